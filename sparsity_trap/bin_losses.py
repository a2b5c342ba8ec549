"""Losses of one bin at a time, elementwise.

Squared errors and the absolute error take the rate λ, the others its logarithm. These work in log
space, finite in value and gradient at least for rates from 1e-8 to 1e4 and counts up to 1e4. They
leave out log y!, which depends on no parameter, so that the negative binomial becomes the Poisson
term by term as θ grows. Reports give deviances (`metrics.poisson_deviance`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rates below exp of this are raised to it where a loss would divide by them, and have no gradient.
_LEAST_LOG_RATE = -40.0

#: Below this log λ, log(1 − exp(−λ)) = log λ to float32 precision.
_LOG_PRESENCE_LINEAR = -15.0

#: Added to counts and rates by `sqrt`: Anscombe's choice.
_ANSCOMBE = 3 / 8

#: Stirling's series replaces lgamma from this θ on; it is then exact to 3e-10.
_STIRLING_FROM = 8.0


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

    Minimiser: (E √(y + 3/8))² − 3/8, below the mean. The gradient in λ is about 2 / (λ + 3/8) times
    a small residual: twice Poisson's weight for large rates, constant for small ones, where the
    root no longer evens out the variance (Anscombe 1948, Biometrika 35, 246–254).
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
    Minimiser: E[y | x] where the model holds. Hist2ST trains with it beside squared error of
    logarithms, with π and θ of each spot and gene and the spot's total as exposure
    (github.com/biomed-AI/Hist2ST, ``NB_module.py``).
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


#: Losses of the rate, and of its logarithm.
OF_RATE: dict[str, Callable[..., Tensor]] = {
    "mse": mse, "mse-log1p": mse_log1p, "l1": l1, "sqrt": sqrt,
}  # fmt: skip
OF_LOG_RATE: dict[str, Callable[..., Tensor]] = {
    "poisson": poisson, "poisson-depth": poisson, "nb": negative_binomial, "zinb": zero_inflated,
    "presence": presence, "hurdle": hurdle,
    **{f"power-{p:g}": partial(power, p=p) for p in (0, 0.5, 1, 1.5, 2)},
}  # fmt: skip

#: Parameters of a likelihood, one per gene, in the order it takes them, and where they start.
PARAMETERS: dict[str, dict[str, float]] = {
    "nb": {"log_dispersion": 0.0},
    "zinb": {"log_dispersion": 0.0, "inflation_logit": -3.0},
    "hurdle": {"log_offset": 0.0},
}
