"""Scores of predicted gene maps against counts: pure functions and one streaming accumulator.

Axis order is patch N, gene G, row H, column W. Arrays may be NumPy, torch or zarr; they are read
one patch at a time and summed in float64, so memory does not grow with the number of patches.

In tissue always means: values off tissue are set to 0 first, then 2 µm bins are summed. So no
in-tissue score sees a prediction from a bin where the model was never supervised.

Maps on a CPU are scored by the compiled loops of ``kernels``, in as many threads as torch has;
maps on another device by torch on that device.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import reduce
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sparsity_trap.bins import Maps, bin_mask, bin_sum
from sparsity_trap.settings import UserError

#: 2 µm bins along one side of a 2, 4, 8 and 16 µm bin.
FACTORS = (1, 2, 4, 8)

#: SSIM leaves out patches with a smaller share of tissue.
MIN_TISSUE = 0.05

#: Predictions are stored as float16, where 0 stands for anything below its smallest number. The
#: deviance takes that number instead; a count at a rate of exactly 0 would be infinitely unlikely.
RATE_FLOOR = 2.0**-24

#: Levels on which AUPRC ranks predictions: the float16 numbers from 0, by their bits. Predictions
#: are stored in float16, so these are all there are.
N_LEVELS = 2**15

_WINDOW = 7
_MOMENTS = (
    *("pcc_2um", "pcc_4um", "pcc_8um", "pcc_16um"),
    *("pcc_2um_unmasked", "pcc_8um_unmasked", "pcc_2um_rate", "pcc_8um_rate"),
)
_SPOOL_BYTES = 2**25  # kept in memory before a temporary file takes over
T = TypeVar("T")


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
    def of(cls, x: Tensor, y: Tensor, mask: Tensor) -> Moments:
        """Moments [G] of float64 maps ``x`` and ``y`` [G, H, W] over the bins in ``mask`` [H, W]."""
        return cls(*_moment_sums(x, y, mask).T.cpu().numpy())

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
    def of(cls, count: Tensor, rate: Tensor, mask: Tensor) -> PoissonSums:
        """Sums over float64 maps ``count`` and ``rate`` [G, H, W], bins in ``mask`` [H, W]."""
        return cls(*_poisson_sums(count, rate, mask).T.cpu().numpy())

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
        rate = np.maximum(rate, RATE_FLOOR)
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
        Bins of the maps along one side of the bins that are scored, see ``binning``: 4 scores
        2 µm maps at 8 µm.

    Returns
    -------
    float64 [G]; NaN, never 0, where truth or prediction is constant.
    """
    return _moments(truth, pred, mask, bin_factor).pcc()


def pooled_pcc(truth: Maps, pred: Maps, mask: Maps | None = None) -> float:
    """Pearson correlation over the bins of all genes together.

    Dominated by differences between genes; never to be mixed with the per-gene ``pcc``.
    Arguments as for ``pcc``.
    """
    return _moments(truth, pred, mask).pooled().pcc().item()


def mse(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Mean squared error per bin, float64 [G]. Arguments as for ``pcc``."""
    return _moments(truth, pred, mask).mse()


def calibration(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Predicted over observed total, float64 [G]; NaN without a count. Arguments as for ``pcc``."""
    return _moments(truth, pred, mask).calibration()


def poisson_deviance(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Mean Poisson deviance per bin, 2 [y log(y / rate) - y + rate] with 0 log 0 = 0.

    Parameters
    ----------
    truth
        Counts [N, G, H, W].
    pred
        Rates [N, G, H, W]; from 0 to ``RATE_FLOOR`` they count as ``RATE_FLOOR``, and a negative
        one makes the gene's deviance NaN.
    mask
        bool [N, H, W]; ``None`` takes every bin.

    Returns
    -------
    float64 [G].
    """
    return _poisson(truth, pred, mask).deviance()


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
    """
    return _poisson(truth, pred, mask).d2(np.asarray(train_mean))


def sparsity(truth: Maps, mask: Maps | None = None) -> np.ndarray:
    """Fraction of in-tissue bins without a count, float64 [G]. Arguments as for ``pcc``."""
    return _poisson(truth, truth, mask).sparsity()


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
    """
    n, genes = truth.shape[:2]
    scores = np.full((n, genes), np.nan)
    wanted = np.nan if data_range is None else data_range
    data_range = np.broadcast_to(np.asarray(wanted, dtype=np.float64), (n, genes))

    def of_patch(i: int) -> None:
        t, p, m = _patch(i, truth, pred, mask=mask)
        if m.double().mean() < min_tissue:
            return
        if t.device.type == "cpu":
            _ssim_on_cpu(t, p, m, data_range[i], scores[i])
        else:
            x, y = (_off_tissue_zero(_double(v), m) for v in (t, p))
            span = torch.as_tensor(data_range[i].copy()).to(x)
            scores[i] = _ssim(x, y, span).cpu().numpy()

    for _ in _each(of_patch, truth, pred, mask=mask):
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


def morans_i(maps: Maps, mask: Maps, origin: Maps) -> np.ndarray:
    """Moran's I of maps of 8 µm bins over their four neighbours, by squidpy.

    Patches are put back on the section's grid, so neighbours may lie in the next patch. Weights of
    a bin sum to 1, as squidpy normalises them.

    Parameters
    ----------
    maps
        8 µm maps [N, G, H, W], all in memory.
    mask
        bool [N, H, W]; ``binning.bin_mask`` of the tissue.
    origin
        [N, 2], row and column of each patch's first 2 µm bin; see ``PatchStore``.

    Returns
    -------
    float64 [G], exact to single precision; NaN where a map is constant or no two bins are
    neighbours.
    """
    import squidpy
    from anndata import AnnData

    logging.getLogger("spatialdata._logging").setLevel(logging.WARNING)  # squidpy's too
    maps, mask = np.asarray(maps), np.asarray(mask)
    patch, row, col = mask.nonzero()
    values = maps[patch, :, row, col].astype(np.float64)
    result = np.full(maps.shape[1], np.nan)
    varies = np.flatnonzero((values != values[:1]).any(0))
    if len(varies) == 0:
        return result
    data = AnnData(values[:, varies])
    data.var_names = [str(g) for g in varies]
    data.obsm["spatial"] = np.asarray(origin)[patch] // 4 + np.stack((row, col), axis=1)
    squidpy.gr.spatial_neighbors_radius(data, radius=1.0)
    if data.obsp["spatial_connectivities"].nnz:
        squidpy.gr.spatial_autocorr(data, mode="moran", show_progress_bar=False)
        table = data.uns["moranI"]["I"]
        result[[int(g) for g in table.index]] = table
    return result


# --- streaming ------------------------------------------------------------------------------------


class PatchSums(NamedTuple):
    """What one patch adds; float64 arrays, but for the 8 µm maps in float32."""

    moments: np.ndarray  # [G, 8, 6], in the order of _MOMENTS and of the fields of Moments
    poisson: np.ndarray  # [G, 6], the fields of PoissonSums
    ssim: np.ndarray  # [G, 2], at 2 and 8 µm
    truth8: np.ndarray  # [G, H / 4, W / 4], 0 off the tissue at 8 µm
    pred8: np.ndarray


class GeneScores:
    """Every per-gene score of a run, from patches that arrive in batches.

    >>> scores = GeneScores()
    >>> for batch in batches:
    ...     scores.update(batch.counts, rate, batch.mask)
    >>> table = scores.compute()  # column -> float64 [G]

    Memory does not grow with the patches. Ranks need all values at once: for Spearman the 8 µm
    bins are kept in single precision in a temporary file (about 0.4 MB per patch of 50 genes) and
    ranked exactly, gene by gene. AUPRC ranks predictions in half precision, in which they are
    stored; see ``N_LEVELS``.

    Parameters
    ----------
    genes
        Names for errors; numbers by default.
    train_mean
        [G] mean count per bin of each gene in the training sections, for ``d2``.
    name
        Whose predictions these are, for errors.
    """

    def __init__(
        self,
        genes: Sequence[str] | None = None,
        *,
        train_mean: np.ndarray | None = None,
        name: str = "prediction",
    ) -> None:
        self.genes, self.train_mean, self.name = genes, train_mean, name
        self._moments: Moments  # of each gene and of each of _MOMENTS, [G, 8]
        self._poisson: PoissonSums
        self._ssim: np.ndarray  # [G, 2 resolutions, 3]: sum, defined, undefined
        self._histogram: Tensor  # [G, 2, N_LEVELS]: bins without and with a count
        self._spool = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115
        self._bins8: list[int] = []  # 8 µm bins of each patch in the spool
        self._columns: dict[str, np.ndarray] | None = None

    def update(self, truth: Maps, pred: Maps, mask: Maps, rate: Maps | None = None) -> None:
        """Add patches.

        Parameters
        ----------
        truth, pred
            Counts and predicted rates at 2 µm [B, G, H, W]; H and W are multiples of 8.
        mask
            bool [B, H, W], tissue.
        rate
            The true rate [B, G, H, W], known only in simulated sections. Give it for every patch
            or for none.

        Raises
        ------
        UserError
            A prediction on tissue is negative, infinite or not a number. Off tissue it may be: only
            the unmasked scores are then undefined.
        """
        self._columns = None
        others = () if rate is None else (rate,)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for i in _numbers(truth, pred, *others, mask=mask):
                t, p, *r, m = _patch(i, truth, pred, *others, mask=mask)
                if not self._bins8:
                    shape = (len(t), 2, N_LEVELS)
                    self._histogram = torch.zeros(shape, dtype=torch.int32, device=t.device)
                sums_of = _sums_on_cpu if t.device.type == "cpu" else _sums_on_device
                self._add(m, sums_of(t, p, r[0] if r else t[:0], m, self._histogram, pool))

    def _add(self, mask: Tensor, sums: PatchSums) -> None:
        moments = Moments(*np.moveaxis(sums.moments, -1, 0))
        poisson = PoissonSums(*sums.poisson.T)
        wrong = np.flatnonzero(~np.isfinite(poisson.rate))
        if len(wrong):
            gene = f"number {wrong[0]}" if self.genes is None else self.genes[wrong[0]]
            raise UserError(
                f"{self.name}: gene {gene} has a rate in patch {len(self._bins8)} that is negative, "
                "infinite or not a number: train again, with a lower learning rate where it recurs"
            )
        defined = ~np.isnan(sums.ssim)
        undefined = ~defined & _scored(mask)
        ssim = np.stack([np.nan_to_num(sums.ssim), defined, undefined], axis=-1)
        if self._bins8:
            moments, poisson = self._moments + moments, self._poisson + poisson
            ssim += self._ssim
        self._moments, self._poisson, self._ssim = moments, poisson, ssim
        inside = bin_mask(mask, 4).cpu().numpy()
        packed = _packed(sums.truth8[:, inside], sums.pred8[:, inside])
        self._spool.write(packed.tobytes())
        self._bins8.append(packed.shape[1])

    def compute(self) -> dict[str, np.ndarray]:
        """Scores of all patches so far.

        Returns
        -------
        dict
            Column of the per-gene table -> float64 [G]; undefined values are NaN. ``auprc`` ranks
            the 2 µm bins that hold a count before those that do not; ``auprc_base`` is its value
            for a prediction without information.
        """
        if not self._bins8:
            raise ValueError("no patches to score: call update first")
        if self._columns is None:
            self._columns = self._compute()
        return self._columns

    def _compute(self) -> dict[str, np.ndarray]:
        counts = self._poisson
        ssim = _ratio(self._ssim[..., 0], self._ssim[..., 1])
        unknown = np.full(len(counts.n), np.nan)
        d2 = unknown if self.train_mean is None else self.d2(self.train_mean)
        correlations = dict(zip(_MOMENTS, self._moments.pcc().T, strict=True))
        known = {name: correlations.pop(name) for name in ("pcc_2um_rate", "pcc_8um_rate")}
        return {
            "sparsity": counts.sparsity(),
            "mean_count": _ratio(counts.count, counts.n),
            **correlations,
            "spearman_8um": self._spearman(),
            "ssim_2um": ssim[:, 0],
            "ssim_8um": ssim[:, 1],
            "deviance": counts.deviance(),
            "d2": d2,
            # A gene at a time: the levels of all genes of a large panel are gigabytes.
            "auprc": np.array([average_precision(h) for h in self._histogram.cpu().numpy()]),
            "auprc_base": 1 - counts.sparsity(),
            "mse": self._moments[:, 0].mse(),
            "calibration": self._moments[:, 0].calibration(),
            **known,
        }

    def pooled(self) -> dict[str, float]:
        """Pooled PCC over all genes, named apart from the per-gene columns."""
        self.compute()
        keys = ("2um", "8um", "2um_unmasked", "8um_unmasked")
        moments = (self._moments[:, _MOMENTS.index(f"pcc_{key}")] for key in keys)
        return {
            f"pooled_pcc_{key}": m.pooled().pcc().item()
            for key, m in zip(keys, moments, strict=True)
        }

    def undefined(self) -> dict[str, int]:
        """Undefined values per score: genes for most, maps (patch x gene) for SSIM."""
        numbers = {name: int(np.isnan(column).sum()) for name, column in self.compute().items()}
        maps = self._ssim[..., 2].sum(0)
        return numbers | {"ssim_2um": int(maps[0]), "ssim_8um": int(maps[1])}

    def d2(self, train_mean: Maps) -> np.ndarray:
        """Deviance explained against a constant mean count per gene, float64 [G]; see ``d2``."""
        return self._poisson.d2(np.asarray(train_mean))

    def _spearman(self) -> np.ndarray:
        genes = len(self._poisson.n)
        starts = np.cumsum([0, *(genes * n for n in self._bins8)])

        def gene(g: int) -> np.ndarray:
            parts = []
            for start, n in zip(starts, self._bins8, strict=False):
                self._spool.seek(8 * (start + g * n))
                parts.append(np.frombuffer(self._spool.read(8 * n), np.uint64))
            return np.concatenate(parts)

        scores: list[float] = []
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, genes, threads):  # a gene a thread in memory
                part = map(gene, range(first, min(first + threads, genes)))
                scores.extend(pool.map(_spearman, part))
        self._spool.seek(0, 2)
        return np.array(scores)


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


def _patch(i: int, *maps: Maps, mask: Maps | None) -> tuple[Tensor, ...]:
    """A patch's maps [G, H, W] as they are stored, then its mask as bool [H, W]."""
    patch = [_tensor(m[i]) for m in maps]
    device = next((p.device for p in patch if p.device.type != "cpu"), patch[0].device)
    if mask is None:
        inside = torch.ones(patch[0].shape[1:], dtype=torch.bool)
    else:
        inside = torch.as_tensor(mask[i])
    return *(p.to(device) for p in patch), inside.to(device, torch.bool)


def _each(score: Callable[[int], T], *maps: Maps, mask: Maps | None) -> Iterator[T]:
    """Scores of all patches, in order; a thread reads and scores one patch at a time."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        yield from pool.map(score, _numbers(*maps, mask=mask))


def _tensor(x: Maps) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.as_tensor(np.ascontiguousarray(x))


def _double(x: Tensor) -> Tensor:
    # half to double in one step is several times slower
    return (x.float() if x.dtype == torch.float16 else x).double()


def _scored(mask: Tensor) -> bool:
    return bool(mask.double().mean() >= MIN_TISSUE)


def _outside(mask: Tensor) -> Tensor:
    """Indices of the bins off tissue in the flattened mask."""
    return (~mask).flatten().nonzero()[:, 0]


def _off_tissue_zero(x: Tensor, mask: Tensor) -> Tensor:
    # filled, not multiplied: predictions off tissue may be NaN
    return x if mask.all() else x.flatten(1).index_fill(1, _outside(mask), 0).view_as(x)


def _moments(truth: Maps, pred: Maps, mask: Maps | None, bin_factor: int = 1) -> Moments:
    def of_patch(i: int) -> Moments:
        t, p, m = _patch(i, truth, pred, mask=mask)
        if t.device.type == "cpu":
            return _moments_on_cpu(t, p, m, bin_factor)
        x, y = (bin_sum(_off_tissue_zero(_double(v), m), bin_factor) for v in (t, p))
        return Moments.of(x, y, bin_mask(m, bin_factor))

    return reduce(Moments.__add__, _each(of_patch, truth, pred, mask=mask))


def _poisson(truth: Maps, pred: Maps, mask: Maps | None) -> PoissonSums:
    def of_patch(i: int) -> PoissonSums:
        t, p, m = _patch(i, truth, pred, mask=mask)
        return PoissonSums.of(_double(t), _double(p), m)

    return reduce(PoissonSums.__add__, _each(of_patch, truth, pred, mask=mask))


def _packed(counts: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """One uint64 for each pair: sorted, they are in the order of the rates."""
    # The bits of floats that are not negative are in the order of the floats; -0 + 0 is 0.
    bits = (np.asarray(rate, np.float32) + np.float32(0)).view(np.uint32)
    return bits.astype(np.uint64) << np.uint64(32) | np.asarray(counts).astype(np.uint64)


def _spearman(packed: np.ndarray) -> float:
    """Spearman's coefficient of pairs from ``_packed``, which are sorted in place."""
    from sparsity_trap import _loops as kernels

    packed.sort()  # numbers alone sort several times faster than they give their order
    ties = np.bincount(packed.astype(np.uint32))  # of counts, the lower half
    rank_of_count = np.cumsum(ties) - (ties + len(packed)) / 2  # about their mean
    yy, xy = kernels.rank_sums(packed, rank_of_count)
    xx = (ties * rank_of_count**2).sum()
    return float(_ratio(xy, np.sqrt(xx) * np.sqrt(yy)))


# --- on a CPU -------------------------------------------------------------------------------------


def _sums_on_cpu(
    truth: Tensor,
    pred: Tensor,
    rate: Tensor,
    mask: Tensor,
    histogram: Tensor,
    pool: ThreadPoolExecutor,
) -> PatchSums:
    """Sums of one patch by the compiled loops, each thread with a share of the genes."""
    from sparsity_trap import _loops as kernels

    genes, height, width = truth.shape
    masks = tuple(bin_mask(mask, factor).numpy() for factor in FACTORS)
    scored = _scored(mask)
    sums = PatchSums(
        moments=np.zeros((genes, len(_MOMENTS), 6)),
        poisson=np.zeros((genes, 6)),
        ssim=np.full((genes, 2), np.nan),
        truth8=np.empty((genes, height // 4, width // 4), np.float32),
        pred8=np.empty((genes, height // 4, width // 4), np.float32),
    )

    def score(part: slice) -> None:
        t, p, level = _loadable(truth[part], pred[part])
        if len(p):
            level = p.astype(np.float16).view(np.int16) & 0x7FFF  # -0 is 0
        r = np.ascontiguousarray(rate[part], dtype=p.dtype)
        out = tuple(array[part] for array in sums)
        kernels.score(t, p, level, r, masks, RATE_FLOOR, scored, out, histogram.numpy()[part])

    list(pool.map(score, _shares(genes)))
    return sums


def _moments_on_cpu(truth: Tensor, pred: Tensor, mask: Tensor, bin_factor: int) -> Moments:
    from sparsity_trap import _loops as kernels

    bin_sum(mask, bin_factor)  # refuses a map that cannot be cut
    out = np.zeros((len(truth), 6))
    coarse = bin_mask(mask, bin_factor).numpy()
    kernels.moments_maps(*_loadable(truth, pred), mask.numpy(), coarse, bin_factor, out)
    return Moments(*out.T)


def _ssim_on_cpu(
    truth: Tensor, pred: Tensor, mask: Tensor, span: np.ndarray, out: np.ndarray
) -> None:
    from sparsity_trap import _loops as kernels

    kernels.ssim_maps(*_loadable(truth, pred), mask.numpy(), span.copy(), out)


def _shares(genes: int) -> Iterator[slice]:
    """Genes of each thread."""
    size = -(-genes // torch.get_num_threads())
    return (slice(start, start + size) for start in range(0, genes, size))


def _loadable(truth: Tensor, pred: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps as ``kernels.load`` takes them: counts, rates and levels.

    As they are stored (uint16 and float16) the loops convert them map by map, in the cache. Others
    are brought to single or double precision, for which the loops are compiled apart.
    """
    t, p = truth.numpy(), pred.numpy()
    wide = np.float64 if np.float64 in (t.dtype, p.dtype) else np.float32
    if t.dtype != np.uint16 or wide == np.float64:
        t = np.ascontiguousarray(t, dtype=wide)
    if p.dtype == np.float16 and wide == np.float32:
        level = np.ascontiguousarray(p).view(np.uint16)
        if level.size and level.max() < 0x7C00:  # finite and, without the highest bit, not negative
            return t, np.empty((0, *p.shape[1:]), wide), level.view(np.int16)
    return t, np.ascontiguousarray(p, dtype=wide), np.empty((0, *p.shape[1:]), np.int16)


# --- on another device ----------------------------------------------------------------------------


def _sums_on_device(
    truth: Tensor,
    pred: Tensor,
    rate: Tensor,
    mask: Tensor,
    histogram: Tensor,
    pool: ThreadPoolExecutor | None = None,
) -> PatchSums:
    """The same sums by torch, all genes at once, on the device that holds the maps."""
    raw = _double(truth), _double(pred)
    t, p, r = (_off_tissue_zero(v, mask) for v in (*raw, _double(rate)))
    everywhere = torch.ones_like(mask)
    moments = [_moment_sums(bin_sum(t, f), bin_sum(p, f), bin_mask(mask, f)) for f in FACTORS]
    moments += [
        _moment_sums(bin_sum(raw[0], f), bin_sum(raw[1], f), bin_mask(everywhere, f))
        for f in (1, 4)
    ]
    if len(rate):
        moments += [_moment_sums(bin_sum(r, f), bin_sum(p, f), bin_mask(mask, f)) for f in (1, 4)]
    else:
        moments += [torch.zeros_like(moments[0])] * 2
    t8, p8 = (_off_tissue_zero(bin_sum(v, 4), bin_mask(mask, 4)) for v in (t, p))
    ssim = torch.full((len(t), 2), torch.nan, dtype=torch.float64, device=t.device)
    if _scored(mask):
        for i, maps in enumerate(((t, p), (t8, p8))):
            ssim[:, i] = _ssim(*maps, torch.full_like(ssim[:, i], torch.nan))
    # Histogram cells are numbered gene by gene, bins without a count before those with one.
    row = 2 * torch.arange(len(t), device=t.device)[:, None] + (t[:, mask] > 0)
    cells = (row * N_LEVELS + (pred.half().view(torch.int16) & 0x7FFF)[:, mask]).flatten()
    histogram += cells.bincount(minlength=histogram.numel()).view_as(histogram).int()
    return PatchSums(
        moments=torch.stack(moments, dim=1).cpu().numpy(),
        poisson=_poisson_sums(t, p, mask).cpu().numpy(),
        ssim=ssim.cpu().numpy(),
        truth8=t8.float().cpu().numpy(),
        pred8=p8.float().cpu().numpy(),
    )


def _moment_sums(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Fields of ``Moments``, float64 [G, 6]."""
    inside, outside = mask.flatten().nonzero()[:, 0], _outside(mask)
    if len(inside) == 0:
        return x.new_zeros((len(x), 6))

    def centred(v: Tensor) -> tuple[Tensor, Tensor]:
        # Centring on the first value, then on the mean, leaves exact zeros of a constant.
        v = v.flatten(1)
        first = v[:, inside[:1]]
        v = (v - first).index_fill_(1, outside, 0)
        mean = v.sum(1, keepdim=True) / len(inside)
        v = v.sub_(mean).index_fill_(1, outside, 0)
        return v, (first + mean)[:, 0]

    (x, mean_x), (y, mean_y) = centred(x), centred(y)
    n = torch.full_like(mean_x, len(inside))
    sums = (x * x).sum(1), (y * y).sum(1), (x * y).sum(1)
    return torch.stack((n, mean_x, mean_y, *sums), dim=1)


def _poisson_sums(count: Tensor, rate: Tensor, mask: Tensor) -> Tensor:
    """Fields of ``PoissonSums``, float64 [G, 6]."""
    outside = _outside(mask)
    count = count.flatten(1).index_fill(1, outside, 0)
    rate = torch.where(rate >= 0, rate.clamp(min=RATE_FLOOR), torch.nan)
    rate = rate.flatten(1).index_fill_(1, outside, 0)
    gene, bin_ = count.nonzero(as_tuple=True)  # 0 log 0 = 0: logarithms only where counts are
    positive = count[gene, bin_]
    empty = count.new_zeros(len(count))
    n = empty + mask.sum()
    sums = (
        n,
        n - empty.index_add(0, gene, torch.ones_like(positive)),
        count.sum(1),
        rate.sum(1),
        empty.index_add(0, gene, positive * positive.log()),
        empty.index_add(0, gene, positive * rate[gene, bin_].log()),
    )
    return torch.stack(sums, dim=1)


def _ssim(x: Tensor, y: Tensor, span: Tensor) -> Tensor:
    """SSIM [G] of float64 maps [G, H, W]; data range ``span`` [G], NaN for the joint one."""
    if min(x.shape[1:]) < _WINDOW:
        return torch.full_like(span, torch.nan)
    extremes = [v.flatten(1).aminmax(dim=1) for v in (x, y)]
    (low_x, high_x), (low_y, high_y) = extremes
    joint = torch.maximum(high_x, high_y) - torch.minimum(low_x, low_y)
    span = torch.where(span.isnan(), joint, span)
    c1, c2 = ((k * span[:, None, None]) ** 2 for k in (0.01, 0.03))
    # Variances are taken about the middle of each range: they do not cancel under large offsets.
    mid_x, mid_y = ((low + high)[:, None, None] / 2 for low, high in extremes)
    x, y = x - mid_x, y - mid_y
    mean = avg_pool2d(torch.stack((x, y, x * x + y * y, x * y)), _WINDOW, stride=1)
    a, b, squares, products = mean
    sample = _WINDOW**2 / (_WINDOW**2 - 1)
    variance, covariance = sample * (squares - a * a - b * b), sample * (products - a * b)
    a, b = a + mid_x, b + mid_y
    values = (2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (variance + c2))
    return torch.where(span > 0, values.mean((1, 2)), torch.nan)
