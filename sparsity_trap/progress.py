"""Progress bars that also reach a terminal from inside a notebook kernel."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")

#: A file that receives the bars of this process; the workflow names one per step and shows it.
VARIABLE = "SPARSITY_TRAP_PROGRESS"


def track(items: Iterable[Item], label: str, unit: str = "step", total: int | None = None):
    """Iterate with a progress bar: in the notebook, in the terminal, or in the workflow's display.

    Parameters
    ----------
    items
        What to iterate over.
    label
        What is being done, in a few words.
    unit
        Name of one item.
    total
        Number of items where ``items`` has no length.

    Returns
    -------
    A tqdm bar, iterable once.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return tqdm(items, desc=label, unit=unit, total=total, mininterval=0.5)
    from tqdm import tqdm as plain

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Line buffering hands every refresh over at once; the bar's carriage return ends it.
    stream = open(path, "w", buffering=1)  # noqa: SIM115 - lives as long as the bar
    return plain(items, desc=label, unit=unit, total=total, mininterval=0.5, file=stream, ncols=88)
