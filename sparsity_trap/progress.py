"""Progress bars that also reach a terminal from inside a notebook kernel."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

#: A file that receives the bars of this process; the workflow names one per step and shows it.
VARIABLE = "SPARSITY_TRAP_PROGRESS"


def track(items: Iterable[Item], label: str, unit: str):
    """Iterate with a progress bar: in the notebook, in the terminal, or in the workflow's display.

    Parameters
    ----------
    items
        What to iterate over.
    label
        What is being done, in a few words.
    unit
        Name of one item.

    Returns
    -------
    A tqdm bar, iterable once.
    """
    return tqdm(items, desc=label, unit=unit, mininterval=0.5, **display_options())


def display_options() -> dict[str, object]:
    """Options that send a tqdm bar to the workflow's display; none outside the workflow."""
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Line buffering hands every refresh over at once. Bars of a step share the file.
        file = open(path, "a", buffering=1)  # noqa: SIM115 - open while drawn
        return {"file": file, "ncols": 88}
    except OSError:
        return {}  # the results of the step will meet the same obstacle, and name it


#: Signs of our own sentences for terminals that know none but ASCII.
_PLAIN = str.maketrans({"µ": "u", "×": "x", "−": "-", "–": "-", "…": "...", "·": "-"})


def say(text: str) -> None:
    """Print a line, also where the terminal does not know its signs."""
    known = sys.stdout.encoding or "utf-8"
    try:
        text.encode(known)
    except UnicodeEncodeError:
        text = text.translate(_PLAIN).encode(known, "backslashreplace").decode(known)
    print(text, flush=True)
