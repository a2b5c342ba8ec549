"""What of a score is only level: rates rescaled on part of the patches, scored on the rest.

A factor per gene takes out a wrong level; an increasing map per gene takes out any wrong curve as
well, and leaves the order of the rates. Neither learns anything of place. What a model gains by
them in SSIM or D² it had only lost by its levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from sparsity_trap.scores import N_LEVELS, GeneScores
from sparsity_trap.settings import UserError

#: The ways of rescaling, in the order of tables.
WAYS = ("as predicted", "a factor per gene", "increasing map per gene")


class Calibration:
    """Counts by level of the rate, of each gene, while patches pass by.

    Levels are the numbers of half precision, in which predictions are ranked elsewhere too; so the
    increasing map is exact for rates that are stored so.
    """

    def __init__(self, genes: int) -> None:
        self.bins = np.zeros((genes, N_LEVELS))
        self.counts = np.zeros((genes, N_LEVELS))

    def update(self, counts: np.ndarray, rate: np.ndarray, mask: np.ndarray) -> None:
        """Add a patch, [G, H, W] and [H, W]."""
        for g, level in enumerate(_levels(rate)[:, mask]):
            self.bins[g] += np.bincount(level, minlength=N_LEVELS)
            self.counts[g] += np.bincount(level, counts[g, mask], N_LEVELS)

    def factor(self) -> np.ndarray:
        """Observed over predicted total, [G]; 1 where nothing was predicted."""
        total = self.bins @ _VALUES
        return np.divide(self.counts.sum(1), total, where=total > 0, out=np.ones(len(total)))

    def increasing(self) -> np.ndarray:
        """Rate for each level, [G, levels]: the isotonic regression of counts on rates.

        Pool adjacent violators, weighted by bins (scipy). Between levels that occurred it is
        interpolated, beyond them constant.
        """
        from scipy.optimize import isotonic_regression

        table = np.empty(self.bins.shape, np.float32)
        for own, bins, counts in zip(table, self.bins, self.counts, strict=True):
            seen = np.flatnonzero(bins)
            if len(seen):
                fit = isotonic_regression(counts[seen] / bins[seen], weights=bins[seen]).x
                own[:] = np.interp(_VALUES, _VALUES[seen], fit)
            else:
                own[:] = _VALUES
        return table


_BITS = np.arange(N_LEVELS, dtype=np.uint16)
#: Rate of each level: infinite and undefined ones do not occur.
_VALUES = np.where(_BITS < 0x7C00, _BITS, 0x7BFF).view(np.float16).astype(np.float64)


def recalibration(
    patches: Callable[[], Iterable[tuple[Any, ...]]],
    genes: tuple[str, ...],
    train_mean: np.ndarray | None = None,
    every: int = 2,
) -> pd.DataFrame:
    """Scores of the held-out patches as predicted and after each way of rescaling.

    Parameters
    ----------
    patches
        Gives counts, rates [G, H, W] and mask [H, W] of each patch, anew at every call.
    genes
        Names.
    train_mean
        [G], for D²; by default the mean of the patches that are fitted on.
    every
        One patch in so many is held out and scored; the others are fitted on.

    Returns
    -------
    DataFrame
        One row per way and gene: ``recalibration``, ``gene`` and the columns of `GeneScores`, named
        as for bins of 2 µm.

    Raises
    ------
    UserError
        There is only one patch.
    """
    fit = Calibration(len(genes))
    n = bins = 0
    total = np.zeros(len(genes))
    for n, (counts, rate, mask, *_) in enumerate(patches(), 1):
        if n % every:
            fit.update(counts, rate, mask)
            total += counts[:, mask].sum(1, dtype=np.float64)
            bins += int(mask.sum())
    if n < every:
        raise UserError("one patch cannot be fitted on and held out: score a section of several")
    mean = total / max(bins, 1) if train_mean is None else train_mean
    factor, table = fit.factor().astype(np.float32)[:, None, None], fit.increasing()
    scores = [GeneScores(genes, train_mean=mean, name=way) for way in WAYS]
    for i, (counts, rate, mask, *_) in enumerate(patches(), 1):
        if i % every:
            continue
        on = np.where(mask, rate, 0).astype(np.float32)
        mapped = np.take_along_axis(table, _levels(on).reshape(len(on), -1).astype(int), 1)
        for own, maps in zip(scores, (on, on * factor, mapped.reshape(on.shape)), strict=True):
            own.update(counts[None], maps[None], mask[None])
    parts = [
        pd.DataFrame({"recalibration": way, "gene": genes, **own.compute()})
        for way, own in zip(WAYS, scores, strict=True)
    ]
    return pd.concat(parts, ignore_index=True)


def recalibration_table(recalibrated: pd.DataFrame) -> pd.DataFrame:
    """Means over genes for each way of rescaling."""
    columns = ["pcc_2um", "pcc_8um", "ssim_2um", "d2", "deviance", "mse", "calibration"]
    return recalibrated.groupby("recalibration")[columns].mean().reindex(list(WAYS))


def _levels(rate: np.ndarray) -> np.ndarray:
    """Level of each rate: its bits in half precision, without the sign."""
    return np.asarray(rate).astype(np.float16).view(np.uint16) & np.uint16(0x7FFF)
