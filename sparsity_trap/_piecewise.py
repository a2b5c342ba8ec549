"""A sum over maps on a CPU and its gradient, found piece by piece while each stays in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Elements per piece: a piece of float32 and the few temporaries of an elementwise loss then fit a
#: second-level cache of 1 to 2 MB.
_PIECE = 1 << 18


def piecewise(
    weighted_sum: Callable[..., Tensor],
    eta: Tensor,
    counts: Tensor,
    tissue: Tensor,
    weights: list[Tensor],
    *parameters: Tensor,
) -> Tensor:
    """``weighted_sum(eta, counts, tissue, weights, *parameters)``, the same sum in pieces.

    At 2 µm the elementwise loss, not the decoder, is what a CPU spends its time on: each operation
    streams [B, G, 128, 128] through memory. Working through cache-sized pieces avoids that and
    holds one gradient instead of every intermediate. Larger bins alone are too few to gain. An
    accelerator hides memory traffic better than it hides launches and takes the batch as a whole.

    Parameters
    ----------
    weighted_sum
        Adds over patches and genes: its value is the sum of its values on parts of them.
    eta, counts
        [B, G, H, W].
    tissue
        bool [B, H, W].
    weights
        [B, h, w] each.
    parameters
        [G] each.

    Returns
    -------
    Scalar, differentiable once in ``eta`` and ``parameters``.
    """
    return _Piecewise.apply(
        weighted_sum, torch.is_grad_enabled(), eta, counts, tissue, weights, *parameters
    )


class _Piecewise(torch.autograd.Function):
    """The gradient is found in `forward`, where a piece is at hand; `backward` only scales it."""

    @staticmethod
    def forward(ctx, weighted_sum, with_gradient, eta, counts, tissue, weights, *parameters):
        genes = max(1, _PIECE // (eta.shape[-2] * eta.shape[-1]))
        gradients = [torch.empty_like(eta), *(torch.zeros_like(p) for p in parameters)]
        total = 0.0
        for b in range(eta.shape[0]):
            row = slice(b, b + 1)
            around = tissue[row], [weight[row] for weight in weights]
            for g in range(0, eta.shape[1], genes):
                some = slice(g, g + genes)
                inputs = [x.detach() for x in (eta[row, some], *(p[some] for p in parameters))]
                with torch.set_grad_enabled(with_gradient):
                    if with_gradient:
                        inputs = [x.requires_grad_() for x in inputs]
                    piece, *own = inputs
                    value = weighted_sum(piece, counts[row, some], *around, *own)
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
        return None, None, gradients[0], None, None, None, *gradients[1:]
