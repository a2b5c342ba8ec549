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

from sparsity_trap._piecewise import piecewise
from sparsity_trap.bins import BIN_UM, bin_mask

#: What turns η into a rate, and what compares the rate with a count.
LINKS = ("softplus", "exp")
LOSSES = ("mse", "mse-log1p", "poisson", "nb")

#: Below this η, log softplus(η) = η to float32 precision, and softplus itself loses digits.
_LOG_SOFTPLUS_LINEAR = -15.0

#: Least rate per bin that `initial_eta` inverts: fewer than one UMI on any section.
LEAST_INITIAL_RATE = 1e-8

#: Stirling's series replaces lgamma from this θ on; it is then exact to 3e-10.
_STIRLING_FROM = 8.0


def _check(what: str, name: str, choices: Sequence[str]) -> None:
    if name not in choices:
        raise ValueError(f"{what} '{name}' is unknown: choose one of {', '.join(choices)}")


def rate(eta: Tensor, link: str) -> Tensor:
    """Predicted rate λ, expected counts per 2 µm bin, of the linear output η.

    Parameters
    ----------
    eta
        Decoder output, any shape.
    link
        ``exp`` or ``softplus``.

    Raises
    ------
    ValueError
        For an unknown link.

    Examples
    --------
    >>> import torch, sparsity_trap as st
    >>> st.rate(torch.tensor([0.0]), "exp")
    tensor([1.])
    """
    _check("link", link, LINKS)
    return torch.exp(eta) if link == "exp" else F.softplus(eta)


def log_rate(eta: Tensor, link: str) -> Tensor:
    """log λ of the linear output η, without underflow at very small rates; as `rate`."""
    _check("link", link, LINKS)
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
        `LEAST_INITIAL_RATE` are raised to it, so that a gene without a count starts at a finite η.
    link
        ``exp`` or ``softplus``.

    Raises
    ------
    ValueError
        For an unknown link.

    Examples
    --------
    >>> import torch, sparsity_trap as st
    >>> st.losses.initial_eta(torch.tensor([1.0]), "exp")
    tensor([0.])
    """
    _check("link", link, LINKS)
    rate = rate.clamp(min=LEAST_INITIAL_RATE)
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
_OF_LOG_RATE: dict[str, Callable[..., Tensor]] = {"poisson": poisson, "nb": negative_binomial}

#: log λ of a bin off tissue in a sum over bins: no share of it, and finite.
_LOG_NOTHING = -1e4


class Objective(nn.Module):
    """Mean loss over genes, bins and resolutions, with the likelihood's own parameters.

    Parameters
    ----------
    loss
        ``mse``, ``mse-log1p``, ``poisson`` or ``nb``.
    link
        ``exp`` or ``softplus``.
    genes
        Number of genes G.
    resolutions_um
        Bin widths, µm, at which rates and counts are compared; the means over bins are averaged
        over widths. For widths above 2 µm, rates and counts are summed over the tissue bins of each
        larger bin, which counts when more than half of it is tissue.
    masked
        Average over tissue bins; otherwise over all, and sum all.

    Attributes
    ----------
    log_dispersion
        log θ of each gene, [G], for ``nb``: the variance is λ + λ²/θ at every width. It starts at
        θ = 1.

    Raises
    ------
    ValueError
        For an unknown loss or link.

    Examples
    --------
    >>> import torch, sparsity_trap as st
    >>> objective = st.Objective("poisson", link="exp", genes=5)
    >>> eta = torch.zeros(1, 5, 16, 16, requires_grad=True)
    >>> loss = objective(eta, torch.ones(1, 5, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool))
    >>> round(loss.item(), 4)
    1.0
    """

    log_dispersion: Tensor

    def __init__(
        self,
        loss: str,
        link: str,
        genes: int,
        resolutions_um: Sequence[int] = (2,),
        masked: bool = True,
    ):
        super().__init__()
        _check("loss", loss, LOSSES)
        _check("link", link, LINKS)
        self.loss, self.link, self.genes, self.masked = loss, link, genes, masked
        self.factors = bin_factors(resolutions_um)
        if loss == "nb":
            self.log_dispersion = nn.Parameter(torch.zeros(genes))

    def forward(self, eta: Tensor, counts: Tensor, mask: Tensor) -> Tensor:
        """Mean loss, in float32 whatever the precision of η (float64 for float64).

        Parameters
        ----------
        eta
            Decoder output, [B, G, H, W].
        counts
            Counts of any number type, [B, G, H, W].
        mask
            True in tissue, [B, H, W].

        Returns
        -------
        Scalar, 0 where there is no tissue. Differentiable once on a CPU.
        """
        dtype = torch.promote_types(eta.dtype, torch.float32)
        tissue = mask if self.masked else torch.ones_like(mask)
        weights = []
        for factor in self.factors:
            weight = bin_mask(tissue, factor).to(dtype)
            terms = weight.sum() * self.genes * len(self.factors)
            weights.append(weight / terms.clamp(min=1))
        maps, parameters = (eta, counts, tissue, weights), tuple(self.parameters())
        # On a CPU the elementwise loss at 2 µm takes longer than the decoder, unless it is cut up.
        if eta.device.type == "cpu" and 1 in self.factors:
            return piecewise(self._weighted_sum, *maps, *parameters)
        return self._weighted_sum(*maps, *parameters)

    def _weighted_sum(
        self,
        eta: Tensor,
        counts: Tensor,
        tissue: Tensor,
        weights: list[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        """Sum of the elementwise loss times the weight [B, h, w] of its bin at each width."""
        dtype = weights[0].dtype
        eta, counts = eta.to(dtype), counts.to(dtype)
        parameters = tuple(p.to(dtype)[:, None, None] for p in parameters)
        in_log = self.loss in _OF_LOG_RATE
        elementwise = (_OF_LOG_RATE if in_log else _OF_RATE)[self.loss]
        # `seen` is the expected count of a bin, or its logarithm.
        seen = (log_rate if in_log else rate)(eta, self.link)
        total, width = eta.new_zeros(()), 1
        for factor, weight in zip(self.factors, weights, strict=True):
            if factor > width:
                if width == 1 and self.masked:
                    seen = torch.where(tissue[:, None], seen, _LOG_NOTHING if in_log else 0.0)
                    counts = counts * tissue[:, None]
                seen = (_log_block_sum if in_log else _block_sum)(seen, factor // width)
                counts = _block_sum(counts, factor // width)
                width = factor
            total = total + (elementwise(seen, counts, *parameters) * weight[:, None]).sum()
        return total


def bin_factors(resolutions_um: Sequence[int]) -> list[int]:
    """Widths at which a loss compares, in 2 µm bins, narrowest first."""
    return sorted({round(width / BIN_UM) for width in resolutions_um})


def _block_sum(x: Tensor, factor: int) -> Tensor:
    """`bins.bin_sum` of floating point maps [B, G, H, W], twice as fast on a CPU."""
    return F.avg_pool2d(x, factor, divisor_override=1)


def _log_block_sum(log: Tensor, factor: int) -> Tensor:
    """Logarithm of the sum over ``factor`` × ``factor`` bins of exp(log), [B, G, H, W].

    Rates from 1e-38 to 1e38 need no shift by their maximum, which `torch.logsumexp` would take
    three times as long for. Below, the logarithm stays finite.
    """
    total = _block_sum(torch.exp(log), factor)
    return torch.log(total.clamp(min=torch.finfo(total.dtype).tiny))
