"""Links, and the mean of a loss: what separates the arms.

The decoder ends in a linear output η per gene and bin. A *link* turns η into the predicted rate
λ > 0 (expected UMI count of the bin), and a *loss* compares λ with the count y. The losses of
single bins are in `bin_losses`, those that couple bins in `map_losses`; an `Objective` takes their
mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap import bin_losses, map_losses
from sparsity_trap._fused import applies, fused
from sparsity_trap._piecewise import piecewise
from sparsity_trap.bin_losses import (
    hurdle,
    l1,
    mse,
    mse_log1p,
    negative_binomial,
    poisson,
    power,
    presence,
    sqrt,
    zero_inflated,
)  # fmt: skip
from sparsity_trap.bins import BIN_UM, bin_mask

__all__ = [
    "LEAST_INITIAL_RATE", "LINKS", "LOSSES", "Objective", "bin_factors", "hurdle", "initial_eta",
    "l1", "log_rate", "mse", "mse_log1p", "negative_binomial", "poisson", "power", "presence",
    "rate", "sqrt", "zero_inflated",
]  # fmt: skip

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


#: log λ of a bin off tissue in a sum over bins: no share of it, and finite.
_LOG_NOTHING = -1e4

_OF_RATE = bin_losses.OF_RATE | map_losses.OF_RATE
_OF_LOG_RATE = bin_losses.OF_LOG_RATE | map_losses.OF_LOG_RATE


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


class Objective(nn.Module):
    """Mean loss over genes, bins and resolutions, with the likelihood's own parameters.

    Parameters
    ----------
    loss
        One of `LOSSES`: those of single bins are described in `bin_losses`, ``pearson``,
        ``mse+pearson``, ``mse+ssim`` and ``multinomial`` in `map_losses`. ``power-p`` has the
        variance λᵖ. With ``-depth``, λ is multiplied by the exposure of the bin
        (`map_losses.log_exposure`), which its counts tell: the local depth, technical or of dense
        tissue, is conditioned out, and λ is the count at mean depth. A prediction knows no counts;
        there the exposure is left out.
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
    inflation_logit, log_offset
        Of each gene, [G], for ``zinb`` and for ``hurdle``; they start at π = 0.05 and at 0.

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
        self.in_log = loss in _OF_LOG_RATE
        self.over_maps = loss in map_losses.OF_RATE | map_losses.OF_LOG_RATE
        self.compare = (_OF_RATE | _OF_LOG_RATE)[loss]
        for name, start in bin_losses.PARAMETERS.get(loss, {}).items():
            self.register_parameter(name, nn.Parameter(torch.full((genes,), start)))
        weight = None if gene_weight is None else _of_mean_one(gene_weight, genes)
        self.register_buffer("gene_weight", weight)

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
        if self.over_maps:
            return self._over_maps(eta.to(dtype), counts.to(dtype), tissue, around)
        for factor in reversed(self.factors):
            weight = bin_mask(tissue, factor).to(dtype)
            terms = weight.sum() * self.genes * len(self.factors)
            around.insert(0, weight / terms.clamp(min=1))
        if applies(self.loss, eta, counts, self.factors):
            own = getattr(self, "log_dispersion", None)
            weight = around[0].to(eta.dtype)
            return fused(self.loss, self.link, eta, counts, weight, self.gene_weight, own)
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
        weights, exposure = around[: len(self.factors)], around[len(self.factors) :]
        total = eta.new_zeros(())
        levels = _levels(self, eta, counts, tissue, exposure)
        for weight, (seen, count) in zip(weights, levels, strict=True):
            value = self.compare(seen, count, *own) * weight[:, None]
            total = total + (value if gene_weight is None else value * gene_weight).sum()
        return total

    def _over_maps(
        self, eta: Tensor, counts: Tensor, tissue: Tensor, exposure: list[Tensor]
    ) -> Tensor:
        """Mean over genes and widths of a loss that couples bins."""
        levels = _levels(self, eta, counts, tissue, exposure)
        values = [
            self.compare(seen, count, bin_mask(tissue, factor))
            for factor, (seen, count) in zip(self.factors, levels, strict=True)
        ]
        mean = torch.stack(values).mean(0)
        return (mean if self.gene_weight is None else mean * self.gene_weight).mean()


def _of_mean_one(gene_weight: Tensor, genes: int) -> Tensor:
    gene_weight = gene_weight.detach().float()
    if gene_weight.shape != (genes,) or not (gene_weight > 0).all():
        raise ValueError(f"gene_weight must hold {genes} positive numbers, one per gene")
    return gene_weight / gene_weight.mean()


def bin_factors(resolutions_um: Sequence[int]) -> list[int]:
    """Widths at which a loss compares, in 2 µm bins, narrowest first."""
    return sorted({round(width / BIN_UM) for width in resolutions_um})


def _levels(
    objective: Objective, eta: Tensor, counts: Tensor, tissue: Tensor, exposure: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Expected counts of the bins of each width, or their logarithms, and counts."""
    in_log = objective.in_log
    seen = (log_rate if in_log else rate)(eta, objective.link)
    for log_exposure in exposure:
        seen = seen + log_exposure[:, None]
    width = 1
    for factor in objective.factors:
        if factor > width:
            if width == 1 and objective.masked:
                seen = torch.where(tissue[:, None], seen, _LOG_NOTHING if in_log else 0.0)
                counts = counts * tissue[:, None]
            seen = (_log_block_sum if in_log else _block_sum)(seen, factor // width)
            counts = _block_sum(counts, factor // width)
            width = factor
        yield seen, counts


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
