"""The loss explorer: losses and gradients at a rate and a count that the reader sets, as HTML."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from sparsity_trap import losses
from sparsity_trap.show.page import render
from sparsity_trap.show.style import MSE_COLOUR, POISSON_COLOUR, used

_LOSSES = {
    "mse": ("MSE", MSE_COLOUR),
    "poisson": ("Poisson", POISSON_COLOUR),
    "nb": ("negative binomial, θ = 1", "#7A4F9A"),
}


def loss_explorer() -> str:
    """Losses and their gradients at a rate and a count that the reader sets, as HTML.

    Shown per loss: its value above its minimum over the rate (for Poisson and negative binomial,
    half the deviance), and its derivative with respect to the decoder's output η under both links.
    The negative binomial has dispersion 1: variance λ + λ².
    """
    names = {key: label for key, (label, _) in _LOSSES.items()}
    return render("loss_explorer.html", losses=names, picture=_picture(count=1.0))


def loss_and_gradient(
    name: str, link: str, rate: np.ndarray, count: float
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of one bin above its minimum over the rate, and its derivative with respect to η.

    Parameters
    ----------
    name
        ``mse``, ``poisson`` or ``nb`` (dispersion 1).
    link
        ``exp`` or ``softplus``.
    rate
        Rates λ > 0 at which both are wanted, any shape.
    count
        Count y of the bin. Every loss is least at λ = y.
    """
    eta = losses.initial_eta(torch.as_tensor(rate, dtype=torch.float64), link).requires_grad_()
    value = _loss(name, losses.rate(eta, link), losses.log_rate(eta, link), count)
    (gradient,) = torch.autograd.grad(value.sum(), eta)
    # At λ = 0, where a count of 0 has its minimum, log λ is beyond what a float holds.
    at = torch.full((1,), max(count, 1e-12), dtype=torch.float64)
    least = _loss(name, at, at.log(), count)
    return (value - least).detach().numpy(), gradient.numpy()


def _loss(name: str, rate: torch.Tensor, log_rate: torch.Tensor, count: float) -> torch.Tensor:
    y = torch.full_like(rate, count)
    if name == "mse":
        return losses.mse(rate, y)
    if name == "poisson":
        return losses.poisson(log_rate, y)
    return losses.negative_binomial(log_rate, y, log_dispersion=torch.zeros_like(rate))


def _picture(count: float) -> str:
    """The two plots at one count as SVG in base 64, for readers without scripts."""
    with used(), matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not outlines
        return _drawn(count)


def _drawn(count: float) -> str:
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    rate = np.logspace(-2.3, 1.3, 181)
    for name, (label, colour) in _LOSSES.items():
        for link, line in (("exp", "-"), ("softplus", "--")):
            excess, gradient = loss_and_gradient(name, link, rate, count)
            right.plot(rate, gradient, line, color=colour)
        left.plot(rate, excess, color=colour, label=label)
    left.set(title="loss above its minimum", ylim=(0, 5))
    left.legend(fontsize=7)
    right.set(title="gradient ∂loss/∂η (dashed: softplus)", ylim=(-1.6, 1.6))
    for axis in (left, right):
        axis.set(xscale="log", xlabel="rate λ")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()
