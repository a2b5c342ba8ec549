"""Code cells of a notebook's script, to be run on evidence that a test makes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jupytext

from sparsity_trap.settings import ROOT


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
    script = ROOT / "notebooks" / f"{name}.py"
    for cell in jupytext.read(script).cells:
        parameters = "parameters" in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and not parameters and where(cell.source):
            exec(compile(cell.source, str(script), "exec"), namespace)
    return namespace


def drawn(source: str) -> bool:
    """Whether a cell draws; the one that asks for the style alone does not."""
    return "style." in source.replace("style.use()", "")
