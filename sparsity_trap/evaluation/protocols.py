"""The same maps, scored as they have been scored in print.

A protocol is one number for a set of maps. Each is defined in `PROTOCOLS`, with its source; the
book's Methods print that table. Sums are taken patch by patch, so nothing grows with the patches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparsity_trap import metrics
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.metrics import Moments


class Protocol(NamedTuple):
    """A way to score in one number.

    Attributes
    ----------
    title, definition
        In words.
    source
        Keys of the book's bibliography, where there is one.
    of_rates
        Whether it needs rates on the scale of counts.
    """

    title: str
    definition: str
    source: str = ""
    of_rates: bool = False


#: Larger bins are those of 8 µm for maps at 2 µm, and the maps' own elsewhere. "mean over genes"
#: leaves out undefined ones unless it says otherwise.
PROTOCOLS = {
    "pcc": Protocol(
        "per-gene PCC, in tissue",
        "PCC over larger bins in tissue, mean over genes",
    ),
    "pcc_unmasked": Protocol(
        "per-gene PCC, all bins",
        "the same over all bins of the patches, those off the tissue included",
        of_rates=True,
    ),
    "pooled": Protocol(
        "pooled PCC",
        "one PCC over all genes and own bins in tissue",
        of_rates=True,
    ),
    "hest": Protocol(
        "HEST-style PCC",
        "PCC of log(1 + count) with log(1 + rate) over larger bins in tissue, all samples "
        "concatenated, mean over genes",
        "jaume2024hest",
        of_rates=True,
    ),
    "hest_per_sample": Protocol(
        "HEST-style PCC, per sample",
        "the same within each patch, mean over patches, then over genes",
        "jaume2024hest",
        of_rates=True,
    ),
    "img2st_pcc": Protocol(
        "PCC, undefined = 0",
        "PCC over larger bins in tissue, 0 for a gene whose counts or rates are constant, mean "
        "over all genes",
        "zhu2025img2st",
    ),
    "img2st_ssim": Protocol(
        "Img2ST-style SSIM",
        "SSIM of larger bins with one range for all genes of a patch, the joint minimum to "
        "maximum; a patch without any range is 1; mean over genes and patches",
        "zhu2025img2st",
        of_rates=True,
    ),
    "ssim": Protocol(
        "scikit-image SSIM",
        "SSIM of own bins with a range for each gene and patch; constant pairs left out",
        "wang2004image",
        of_rates=True,
    ),
    "best_genes": Protocol(
        "PCC of the best genes",
        "PCC over larger bins in tissue, mean over the 50 genes in which it is highest, or over "
        "the better half of fewer than 100; chosen on the test data",
        "chung2024triplex",
    ),
    "nonzero": Protocol(
        "PCC on non-zero bins",
        "PCC over larger bins in tissue that hold a count of the gene, mean over genes",
    ),
    "top_k": Protocol(
        "top-k precision",
        "share of the k own bins with the highest rates that hold a count, k being the number of "
        "such bins; ties count by their share; mean over genes",
    ),
}


class ProtocolSums:
    """What the protocols need of a set of maps beside its per-gene scores.

    Parameters
    ----------
    wide
        Bins along one side of the larger bins that correlations compare.
    of_rates
        Whether values are rates of counts; else only scale-free protocols are summed.
    """

    def __init__(self, wide: int, of_rates: bool = True) -> None:
        self.wide, self.of_rates, self.n = wide, of_rates, 0
        self.logs: Moments
        self.nonzero: Moments
        self.per_sample = np.zeros((2, 1))  # sum and number of defined PCC, [2, G]
        self.ssim = np.zeros(2)  # sum and number of patches

    def update(self, counts: np.ndarray, rate: np.ndarray, mask: np.ndarray) -> None:
        """Add a patch: larger bins of counts and rates [G, h, w], 0 off tissue; tissue [h, w]."""
        nonzero = moments_where(counts, rate, (counts > 0) & mask)
        first = self.n == 0
        self.nonzero = nonzero if first else self.nonzero + nonzero
        self.n += 1
        if not self.of_rates:
            return
        logs = Moments.of(np.log1p(counts), np.log1p(rate), mask)
        pcc = logs.pcc()
        self.logs = logs if first else self.logs + logs
        self.per_sample = self.per_sample + [np.nan_to_num(pcc), ~np.isnan(pcc)]
        if min(mask.shape) >= 7:
            self.ssim += [joint_ssim(counts, rate), 1]

    def compute(
        self,
        columns: dict[str, np.ndarray],
        histogram: np.ndarray,
        pooled: float,
        wide_um: float,
        own_um: float,
    ) -> dict[str, float]:
        """The number of every protocol that the maps allow; NaN where it is undefined.

        Parameters
        ----------
        columns
            Per-gene scores of the same maps.
        histogram
            [G, 2, levels]: own bins without and with a count at each level of the rate.
        pooled
            Pooled PCC; of rates.
        wide_um, own_um
            Widths of larger and own bins, as they name columns.
        """
        pcc = columns[f"pcc_{wide_um:g}um"]
        found = {
            "pcc": mean_of(pcc),
            "img2st_pcc": float(np.nan_to_num(pcc).mean()),
            "best_genes": best_genes(pcc),
            "nonzero": mean_of(self.nonzero.pcc()),
            "top_k": mean_of(np.array([precision_at_k(h) for h in histogram])),
        }
        if self.of_rates:
            total, n = self.per_sample
            found |= {
                "pcc_unmasked": mean_of(columns[f"pcc_{wide_um:g}um_unmasked"]),
                "pooled": pooled,
                "hest": mean_of(self.logs.pcc()),
                "hest_per_sample": mean_of(np.divide(total, n, where=n > 0, out=total * np.nan)),
                "img2st_ssim": float(self.ssim[0] / self.ssim[1]) if self.ssim[1] else np.nan,
                "ssim": mean_of(columns[f"ssim_{own_um:g}um"]),
            }
        return {name: found[name] for name in PROTOCOLS if name in found}


def larger(
    counts: np.ndarray, rate: np.ndarray, mask: np.ndarray, factor: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts and rates [G, H, W] summed over tissue to larger bins, 0 off it; their tissue."""
    inside = bin_mask(mask, factor)
    on = (np.where(mask, np.asarray(x, np.float32), np.float32(0)) for x in (counts, rate))
    summed = (bin_sum(x, factor).astype(np.float64) for x in on)
    return *(x * inside for x in summed), inside


def moments_where(x: np.ndarray, y: np.ndarray, where: np.ndarray) -> Moments:
    """Moments [G] of maps [G, H, W] over bins that differ from gene to gene, ``where`` bool."""
    x, y, where = (v.reshape(len(v), -1) for v in (x, y, where))
    n = where.sum(1).astype(float)
    first = where.argmax(1)[:, None]
    means, centred = [], []
    for values in (x, y):
        # Centring on a first value, then on the mean, leaves exact zeros of a constant.
        start = np.take_along_axis(values, first, 1)
        off = np.where(where, values - start, 0)
        mean = off.sum(1) / n.clip(min=1)
        means.append(np.where(n > 0, start[:, 0] + mean, 0))
        centred.append(np.where(where, off - mean[:, None], 0))
    (mean_x, mean_y), (a, b) = means, centred
    return Moments(n, mean_x, mean_y, (a * a).sum(1), (b * b).sum(1), (a * b).sum(1))


def joint_ssim(counts: np.ndarray, rate: np.ndarray) -> float:
    """SSIM of a patch [G, H, W] with one range for all genes, mean over genes; 1 without range."""
    span = max(counts.max(), rate.max()) - min(counts.min(), rate.min())
    if span == 0:
        return 1.0
    return float(metrics.ssim(counts[None], rate[None], None, span, 0).mean())


def best_genes(pcc: np.ndarray) -> float:
    """Mean over the 50 highest, or the better half of fewer than 100."""
    known = np.sort(pcc[~np.isnan(pcc)])[::-1]
    return mean_of(known[: min(50, -(-len(pcc) // 2))])


def precision_at_k(histogram: np.ndarray) -> float:
    """Precision of the k highest of one gene, k being the number of positives; ties by share.

    Parameters
    ----------
    histogram
        [2, levels]: negatives and positives at each level of the score, levels ascending.
    """
    negatives, positives = histogram[:, ::-1].astype(np.int64)
    k = positives.sum()
    if k == 0:
        return np.nan
    here = negatives + positives
    called = here.cumsum()
    last = int(np.searchsorted(called, k))  # the level in which the k-th lies
    before = called[last] - here[last]
    found = positives[:last].sum() + (k - before) * positives[last] / here[last]
    return float(found / k)


def mean_of(values: np.ndarray) -> float:
    """Mean of the defined values; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
