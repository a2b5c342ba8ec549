"""Losses at 2 µm on a CPU, with their gradient in η, in one compiled pass over the maps.

What `bin_losses` defines by elementwise functions, autograd computes in some twenty passes. Here
torch computes the transcendental functions of a few genes at a time and a compiled loop does the
rest while they stay in the cache. The definitions there remain the ones that count: tests hold each
loop to them, and a loss without a loop takes the general way of `_piecewise`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Losses that have a loop in `_loss_loops`.
FUSED = ("mse", "mse-log1p", "poisson", "nb")

#: Elements per piece: η, its gradient and what torch makes of η fit a second-level cache.
_PIECE = 1 << 18


def applies(loss: str, eta: Tensor, counts: Tensor, factors: list[int]) -> bool:
    """Whether a loop takes these maps: at 2 µm alone, counts in bytes, on a CPU."""
    cpu = eta.device.type == "cpu" and counts.dtype == torch.uint8
    return cpu and eta.dtype in (torch.float32, torch.float64) and loss in FUSED and factors == [1]


def fused(
    loss: str,
    link: str,
    eta: Tensor,
    counts: Tensor,
    weight: Tensor,
    gene_weight: Tensor | None = None,
    log_dispersion: Tensor | None = None,
) -> Tensor:
    """Sum of the elementwise loss times the weights of its bin and gene.

    Parameters
    ----------
    loss, link
        One of `FUSED`; ``exp`` or ``softplus``.
    eta
        [B, G, H, W], float32 or float64.
    counts
        uint8 [B, G, H, W].
    weight
        [B, H, W], of the type of ``eta``.
    gene_weight
        [G]; by default 1.
    log_dispersion
        log θ [G], for ``nb``.

    Returns
    -------
    Scalar, differentiable once in ``eta`` and ``log_dispersion``.
    """
    way = loss, link, torch.is_grad_enabled()
    return _Fused.apply(*way, eta, counts, weight, gene_weight, log_dispersion)


class _Fused(torch.autograd.Function):
    """The gradient is found in `forward`, on the way; `backward` only scales it."""

    @staticmethod
    def forward(ctx, loss, link, with_gradient, eta, counts, weight, gene_weight, log_dispersion):
        shape, dtype = eta.shape, eta.dtype
        eta, counts, weight = (x.flatten(-2).contiguous() for x in (eta, counts, weight))
        genes = eta.shape[1]
        scale = eta.new_ones(genes) if gene_weight is None else gene_weight.to(dtype)
        dispersion = eta.new_zeros(genes) if log_dispersion is None else log_dispersion.to(dtype)
        gradient = torch.empty_like(eta) if with_gradient else None
        slopes = torch.zeros(genes, dtype=torch.float64)
        total = 0.0
        step = max(1, _PIECE // eta.shape[-1])
        for b in range(len(eta)):
            for g in range(0, genes, step):
                some = slice(g, g + step)
                out = torch.empty_like(eta[b, some]) if gradient is None else gradient[b, some]
                own = torch.zeros(len(out), dtype=torch.float64)
                maps = _Maps(eta[b, some], counts[b, some], scale[some], dispersion[some], out, own)
                total += _sum(loss, link == "exp", maps, weight[b])
                slopes[some] += own
        has_own = log_dispersion is not None
        ctx.save_for_backward(
            None if gradient is None else gradient.view(shape),
            slopes.to(log_dispersion.dtype) if has_own else None,
        )
        return eta.new_tensor(total)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        found = ctx.saved_tensors
        if upstream != 1:  # spares a pass over memory where nothing scales the loss
            found = [x if x is None else x * upstream.to(x.dtype) for x in found]
        return None, None, None, found[0], None, None, None, found[1]


class _Maps(NamedTuple):
    """Some genes of a patch."""

    eta: Tensor
    counts: Tensor
    scale: Tensor
    log_dispersion: Tensor
    out: Tensor
    own: Tensor


def _rate_and_slope(eta: Tensor, exponential: bool) -> tuple[Tensor, Tensor]:
    """λ and dλ/dη."""
    from sparsity_trap import _loss_loops

    if exponential:
        rate = torch.exp(eta)
        return rate, rate
    power = torch.exp(eta)
    rate, slope = torch.log1p(power), torch.empty_like(eta)
    _run(_loss_loops.softplus, (eta, power, rate, slope))
    return rate, slope


def _sum(loss: str, exponential: bool, maps: _Maps, weight: Tensor) -> float:
    """Value of a loss over some genes of a patch; the gradients go to ``maps``."""
    from sparsity_trap import _loss_loops

    eta, counts, scale, log_dispersion, out, own = maps
    rate, slope = _rate_and_slope(eta, exponential)
    if loss == "mse":
        return _run(_loss_loops.mse, (rate, slope, counts, scale, out), weight)
    if loss == "mse-log1p":
        of_genes = rate, slope, torch.log1p(rate), counts, scale, out
        log1p_count = torch.log1p(torch.arange(256, dtype=rate.dtype))
        return _run(_loss_loops.mse_log1p, of_genes, weight, log1p_count)
    if loss == "poisson":
        return _run(
            _loss_loops.poisson, (eta, rate, slope, counts, scale, out), weight, exponential
        )
    softplus = torch.log1p(rate * torch.exp(-log_dispersion)[:, None])
    return _run(
        _loss_loops.negative_binomial,
        (eta, rate, slope, softplus, log_dispersion, counts, scale, out, own),
        weight,
        exponential,
    )


def _run(loop: Callable[..., Any], of_genes: tuple[Tensor, ...], *common: Tensor | bool) -> Any:
    """Sum of a loop over genes, each of torch's threads with a share of them."""
    arrays = [x.detach().numpy() for x in of_genes]
    around = [x.numpy() if isinstance(x, Tensor) else x for x in common]
    threads = torch.get_num_threads()
    if threads == 1:
        return loop(*arrays, *around)
    size = -(-len(arrays[0]) // threads)
    parts = [slice(start, start + size) for start in range(0, len(arrays[0]), size)]
    with ThreadPoolExecutor(threads) as pool:
        # Summed in the order of the genes: the same every time.
        values = pool.map(lambda part: loop(*(x[part] for x in arrays), *around), parts)
        return sum(value or 0.0 for value in values)
