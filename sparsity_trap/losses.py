"""Links, losses and the head bias: what separates the arms.

The decoder ends in a linear output η per gene and bin. A *link* turns η into the predicted rate
λ > 0 (expected UMI count of the bin), and a *loss* compares λ with the count y. All losses are
averaged over in-tissue bins and genes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: Below this η, log softplus(η) = η to float32 precision, and softplus itself loses digits.
_LOG_SOFTPLUS_LINEAR = -15.0


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


def mse(eta: Tensor, count: Tensor, link: str, offset: Tensor | None = None) -> Tensor:
    """Squared error of the rate, (y − λ)², elementwise."""
    return (count - _exposed(rate(eta, link), offset)).square()


def mse_log1p(eta: Tensor, count: Tensor, link: str, offset: Tensor | None = None) -> Tensor:
    """Squared error on the log1p scale, (log(1 + y) − log(1 + λ))², elementwise.

    Its minimiser is not the conditional mean: it estimates exp(E log(1 + y)) − 1, which is smaller.
    """
    return (torch.log1p(count) - torch.log1p(_exposed(rate(eta, link), offset))).square()


def poisson(eta: Tensor, count: Tensor, link: str, offset: Tensor | None = None) -> Tensor:
    """Poisson negative log likelihood without its constant, λ − y log λ, elementwise.

    The term log y! does not depend on λ. Reports give the deviance (`metrics.poisson_deviance`).
    """
    log = log_rate(eta, link)
    if offset is not None:
        log = log + offset
    return _exposed(rate(eta, link), offset) - count * log


def _exposed(rate: Tensor, offset: Tensor | None) -> Tensor:
    """Rate seen through a known log exposure, such as a bin's stripe."""
    return rate if offset is None else rate * torch.exp(offset)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": mse,
    "mse-log1p": mse_log1p,
    "poisson": poisson,
}


#: Elements per piece on the CPU: a piece and its temporaries stay in the second-level cache.
_PIECE = 1 << 18


class _MaskedMean(torch.autograd.Function):
    """Masked mean of an elementwise loss, with its gradient found piece by piece.

    At 2 µm the elementwise loss, not the decoder, is what a CPU spends its time on: each operation
    streams [B, G, 128, 128] through memory. Working through cache-sized pieces avoids that and
    holds one gradient instead of every intermediate.
    """

    @staticmethod
    def forward(ctx, eta, count, mask, loss, link, offset):
        weight = mask[:, None].to(eta.dtype)
        weight = weight / (weight.sum() * eta.shape[1]).clamp(min=1)
        bins = eta.shape[-2] * eta.shape[-1]
        # An accelerator hides memory traffic better than it hides launches: one piece per patch.
        genes = eta.shape[1] if eta.is_cuda else max(1, _PIECE // bins)
        gradient = torch.empty_like(eta)
        total = eta.new_zeros((), dtype=torch.float64)
        for b in range(eta.shape[0]):
            for g in range(0, eta.shape[1], genes):
                piece = eta[b, g : g + genes].detach().requires_grad_()
                with torch.enable_grad():
                    y = count[b, g : g + genes].to(eta.dtype)
                    seen = None if offset is None else offset[b]
                    value = (loss(piece, y, link, seen) * weight[b]).sum()
                    gradient[b, g : g + genes] = torch.autograd.grad(value, piece)[0]
                total += value.detach()
        ctx.save_for_backward(gradient)
        return total.to(eta.dtype)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None, None, None, None, None


def masked_mean(
    name: str,
    eta: Tensor,
    count: Tensor,
    mask: Tensor,
    link: str,
    offset: Tensor | None = None,
) -> Tensor:
    """Mean loss over in-tissue bins and all genes, differentiable once in η.

    Parameters
    ----------
    name
        Key of `LOSSES`.
    eta
        Decoder output, [B, G, H, W].
    count
        Counts of any number type, [B, G, H, W].
    mask
        True in tissue, [B, H, W].
    link
        ``exp`` or ``softplus``.
    offset
        Known log exposure of each bin, [B, H, W]: the counts are compared with λ exp(offset), so
        that λ itself does not have to explain it. Counts are never edited.
    """
    return _MaskedMean.apply(eta, count, mask, LOSSES[name], link, offset)
