"""Code cells of a notebook's script, to be run on evidence that a test makes up."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any

import jupytext

from sparsity_trap.settings import ROOT


@cache
def _code(name: str) -> list[tuple[str, CodeType]]:
    """Source and code of a notebook's cells but for its parameters: read once for all tests."""
    script = ROOT / "notebooks" / f"{name}.py"
    return [
        (cell.source, compile(cell.source, str(script), "exec"))
        for cell in jupytext.read(script).cells
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", [])
    ]


def run_cells(
    name: str, namespace: dict[str, Any], where: Callable[[str], bool] = lambda source: True
) -> dict[str, Any]:
    """Run the notebook's cells in order, but for its parameters; return what they define.

    Parameters
    ----------
    name
        Of the script, such as ``04_sparsity``.
    namespace
        What the cells find defined; they change it.
    where
        Takes the source of a cell; cells for which it is false are left out.
    """
    for source, code in _code(name):
        if where(source):
            exec(code, namespace)
    return namespace


def drawn(source: str) -> bool:
    """Whether a cell draws; the one that asks for the style alone does not."""
    return "style." in source.replace("style.use()", "")
