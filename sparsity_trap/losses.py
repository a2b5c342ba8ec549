"""Links, likelihoods and their mean: what separates the arms.

The decoder ends in a linear output η per gene and bin. A *link* turns η into the predicted rate
λ > 0 (expected UMI count of the bin), and a *loss* compares λ with the count y: elementwise
functions below and those of `map_losses`, which couple bins, averaged by an `Objective`.

The likelihoods take log λ and work in log space, finite in value and gradient at least for rates
from 1e-8 to 1e4 and counts up to 1e4. They leave out log y!, which depends on no parameter, so that
the negative binomial becomes the Poisson term by term as θ grows. Reports give deviances
(`metrics.poisson_deviance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap import map_losses
from sparsity_trap._piecewise import piecewise
from sparsity_trap.bins import BIN_UM, bin_mask
from sparsity_trap.map_losses import LOG_NOTHING

#: What turns η into a rate, and what compares the rate with a count.
LINKS = ("softplus", "exp")
LOSSES = (
    "mse", "mse-log1p", "poisson", "nb",
    "power-0", "power-0.5", "power-1", "power-1.5", "power-2",
    "l1", "sqrt", "presence", "hurdle", "zinb", "poisson-depth",
    "pearson", "mse+pearson", "mse+ssim", "multinomial", "multinomial-depth",
)  # fmt: skip

#: Below this η, log softplus(η) = η to float32 precision, and softplus itself loses digits.
_LOG_SOFTPLUS_LINEAR = -15.0

#: Least rate per bin that `initial_eta` inverts: fewer than one UMI on any section.
LEAST_INITIAL_RATE = 1e-8

#: Rates below exp of this are raised to it where a loss would divide by them, and have no gradient.
_LEAST_LOG_RATE = -40.0

#: Below this log λ, log(1 − exp(−λ)) = log λ to float32 precision.
_LOG_PRESENCE_LINEAR = -15.0

#: Added to counts and rates by `sqrt`: Anscombe's choice.
_ANSCOMBE = 3 / 8

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
    """Squared error of the rate, (y − λ)², elementwise. Minimiser: E[y | x]."""
    return (count - rate).square()


def mse_log1p(rate: Tensor, count: Tensor) -> Tensor:
    """Squared error on the log1p scale, (log(1 + y) − log(1 + λ))², elementwise.

    Its minimiser is not the conditional mean: it estimates exp(E log(1 + y)) − 1, which is smaller.
    """
    return (torch.log1p(count) - torch.log1p(rate)).square()


def l1(rate: Tensor, count: Tensor) -> Tensor:
    """Absolute error of the rate, |y − λ|, elementwise.

    Minimiser: the conditional median, which is 0 wherever fewer than half of the bins hold a count.
    The gradient in λ is the sign of the residual, whatever its size.
    """
    return (count - rate).abs()


def sqrt(rate: Tensor, count: Tensor) -> Tensor:
    """Squared error on Anscombe's scale, (2 √(y + 3/8) − 2 √(λ + 3/8))², elementwise.

    Minimiser: (E √(y + 3/8))² − 3/8, below the mean. Its weight on small residuals is 1 / (λ + 3/8)
    times that of half the squared error: Poisson's for large rates, constant for small ones, where
    the root no longer evens out the variance (Anscombe 1948, Biometrika 35, 246–254).
    """
    return 4 * (torch.sqrt(count + _ANSCOMBE) - torch.sqrt(rate + _ANSCOMBE)).square()


def poisson(log_rate: Tensor, count: Tensor) -> Tensor:
    """Poisson negative log likelihood without log y!: λ − y log λ, elementwise."""
    return torch.exp(log_rate) - count * log_rate


def power(log_rate: Tensor, count: Tensor, p: float) -> Tensor:
    """Quasi-likelihood of counts with variance λᵖ, elementwise: λ²⁻ᵖ / (2 − p) − y λ¹⁻ᵖ / (1 − p).

    Parameters
    ----------
    log_rate
        log λ, any shape.
    count
        Counts y, of the same shape.
    p
        0 is half the squared error without y² / 2; 1 (limit λ − y log λ) is Poisson; 2 (limit
        y / λ + log λ) is the gamma likelihood.

    Notes
    -----
    Minimiser: E[y | x] for every p. The gradient in λ is (λ − y) / λᵖ: p turns nothing but the
    weight 1 / λᵖ of the residual (quasi-likelihood, McCullagh and Nelder 1989).

    Where all counts are 0, p = 2 falls without end as λ → 0; rates below exp(−40) are raised to it.
    """
    if p == 1:
        return poisson(log_rate, count)
    if p > 1:  # divides by the rate
        log_rate = log_rate.clamp(min=_LEAST_LOG_RATE)
    growing = log_rate if p == 2 else torch.exp((2 - p) * log_rate) / (2 - p)
    return growing - count * torch.exp((1 - p) * log_rate) / (1 - p)


def presence(log_rate: Tensor, count: Tensor) -> Tensor:
    """Binary cross-entropy of y > 0, with P(y > 0) = 1 − exp(−λ), elementwise.

    Notes
    -----
    Minimiser: −log P(y = 0 | x), the mean of Poisson counts and below it for more variable ones.
    In log λ the gradient is λ / P(y > 0) times the residual of presence, a weight near 1 where
    counts are sparse. The relation is the complementary log-log link; counts above 1 say no more
    than 1 does.
    """
    return torch.where(count > 0, -_log_presence(log_rate), torch.exp(log_rate))


def hurdle(log_rate: Tensor, count: Tensor, log_offset: Tensor) -> Tensor:
    """Presence as in `presence`, and zero-truncated Poisson counts where present, elementwise.

    λ for y = 0; −log(1 − e^−λ) + μ − y log μ + log(1 − e^−μ) for y > 0, with μ = λ e^offset.

    Parameters
    ----------
    log_rate
        log λ, any shape.
    count
        Counts y, of the same shape.
    log_offset
        Logarithm of the rate of truncated counts over that of presence, broadcast. With one rate
        for both, an offset of 0, this *is* the Poisson likelihood.

    Notes
    -----
    Minimiser: as `presence` while counts above 1 are rare. The expected count is
    (1 − e^−λ) μ / (1 − e^−μ), which is λ for small rates. Hurdle models: Mullahy 1986, Journal of
    Econometrics 33, 341–365.
    """
    log_positive = log_rate + log_offset
    truncated = poisson(log_positive, count) + _log_presence(log_positive)
    return presence(log_rate, count) + torch.where(count > 0, truncated, 0.0)


def _log_presence(log_rate: Tensor) -> Tensor:
    """log(1 − exp(−λ)), without underflow at very small rates."""
    linear = log_rate < _LOG_PRESENCE_LINEAR
    # As in `log_rate`, the unused branch stays finite.
    safe = torch.where(linear, torch.zeros_like(log_rate), log_rate)
    return torch.where(linear, log_rate, torch.log(-torch.expm1(-torch.exp(safe))))


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


def zero_inflated(
    log_rate: Tensor, count: Tensor, log_dispersion: Tensor, inflation_logit: Tensor
) -> Tensor:
    """Zero-inflated negative binomial negative log likelihood without log y!, elementwise.

    −log(π + (1 − π) NB(0)) for y = 0 and −log(1 − π) − log NB(y) for y > 0.

    Parameters
    ----------
    log_rate
        log λ, any shape. λ is the expected count: NB has the mean λ / (1 − π).
    count, log_dispersion
        As for `negative_binomial`.
    inflation_logit
        log(π / (1 − π)), broadcast; π → 0 gives the negative binomial.

    Notes
    -----
    Minimiser: E[y | x] where the model holds. Hist2ST trains with it beside squared error, with π
    and θ of each spot and gene (github.com/biomed-AI/Hist2ST, ``NB_module.py``).
    """
    present = F.softplus(inflation_logit)  # −log(1 − π)
    given = negative_binomial(log_rate + present, count, log_dispersion) + present
    return torch.where(count > 0, given, -torch.logaddexp(inflation_logit - present, -given))


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


#: Elementwise losses of the rate, and of its logarithm.
_OF_RATE: dict[str, Callable[..., Tensor]] = {
    "mse": mse, "mse-log1p": mse_log1p, "l1": l1, "sqrt": sqrt,
}  # fmt: skip
_OF_LOG_RATE: dict[str, Callable[..., Tensor]] = {
    "poisson": poisson, "poisson-depth": poisson, "nb": negative_binomial, "zinb": zero_inflated,
    "presence": presence, "hurdle": hurdle,
    **{f"power-{p:g}": partial(power, p=p) for p in (0, 0.5, 1, 1.5, 2)},
}  # fmt: skip

#: Parameters of a likelihood, one per gene, in the order it takes them, and where they start.
_PARAMETERS: dict[str, dict[str, float]] = {
    "nb": {"log_dispersion": 0.0},
    "zinb": {"log_dispersion": 0.0, "inflation_logit": -3.0},
    "hurdle": {"log_offset": 0.0},
}


class Objective(nn.Module):
    """Mean loss over genes, bins and resolutions, with the likelihood's own parameters.

    Parameters
    ----------
    loss
        One of `LOSSES`. Elementwise: ``mse``, ``mse-log1p``, ``l1``, ``sqrt``, ``poisson``, ``nb``,
        ``zinb``, ``presence``, ``hurdle``, and ``power-p`` for the quasi-likelihood of variance λᵖ.
        Over maps: ``pearson``, ``mse+pearson``, ``mse+ssim``, ``multinomial``.

        ``poisson-depth`` and ``multinomial-depth`` multiply λ by the exposure of the bin
        (`map_losses.log_exposure`), which the counts themselves tell. So the local depth, technical
        or of dense tissue, is conditioned out: λ is the count at mean depth, in proportion to the
        other genes. A prediction knows no counts, so the exposure is left out there.
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
    gene_weight
        Positive weight of each gene's loss, [G], kept as a buffer and divided by its mean, so that
        losses with and without weights are of similar size.
    mean_depth
        Mean total count of a 2 µm tissue bin over the panel, for losses with an exposure; by
        default that of each batch.

    Attributes
    ----------
    log_dispersion
        log θ of each gene, [G], for ``nb`` and ``zinb``: the variance (of counts that are not
        inflated zeros) is μ + μ²/θ at every width. It starts at θ = 1.
    inflation_logit
        log(π / (1 − π)) of each gene, [G], for ``zinb``; it starts at π = 0.05.
    log_offset
        Of ``hurdle``, [G]; it starts at 0.

    Raises
    ------
    ValueError
        For an unknown loss or link, or weights that are not G positive numbers.

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
    inflation_logit: Tensor
    log_offset: Tensor
    gene_weight: Tensor | None

    def __init__(
        self,
        loss: str,
        link: str,
        genes: int,
        resolutions_um: Sequence[int] = (2,),
        masked: bool = True,
        gene_weight: Tensor | None = None,
        mean_depth: float | None = None,
    ):
        super().__init__()
        _check("loss", loss, LOSSES)
        _check("link", link, LINKS)
        self.loss, self.link, self.genes, self.masked = loss, link, genes, masked
        self.factors = bin_factors(resolutions_um)
        self.mean_depth, self.with_exposure = mean_depth, loss.endswith("-depth")
        self.in_log = loss in _OF_LOG_RATE or loss in map_losses.OF_LOG_RATE
        for name, start in _PARAMETERS.get(loss, {}).items():
            self.register_parameter(name, nn.Parameter(torch.full((genes,), start)))
        if gene_weight is not None:
            gene_weight = gene_weight.detach().float()
            if gene_weight.shape != (genes,) or not (gene_weight > 0).all():
                raise ValueError(f"gene_weight must hold {genes} positive numbers, one per gene")
            gene_weight = gene_weight / gene_weight.mean()
        self.register_buffer("gene_weight", gene_weight)

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
        around = []
        if self.with_exposure:
            around = [map_losses.log_exposure(counts, tissue, self.mean_depth).to(dtype)]
        if self.loss in map_losses.OF_RATE or self.loss in map_losses.OF_LOG_RATE:
            return self._over_maps(eta.to(dtype), counts.to(dtype), tissue, *around)
        for factor in reversed(self.factors):
            weight = bin_mask(tissue, factor).to(dtype)
            terms = weight.sum() * self.genes * len(self.factors)
            around.insert(0, weight / terms.clamp(min=1))
        maps = (eta, counts, tissue, around)
        parameters = (*self.parameters(), *self.buffers())
        # On a CPU the elementwise loss at 2 µm takes longer than the decoder, unless it is cut up.
        if eta.device.type == "cpu" and 1 in self.factors:
            return piecewise(self._weighted_sum, *maps, *parameters)
        return self._weighted_sum(*maps, *parameters)

    def _weighted_sum(
        self,
        eta: Tensor,
        counts: Tensor,
        tissue: Tensor,
        around: list[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        """Sum of the elementwise loss times the weight [B, h, w] of its bin at each width.

        ``around`` has the weights and, where the loss takes one, the log exposure; ``parameters``
        those of the likelihood and, where there is one, the weight of each gene.
        """
        dtype = around[0].dtype
        eta, counts = eta.to(dtype), counts.to(dtype)
        own = [p.to(dtype)[:, None, None] for p in parameters]
        gene_weight = own.pop() if self.gene_weight is not None else None
        elementwise = (_OF_LOG_RATE if self.in_log else _OF_RATE)[self.loss]
        weights, exposure = around[: len(self.factors)], around[len(self.factors) :]
        total = eta.new_zeros(())
        levels = self._levels(eta, counts, tissue, *exposure)
        for weight, (seen, count) in zip(weights, levels, strict=True):
            value = elementwise(seen, count, *own) * weight[:, None]
            total = total + (value if gene_weight is None else value * gene_weight).sum()
        return total

    def _over_maps(self, eta: Tensor, counts: Tensor, tissue: Tensor, *exposure: Tensor) -> Tensor:
        """Mean over genes and widths of a loss that couples bins."""
        over_map = (map_losses.OF_LOG_RATE if self.in_log else map_losses.OF_RATE)[self.loss]
        levels = self._levels(eta, counts, tissue, *exposure)
        values = [
            over_map(seen, count, bin_mask(tissue, factor))
            for factor, (seen, count) in zip(self.factors, levels, strict=True)
        ]
        mean = torch.stack(values).mean(0)
        return (mean if self.gene_weight is None else mean * self.gene_weight).mean()

    def _levels(
        self, eta: Tensor, counts: Tensor, tissue: Tensor, *exposure: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Expected counts, or their logarithms, and counts of the bins of each width."""
        seen = (log_rate if self.in_log else rate)(eta, self.link)
        for log_exposure in exposure:
            seen = seen + log_exposure[:, None]
        width = 1
        for factor in self.factors:
            if factor > width:
                if width == 1 and self.masked:
                    seen = torch.where(tissue[:, None], seen, LOG_NOTHING if self.in_log else 0.0)
                    counts = counts * tissue[:, None]
                seen = (_log_block_sum if self.in_log else _block_sum)(seen, factor // width)
                counts = _block_sum(counts, factor // width)
                width = factor
            yield seen, counts


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
