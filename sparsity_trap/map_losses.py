"""Losses that couple the bins of a map: correlation, structural similarity, multinomial.

Each takes rates (or their logarithms) and counts [B, G, h, w] and the tissue, bool [B, h, w], of
bins of one width, and gives one value per gene, [G]: 0 where there is no tissue. Bins off the
tissue have no influence. `losses.Objective` averages over genes and widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity_trap.bins import bin_sum

#: Predictions whose coefficient of variation is below this count as constant in `pearson`.
_LEAST_VARIATION = 1e-4
#: Counts whose variance is below this share of their squared mean are constant but for rounding.
_ROUNDING = 1e-10

#: Side of the window of `ssim`, and its constants as shares of the range: those of Wang et al. 2004
#: and of `metrics`.
SSIM_WINDOW, SSIM_K1, SSIM_K2 = 7, 0.01, 0.03

#: Weight of 1 − r beside the squared error in `mse_pearson`, that of EGN.
PEARSON_WEIGHT = 0.5

#: Width over which `log_exposure` smooths, in 2 µm bins.
DEPTH_BINS = 4
#: Exposure of a block without any count, whose bins then have no share in a loss.
_LEAST_EXPOSURE = 1e-8

#: log λ of a bin off tissue in a sum over bins: no share of it, and finite.
_LOG_NOTHING = -1e4


def mse(rate: Tensor, count: Tensor, tissue: Tensor) -> Tensor:
    """Mean squared error of each gene over the tissue bins of the batch, [G]."""
    error = torch.where(tissue[:, None], rate - count, 0.0)
    return error.square().sum((0, 2, 3)) / tissue.sum().clamp(min=1)


def pearson(rate: Tensor, count: Tensor, tissue: Tensor) -> Tensor:
    """1 − r, with r Pearson's correlation of each gene over the tissue bins of the batch, [G].

    Notes
    -----
    Minimiser: a + b E[y | x] with any a and any b > 0. Neither level nor scale of the rate is
    determined: calibration and deviances mean nothing, and both stay where training started.

    In log λ the gradient is λ (r z(λ) − z(y)) / (n s(λ)), z being standardised over bins: like
    squared error it weighs bins by λ, but every gene alike, for s(λ) divides.

    r is 0 for a gene whose counts are all equal, without a gradient. (10⁻⁴ mean)² is added to the
    variance of the rates, so that a constant map has a finite gradient too.

    Used by STRank as one of the losses it compares (Nishimura et al., arXiv 2512.06612).
    """
    inside, n = tissue[:, None], tissue.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return x.sum((0, 2, 3), keepdim=True) / n

    rate, count = (torch.where(inside, x, 0.0) for x in (rate, count))
    x = torch.where(inside, rate / mean(rate).clamp(min=1e-30) - 1, 0.0)
    level = mean(count)
    y = torch.where(inside, count - level, 0.0)
    variance = mean(y.square())
    defined = variance > _ROUNDING * level.square()
    spread = (mean(x.square()) + _LEAST_VARIATION**2) * torch.where(defined, variance, 1.0)
    r = torch.where(defined, mean(x * y) * spread.rsqrt(), 0.0)
    return (1 - r.flatten()) * tissue.any()


def mse_pearson(rate: Tensor, count: Tensor, tissue: Tensor) -> Tensor:
    """Squared error plus (1 − r) / 2, of each gene over the tissue bins of the batch, [G].

    Notes
    -----
    Minimiser: E[y | x], which minimises both terms. In a sparse gene the squared error is small and
    correlation decides, in an abundant one the squared error.

    Used by EGN (github.com/Yan98/EGN, ``v1/train.py``), on logarithms of the
    counts of spots, scaled to the range of each gene.
    """
    return mse(rate, count, tissue) + PEARSON_WEIGHT * pearson(rate, count, tissue)


def ssim(rate: Tensor, count: Tensor, tissue: Tensor) -> Tensor:
    """1 − SSIM of each gene, mean over the windows centred on tissue, [G].

    SSIM = (2 m(λ) m(y) + C₁) (2 s(λ, y) + C₂) / ((m(λ)² + m(y)² + C₁) (s(λ)² + s(y)² + C₂)) in
    windows of 7 × 7 bins that lie in the patch; means m and sample covariances s are uniform over
    the window, and both maps are 0 off the tissue.

    Notes
    -----
    C₁ = (0.01 L)² and C₂ = (0.03 L)², as in `metrics`. There L is the joint range of prediction and
    truth; here it is the largest count of patch and gene, at least 1, so that no gradient runs
    through it.

    Minimiser: none in closed form, and below E[y | x] where counts are sparse: windows without a
    count, most of them, are met exactly by λ = 0.

    SSIM as a training loss: Zhao et al. 2017, IEEE Transactions on Computational Imaging 3(1).

    Raises
    ------
    ValueError
        The maps are smaller than the window.
    """
    side = SSIM_WINDOW
    if min(rate.shape[-2:]) < side:
        size = f"{rate.shape[-2]} x {rate.shape[-1]}"
        raise ValueError(f"maps of {size} bins are smaller than the {side} x {side} of SSIM")
    x, y = (torch.where(tissue[:, None], maps, 0.0) for maps in (rate, count))
    scale = y.detach().amax((2, 3), keepdim=True).clamp(min=1).square()

    sample = side**2 / (side**2 - 1)
    mx, my, mxx, myy, mxy = (_window_mean(z, side) for z in (x, y, x * x, y * y, x * y))
    xx, yy = ((m - n.square()).clamp(min=0) * sample for m, n in ((mxx, mx), (myy, my)))
    xy = (mxy - mx * my) * sample
    c1, c2 = SSIM_K1**2 * scale, SSIM_K2**2 * scale
    similar = (2 * mx * my + c1) * (2 * xy + c2)
    similar = similar / ((mx.square() + my.square() + c1) * (xx + yy + c2))
    edge = side // 2
    centre = tissue[:, edge:-edge, edge:-edge]
    error = torch.where(centre[:, None], 1 - similar, 0.0)
    return error.sum((0, 2, 3)) / centre.sum().clamp(min=1)


def _window_mean(z: Tensor, side: int) -> Tensor:
    """Mean of every window of ``side`` × ``side`` bins that lies in a map [B, G, h, w]."""
    if z.device.type != "cpu":
        return F.avg_pool2d(z, side, stride=1)
    # On a CPU two products with band matrices take a fifth of the time of pooling.
    rows, columns = (torch.ones(n - side + 1, n, dtype=z.dtype) / side for n in z.shape[-2:])
    rows, columns = (m.triu().tril(side - 1) for m in (rows, columns))
    return rows @ z @ columns.T


def mse_ssim(rate: Tensor, count: Tensor, tissue: Tensor) -> Tensor:
    """Squared error plus 1 − SSIM of each gene, [G]: training on the score that rewards emptiness.

    Minimiser: below E[y | x] where counts are sparse, pulled there by `ssim`.
    """
    return mse(rate, count, tissue) + ssim(rate, count, tissue)


def multinomial(log_rate: Tensor, count: Tensor, tissue: Tensor) -> Tensor:
    """Multinomial negative log likelihood over the bins of each patch, mean per tissue bin, [G].

    −Σ y log(λ / λ̄) over the tissue bins of a patch, λ̄ being the mean of λ there: given the gene's
    total in the patch, its counts fall into bin i with probability λᵢ / Σλ.

    Notes
    -----
    Normalised over the *bins* of a patch, gene by gene; not over the genes of a bin. What is
    conditioned out is the level of each gene in each patch: it is the Poisson likelihood with that
    level free, at its best. In log λ the gradient is λ Y / Σλ − y with Y the patch's total: the
    residual weighs 1, as for Poisson.

    Minimiser: a multiple of E[y | x], one for each gene; the level stays where training started.

    ListSTRank (Nishimura et al., arXiv 2512.06612; github.com/naivete5656/STRank,
    ``strank/loss_functions.py``), the best of seven losses on HEST-1k, is this likelihood over the
    spots of a section in a batch, again gene by gene, with the total of each spot as its exposure:
    here ``multinomial-depth``.
    """
    inside, bins = tissue[:, None], tissue.sum((1, 2))
    inner = torch.where(inside, log_rate, _LOG_NOTHING)
    log_total = inner.flatten(2).logsumexp(2)[:, :, None, None]
    log_bins = bins.clamp(min=1).to(log_rate.dtype).log()[:, None, None, None]
    relative = torch.where(inside, log_rate - log_total + log_bins, 0.0)
    return -(count * relative).sum((0, 2, 3)) / bins.sum().clamp(min=1)


#: Losses of rates, and of their logarithms.
OF_RATE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "pearson": pearson, "mse+pearson": mse_pearson, "mse+ssim": mse_ssim,
}  # fmt: skip
OF_LOG_RATE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "multinomial": multinomial, "multinomial-depth": multinomial,
}  # fmt: skip


def log_exposure(counts: Tensor, tissue: Tensor, mean_depth: float | None = None) -> Tensor:
    """Logarithm of the depth of each bin relative to its mean, float [B, H, W].

    The depth of a bin is the total count over all genes, averaged over the tissue bins of its block
    of 8 µm: 2 µm bins hold too few counts to tell their own. Off tissue and in blocks without any
    count it is 10⁻⁸ of the mean: Poisson counts of 0 then have no say.

    Parameters
    ----------
    counts
        [B, G, H, W] of any number type.
    tissue
        bool [B, H, W].
    mean_depth
        Mean total count of a 2 µm tissue bin; by default that of the batch.
    """
    total = counts.sum(1).double() * tissue
    mean: float | Tensor = mean_depth or (total.sum() / tissue.sum().clamp(min=1)).clamp(min=1e-30)
    height, width = tissue.shape[-2:]
    whole = (0, -width % DEPTH_BINS, 0, -height % DEPTH_BINS)
    depth, bins = (bin_sum(F.pad(x, whole), DEPTH_BINS) for x in (total, tissue.double()))
    exposure = (depth / bins.clamp(min=1) / mean).clamp(min=_LEAST_EXPOSURE)
    spread = exposure.log().repeat_interleave(DEPTH_BINS, 1).repeat_interleave(DEPTH_BINS, 2)
    return spread[:, :height, :width]
