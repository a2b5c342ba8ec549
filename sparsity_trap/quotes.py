"""Numbers that the book's prose quotes, each written by the notebook that computes it."""

from __future__ import annotations

import json

import numpy as np

from sparsity_trap.files import building
from sparsity_trap.settings import Preset


class Quotes:
    """Numbers that the book's prose quotes, written by the notebook that computes them.

    Parameters
    ----------
    preset
        Of the notebook.
    notebook
        Name of its page, such as ``04_sparsity``. A new `Quotes` forgets what an earlier execution
        of the notebook wrote.

    Notes
    -----
    ``quote("sparsity", rho=0.2)`` writes the key ``sparsity.rho`` to
    ``results/<preset>/numbers/04_sparsity.json``; the role ``val`` reads the files of all
    notebooks. What is not finite becomes null, which the book shows as *undefined*.
    """

    def __init__(self, preset: Preset, notebook: str):
        self.path = preset.folder / "numbers" / f"{notebook}.json"
        self.values: dict[str, float | int | str | None] = {}
        self._write()

    def __call__(self, prefix: str, /, **numbers: object) -> None:
        """Write numbers under a dotted prefix.

        Raises
        ------
        ValueError
            A key was written before, with another value.
        """
        for name, number in numbers.items():
            key, value = f"{prefix}.{name}", plain(number)
            if self.values.setdefault(key, value) != value:
                raise ValueError(f"'{key}' is quoted twice, as {self.values[key]} and {value}")
        self._write()

    def _write(self) -> None:
        with building(self.path) as partial:
            partial.write_text(json.dumps(self.values, indent=1))


def plain(value: object) -> float | int | str | None:
    """A value that JSON holds; NaN and infinity become None."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    number = float(value)  # type: ignore[arg-type]
    return number if np.isfinite(number) else None
