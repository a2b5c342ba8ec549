"""Scores of predicted gene maps against counts: pure functions over sums that can be merged.

Axis order is patch N, gene G, row H, column W. Arrays may be NumPy, torch or zarr; they are read
one patch at a time and summed in float64, so memory does not grow with the number of patches.

In tissue always means: values off tissue are set to 0 first, then 2 µm bins are summed. So no
in-tissue score sees a prediction from a bin where the model was never supervised.

Scoring is done on the CPU, by the compiled loops of ``_loops``, in as many threads as torch has;
maps on another device are brought over patch by patch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import reduce
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsity_trap.bins import Maps, bin_mask, bin_sum

#: SSIM leaves out patches with a smaller share of tissue.
MIN_TISSUE = 0.05

#: Predictions are stored as float16, where 0 stands for anything below its smallest number. The
#: deviance takes that number instead; a count at a rate of exactly 0 would be infinitely unlikely.
LEAST_RATE = 2.0**-24

T = TypeVar("T")
S = TypeVar("S", "Moments", "PoissonSums")


# --- sums that can be merged ----------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Bins, means and centred sums of a pair of variables (x, y), arrays of one shape.

    Centred sums do not cancel under large offsets, and a constant side has a sum of squares of
    exactly 0. Merging follows Chan, Golub and LeVeque (1983).
    """

    n: np.ndarray
    mean_x: np.ndarray
    mean_y: np.ndarray
    xx: np.ndarray
    yy: np.ndarray
    xy: np.ndarray

    @classmethod
    def of(cls, x: Maps, y: Maps, mask: Maps, bin_factor: int = 1) -> Moments:
        """Moments [G] of maps [G, H, W] over the bins in ``mask`` [H, W], summed to larger ones.

        Off tissue may hold anything; a larger bin counts when more than half of it is tissue.
        """
        from sparsity_trap import _loops

        x, y, mask = _array(x), _array(y), _array(mask).astype(bool)
        bin_sum(mask, bin_factor)  # refuses a map that cannot be cut
        out = np.zeros((len(x), 6))
        _loops.moments_maps(*_loadable(x, y), mask, bin_mask(mask, bin_factor), bin_factor, out)
        return cls(*out.T)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of bins together."""
        n = self.n + other.n
        share = other.n / n.clip(min=1)
        weight = self.n * share
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        return Moments(
            n=n,
            mean_x=self.mean_x + dx * share,
            mean_y=self.mean_y + dy * share,
            xx=self.xx + other.xx + dx * dx * weight,
            yy=self.yy + other.yy + dy * dy * weight,
            xy=self.xy + other.xy + dx * dy * weight,
        )

    def __getitem__(self, index: object) -> Moments:
        """Moments of some genes."""
        return Moments(*(getattr(self, f.name)[index] for f in fields(self)))

    def pooled(self) -> Moments:
        """Moments over the bins of all genes together, as if they were one gene."""
        return reduce(Moments.__add__, (self[g : g + 1] for g in range(len(self.n))))

    def pcc(self) -> np.ndarray:
        """Pearson correlation; NaN where either side is constant."""
        return np.clip(_ratio(self.xy, np.sqrt(self.xx) * np.sqrt(self.yy)), -1, 1)

    def mse(self) -> np.ndarray:
        """Mean squared difference; NaN without bins."""
        spread = _ratio((self.xx + self.yy - 2 * self.xy).clip(min=0), self.n)
        return spread + (self.mean_x - self.mean_y) ** 2

    def calibration(self) -> np.ndarray:
        """Total of y over total of x; NaN where x has none."""
        return _ratio(self.mean_y, self.mean_x)

    def cv(self) -> np.ndarray:
        """Coefficient of variation of y; NaN where its mean is 0."""
        return _ratio(np.sqrt(_ratio(self.yy, self.n)), self.mean_y)


@dataclass(frozen=True)
class PoissonSums:
    """Sums over bins, per gene, from which the Poisson deviance of any rate follows."""

    n: np.ndarray
    zeros: np.ndarray
    count: np.ndarray
    rate: np.ndarray  # not finite where a rate is negative, infinite or not a number
    count_log_count: np.ndarray
    count_log_rate: np.ndarray

    @classmethod
    def of(cls, count: Maps, rate: Maps, mask: Maps) -> PoissonSums:
        """Sums over maps ``count`` and ``rate`` [G, H, W], bins in ``mask`` [H, W]."""
        inside = _array(mask).astype(bool)
        y, rate = (_array(m)[:, inside].astype(np.float64) for m in (count, rate))
        rate = np.where(rate >= 0, rate.clip(min=LEAST_RATE), np.nan)
        log_y = np.log(y, where=y > 0, out=np.zeros_like(y))  # 0 log 0 = 0
        log_rate = np.log(rate, where=y > 0, out=np.zeros_like(y))
        n = np.full(len(y), y.shape[1], np.float64)
        terms = (y, rate, y * log_y, y * log_rate)
        return cls(n, (y == 0).sum(1).astype(np.float64), *(term.sum(1) for term in terms))

    def __add__(self, other: PoissonSums) -> PoissonSums:
        """Sums over both sets of bins."""
        return PoissonSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def sparsity(self) -> np.ndarray:
        """Fraction of bins without a count [G]."""
        return _ratio(self.zeros, self.n)

    def deviance(self) -> np.ndarray:
        """Mean deviance per bin [G]: 2 [y log(y / rate) - y + rate]."""
        total = self.count_log_count - self.count_log_rate - self.count + self.rate
        return _ratio(2 * total, self.n)

    def constant_deviance(self, rate: np.ndarray) -> np.ndarray:
        """Mean deviance per bin [G] had each gene one rate everywhere."""
        rate = np.maximum(rate, LEAST_RATE)
        total = self.count_log_count - self.count * np.log(rate) - self.count + self.n * rate
        return _ratio(2 * total, self.n)

    def d2(self, rate: np.ndarray) -> np.ndarray:
        """Share of the deviance of a constant rate that the prediction explains [G]."""
        return 1 - _ratio(self.deviance(), self.constant_deviance(rate))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotient, NaN unless the denominator is positive."""
    positive = below > 0
    return np.where(positive, above / np.where(positive, below, 1), np.nan)


# --- functions ------------------------------------------------------------------------------------


def pcc(truth: Maps, pred: Maps, mask: Maps | None = None, bin_factor: int = 1) -> np.ndarray:
    """Pearson correlation per gene over all in-tissue bins of all patches.

    Parameters
    ----------
    truth, pred
        [N, G, H, W].
    mask
        bool [N, H, W]; ``None`` takes every bin (the published protocol).
    bin_factor
        Bins of the maps along one side of the bins that are scored, see ``bins``: 4 scores
        2 µm maps at 8 µm.

    Returns
    -------
    float64 [G]; NaN, never 0, where truth or prediction is constant.

    Raises
    ------
    ValueError
        Maps or mask differ in shape, or cannot be cut into larger bins.

    Examples
    --------
    >>> import numpy as np, sparsity_trap as st
    >>> truth = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> st.pcc(truth, 2 * truth, np.ones((1, 4, 4), bool)).round(6)
    array([1.])
    >>> st.pcc(truth, 0 * truth)
    array([nan])
    """
    return _total(Moments.of, truth, pred, mask, bin_factor).pcc()


def pooled_pcc(truth: Maps, pred: Maps, mask: Maps | None = None) -> float:
    """Pearson correlation over the bins of all genes together.

    Dominated by differences between genes; never to be mixed with the per-gene ``pcc``.
    Arguments as for ``pcc``.
    """
    return _total(Moments.of, truth, pred, mask).pooled().pcc().item()


def mse(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Mean squared error per bin, float64 [G]. Arguments as for ``pcc``."""
    return _total(Moments.of, truth, pred, mask).mse()


def calibration(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Predicted over observed total, float64 [G]; NaN without a count. Arguments as for ``pcc``."""
    return _total(Moments.of, truth, pred, mask).calibration()


def poisson_deviance(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Mean Poisson deviance per bin, 2 [y log(y / rate) - y + rate] with 0 log 0 = 0.

    Parameters
    ----------
    truth
        Counts [N, G, H, W].
    pred
        Rates [N, G, H, W]; from 0 to ``LEAST_RATE`` they count as ``LEAST_RATE``, and a negative
        one makes the gene's deviance NaN.
    mask
        bool [N, H, W]; ``None`` takes every bin.

    Returns
    -------
    float64 [G].
    """
    return _total(PoissonSums.of, truth, pred, mask).deviance()


def d2(truth: Maps, pred: Maps, train_mean: Maps, mask: Maps | None = None) -> np.ndarray:
    """Deviance explained, 1 - D(truth, pred) / D(truth, train_mean).

    Parameters
    ----------
    truth, pred, mask
        As for ``poisson_deviance``.
    train_mean
        [G] mean count per bin of each gene in the training sections.

    Returns
    -------
    float64 [G]; 1 is perfect, 0 no better than the constant, NaN where the constant is perfect.

    Examples
    --------
    >>> import numpy as np, sparsity_trap as st
    >>> truth = np.array([[[[0, 1], [2, 5]]]])
    >>> st.d2(truth, truth, train_mean=[2.0]).round(6)
    array([1.])
    """
    return _total(PoissonSums.of, truth, pred, mask).d2(np.asarray(train_mean))


def sparsity(truth: Maps, mask: Maps | None = None) -> np.ndarray:
    """Fraction of in-tissue bins without a count, float64 [G]. Arguments as for ``pcc``."""
    return _total(PoissonSums.of, truth, truth, mask).sparsity()


def ssim(
    truth: Maps,
    pred: Maps,
    mask: Maps | None = None,
    data_range: Maps | None = None,
    min_tissue: float = MIN_TISSUE,
) -> np.ndarray:
    """Structural similarity of every patch and gene, as scikit-image computes it.

    7 x 7 uniform window, sample covariance, K1 = 0.01, K2 = 0.03, mean over windows that lie
    within the patch (Wang et al. 2004). Bins off tissue are set to 0 on both sides.

    Parameters
    ----------
    truth, pred
        [N, G, H, W], H and W at least 7.
    mask
        bool [N, H, W]; ``None`` takes every bin.
    data_range
        Broadcasts to [N, G]. Default: joint minimum to maximum of truth and prediction after
        masking, for each patch and gene.
    min_tissue
        Patches with a smaller share of tissue are left out.

    Returns
    -------
    float64 [N, G]; NaN for patches left out and for pairs that are one and the same constant.

    Examples
    --------
    >>> import numpy as np, sparsity_trap as st
    >>> truth = np.arange(64.0).reshape(1, 1, 8, 8)
    >>> st.ssim(truth, truth, np.ones((1, 8, 8), bool)).round(6)
    array([[1.]])
    """
    from sparsity_trap import _loops

    n, genes = truth.shape[:2]
    scores = np.full((n, genes), np.nan)
    wanted = np.nan if data_range is None else data_range
    data_range = np.broadcast_to(np.asarray(wanted, dtype=np.float64), (n, genes))

    def of_patch(i: int, t: np.ndarray, p: np.ndarray, m: np.ndarray) -> None:
        if m.mean() >= min_tissue:
            _loops.ssim_maps(*_loadable(t, p), m, data_range[i].copy(), scores[i])

    for _ in _each(of_patch, truth, pred, mask):
        pass
    return scores


def average_precision(histogram: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve, by the step rule of scikit-learn.

    Parameters
    ----------
    histogram
        [..., 2, levels]: negatives and positives at each level of the score, levels ascending.

    Returns
    -------
    float64 [...]; equal to the share of positives when all have one score, NaN without positives.
    """
    negatives, positives = np.moveaxis(histogram[..., ::-1], -2, 0)
    found = positives.cumsum(-1)
    called = found + negatives.cumsum(-1)
    return _ratio((positives * found / called.clip(min=1)).sum(-1), found[..., -1])


def spearman(counts: np.ndarray, rate: np.ndarray) -> float:
    """Rank correlation of two vectors, ties at their mean rank; NaN when either is constant.

    Parameters
    ----------
    counts
        Whole numbers from 0 to 2**32.
    rate
        Not negative; ranked in single precision.
    """
    return _spearman(_packed(counts, rate))


# --- details --------------------------------------------------------------------------------------


def _numbers(*maps: Maps, mask: Maps | None) -> range:
    """Numbers of the patches, of maps that fit each other."""
    shapes = {tuple(m.shape) for m in maps}
    shape = shapes.pop()
    if shapes:
        raise ValueError(f"maps differ in shape: {shape} and {shapes.pop()}")
    if mask is not None and tuple(mask.shape) != (shape[0], *shape[2:]):
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit maps of shape {shape}")
    return range(shape[0])


def _patch(i: int, *maps: Maps, mask: Maps | None) -> tuple[np.ndarray, ...]:
    """A patch's maps [G, H, W] as they are stored, then its mask as bool [H, W]."""
    patch = [_array(m[i]) for m in maps]
    inside = np.ones(patch[0].shape[1:], bool) if mask is None else _array(mask[i]).astype(bool)
    return *patch, inside


def _array(x: Maps) -> np.ndarray:
    return np.ascontiguousarray(x.detach().cpu().numpy() if isinstance(x, Tensor) else x)


def _each(score: Callable[..., T], truth: Maps, pred: Maps, mask: Maps | None) -> Iterator[T]:
    """``score(number, truth, pred, mask)`` of all patches, in order.

    A thread reads and scores one patch at a time.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        patches = _numbers(truth, pred, mask=mask)
        yield from pool.map(lambda i: score(i, *_patch(i, truth, pred, mask=mask)), patches)


def _total(of: Callable[..., S], truth: Maps, pred: Maps, mask: Maps | None, *options: int) -> S:
    """Sums ``of(truth, pred, mask, *options)`` over all patches."""
    parts = _each(lambda _, *patch: of(*patch, *options), truth, pred, mask)
    return reduce(operator.add, parts)


def _packed(counts: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """One uint64 for each pair: sorted, they are in the order of the rates."""
    # The bits of floats that are not negative are in the order of the floats; -0 + 0 is 0.
    bits = (np.asarray(rate, np.float32) + np.float32(0)).view(np.uint32)
    return bits.astype(np.uint64) << np.uint64(32) | np.asarray(counts).astype(np.uint64)


def _spearman(packed: np.ndarray) -> float:
    """Spearman's coefficient of pairs from ``_packed``, which are sorted in place."""
    from sparsity_trap import _loops

    packed.sort()  # numbers alone sort several times faster than they give their order
    ties = np.bincount(packed.astype(np.uint32))  # of counts, the lower half
    rank_of_count = np.cumsum(ties) - (ties + len(packed)) / 2  # about their mean
    yy, xy = _loops.rank_sums(packed, rank_of_count)
    xx = (ties * rank_of_count**2).sum()
    return float(_ratio(xy, np.sqrt(xx) * np.sqrt(yy)))


def _loadable(t: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps as ``_loops.load`` takes them: counts, rates and levels.

    As they are stored (uint16 and float16) the loops convert them map by map, in the cache. Others
    are brought to single or double precision, for which the loops are compiled apart.
    """
    wide = np.float64 if np.float64 in (t.dtype, p.dtype) else np.float32
    if t.dtype != np.uint16 or wide == np.float64:
        t = np.ascontiguousarray(t, dtype=wide)
    if p.dtype == np.float16 and wide == np.float32:
        level = np.ascontiguousarray(p).view(np.uint16)
        if level.size and level.max() < 0x7C00:  # finite and, without the highest bit, not negative
            return t, np.empty((0, *p.shape[1:]), wide), level.view(np.int16)
    return t, np.ascontiguousarray(p, dtype=wide), np.empty((0, *p.shape[1:]), np.int16)
