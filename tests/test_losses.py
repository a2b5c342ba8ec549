"""Losses against torch.distributions and autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sparsity_trap import losses

LINKS = ("exp", "softplus")


@pytest.fixture
def maps():
    draw = torch.Generator().manual_seed(1)
    eta = torch.randn(2, 3, 16, 16, generator=draw, dtype=torch.float64) - 1
    count = torch.poisson(torch.exp(eta), generator=draw)
    mask = torch.rand(2, 16, 16, generator=draw) > 0.3
    return eta, count, mask


@pytest.mark.parametrize("link", LINKS)
def test_poisson_is_the_negative_log_likelihood_without_its_constant(maps, link):
    eta, count, _ = maps
    rate = losses.rate(eta, link)
    expected = -torch.distributions.Poisson(rate).log_prob(count) - torch.lgamma(count + 1)
    torch.testing.assert_close(losses.poisson(eta, count, link), expected)


@pytest.mark.parametrize("link", LINKS)
def test_squared_errors_agree_with_torch(maps, link):
    eta, count, _ = maps
    rate = losses.rate(eta, link)
    expected = F.mse_loss(rate, count, reduction="none")
    torch.testing.assert_close(losses.mse(eta, count, link), expected)
    expected = F.mse_loss(torch.log1p(rate), torch.log1p(count), reduction="none")
    torch.testing.assert_close(losses.mse_log1p(eta, count, link), expected)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("eta", [-80.0, -18.4, -15.0, 0.0, 9.2])
def test_log_rate_is_exact_and_its_gradient_finite_from_tiny_to_large_rates(link, eta):
    x = torch.tensor(eta, dtype=torch.float32, requires_grad=True)
    value = losses.log_rate(x, link)
    value.backward()
    rate = math.exp(eta) if link == "exp" else math.log1p(math.exp(eta))
    assert value.item() == pytest.approx(math.log(rate), rel=1e-6)
    assert torch.isfinite(x.grad)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", losses.LOSSES)
def test_masked_mean_and_its_gradient_equal_the_plain_expression(maps, name, link):
    eta, count, mask = maps
    ours, plain = (eta.clone().requires_grad_() for _ in range(2))
    value = losses.masked_mean(name, ours, count.to(torch.uint8), mask, link)
    (3 * value).backward()
    expected = losses.LOSSES[name](plain, count, link).movedim(1, -1)[mask].mean()
    (3 * expected).backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours.grad, plain.grad)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_offset_is_a_known_exposure(maps, name):
    """With the exp link, a log offset equals the same number added to η, gradient included."""
    eta, count, mask = maps
    offset = torch.linspace(-1, 1, 16, dtype=torch.float64).expand(2, 16, 16)
    ours, plain = (eta.clone().requires_grad_() for _ in range(2))
    losses.masked_mean(name, ours, count, mask, "exp", offset).backward()
    losses.masked_mean(name, plain + offset[:, None], count, mask, "exp").backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_bins_outside_the_tissue_have_no_influence(maps):
    eta, count, mask = maps
    changed = torch.where(mask[:, None], count, count + 7)
    same = [losses.masked_mean("poisson", eta, y, mask, "exp") for y in (count, changed)]
    assert same[0] == same[1]
    empty = losses.masked_mean("poisson", eta, count, torch.zeros_like(mask), "exp")
    assert empty == 0


@pytest.mark.parametrize("name", ["mse", "poisson"])
def test_both_losses_are_minimised_by_the_mean_count(name):
    count = torch.tensor([0.0, 0.0, 0.0, 1.0, 3.0], dtype=torch.float64).view(1, 1, 1, -1)
    mask = torch.ones(1, 1, 5, dtype=torch.bool)
    rates = torch.linspace(0.05, 3, 1000, dtype=torch.float64)
    values = [
        losses.masked_mean(name, r.log().expand_as(count).contiguous(), count, mask, "exp")
        for r in rates
    ]
    assert rates[torch.stack(values).argmin()].item() == pytest.approx(0.8, abs=0.003)
