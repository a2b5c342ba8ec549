"""Scores of predicted gene maps against counts: pure functions and one streaming accumulator.

Axis order is patch N, gene G, row H, column W. Arrays may be NumPy, torch or zarr; they are read
one patch at a time and summed in float64, so memory does not grow with the number of patches.

In tissue always means: values off tissue are set to 0 first, then 2 µm bins are summed. So no
in-tissue score sees a prediction from a bin where the model was never supervised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsity_trap.binning import Maps, bin_mask, bin_sum

#: 2 µm bins along one side of an 8 µm bin.
FACTOR_8UM = 4

#: SSIM leaves out patches with a smaller share of tissue.
MIN_TISSUE = 0.05

#: Predictions are stored as float16, where 0 stands for anything below its smallest number. The
#: deviance takes that number instead; a count at a rate of exactly 0 would be infinitely unlikely.
RATE_FLOOR = 2.0**-24

_WINDOW = 7
_MAPS_AT_ONCE = 4  # SSIM works on this many maps: few enough to stay in the processor's cache


# --- sums that can be merged ----------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Bins, means and centred sums of a pair of variables (x, y), one of each per gene.

    Centred sums do not cancel under large offsets, and a constant side has a sum of squares of
    exactly 0. Merging follows Chan, Golub and LeVeque (1983).
    """

    n: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, mask: Tensor) -> Moments:
        """Moments of float64 maps ``x`` and ``y`` [G, H, W] over the bins in ``mask`` [H, W]."""
        inside, outside = mask.flatten().nonzero()[:, 0], _outside(mask)
        if len(inside) == 0:
            return cls(*(x.new_zeros(len(x)) for _ in fields(cls)))

        def centred(v: Tensor) -> tuple[Tensor, Tensor]:
            # Centring on the first value, then on the mean, leaves exact zeros of a constant.
            v = v.flatten(1)
            first = v[:, inside[:1]]
            v = (v - first).index_fill_(1, outside, 0)
            mean = v.sum(1, keepdim=True) / len(inside)
            v = v.sub_(mean).index_fill_(1, outside, 0)
            return v, (first + mean)[:, 0]

        (x, mean_x), (y, mean_y) = centred(x), centred(y)
        return cls(
            n=torch.full_like(mean_x, len(inside)),
            mean_x=mean_x,
            mean_y=mean_y,
            xx=torch.linalg.vector_norm(x, dim=1) ** 2,
            yy=torch.linalg.vector_norm(y, dim=1) ** 2,
            xy=(x * y).sum(1),
        )

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of bins together."""
        n = self.n + other.n
        share = other.n / n.clamp(min=1)
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

    def pooled(self) -> Moments:
        """Moments over the bins of all genes together, as if they were one gene."""
        genes = [
            Moments(*(getattr(self, f.name)[g : g + 1] for f in fields(self)))
            for g in range(len(self.n))
        ]
        return reduce(Moments.__add__, genes)

    def pcc(self) -> Tensor:
        """Pearson correlation [G]; NaN where either side is constant."""
        spread = self.xx.sqrt() * self.yy.sqrt()
        return torch.where(spread > 0, (self.xy / spread).clamp(-1, 1), torch.nan)

    def mse(self) -> Tensor:
        """Mean squared difference [G]; NaN without bins."""
        bias = self.mean_x - self.mean_y
        return (self.xx + self.yy - 2 * self.xy).clamp(min=0) / self.n + bias * bias


@dataclass(frozen=True)
class PoissonSums:
    """Sums over bins, per gene, from which the Poisson deviance of any rate follows."""

    n: Tensor
    zeros: Tensor
    count: Tensor
    rate: Tensor
    count_log_count: Tensor
    count_log_rate: Tensor

    @classmethod
    def of(cls, count: Tensor, rate: Tensor, mask: Tensor) -> PoissonSums:
        """Sums over float64 maps ``count`` and ``rate`` [G, H, W], bins in ``mask`` [H, W]."""
        outside = _outside(mask)
        count = count.flatten(1).index_fill(1, outside, 0)
        rate = rate.flatten(1).clamp(min=RATE_FLOOR).index_fill_(1, outside, 0)
        gene, bin_ = count.nonzero(as_tuple=True)  # 0 log 0 = 0: logarithms only where counts are
        positive = count[gene, bin_]
        empty = count.new_zeros(len(count))
        n = empty + mask.sum()
        return cls(
            n=n,
            zeros=n - empty.index_add(0, gene, torch.ones_like(positive)),
            count=count.sum(1),
            rate=rate.sum(1),
            count_log_count=empty.index_add(0, gene, positive * positive.log()),
            count_log_rate=empty.index_add(0, gene, positive * rate[gene, bin_].log()),
        )

    def __add__(self, other: PoissonSums) -> PoissonSums:
        """Sums over both sets of bins."""
        return PoissonSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def deviance(self) -> Tensor:
        """Mean deviance per bin [G]: 2 [y log(y / rate) - y + rate]."""
        total = self.count_log_count - self.count_log_rate - self.count + self.rate
        return 2 * total / self.n

    def constant_deviance(self, rate: Tensor) -> Tensor:
        """Mean deviance per bin [G] had each gene one rate everywhere."""
        rate = rate.clamp(min=RATE_FLOOR)
        total = self.count_log_count - self.count * rate.log() - self.count + self.n * rate
        return 2 * total / self.n

    def d2(self, rate: Tensor) -> Tensor:
        """Share of the deviance of a constant rate that the prediction explains [G]."""
        null = self.constant_deviance(rate)
        return torch.where(null > 0, 1 - self.deviance() / null, torch.nan)


# --- functions ------------------------------------------------------------------------------------


def pcc(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Pearson correlation per gene over all in-tissue bins of all patches.

    Parameters
    ----------
    truth, pred
        [N, G, H, W].
    mask
        bool [N, H, W]; ``None`` takes every bin (the published protocol).

    Returns
    -------
    float64 [G]; NaN, never 0, where truth or prediction is constant.
    """
    return _moments(truth, pred, mask).pcc().cpu().numpy()


def pooled_pcc(truth: Maps, pred: Maps, mask: Maps | None = None) -> float:
    """Pearson correlation over the bins of all genes together.

    Dominated by differences between genes; never to be mixed with the per-gene ``pcc``.
    Arguments as for ``pcc``.
    """
    return float(_moments(truth, pred, mask).pooled().pcc())


def mse(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Mean squared error per bin, float64 [G]. Arguments as for ``pcc``."""
    return _moments(truth, pred, mask).mse().cpu().numpy()


def calibration(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Predicted over observed total, float64 [G]; NaN without a count. Arguments as for ``pcc``."""
    return _calibration(_moments(truth, pred, mask)).cpu().numpy()


def poisson_deviance(truth: Maps, pred: Maps, mask: Maps | None = None) -> np.ndarray:
    """Mean Poisson deviance per bin, 2 [y log(y / rate) - y + rate] with 0 log 0 = 0.

    Parameters
    ----------
    truth
        Counts [N, G, H, W].
    pred
        Rates [N, G, H, W]; anything below ``RATE_FLOOR`` counts as ``RATE_FLOOR``.
    mask
        bool [N, H, W]; ``None`` takes every bin.

    Returns
    -------
    float64 [G].
    """
    return _poisson_sums(truth, pred, mask).deviance().cpu().numpy()


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
    sums = _poisson_sums(truth, pred, mask)
    return sums.d2(torch.as_tensor(train_mean).to(sums.n)).cpu().numpy()


def sparsity(truth: Maps, mask: Maps | None = None) -> np.ndarray:
    """Fraction of in-tissue bins without a count, float64 [G]. Arguments as for ``pcc``."""
    sums = _poisson_sums(truth, truth, mask)
    return (sums.zeros / sums.n).cpu().numpy()


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
    if data_range is not None:
        data_range = np.broadcast_to(np.asarray(data_range, dtype=np.float64), (n, genes))
    for i, (t, p, m) in enumerate(_patches(truth, pred, mask=mask)):
        if m.double().mean() >= min_tissue:
            span = None if data_range is None else torch.as_tensor(data_range[i].copy())
            scores[i] = _ssim(t, p, m, span).cpu().numpy()
    return scores


# --- streaming ------------------------------------------------------------------------------------


class GeneScores:
    """Every per-gene score of a run, from patches that arrive in batches.

    >>> scores = GeneScores()
    >>> for batch in batches:
    ...     scores.update(batch.counts, rate, batch.mask)
    >>> table = scores.compute()  # column -> float64 [G]
    """

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}

    def update(self, truth: Maps, pred: Maps, mask: Maps, rate: Maps | None = None) -> None:
        """Add patches.

        Parameters
        ----------
        truth, pred
            Counts and predicted rates at 2 µm [B, G, H, W].
        mask
            bool [B, H, W], tissue.
        rate
            The true rate [B, G, H, W], known only in simulated sections. Give it for every patch
            or for none.
        """
        others = () if rate is None else (rate,)
        for *patch, m in _patches(truth, pred, *others, mask=mask):
            self._add_patch(m, *(_double(x) for x in patch))

    def _add_patch(
        self, mask: Tensor, truth: Tensor, pred: Tensor, rate: Tensor | None = None
    ) -> None:
        inside_truth, inside_pred = _off_tissue_zero(truth, mask), _off_tissue_zero(pred, mask)
        inside_rate = None if rate is None else _off_tissue_zero(rate, mask)
        scored = bool(mask.double().mean() >= MIN_TISSUE)
        whole = bool(mask.all())
        for name, factor in (("2um", 1), ("8um", FACTOR_8UM)):
            m = bin_mask(mask, factor)
            t, p = bin_sum(inside_truth, factor), bin_sum(inside_pred, factor)
            moments = Moments.of(t, p, m)
            self._add(f"pcc_{name}", moments)
            if not whole:
                raw = bin_sum(truth, factor), bin_sum(pred, factor)
                moments = Moments.of(*raw, torch.ones_like(m))
            self._add(f"pcc_{name}_unmasked", moments)
            if inside_rate is not None:
                self._add(f"pcc_{name}_rate", Moments.of(bin_sum(inside_rate, factor), p, m))
            if factor == 1:
                self._add("poisson", PoissonSums.of(t, p, m))
            if scored:
                # A gap in the tissue can empty every larger bin; the maps are then zero, SSIM NaN.
                value = _ssim(t, p, m)
                defined = ~value.isnan()
                self._add(f"ssim_{name}", torch.stack([value.nan_to_num(), defined, ~defined]))

    def _add(self, key: str, value: Any) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value

    def compute(self) -> dict[str, np.ndarray]:
        """Scores of all patches so far.

        Returns
        -------
        dict
            Column of the per-gene table -> float64 [G]; undefined values are NaN.
        """
        truth_pred, counts = self._get("pcc_2um"), self._get("poisson")
        columns = {
            "sparsity": counts.zeros / counts.n,
            "mean_count": counts.count / counts.n,
            "pcc_2um": truth_pred.pcc(),
            "pcc_8um": self._get("pcc_8um").pcc(),
            "pcc_2um_unmasked": self._get("pcc_2um_unmasked").pcc(),
            "pcc_8um_unmasked": self._get("pcc_8um_unmasked").pcc(),
            "ssim_2um": self._mean_ssim("2um"),
            "ssim_8um": self._mean_ssim("8um"),
            "deviance": counts.deviance(),
            "mse": truth_pred.mse(),
            "calibration": _calibration(truth_pred),
            "pcc_2um_rate": self._rate_pcc("2um"),
            "pcc_8um_rate": self._rate_pcc("8um"),
        }
        return {name: column.cpu().numpy() for name, column in columns.items()}

    def pooled(self) -> dict[str, float]:
        """Pooled PCC over all genes, named apart from the per-gene columns."""
        keys = ("2um", "8um", "2um_unmasked", "8um_unmasked")
        return {f"pooled_pcc_{key}": float(self._get(f"pcc_{key}").pooled().pcc()) for key in keys}

    def undefined(self) -> dict[str, int]:
        """Undefined values per score: genes for most, maps (patch x gene) for SSIM."""
        numbers = {name: int(np.isnan(column).sum()) for name, column in self.compute().items()}
        for name in ("2um", "8um"):
            if f"ssim_{name}" in self._sums:
                numbers[f"ssim_{name}"] = int(self._sums[f"ssim_{name}"][2].sum())
        return numbers

    def d2(self, train_mean: Maps) -> np.ndarray:
        """Deviance explained against a constant mean count per gene, float64 [G]; see ``d2``."""
        counts = self._get("poisson")
        return counts.d2(torch.as_tensor(train_mean).to(counts.n)).cpu().numpy()

    def _get(self, key: str) -> Any:
        if key not in self._sums:
            raise ValueError("no patches to score: call update first")
        return self._sums[key]

    def _mean_ssim(self, name: str) -> Tensor:
        if f"ssim_{name}" not in self._sums:
            return torch.full_like(self._get("poisson").n, torch.nan)
        total, defined, _ = self._sums[f"ssim_{name}"]
        return total / defined  # 0 / 0 is NaN

    def _rate_pcc(self, name: str) -> Tensor:
        if f"pcc_{name}_rate" not in self._sums:
            return torch.full_like(self._get("poisson").n, torch.nan)
        return self._sums[f"pcc_{name}_rate"].pcc()


# --- details --------------------------------------------------------------------------------------


def _patches(*maps: Maps, mask: Maps | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield each patch's maps [G, H, W] as they are stored, then its mask as bool [H, W]."""
    shapes = {tuple(m.shape) for m in maps}
    shape = shapes.pop()
    if shapes:
        raise ValueError(f"maps differ in shape: {shape} and {shapes.pop()}")
    if mask is not None and tuple(mask.shape) != (shape[0], *shape[2:]):
        raise ValueError(f"mask of shape {tuple(mask.shape)} does not fit maps of shape {shape}")
    for i in range(shape[0]):
        patch = [_tensor(m[i]) for m in maps]
        if mask is None:
            yield *patch, torch.ones(shape[2:], dtype=torch.bool, device=patch[0].device)
        else:
            yield *patch, torch.as_tensor(mask[i]).to(patch[0].device, torch.bool)


def _tensor(x: Maps) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.as_tensor(np.ascontiguousarray(x))


def _double(x: Tensor) -> Tensor:
    # half to double in one step is several times slower
    return (x.float() if x.dtype == torch.float16 else x).double()


def _outside(mask: Tensor) -> Tensor:
    """Indices of the bins off tissue in the flattened mask."""
    return (~mask).flatten().nonzero()[:, 0]


def _off_tissue_zero(x: Tensor, mask: Tensor) -> Tensor:
    # filled, not multiplied: predictions off tissue may be NaN
    return x if mask.all() else x.flatten(1).index_fill(1, _outside(mask), 0).view_as(x)


def _moments(truth: Maps, pred: Maps, mask: Maps | None) -> Moments:
    parts = (Moments.of(_double(t), _double(p), m) for t, p, m in _patches(truth, pred, mask=mask))
    return reduce(Moments.__add__, parts)


def _poisson_sums(truth: Maps, pred: Maps, mask: Maps | None) -> PoissonSums:
    parts = (
        PoissonSums.of(_double(t), _double(p), m) for t, p, m in _patches(truth, pred, mask=mask)
    )
    return reduce(PoissonSums.__add__, parts)


def _calibration(moments: Moments) -> Tensor:
    ratio = moments.mean_y / moments.mean_x
    return torch.where(moments.mean_x > 0, ratio, torch.nan)


def _ssim(truth: Tensor, pred: Tensor, mask: Tensor, data_range: Tensor | None = None) -> Tensor:
    """SSIM [G] of the maps [G, H, W] of one patch, a few genes at a time."""
    work = torch.empty(12 * truth[:_MAPS_AT_ONCE].numel(), dtype=torch.float64, device=truth.device)
    values = []
    for start in range(0, len(truth), _MAPS_AT_ONCE):
        genes = slice(start, start + _MAPS_AT_ONCE)
        x, y = (_off_tissue_zero(_double(v[genes]), mask) for v in (truth, pred))
        if data_range is None:
            low = torch.minimum(x.amin((1, 2)), y.amin((1, 2)))
            span = torch.maximum(x.amax((1, 2)), y.amax((1, 2))) - low
        else:
            span = data_range[genes].to(x)
        value = _ssim_group(x, y, span[:, None, None], work)
        values.append(torch.where(span > 0, value, torch.nan))
    return torch.cat(values)


def _ssim_group(x: Tensor, y: Tensor, data_range: Tensor, work: Tensor) -> Tensor:
    """SSIM of a few maps; ``work``, 12 numbers for each bin, is overwritten."""
    n = _WINDOW**2
    work = work[: 12 * x.numel()].view(3, 4, *x.shape)
    # Only the sum of the two variances enters, so four window sums do, not five.
    sum_x, sum_y, squares, product = work[0]
    sum_x.copy_(x)
    sum_y.copy_(y)
    torch.mul(x, x, out=squares).addcmul_(y, y)
    torch.mul(x, y, out=product)
    sum_x, sum_y, squares, product = _window_sums(*work)
    c1 = (0.01 * data_range * n) ** 2  # both sides of each ratio are scaled by n² and n - 1
    c2 = (0.03 * data_range) ** 2 * (n - 1)
    means = sum_x * sum_y
    energy = sum_x.square_().addcmul_(sum_y, sum_y)
    covariance = product.sub_(means, alpha=1 / n)
    variance = squares.sub_(energy, alpha=1 / n)
    numerator = means.mul_(2).add_(c1).mul_(covariance.mul_(2).add_(c2))
    values = numerator.div_(energy.add_(c1).mul_(variance.add_(c2)))
    return values[..., : 1 - _WINDOW, : 1 - _WINDOW].mean((-2, -1))


def _window_sums(maps: Tensor, two: Tensor, four: Tensor) -> Tensor:
    """Sums over 7 x 7 windows that start at each bin of maps [..., H, W].

    Adds 2 + 2 + 2 + 1 bins along each axis. Meaningless in the last six rows and columns, where the
    window leaves the map: adding flat memory is faster than adding rows. The three arguments,
    alike in shape, are overwritten.
    """
    shape = maps.shape
    maps, two, four = (v.view(-1) for v in (maps, two, four))
    n = maps.numel()
    for step in (1, shape[-1]):
        n -= 6 * step
        torch.add(maps[: n + 4 * step], maps[step : n + 5 * step], out=two[: n + 4 * step])
        torch.add(two[:n], two[2 * step : n + 2 * step], out=four[:n])
        four[:n].add_(two[4 * step : n + 4 * step]).add_(maps[6 * step : n + 6 * step])
        maps, four = four, maps
    return maps.view(shape)
