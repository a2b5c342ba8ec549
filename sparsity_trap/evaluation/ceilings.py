"""Ceilings: the best PCC with counts that any prediction can have, since counts are noisy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from sparsity_trap.bins import Maps, bin_mask, bin_sum
from sparsity_trap.metrics import Moments


def poisson_ceiling(rate: Maps, mask: Maps, bin_factor: int = 4) -> np.ndarray:
    """Best attainable PCC of any prediction with Poisson counts of a known rate.

    sqrt(Var λ / (Var λ + E λ)) over in-tissue bins: the correlation of the rate itself with its
    counts, in expectation.

    Parameters
    ----------
    rate
        True rates at 2 µm [N, G, H, W].
    mask
        bool [N, H, W], tissue.
    bin_factor
        2 µm bins along one side of the bins that are scored; 4 is 8 µm.

    Returns
    -------
    float64 [G]; 0 for a constant rate, NaN for a rate of 0 and without tissue.
    """
    known = KnownCeiling(bin_factor)
    for i in range(rate.shape[0]):
        known.update(rate[i], mask[i])
    return known.compute()


def split_ceiling(
    counts: Maps, mask: Maps, bin_factor: int = 4, repeats: int = 10, seed: int = 0
) -> np.ndarray:
    """Best attainable PCC, estimated from counts by splitting them in binomial halves.

    The halves of Poisson counts are independent given the rate, so their correlation r comes from
    the rate alone. The full counts have the reliability 2 r / (1 + r) (Spearman and Brown, 1910),
    whose square root bounds the correlation of any prediction with them. Splitting cannot tell
    structure from noise that neighbouring bins share; it takes both for signal. Its error is that
    of a correlation: about 0.02 at a ceiling of 0.5 with 20,000 bins, more where counts are rarer.

    Parameters
    ----------
    counts
        Counts at 2 µm [N, G, H, W].
    mask, bin_factor
        As for ``poisson_ceiling``.
    repeats
        Splits whose correlations are averaged.
    seed
        RNG seed; patch by patch, so the result does not depend on how a store is read.

    Returns
    -------
    float64 [G]; NaN where the mean correlation of the halves is not positive.
    """
    split = SplitCeiling(bin_factor, repeats, seed)
    for i in range(counts.shape[0]):
        split.update(counts[i], mask[i])
    return split.compute()


class KnownCeiling:
    """`poisson_ceiling` of patches that pass by once."""

    def __init__(self, bin_factor: int) -> None:
        self.bin_factor, self.n = bin_factor, 0
        self.moments: Moments

    def update(self, rate: Maps, mask: Maps) -> None:
        """Add a patch: rates [G, H, W], mask [H, W]."""
        x = _in_tissue(rate, mask, self.bin_factor)
        part = _moments(x, x)
        self.moments = self.moments + part if self.n else part
        self.n += 1

    def compute(self) -> np.ndarray:
        """Ceiling of each gene, float64 [G]."""
        with np.errstate(invalid="ignore"):
            variance = self.moments.xx / self.moments.n
            return np.sqrt(variance / (variance + self.moments.mean_x))


class SplitCeiling:
    """`split_ceiling` of patches that pass by once."""

    def __init__(self, bin_factor: int, repeats: int = 10, seed: int = 0) -> None:
        if repeats < 1:
            raise ValueError(f"repeats = {repeats}: at least one split is needed")
        self.bin_factor, self.repeats, self.seed = bin_factor, repeats, seed
        self.n = 0
        self.moments: Moments

    def update(self, counts: Maps, mask: Maps) -> None:
        """Add a patch: counts [G, H, W], mask [H, W]."""
        # Sums of binomial halves are binomial halves of sums, so larger bins are split as they are.
        y = _in_tissue(counts, mask, self.bin_factor)
        each = [_moments(half, y - half) for half in self._halves(y)]
        parts = Moments(
            *(np.concatenate([getattr(m, f.name) for m in each]) for f in fields(Moments))
        )
        self.moments = self.moments + parts if self.n else parts
        self.n += 1

    def _halves(self, y: np.ndarray) -> Iterator[np.ndarray]:
        """One half of each split; one at a time: all, of a large panel, are gigabytes."""
        rng = np.random.default_rng([self.seed, self.n])
        some = y > 0  # of sparse counts few
        whole = y[some].astype(np.int64)
        for _ in range(self.repeats):
            half = np.zeros_like(y)
            half[some] = rng.binomial(whole, 0.5)
            yield half

    def compute(self) -> np.ndarray:
        """Ceiling of each gene, float64 [G]."""
        r = self.moments.pcc()
        # A gene with a count or two may leave a half empty: that split found no correlation.
        r = np.nan_to_num(r.reshape(self.repeats, -1)).mean(0)
        r = np.where(r > 0, r, np.nan)
        return np.sqrt(2 * r / (1 + r))


def _moments(x: np.ndarray, y: np.ndarray) -> Moments:
    """Moments [G] over the bins of x and y, [G, bins]."""
    return Moments.of(x[:, None], y[:, None], np.ones((1, x.shape[1]), bool))


def _in_tissue(maps: Maps, mask: Maps, bin_factor: int) -> np.ndarray:
    """A patch's bins of the wanted size in tissue, float64 [G, bins]."""
    inside = np.asarray(mask).astype(bool)
    x = np.where(inside, np.asarray(maps, np.float64), 0)
    return bin_sum(x, bin_factor)[:, bin_mask(inside, bin_factor)]
