"""Whether a whole table is laid the right way over its section: turns, bin width, large shifts.

Predictions and counts are summed to bins of 16 or 32 µm over the whole array. What is wrong with
single patches, `evaluation.placement` finds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparsity_trap.evaluation.placement import REACH, TURNS, Placement
from sparsity_trap.evaluation.protocols import mean_of, moments_where

if TYPE_CHECKING:
    from sparsity_trap.score.section import OutsSection

_MOST = 256  # bins along a side of the coarse grid, while they are 16 µm wide
_GENES = 8

#: What another width of bins must gain, in PCC, in both halves of the section.
_CLEARLY = 0.05

#: Factors of rows and columns that a wrong bin width leaves, and what they say of them.
_WIDTHS = {
    4.0: "rows and columns look like those of bins four times as wide",
    0.25: "rows and columns look like those of bins a quarter as wide",
}


class Overview:
    """Predictions on a coarse grid of the array, as given and under other widths of bins."""

    def __init__(
        self, section: OutsSection, genes: tuple[str, ...], factor: int, bin_um: float
    ) -> None:
        # Bins of 2 µm along one of the coarse grid; a whole capture area has them twice as wide.
        fine = 8 if max(section.array_shape) <= 8 * _MOST else 16
        side = -(-max(section.array_shape) // fine)
        counts, columns = section.counts(genes), section.array_shape[1]
        total = np.diff(counts.indptr)
        self.genes = np.argsort(-total, kind="stable")[:_GENES]
        blocks = (len(section.tissue) // fine, fine, -1, fine)
        tissue = section.tissue.reshape(blocks).sum((1, 3))[:side, :side]
        self.tissue = np.zeros((side, side))
        self.tissue[: tissue.shape[0], : tissue.shape[1]] = tissue
        self.counts = np.stack(
            [
                _binned(np.divmod(counts.indices[own], columns), fine, side, counts.data[own])
                for g in self.genes
                for own in [slice(*counts.indptr[g : g + 2])]
            ]
        )
        self.bin_um, self.factor, self.fine, self.side = bin_um, factor, fine, side
        self.sums = {width: np.zeros((len(self.genes), side, side)) for width in (1.0, *_WIDTHS)}
        self.bins = {width: np.zeros((side, side)) for width in self.sums}

    def add(self, rows: np.ndarray, cols: np.ndarray, values: np.ndarray) -> None:
        """Add predicted bins: places in their own width, values [n, genes]."""
        for width in self.sums:
            place = tuple(
                np.floor(x * (self.factor * width)).astype(np.int64) for x in (rows, cols)
            )
            self.bins[width] += _binned(place, self.fine, self.side)
            for into, g in zip(self.sums[width], self.genes, strict=True):
                known = np.nan_to_num(values[:, g].astype(np.float64))
                into += _binned(place, self.fine, self.side, known)

    def findings(self) -> list[str]:
        """What fits better than the places given, in a sentence."""
        if self.side < 4 * REACH or not len(self.genes):
            return []
        placement = Placement()
        for inside in self._halves():
            y, p, known = self._means(1.0)
            placement.update(y, p, inside, known)
        if (found := placement.best()) is not None:
            if found.turn != TURNS[False, False, False]:
                # Ends of the array do not lie at whole coarse bins: only the turn is meant.
                found = found._replace(down=0, right=0)
            return ["Of the whole section: " + found.sentence(2 * self.fine) + "."]
        given = self._pcc(1.0)
        for width, words in _WIDTHS.items():
            if min(np.subtract(self._pcc(width), given)) > _CLEARLY:
                return [
                    f"The prediction's {words} than the stated {self.bin_um:g} µm: say the width "
                    "of the bins."
                ]
        return []

    def _halves(self) -> list[np.ndarray]:
        """Upper and lower half of the tissue on the coarse grid."""
        tissue = 2 * self.tissue > self.fine**2
        rows = np.flatnonzero(tissue.any(1))
        upper = np.arange(self.side)[:, None] < (rows.mean() if len(rows) else 0)
        return [tissue & upper, tissue & ~upper]

    def _means(self, width: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts and predictions per bin, and where there are predictions."""
        counts = self.counts / self.tissue.clip(min=1)
        return counts, self.sums[width] / self.bins[width].clip(min=1), self.bins[width] > 0

    def _pcc(self, width: float) -> list[float]:
        """Mean PCC of the genes in each half, 0 where there is none."""
        y, p, known = self._means(width)
        where = (np.broadcast_to(half & known, y.shape) for half in self._halves())
        return [float(np.nan_to_num(mean_of(moments_where(y, p, own).pcc()))) for own in where]


def _binned(
    place: tuple[np.ndarray, ...], fine: int, side: int, values: np.ndarray | None = None
) -> np.ndarray:
    """Sums of values, or numbers of bins, on the coarse grid [side, side]."""
    row, col = (x // fine for x in place)
    kept = (row >= 0) & (col >= 0) & (row < side) & (col < side)
    weights = None if values is None else values[kept]
    flat = np.bincount(row[kept] * side + col[kept], weights, side * side)
    return flat.reshape(side, side).astype(float)
