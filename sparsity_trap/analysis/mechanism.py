"""Why the losses differ although MSE and Poisson have the same minimiser, the conditional mean.

Both push η of a bin by a weight times its residual, and only the weight differs. Under MSE it grows
with the rate, so rich genes and bins set the pace; under Poisson it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity_trap import losses, runs
from sparsity_trap.encoders import open_tokens
from sparsity_trap.predict import load_model
from sparsity_trap.runs import Result
from sparsity_trap.settings import PUBLISHED_BIAS, Preset
from sparsity_trap.trainer import EPS
from sparsity_trap.training import initial_model
from sparsity_trap.training_data import gene_weight, load_training_set

#: Decay of AdamW's means of gradients and of their squares, torch's default.
ADAM = (0.9, 0.999)


def gradient_share(
    model: Any,
    tokens: Tensor,
    counts: Tensor,
    mask: Tensor,
    objective: Callable[[Tensor, Tensor, Tensor], Tensor],
    gene_weight: Tensor | None = None,
) -> np.ndarray:
    """Share of each gene in the gradient that reaches the decoder shared by all genes.

    For gene g it is the squared norm of d L_g / d h, with h the input of the decoder's head and
    L_g the gene's loss over tissue bins, divided by the sum of all genes' squared norms.

    Parameters
    ----------
    model
        Tokens to η [B, G, H, W], with a head ``model.decoder.head``; set to evaluation for
        the call, so that dropout and batch statistics play no part.
    tokens
        Encoder tokens of a batch of patches, [B, C, 16, 16].
    counts
        Counts, [B, G, H, W].
    mask
        True in tissue, [B, H, W].
    objective
        Loss of one gene, a scalar, from η and counts [B, 1, H, W] and the mask: a
        `losses.Objective` of one gene.
    gene_weight
        Weight of each gene's loss, [G]; equal ones by default.

    Returns
    -------
    ndarray
        float64 [G], summing to 1; NaN where no gene has a gradient, as on an empty mask.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            eta = model(tokens).float()
    finally:
        model.train(was_training)
    # The head is linear: d L_g / d h is its transposed weights times d L_g / d η. The linear
    # decoder has 64 rows of weights per gene, one for each bin of a token.
    rows = model.decoder.head.weight.detach().flatten(1).double().unflatten(0, (eta.shape[1], -1))
    side = math.isqrt(rows.shape[1])
    norms = np.zeros(eta.shape[1])
    for g, weight in enumerate(rows):  # a gene at a time: gradients of a large panel are gigabytes
        one = slice(g, g + 1)
        with torch.enable_grad():
            own = eta[:, one].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(own, counts[:, one], mask), own)
        by_row = F.pixel_unshuffle(gradient.double(), side).transpose(0, 1).flatten(1)
        norms[g] = (weight.T @ by_row).square().sum().item()
    if gene_weight is not None:
        norms *= gene_weight.double().numpy() ** 2
    total = norms.sum()
    return norms / total if total > 0 else np.full_like(norms, np.nan)


def gradient_shares(preset: Preset, result: Result, patches: int = 8) -> pd.DataFrame:
    """Share of each gene in the gradient of the shared decoder, before and after training.

    Parameters
    ----------
    preset, result
        A run and its preset.
    patches
        Patches of the first training patient that are looked at, spread over its section.

    Returns
    -------
    DataFrame with columns ``gene``, ``category``, ``mean_count``, ``panel`` (arm and moment) and
    ``share``.

    Raises
    ------
    ValueError
        The arm's loss takes an exposure, which a gene alone does not tell.
    """
    arm = preset.arm(result.run.arm)
    if arm.loss.endswith("-depth"):
        raise ValueError(f"gradient shares are taken gene by gene, which loss '{arm.loss}' is not")
    patient = preset.training_patients(result.run.test_patient)[0]
    store = runs.store(preset, patient)
    chosen = np.unique(np.linspace(0, len(store) - 1, patches).astype(int))
    counts, mask = (torch.from_numpy(a.oindex[chosen]) for a in (store.counts, store.mask))
    runs.tokens(preset, patient)
    tokens = torch.from_numpy(open_tokens(preset, patient)[0][chosen, 0])
    objective = losses.Objective(arm.loss, arm.link, 1, arm.resolutions_um, arm.masked)
    weight = gene_weight(load_training_set(preset, result.run), arm.gene_weight)
    moments = {
        "start": initial_model(preset, result.run),
        "end": load_model(result.folder).model.cpu(),
    }
    genes = result.genes[["gene", "category", "mean_count"]]
    return pd.concat(
        genes.assign(
            panel=f"{result.run.arm}, {moment}",
            share=gradient_share(model, tokens, counts, mask, objective, weight),
        )
        for moment, model in moments.items()
    )


def toy_minimisers(
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0),
    bins: int = 4000,
    seed: int = 0,
    max_steps: int = 200_000,
    lr: float | None = None,
) -> pd.DataFrame:
    """Fit one η per group of bins to Poisson counts until it stands still.

    In plain gradient descent all groups share one step size, the largest that the loss bears: 1 /
    its greatest curvature at the solution. AdamW, with which arms are trained, gives each group's η
    a scale of its own. η starts at the published bias of the link, 0 for softplus and -3 for exp.

    Parameters
    ----------
    rates
        Rate of each group, counts per bin.
    bins
        Bins per group.
    seed
        Seed of the counts.
    max_steps
        Most steps.
    lr
        Learning rate of AdamW, without decay; plain gradient descent where it is None.

    Returns
    -------
    DataFrame
        One row per loss (``mse``, ``mse-log1p``, ``poisson``), link and group: ``loss``, ``link``,
        ``rate``, ``mean_count`` (of the group's bins), ``minimiser`` (rate reached),
        ``relative_error`` of the minimiser against the mean count, ``steps`` until the group came
        and stayed within 1 % of the rate it reached, and ``converged``.
    """
    counts = np.random.default_rng(seed).poisson(np.array(rates)[:, None], (len(rates), bins))
    mean = counts.mean(axis=1)
    rows = []
    for loss, link in product(("mse", "mse-log1p", "poisson"), losses.LINKS):
        # The gradient of a group's mean loss is that of the loss at one count: losses are linear
        # in the count, or in its log1p, but for a term without the rate.
        one = np.expm1(np.log1p(counts).mean(axis=1)) if loss == "mse-log1p" else mean
        path, converged = _descend(loss, link, one, max_steps, lr)
        away = np.abs(path / path[-1] - 1) > 0.01
        for g, rate in enumerate(rates):
            steps = int(np.flatnonzero(away[:, g]).max(initial=-1)) + 1
            error = path[-1, g] / mean[g] - 1
            rows.append((loss, link, rate, mean[g], path[-1, g], error, steps, converged))
    columns = ["loss", "link", "rate", "mean_count", "minimiser", "relative_error", "steps"]
    return pd.DataFrame(rows, columns=[*columns, "converged"])


def toy_gradient(loss: str, link: str, eta: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Derivative of a loss in η."""
    rate = _toy_rate(link, eta)
    slope = rate if link == "exp" else -np.expm1(-rate)  # of the rate in η
    of_rate = {
        "mse": lambda: 2 * (rate - count),
        "mse-log1p": lambda: 2 * (np.log1p(rate) - np.log1p(count)) / (1 + rate),
        "poisson": lambda: 1 - count / rate,
    }
    return of_rate[loss]() * slope


def _toy_rate(link: str, eta: np.ndarray) -> np.ndarray:
    return np.exp(eta) if link == "exp" else np.logaddexp(0, eta)


def _descend(
    loss: str, link: str, count: np.ndarray, max_steps: int, lr: float | None
) -> tuple[np.ndarray, bool]:
    """Rates after every step, [steps + 1, groups], and whether they stood still."""
    slope = count if link == "exp" else -np.expm1(-count)
    of_rate = {"mse": 2.0, "mse-log1p": 2 / (1 + count) ** 2, "poisson": 1 / count}[loss]
    step = 1 / (slope**2 * of_rate).max()  # 1 / the greatest curvature in η at the solution
    (decay, decay_square), still = ADAM, 1e-7 if lr else 1e-9
    first = second = np.zeros_like(count)
    eta = np.full_like(count, PUBLISHED_BIAS[link])
    path, converged = [eta], False
    while len(path) <= max_steps and not converged:
        gradient, number = toy_gradient(loss, link, eta, count), len(path)
        if lr:
            first = decay * first + (1 - decay) * gradient
            second = decay_square * second + (1 - decay_square) * gradient**2
            scale = np.sqrt(second / (1 - decay_square**number)) + EPS
            change = lr * first / (1 - decay**number) / scale
        else:
            change = step * gradient
        eta = eta - change
        path.append(eta)
        converged = bool(np.abs(change).max() < still)
    return _toy_rate(link, np.array(path)), converged
