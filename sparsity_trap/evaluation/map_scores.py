"""Per-gene scores and protocols of one set of maps: a model's, or a null's.

`CountScores` takes rates on the scale of counts and gives every score. `ScaleFreeScores` takes
values of another unit (z-scores, normalised logarithms) and gives the scores that no increasing
straight line moves: correlations and AUPRC.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparsity_trap.evaluation.protocols import ProtocolSums, larger
from sparsity_trap.metrics import Moments, average_precision
from sparsity_trap.scores import FACTORS, GeneScores, RankFile

#: Widest bins of the maps, in µm, that are summed fourfold before correlations compare them.
_FINE_UM = 2.0


def wide_factor(bin_um: float) -> int:
    """Bins along one side of the larger bins: 8 µm for 2 µm, and wider bins as they are."""
    return 4 if bin_um <= _FINE_UM else 1


class CountScores:
    """Every score of rates of counts; see `scores.GeneScores`.

    Parameters
    ----------
    genes, train_mean, name
        As for `GeneScores`. Without ``train_mean``, D² is against each gene's mean in the section.
    bin_um
        Width of the maps' bins.
    """

    of_rates = True

    def __init__(
        self, genes: Sequence[str] | None, train_mean: np.ndarray | None, name: str, bin_um: float
    ) -> None:
        self.scores = GeneScores(genes, train_mean=train_mean, name=name)
        self.scores._ranks.file.rollover()  # to disk: those of ten nulls would fill memory
        self.bin_um, self.wide = bin_um, wide_factor(bin_um)
        self.ranks = RankFile() if self.wide == 1 else None  # GeneScores ranks fourfold bins
        self.sums = ProtocolSums(self.wide)
        self.found: dict[str, np.ndarray] | None = None

    def update(
        self,
        counts: np.ndarray,
        rate: np.ndarray,
        mask: np.ndarray,
        true_rate: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add a patch, [G, H, W] and [H, W]; give its larger bins as `protocols.larger`."""
        self.found = None
        known = None if true_rate is None else true_rate[None]
        self.scores.update(counts[None], rate[None], mask[None], known)
        if self.ranks is not None:
            self.ranks.add(counts[:, mask], rate[:, mask])
        wide = larger(counts, rate, mask, self.wide)
        self.sums.update(*wide)
        return wide

    def columns(self) -> dict[str, np.ndarray]:
        """Score -> float64 [G]. Names hold the width of the bins compared, such as ``pcc_8um``."""
        if self.found is None:
            found = dict(self.scores.compute())
            if self.scores.train_mean is None:
                found["d2"] = self.scores._poisson.d2(found["mean_count"])
            if self.ranks is not None:
                found["spearman_2um"] = self.ranks.spearman(len(found["mean_count"]))
                del found["spearman_8um"]
            self.found = {renamed(key, self.bin_um): column for key, column in found.items()}
        return self.found

    def protocols(self) -> dict[str, float]:
        """Protocol -> number, see `protocols.PROTOCOLS`."""
        pooled = self.scores.pooled()["pooled_pcc_2um"]
        widths = self.wide * self.bin_um, self.bin_um
        return self.sums.compute(self.columns(), self.scores._histogram, pooled, *widths)


class ScaleFreeScores:
    """Correlations and AUPRC of values of any unit, negative ones too; arguments as `CountScores`.

    Larger bins are sums over tissue, as of rates. Ranks for AUPRC are in half precision.
    """

    of_rates = False

    def __init__(self, genes: Sequence[str] | None, name: str, bin_um: float) -> None:
        self.genes, self.name, self.bin_um, self.wide = genes, name, bin_um, wide_factor(bin_um)
        self.moments: dict[int, Moments] = {}
        self.ranks = RankFile()
        self.sums = ProtocolSums(self.wide, of_rates=False)
        self.histogram: np.ndarray = np.zeros(0, np.int32)

    def update(
        self,
        counts: np.ndarray,
        rate: np.ndarray,
        mask: np.ndarray,
        true_rate: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add a patch, as `CountScores.update`; a true rate is of another unit, and left out."""
        wrong = ~np.isfinite(rate[:, mask]).all(1)
        if wrong.any():
            gene = int(wrong.argmax())
            name = f"number {gene}" if self.genes is None else self.genes[gene]
            raise ValueError(f"{self.name}: gene {name} has values that are not finite")
        for factor in FACTORS:
            part = Moments.of(counts, rate, mask, factor)
            self.moments[factor] = self.moments[factor] + part if factor in self.moments else part
        wide = larger(counts, rate, mask, self.wide)
        y, p, inside = wide
        self.ranks.add(y[:, inside], ranked(p[:, inside]))
        self.sums.update(*wide)
        self._count_levels(counts[:, mask], rate[:, mask])
        return wide

    def _count_levels(self, counts: np.ndarray, rate: np.ndarray) -> None:
        if not self.histogram.size:
            self.histogram = np.zeros((len(counts), 2, 2**16), np.int32)
        level = in_order(rate.astype(np.float16))
        for into, y, own in zip(self.histogram, counts, level, strict=True):
            into += np.bincount(own + 2**16 * (y > 0), minlength=2**17).reshape(2, -1)

    def columns(self) -> dict[str, np.ndarray]:
        """Score -> float64 [G], as `CountScores.columns`, without the scores of rates."""
        own, bins = self.moments[1], self.histogram.sum(-1)
        share = bins[:, 1] / bins.sum(1).clip(min=1)
        found = {"sparsity": 1 - share, "mean_count": own.mean_x}
        found |= {f"pcc_{2 * factor}um": part.pcc() for factor, part in self.moments.items()}
        found[f"spearman_{2 * self.wide}um"] = self.ranks.spearman(len(share))
        found["auprc"] = np.array([average_precision(own) for own in self.histogram])
        found["auprc_base"] = share
        return {renamed(key, self.bin_um): column for key, column in found.items()}

    def protocols(self) -> dict[str, float]:
        """Protocol -> number, of those that need no rates."""
        widths = self.wide * self.bin_um, self.bin_um
        return self.sums.compute(self.columns(), self.histogram, np.nan, *widths)


def in_order(values: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 in the order of floats, as wide as these; negative floats come first.

    The bits of floats that are not negative are in their order; those of negative ones run the
    other way.
    """
    kind = {2: np.uint16, 4: np.uint32}[values.itemsize]
    high = kind(1 << (8 * values.itemsize - 1))
    bits = (values + values.dtype.type(0)).view(kind)  # -0 + 0 is 0
    return np.where(bits & high, ~bits, bits | high)


def ranked(values: np.ndarray) -> np.ndarray:
    """Floats of single precision, finite and not negative, in the order of any others.

    As `RankFile` takes them. Twice as many numbers share a range half as wide: neighbours in single
    precision become ties, and so do numbers above 1.7e38.
    """
    bits = in_order(values.astype(np.float32)) >> np.uint32(1)
    return bits.clip(max=0x7F7FFFFF).view(np.float32)


def renamed(column: str, bin_um: float) -> str:
    """Name of a column of `GeneScores`, whose bins are 2 µm wide, for bins of another width."""
    parts = column.split("_")
    for i, part in enumerate(parts):
        if part.endswith("um") and part[:-2].isdigit():
            parts[i] = f"{int(part[:-2]) / 2 * bin_um:g}um"
    return "_".join(parts)
