"""Compiled losses against autograd's through the definitions."""

from __future__ import annotations

import numba.core.caching
import pytest
import torch

from sparsity_trap import _fused, losses
from sparsity_trap._compiled import compiled
from sparsity_trap.losses import LINKS, Objective

TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=1e-6), torch.float64: dict(rtol=1e-10, atol=1e-14)}


@pytest.fixture
def maps():
    """η from rates of 1e-17 to 1e3, counts to 255 and a mask; a gene without a count."""
    draw = torch.Generator().manual_seed(3)
    eta = 3 * torch.randn(2, 4, 16, 16, generator=draw, dtype=torch.float64) - 2
    eta[0, 0, 0], eta[0, 0, 1] = -40, 30
    count = torch.poisson(torch.exp(eta.clamp(max=3)), generator=draw).clamp(max=255)
    count[0, 0, :2, ::2] = 3
    count[:, 3] = 0
    count[0, 1, 3, 3] = 255
    return eta, count.to(torch.uint8), torch.rand(2, 16, 16, generator=draw) > 0.3


def objective(loss, link, dtype, **settings) -> Objective:
    made = Objective(loss, link, 4, **settings).to(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.tensor([-3.0, 0.0, 2.0, 6.0]))
    return made


def value_and_gradients(made, eta, count, mask):
    inputs = [eta.detach().clone().requires_grad_(), *made.parameters()]
    value = made(inputs[0], count, mask)
    return [value.detach(), *torch.autograd.grad(3 * value, inputs)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("loss", _fused.FUSED)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compiled_loss_equals_autograd(maps, monkeypatch, loss, link, dtype, weighted, masked):
    eta, count, mask = maps
    eta = eta.to(dtype).clamp(max=30 if link == "softplus" else 8)
    weight = torch.tensor([1.0, 0.5, 2.0, 7.0]) if weighted else None
    made = objective(loss, link, dtype, masked=masked, gene_weight=weight)
    if masked:
        count = torch.where(mask[:, None], count, 200)
    assert losses.applies(loss, eta, count, made.factors)
    ours = value_and_gradients(made, eta, count, mask)
    monkeypatch.setattr(losses, "applies", lambda *given: False)
    general = value_and_gradients(made, eta, count, mask)
    for found, wanted in zip(ours, general, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(found / scale, wanted / scale, **TOLERANCE[dtype])


@pytest.mark.parametrize("loss", _fused.FUSED)
def test_compiled_loss_is_the_same_in_pieces_in_threads_and_without_gradient(
    maps, monkeypatch, loss
):
    eta, count, mask = maps
    made = objective(loss, "softplus", torch.float64)
    whole = value_and_gradients(made, eta, count, mask)
    with torch.no_grad():
        assert made(eta, count, mask) == whole[0]
    monkeypatch.setattr(_fused, "_PIECE", 2 * 256)
    torch.testing.assert_close(value_and_gradients(made, eta, count, mask), whole)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    torch.testing.assert_close(value_and_gradients(made, eta, count, mask), whole)


def test_larger_bins_counts_beyond_a_byte_and_other_losses_take_the_general_way(maps):
    eta, count, _ = maps
    assert losses.applies("poisson", eta, count, [1])
    assert not losses.applies("poisson", eta, count, [1, 2])
    assert not losses.applies("poisson", eta, count.int(), [1])
    assert not losses.applies("poisson", eta.bfloat16(), count, [1])
    assert not losses.applies("l1", eta, count, [1])


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("loss", _fused.FUSED)
def test_compiled_gradients_by_finite_differences(loss, link):
    draw = torch.Generator().manual_seed(2)
    eta = torch.randn(2, 4, 4, 4, generator=draw, dtype=torch.float64)
    count = torch.randint(0, 5, eta.shape, generator=draw).to(torch.uint8)
    mask = torch.rand(2, 4, 4, generator=draw) > 0.2
    made = Objective(loss, link, 4).double()
    names = [name for name, _ in made.named_parameters()]

    def call(eta, *own):
        parameters = dict(zip(names, own, strict=True))
        return torch.func.functional_call(made, parameters, (eta, count, mask))

    own = [p.detach().requires_grad_() for p in made.parameters()]
    assert torch.autograd.gradcheck(call, [eta.requires_grad_(), *own])


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("loss", _fused.FUSED)
def test_extreme_rates_and_dispersions_stay_finite(loss, link):
    eta = losses.initial_eta(torch.logspace(-8, 4, 16), link)
    eta = eta[None, None, :, None].expand(1, 6, 16, 16).clone()
    eta[..., 0] = -80
    count = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).repeat(4).expand(1, 6, 16, 16)
    made = Objective(loss, link, 6)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.linspace(-20, 60, 6))
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    for found in value_and_gradients(made, eta, count, mask):
        assert torch.isfinite(found).all()


def test_loops_are_compiled_where_nothing_may_be_kept(monkeypatch):
    """Neither beside the source nor in a home."""
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])

    def twice(x):
        return 2 * x

    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(twice)
    assert compiled(twice)(21) == 42
