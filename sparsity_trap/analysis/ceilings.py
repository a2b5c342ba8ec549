"""Ceilings: the best PCC with counts that any prediction can have, since counts are noisy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import reduce

import numpy as np
import pandas as pd
import torch

from sparsity_trap import runs
from sparsity_trap.bins import Maps, bin_mask, bin_sum
from sparsity_trap.metrics import Moments
from sparsity_trap.settings import Preset


def best_pcc(preset: Preset, patient: str) -> pd.DataFrame:
    """Best attainable PCC per gene: exact where the true rate is known, else by splitting.

    Computed once and kept as ``tables/ceilings.parquet``.

    Returns
    -------
    DataFrame with ``gene``, ``ceiling_2um`` and ``ceiling_8um``.
    """

    def computed() -> pd.DataFrame:
        store = runs.store(preset, patient)
        mask, columns = store.mask[:], {}
        for name, factor in (("ceiling_2um", 1), ("ceiling_8um", 4)):
            if store.truth is not None:
                columns[name] = poisson_ceiling(store.truth, mask, factor)
            else:
                columns[name] = split_ceiling(store.counts, mask, factor)
        return pd.DataFrame({"gene": list(store.genes), **columns})

    return runs.kept_table(preset, "ceilings", patient, computed)


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
    parts = (_moments(x, x) for x in _in_tissue(rate, mask, bin_factor))
    moments = reduce(Moments.__add__, parts)
    with np.errstate(invalid="ignore"):
        variance = moments.xx / moments.n
        return np.sqrt(variance / (variance + moments.mean_x))


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
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: at least one split is needed")

    def split(i: int, y: np.ndarray) -> Moments:
        rng = np.random.default_rng([seed, i])
        # Sums of binomial halves are binomial halves of sums, so larger bins are split as they are.
        whole = y.astype(np.int64)
        # One split at a time: all of them, of a large panel, are gigabytes.
        halves = (rng.binomial(whole, 0.5).astype(float) for _ in range(repeats))
        each = [_moments(half, y - half) for half in halves]
        return Moments(
            *(np.concatenate([getattr(m, f.name) for m in each]) for f in fields(Moments))
        )

    parts = enumerate(_in_tissue(counts, mask, bin_factor))
    r = reduce(Moments.__add__, (split(i, y) for i, y in parts)).pcc()
    # A gene with a count or two may leave a half empty: that split found no correlation.
    r = np.nan_to_num(r.reshape(repeats, -1)).mean(0)
    r = np.where(r > 0, r, np.nan)
    return np.sqrt(2 * r / (1 + r))


def _moments(x: np.ndarray, y: np.ndarray) -> Moments:
    """Moments [rows] over the last axis, the other axes made one."""
    bins = x.shape[-1]
    shape = x.size // max(bins, 1) or len(x), 1, bins
    first, second = (torch.from_numpy(v).reshape(shape) for v in (x, y))
    return Moments.of(first, second, torch.ones((1, bins), dtype=torch.bool))


def _in_tissue(maps: Maps, mask: Maps, bin_factor: int) -> Iterator[np.ndarray]:
    """Each patch's bins of the wanted size in tissue, float64 [G, bins]."""
    for i in range(maps.shape[0]):
        inside = np.asarray(mask[i])
        x = np.where(inside, np.asarray(maps[i], np.float64), 0)
        yield bin_sum(x, bin_factor)[:, bin_mask(inside, bin_factor)]
