"""Whether a whole table is laid the right way over its section: turns, bin width, large shifts.

Predictions and counts are summed to bins of 16 µm over the whole array. What is wrong with single
patches, `evaluation.placement` finds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparsity_trap.evaluation.placement import REACH, TURNS, Placement

if TYPE_CHECKING:
    from sparsity_trap.score.section import OutsSection

_COARSE_UM = 16
_GENES = 8

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
        fine = _COARSE_UM // 2  # bins of 2 µm along one of the coarse grid
        side = -(-max(section.array_shape) // fine)
        counts, columns = section.counts(genes), section.array_shape[1]
        total = np.diff(counts.indptr)
        self.genes = np.argsort(-total, kind="stable")[:_GENES]
        blocks = (len(section.tissue) // fine, fine, -1, fine)
        self.tissue = section.tissue.reshape(blocks).sum((1, 3))[:side, :side].astype(float)
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
        given = self._placed(1.0)
        if (found := given.best()) is not None:
            if found.turn != TURNS[False, False, False]:
                # Ends of the array do not lie at whole coarse bins: only the turn is meant.
                found = found._replace(down=0, right=0)
            return ["Of the whole section: " + found.sentence(_COARSE_UM) + "."]
        score = [given.given(half) for half in (0, 1)]
        for width, words in _WIDTHS.items():
            other = self._placed(width)
            gain = [other.given(half) - score[half] for half in (0, 1)]
            if min(gain) > 0.05:
                return [
                    f"The prediction's {words} than the stated {self.bin_um:g} µm: say the width "
                    "of the bins."
                ]
        return []

    def _placed(self, width: float) -> Placement:
        """Means per bin of both sides, compared in the upper and in the lower half."""
        tissue = 2 * self.tissue > self.fine**2
        known = self.bins[width] > 0
        y = self.counts / self.tissue.clip(min=1)
        p = self.sums[width] / self.bins[width].clip(min=1)
        placement, middle = Placement(), self.side // 2
        rows = np.flatnonzero(tissue.any(1))
        middle = int(rows.mean()) if len(rows) else middle
        for half in (np.s_[:middle], np.s_[middle:]):
            inside = np.zeros_like(tissue)
            inside[half] = tissue[half]
            placement.update(y, p, inside, known)
        return placement


def _binned(
    place: tuple[np.ndarray, ...], fine: int, side: int, values: np.ndarray | None = None
) -> np.ndarray:
    """Sums of values, or numbers of bins, on the coarse grid [side, side]."""
    row, col = (x // fine for x in place)
    kept = (row >= 0) & (col >= 0) & (row < side) & (col < side)
    weights = None if values is None else values[kept]
    flat = np.bincount(row[kept] * side + col[kept], weights, side * side)
    return flat.reshape(side, side).astype(float)
