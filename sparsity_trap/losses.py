"""Links, likelihoods and their mean: what separates the arms.

The decoder ends in a linear output η per gene and bin. A *link* turns η into the predicted rate
λ > 0 (expected UMI count of the bin), and a *loss* compares λ with the count y: elementwise
functions below, averaged over genes and bins by an `Objective`.

The likelihoods take log λ and work in log space, finite in value and gradient at least for rates
from 1e-8 to 1e4 and counts up to 1e4. They leave out log y!, which depends on no parameter, so that
the negative binomial becomes the Poisson term by term as θ grows. Reports give deviances
(`metrics.poisson_deviance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsity_trap.bins import bin_mask
from sparsity_trap.settings import BIN_UM, Arm

#: Below this η, log softplus(η) = η to float32 precision, and softplus itself loses digits.
_LOG_SOFTPLUS_LINEAR = -15.0

#: Least rate per bin that `initial_eta` inverts: fewer than one UMI on any section.
RATE_FLOOR = 1e-8

#: Stirling's series replaces lgamma from this θ on; it is then exact to 3e-10.
_STIRLING_FROM = 8.0


def rate(eta: Tensor, link: str) -> Tensor:
    """Predicted rate λ of the linear output η (any shape)."""
    return torch.exp(eta) if link == "exp" else F.softplus(eta)


def log_rate(eta: Tensor, link: str) -> Tensor:
    """log λ of the linear output η, without underflow at very small rates."""
    if link == "exp":
        return eta
    linear = eta < _LOG_SOFTPLUS_LINEAR
    # The inner `where` keeps the unused branch finite, or its gradient would be NaN.
    safe = torch.where(linear, torch.zeros_like(eta), eta)
    return torch.where(linear, eta, torch.log(F.softplus(safe)))


def initial_eta(rate: Tensor, link: str) -> Tensor:
    """Linear output η whose rate is the given one: the inverse link.

    Parameters
    ----------
    rate
        Counts per bin, such as each gene's training mean, [G] or any shape. Rates below
        `RATE_FLOOR` are raised to it, so that a gene without a count starts at a finite η.
    link
        ``exp`` or ``softplus``.
    """
    rate = rate.clamp(min=RATE_FLOOR)
    # log(exp(λ) - 1), written so that neither a small nor a large λ loses digits
    return torch.log(rate) if link == "exp" else rate + torch.log(-torch.expm1(-rate))


def mse(rate: Tensor, count: Tensor) -> Tensor:
    """Squared error of the rate, (y − λ)², elementwise."""
    return (count - rate).square()


def mse_log1p(rate: Tensor, count: Tensor) -> Tensor:
    """Squared error on the log1p scale, (log(1 + y) − log(1 + λ))², elementwise.

    Its minimiser is not the conditional mean: it estimates exp(E log(1 + y)) − 1, which is smaller.
    """
    return (torch.log1p(count) - torch.log1p(rate)).square()


def poisson(log_rate: Tensor, count: Tensor) -> Tensor:
    """Poisson negative log likelihood without log y!: λ − y log λ, elementwise."""
    return torch.exp(log_rate) - count * log_rate


def negative_binomial(log_rate: Tensor, count: Tensor, log_dispersion: Tensor) -> Tensor:
    """Negative binomial negative log likelihood without log y!, elementwise.

    Parameters
    ----------
    log_rate
        log λ, any shape.
    count
        Counts y as floating point numbers, of the same shape.
    log_dispersion
        log θ, broadcast against them. The variance is λ + λ²/θ: Poisson as θ → ∞.

    Notes
    -----
    With a = log λ − log θ the terms are rearranged to

        (θ + y) log(1 + eᵃ) − y log λ − Σ_{k<y} log(1 + k/θ),

    none of which grows with θ: the first tends to λ, the sum to 0. The usual form subtracts
    lgamma(θ) from lgamma(y + θ), which in float32 leaves no digit from θ = 1e5 on. Good for
    log θ up to 60.
    """
    softplus = F.softplus(log_rate - log_dispersion)
    dispersion = torch.exp(log_dispersion)
    return (dispersion + count) * softplus - count * log_rate - _rising(count, log_dispersion)


def zero_inflated_nb(
    log_rate: Tensor, count: Tensor, log_dispersion: Tensor, zero_logit: Tensor
) -> Tensor:
    """Zero-inflated negative binomial negative log likelihood without log y!, elementwise.

    A bin is empty with probability π = sigmoid(``zero_logit``), else negative binomial with rate λ;
    its mean is (1 − π) λ. Shapes as in `negative_binomial`.
    """
    counted = negative_binomial(log_rate, count, log_dispersion)
    # −log(π + (1 − π) e^−counted) and −log(1 − π) + counted, both less softplus(logit)
    either = -torch.logaddexp(zero_logit, -counted)
    return F.softplus(zero_logit) + torch.where(count == 0, either, counted)


def _rising(count: Tensor, log_dispersion: Tensor) -> Tensor:
    """Σ_{k<y} log(1 + k/θ) = lgamma(y + θ) − lgamma(θ) − y log θ, without its cancellation."""
    if count.device.type != "cpu":
        return _rising_of(count, log_dispersion)
    # The sum is 0 for counts of 0 and 1, which most bins hold, and lgamma is slow. An accelerator
    # would have to tell the host how many bins are left.
    more = count > 1
    some = _rising_of(count[more], log_dispersion.expand_as(count)[more])
    return torch.zeros_like(count).masked_scatter(more, some)


def _rising_of(count: Tensor, log_dispersion: Tensor) -> Tensor:
    large = log_dispersion > math.log(_STIRLING_FROM)
    theta = torch.exp(log_dispersion)
    direct = torch.lgamma(count + theta) - torch.lgamma(theta) - count * log_dispersion
    # Powers of 1 / θ would overflow in the unused branch, and make its gradient NaN.
    theta = torch.exp(torch.where(large, log_dispersion, math.log(_STIRLING_FROM)))
    total = count + theta
    series = (total - 0.5) * torch.log1p(count / theta) - count
    return torch.where(large, series + _stirling(total) - _stirling(theta), direct)


def _stirling(x: Tensor) -> Tensor:
    """lgamma(x) − (x − ½) log x + x − ½ log 2π, for x ≥ 8 (Abramowitz and Stegun, 6.1.41)."""
    inverse = 1 / x
    square = inverse.square()
    return inverse * (1 / 12 - square * (1 / 360 - square / 1260))


#: Losses of the rate, and likelihoods of its logarithm with their parameters, one per gene.
_OF_RATE: dict[str, Callable[..., Tensor]] = {"mse": mse, "mse-log1p": mse_log1p}
_OF_LOG_RATE: dict[str, Callable[..., Tensor]] = {
    "poisson": poisson,
    "nb": negative_binomial,
    "zinb": zero_inflated_nb,
}

#: log λ of a bin off tissue in a sum over bins: no share of it, and finite.
_LOG_NOTHING = -1e4


class Objective(nn.Module):
    """Mean loss over genes, bins and resolutions, with the likelihood's own parameters.

    Parameters
    ----------
    loss
        ``mse``, ``mse-log1p``, ``poisson``, ``nb`` or ``zinb``.
    link
        ``exp`` or ``softplus``.
    genes
        Number of genes G.
    resolutions_um
        Bin widths, µm, at which rates and counts are compared; the means over bins are averaged
        over widths. For widths above 2 µm, rates (after the offset) and counts are summed over the
        tissue bins of each larger bin, which counts when more than half of it is tissue.
    masked
        Average over tissue bins; otherwise over all, and sum all.

    Attributes
    ----------
    log_dispersion
        log θ of each gene, [G], for ``nb`` and ``zinb``: the variance is λ + λ²/θ at every width.
        It starts at θ = 1.
    zero_logit
        logit π of each gene, [G], for ``zinb``: the share of bins emptied beyond the negative
        binomial. It starts at π = 0.05.

    Notes
    -----
    λ is the expected count under every loss. With ``zinb`` the negative binomial's own mean is
    therefore λ / (1 − π).
    """

    log_dispersion: Tensor
    zero_logit: Tensor

    def __init__(
        self,
        loss: str,
        link: str,
        genes: int,
        resolutions_um: Sequence[int] = (2,),
        masked: bool = True,
    ):
        super().__init__()
        self.loss, self.link, self.genes, self.masked = loss, link, genes, masked
        self.factors = bin_factors(resolutions_um)
        if loss in ("nb", "zinb"):
            self.log_dispersion = nn.Parameter(torch.zeros(genes))
        if loss == "zinb":
            self.zero_logit = nn.Parameter(torch.full((genes,), -3.0))

    def forward(
        self,
        eta: Tensor,
        count: Tensor,
        mask: Tensor,
        offset: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Mean loss, in float32 whatever the precision of η (float64 for float64).

        Parameters
        ----------
        eta
            Decoder output, [B, G, H, W].
        count
            Counts of any number type, [B, G, H, W].
        mask
            True in tissue, [B, H, W].
        offset
            Known log exposure of each bin, [B, H, W]: the counts are compared with λ exp(offset),
            so that λ itself does not have to explain it. Counts are never edited.
        shares
            Where these patches are a part of a batch: the part's share of the batch's bins at each
            width of ``factors``, so that the losses of all parts sum to the batch's.

        Returns
        -------
        Scalar, 0 where there is no tissue. Differentiable once on a CPU.
        """
        dtype = torch.promote_types(eta.dtype, torch.float32)
        tissue = mask if self.masked else torch.ones_like(mask)
        weights = []
        for i, factor in enumerate(self.factors):
            weight = bin_mask(tissue, factor).to(dtype)
            terms = weight.sum() * self.genes * len(self.factors)
            weight = weight / terms.clamp(min=1)
            weights.append(weight if shares is None else weight * shares[i])
        maps = (eta, count, tissue, None if offset is None else offset.to(dtype), weights)
        parameters = tuple(self.parameters())
        if eta.device.type == "cpu" and 1 in self.factors:
            return _Piecewise.apply(self, torch.is_grad_enabled(), *maps, *parameters)
        return self._weighted_sum(*maps, *parameters)

    def _weighted_sum(
        self,
        eta: Tensor,
        count: Tensor,
        tissue: Tensor,
        offset: Tensor | None,
        weights: list[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        """Sum of the elementwise loss times the weight [B, h, w] of its bin at each width."""
        dtype = weights[0].dtype
        eta, count = eta.to(dtype), count.to(dtype)
        parameters = tuple(p.to(dtype)[:, None, None] for p in parameters)
        in_log = self.loss in _OF_LOG_RATE
        elementwise = (_OF_LOG_RATE if in_log else _OF_RATE)[self.loss]
        # `seen` is the expected count of a bin, or its logarithm.
        seen = (log_rate if in_log else rate)(eta, self.link)
        if offset is not None:
            seen = seen + offset[:, None] if in_log else seen * torch.exp(offset)[:, None]
        if self.loss == "zinb":
            seen = seen + F.softplus(parameters[1])  # −log(1 − π)
        total, width = eta.new_zeros(()), 1
        for factor, weight in zip(self.factors, weights, strict=True):
            if factor > width:
                if width == 1 and self.masked:
                    seen = torch.where(tissue[:, None], seen, _LOG_NOTHING if in_log else 0.0)
                    count = count * tissue[:, None]
                seen = (_log_block_sum if in_log else _block_sum)(seen, factor // width)
                count = _block_sum(count, factor // width)
                width = factor
            total = total + (elementwise(seen, count, *parameters) * weight[:, None]).sum()
        return total


def bin_factors(resolutions_um: Sequence[int]) -> list[int]:
    """Widths at which a loss compares, in 2 µm bins, narrowest first."""
    return sorted({round(width / BIN_UM) for width in resolutions_um})


def objective(arm: Arm, genes: int) -> Objective:
    """Objective of an arm for the given number of genes."""
    return Objective(arm.loss, arm.link, genes, arm.resolutions_um, arm.masked)


def _block_sum(x: Tensor, factor: int) -> Tensor:
    """`binning.bin_sum` of floating point maps [B, G, H, W], twice as fast on a CPU."""
    return F.avg_pool2d(x, factor, divisor_override=1)


def _log_block_sum(log: Tensor, factor: int) -> Tensor:
    """Logarithm of the sum over ``factor`` × ``factor`` bins of exp(log), [B, G, H, W].

    Rates from 1e-38 to 1e38 need no shift by their maximum, which `torch.logsumexp` would take
    three times as long for. Below, the logarithm stays finite.
    """
    total = _block_sum(torch.exp(log), factor)
    return torch.log(total.clamp(min=torch.finfo(total.dtype).tiny))


#: Elements per piece on the CPU: a piece and its temporaries stay in the second-level cache.
_PIECE = 1 << 18


class _Piecewise(torch.autograd.Function):
    """`Objective._weighted_sum` on a CPU, with its gradient found piece by piece.

    At 2 µm the elementwise loss, not the decoder, is what a CPU spends its time on: each operation
    streams [B, G, 128, 128] through memory. Working through cache-sized pieces avoids that and
    holds one gradient instead of every intermediate. Larger bins alone are too few to gain. An
    accelerator hides memory traffic better than it hides launches and takes the batch as a whole.
    """

    @staticmethod
    def forward(ctx, objective, with_gradient, eta, count, tissue, offset, weights, *parameters):
        genes = max(1, _PIECE // (eta.shape[-2] * eta.shape[-1]))
        gradients = [torch.empty_like(eta), *(torch.zeros_like(p) for p in parameters)]
        total = 0.0
        for b in range(eta.shape[0]):
            row = slice(b, b + 1)
            around = (
                tissue[row],
                None if offset is None else offset[row],
                [weight[row] for weight in weights],
            )
            for g in range(0, eta.shape[1], genes):
                some = slice(g, g + genes)
                inputs = [x.detach() for x in (eta[row, some], *(p[some] for p in parameters))]
                with torch.set_grad_enabled(with_gradient):
                    if with_gradient:
                        inputs = [x.requires_grad_() for x in inputs]
                    piece, *own = inputs
                    value = objective._weighted_sum(piece, count[row, some], *around, *own)
                if with_gradient:
                    found = torch.autograd.grad(value, inputs)
                    gradients[0][row, some] = found[0]
                    for gradient, part in zip(gradients[1:], found[1:], strict=True):
                        gradient[some] += part
                total += value.item()
        ctx.save_for_backward(*gradients)
        return weights[0].new_tensor(total)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradients = ctx.saved_tensors
        if upstream != 1:  # spares a pass over memory where nothing scales the loss
            gradients = [gradient * upstream.to(gradient.dtype) for gradient in gradients]
        return None, None, gradients[0], None, None, None, None, *gradients[1:]
