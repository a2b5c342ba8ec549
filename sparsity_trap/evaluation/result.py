"""What `evaluate` finds.

pandas, and what the report card is made with, are no dependencies of the core: they are loaded when
a table or a card is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

#: Standard deviation of the blurred null and shift of the shifted one, µm.
BLUR_UM, SHIFT_UM = 8.0, 32.0

MODEL, ORACLE = "model", "oracle"

#: Nulls that know part of the answer: the counts of the patch, or of the bin in other genes.
INFORMED = ("patch mean", "depth only")

#: Nulls that are the model's own maps, spoilt; the others know nothing of its place and detail.
SPOILT = (f"blurred {BLUR_UM:g} µm", f"shifted {SHIFT_UM:g} µm")


class Example(NamedTuple):
    """A patch kept for pictures: its number, larger bins [G, h, w] of both sides, tissue [h, w]."""

    number: int
    counts: np.ndarray
    rate: np.ndarray
    mask: np.ndarray


@dataclass
class Evaluation:
    """Scores of a model beside those of its nulls and its ceilings.

    Attributes
    ----------
    genes
        Names, in the order of every array [G].
    scores
        ``"model"``, each null, and ``"oracle"`` where the true rate is known -> score -> float64
        [G]. Names of scores hold the width of the bins compared.
    ceilings
        ``ceiling_2um``, ``ceiling_8um`` (or the widths that the maps have) -> float64 [G].
    protocols
        The same maps -> protocol (see `protocols.PROTOCOLS`) -> number.
    moments
        Sums of each patch in larger bins, float64 [N, G, 6], as the fields of `metrics.Moments`.
    curve
        Sums of larger bins by predicted rate, [3, levels]: bins, rates, counts; of rates alone.
    examples
        Some patches, drawn at random.
    about
        What was scored: ``name``, ``units``, ``bin_um``, ``wide_um``, ``patches``, ``bins`` in
        tissue, ``baseline`` of D², how ``ceilings`` were found.
    findings, verdict
        What looks like a mistake, and what the scores say: sentences.
    """

    genes: tuple[str, ...]
    scores: dict[str, dict[str, np.ndarray]]
    ceilings: dict[str, np.ndarray]
    protocols: dict[str, dict[str, float]]
    moments: np.ndarray
    curve: np.ndarray
    examples: list[Example]
    about: dict[str, Any]
    findings: list[str] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)

    @property
    def main(self) -> str:
        """The score that verdicts are about: PCC over larger bins in tissue."""
        return f"pcc_{self.about['wide_um']:g}um"

    def to_dataframe(self) -> Any:
        """One row per set of maps and gene: ``map``, ``gene``, scores, and the gene's ceilings."""
        pandas = import_module("pandas")
        parts = [
            pandas.DataFrame({"map": name, "gene": self.genes, **columns, **self.ceilings})
            for name, columns in self.scores.items()
        ]
        return pandas.concat(parts, ignore_index=True)

    def protocol_table(self) -> Any:
        """One row per set of maps, one column per protocol."""
        return import_module("pandas").DataFrame(self.protocols).T.rename_axis("map")

    def report(self, folder: Path | str, **details: Any) -> Path:
        """Write the report card to a folder; see `sparsity_trap.score.report.write`."""
        return import_module("sparsity_trap.score.report").write(self, folder, **details)
