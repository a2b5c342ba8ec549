"""Kinds of evidence that claims are judged on, and what marks each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sparsity_trap.settings import ROOT


class Family(NamedTuple):
    """Claims judged on one kind of evidence.

    Attributes
    ----------
    title
        The evidence in words.
    notebook
        That judges, with the claims' sentences and rules.
    mark
        Of the notebook's page and figures, where they show no sections of the build.
    data
        What they show instead.
    """

    title: str
    notebook: str
    mark: str = ""
    data: str = ""

    @property
    def script(self) -> Path:
        """The notebook's source."""
        return ROOT / "notebooks" / f"{self.notebook}.py"


#: Families of claims, those on real tissue first.
FAMILIES = {
    "real": Family(
        "real counts",
        "12_tiles",
        mark="Real counts, one patient",
        data="real counts of tiles of patient P5: the scores in `results/real_tiles/`",
    ),
    "printed": Family(
        "printed numbers",
        "11_record",
        mark="Printed numbers, real tissue",
        data="printed by others about real tissue: the tables in `published/`",
    ),
    "build": Family("this build", "10_claims"),
    "worlds": Family("simulations that are less kind", "08d_worlds"),
}

#: Page -> its family, where it shows no sections of the build.
MARKED = {family.notebook: family for family in FAMILIES.values() if family.mark}
