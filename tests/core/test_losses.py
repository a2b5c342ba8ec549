"""Losses against torch.distributions, scipy and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from sparsity_trap import _piecewise, bin_losses, losses, map_losses
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.losses import LINKS, LOSSES, Objective

COUNT_LOSSES = ("poisson", "nb")
OVER_MAPS = (*map_losses.OF_RATE, *map_losses.OF_LOG_RATE)
#: Losses of one bin at a time.
ELEMENTWISE = [loss for loss in LOSSES if loss not in OVER_MAPS and not loss.endswith("-depth")]


@pytest.fixture
def maps():
    """η, counts and mask: two patches, three genes, 16 × 16 bins."""
    draw = torch.Generator().manual_seed(1)
    eta = torch.randn(2, 3, 16, 16, generator=draw, dtype=torch.float64) - 1
    count = torch.poisson(2 * torch.exp(eta), generator=draw)
    mask = torch.rand(2, 16, 16, generator=draw) > 0.3
    return eta, count, mask


def double(loss: str, link: str, genes: int = 3, **settings) -> Objective:
    """Objective in float64 whose parameters differ between genes."""
    objective = Objective(loss, link, genes, **settings).double()
    with torch.no_grad():
        for shift, parameter in enumerate(objective.parameters()):
            parameter.add_(torch.linspace(-1, 3 - shift, genes, dtype=torch.float64))
    return objective


def plain(objective: Objective, eta, count):
    """The elementwise loss, written out."""
    rate = losses.rate(eta, objective.link)
    own = [p[:, None, None] for p in objective.parameters()]
    if objective.loss in bin_losses.OF_RATE:
        return bin_losses.OF_RATE[objective.loss](rate, count)
    return bin_losses.OF_LOG_RATE[objective.loss](rate.log(), count, *own)


# --- elementwise losses -------------------------------------------------------------------------


def test_poisson_is_the_negative_log_likelihood_without_its_constant(maps):
    eta, count, _ = maps
    expected = -torch.distributions.Poisson(eta.exp()).log_prob(count) - torch.lgamma(count + 1)
    torch.testing.assert_close(losses.poisson(eta, count), expected)


@pytest.mark.parametrize("theta", [1e-3, 0.5, 7.9, 8.1, 300.0])
def test_negative_binomial_agrees_with_torch_and_scipy(maps, theta):
    eta, count, _ = maps
    log_theta = torch.tensor(theta, dtype=torch.float64).log()
    ours = losses.negative_binomial(eta, count, log_theta) + torch.lgamma(count + 1)
    reference = torch.distributions.NegativeBinomial(theta, logits=eta - log_theta)
    torch.testing.assert_close(ours, -reference.log_prob(count), rtol=1e-8, atol=1e-8)
    success = theta / (theta + eta.exp())
    scipy = -stats.nbinom.logpmf(count.numpy(), theta, success.numpy())
    np.testing.assert_allclose(ours.numpy(), scipy, rtol=1e-8, atol=1e-8)


def test_dispersion_is_the_inverse_of_the_variance_beyond_poisson():
    """Moments of exp(−loss) / y! over all counts: mean λ, variance λ + λ²/θ."""
    rate, theta = 3.0, 2.0
    count = torch.arange(400, dtype=torch.float64)
    log_rate, log_theta = (torch.tensor(x, dtype=torch.float64).log() for x in (rate, theta))
    loss = losses.negative_binomial(log_rate.expand_as(count), count, log_theta)
    mass = torch.exp(-loss - torch.lgamma(count + 1))
    mean = (mass * count).sum()
    assert mass.sum().item() == pytest.approx(1)
    assert mean.item() == pytest.approx(rate)
    assert (mass * (count - mean).square()).sum().item() == pytest.approx(rate + rate**2 / theta)


@pytest.mark.parametrize("log_theta", [20.0, 40.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_binomial_becomes_poisson_as_theta_grows(log_theta, dtype):
    log_rate = torch.linspace(math.log(1e-8), math.log(1e3), 50, dtype=dtype)[:, None]
    count = torch.tensor([0.0, 1.0, 2.0, 7.0, 50.0], dtype=dtype).expand(50, -1)
    log_rate = log_rate.expand_as(count).clone()
    ours, limit = (log_rate.clone().requires_grad_() for _ in range(2))
    value = losses.negative_binomial(ours, count, torch.tensor(log_theta, dtype=dtype))
    expected = losses.poisson(limit, count)
    # λ² / θ and y² / θ remain at θ = 5e8
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=2e-3)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, limit.grad, rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("log_theta", [-20.0, 0.0, 2.0, 2.2, 20.0])
def test_rising_sum_is_the_same_on_an_accelerator_as_on_a_cpu(log_theta):
    """A CPU leaves out counts of 0 and 1, an accelerator does not; both equal the plain sum."""
    count = torch.tensor([0.0, 1.0, 2.0, 5.0, 40.0], dtype=torch.float64)
    log_theta = torch.tensor(log_theta, dtype=torch.float64, requires_grad=True)
    terms = [torch.log1p(torch.arange(int(y)) / log_theta.exp()).sum() for y in count]
    expected = torch.stack(terms)
    (slope,) = torch.autograd.grad(expected.sum(), log_theta, retain_graph=True)
    for found in (bin_losses._rising(count, log_theta), bin_losses._rising_of(count, log_theta)):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), log_theta)[0], slope)


def test_squared_errors_agree_with_torch(maps):
    eta, count, _ = maps
    rate = eta.exp()
    torch.testing.assert_close(losses.mse(rate, count), F.mse_loss(rate, count, reduction="none"))
    expected = F.mse_loss(torch.log1p(rate), torch.log1p(count), reduction="none")
    torch.testing.assert_close(losses.mse_log1p(rate, count), expected)


@pytest.mark.parametrize("loss, shape", [("mse", 2), ("poisson", 0)])
def test_gradient_in_eta_under_the_exp_link(maps, loss, shape):
    """2 λ (λ − y) for squared error, λ − y for Poisson: the first vanishes where λ is small."""
    eta, count, _ = maps
    eta = eta.requires_grad_()
    mask = torch.ones(2, 16, 16, dtype=torch.bool)
    Objective(loss, "exp", 3)(eta, count, mask).backward()
    rate = eta.detach().exp()
    expected = (2 * rate if shape else 1) * (rate - count) / count.numel()
    torch.testing.assert_close(eta.grad, expected)


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
def test_initial_eta_inverts_the_link_and_is_finite_without_counts(link):
    rate = torch.tensor([1e-7, 0.05, 0.69, 40.0, 1e4])
    torch.testing.assert_close(losses.rate(losses.initial_eta(rate, link), link), rate)
    least = losses.initial_eta(torch.zeros(1), link)
    assert losses.rate(least, link).item() == pytest.approx(losses.LEAST_INITIAL_RATE, rel=1e-4)


# --- objective ----------------------------------------------------------------------------------


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("loss", ELEMENTWISE)
@pytest.mark.parametrize("masked", [True, False])
def test_mean_and_gradients_equal_the_plain_expression(maps, loss, link, masked):
    eta, count, mask = maps
    objective = double(loss, link, masked=masked)
    inputs = [eta.requires_grad_(), *objective.parameters()]
    value = objective(eta, count.to(torch.uint8), mask)
    bins = mask if masked else torch.ones_like(mask)
    expected = plain(objective, eta, count).movedim(1, -1)[bins].mean()
    torch.testing.assert_close(value, expected)
    found, wanted = (torch.autograd.grad(3 * x, inputs) for x in (value, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("resolutions", [(2,), (2, 4)])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_finite_differences(loss, link, resolutions):
    """In η and, where the likelihood has them, in each gene's own parameters."""
    draw = torch.Generator().manual_seed(2)
    side = 16 if loss == "mse+ssim" else 4
    eta = torch.randn(2, 2, side, side, generator=draw, dtype=torch.float64)
    count = torch.randint(0, 5, eta.shape, generator=draw)
    mask = torch.rand(2, side, side, generator=draw) > 0.2
    objective = double(loss, link, genes=2, resolutions_um=resolutions)
    names = [name for name, _ in objective.named_parameters()]

    def call(eta, *own):
        parameters = dict(zip(names, own, strict=True))
        return torch.func.functional_call(objective, parameters, (eta, count, mask))

    own = [p.detach().requires_grad_() for p in objective.parameters()]
    # finite differences of every direction of a large map would take minutes
    fast = loss == "mse+ssim"
    assert torch.autograd.gradcheck(call, [eta.requires_grad_(), *own], fast_mode=fast)


def test_pieces_of_a_large_map_add_up(monkeypatch, maps):
    """A batch in pieces of one gene and of all genes has the same loss and gradients."""
    eta, count, mask = maps
    objective = double("nb", "exp")
    inputs = [eta.requires_grad_(), *objective.parameters()]

    def run():
        value = objective(eta, count, mask)
        return value.detach(), torch.autograd.grad(value, inputs)

    whole = run()
    monkeypatch.setattr(_piecewise, "_PIECE", 1)
    torch.testing.assert_close(run(), whole)


def test_gradient_survives_repeated_backward(maps):
    eta, count, mask = maps
    eta = eta.requires_grad_()
    value = Objective("poisson", "exp", 3)(eta, count, mask)
    for _ in range(3):
        value.backward(retain_graph=True)
    (once,) = torch.autograd.grad(value, eta)
    torch.testing.assert_close(eta.grad, 3 * once)


@pytest.mark.parametrize("loss", LOSSES)
def test_bins_outside_the_tissue_have_no_influence(maps, loss):
    eta, count, mask = maps
    inside = mask[:, None]
    changed = torch.where(inside, eta, eta + 1), torch.where(inside, count, count + 7)
    for resolutions in ((2,), (2, 4)) if loss == "mse+ssim" else ((2,), (2, 4), (8,)):
        objective = double(loss, "exp", resolutions_um=resolutions)
        assert objective(eta, count, mask) == objective(*changed, mask)
        assert objective(eta, count, torch.zeros_like(mask)) == 0
        everywhere = double(loss, "exp", resolutions_um=resolutions, masked=False)
        assert everywhere(eta, count, mask) != everywhere(*changed, mask)


@pytest.mark.parametrize("loss", ELEMENTWISE)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("resolutions", [(8,), (2, 4, 8, 16)])
def test_resolutions_compare_sums_over_tissue_bins(maps, loss, masked, resolutions):
    eta, count, mask = maps
    mask[0, :8, :8] = False  # a larger bin without any tissue
    objective = double(loss, "softplus", resolutions_um=resolutions, masked=masked)
    bins = mask if masked else torch.ones_like(mask)
    rate = losses.rate(eta, "softplus") * bins[:, None]
    means = []
    for factor in (r // 2 for r in resolutions):
        large = bin_sum(rate, factor).clamp(min=1e-30).log()
        single = double(loss, "exp")
        value = plain(single, large, bin_sum(count * bins[:, None], factor).double())
        means.append(value.movedim(1, -1)[bin_mask(bins, factor)].mean())
    expected = torch.stack(means).mean()
    torch.testing.assert_close(objective(eta, count.to(torch.uint8), mask), expected)


@pytest.mark.parametrize("resolutions", [(2,), (2, 4, 8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_rates_and_counts_stay_finite(loss, link, dtype, resolutions):
    if loss == "mse+ssim":
        resolutions = tuple(r for r in resolutions if r < 8)  # larger bins are fewer than a window
    rates = torch.logspace(-8, 4, 16)
    eta = losses.initial_eta(rates, link).to(dtype)
    eta = eta[None, None, :, None].expand(1, 6, 16, 16).clone().requires_grad_()
    count = torch.tensor([0, 1, 2, 255, 10_000], dtype=torch.int32).repeat(4)[:16]
    count = count.expand(1, 6, 16, 16)
    objective = Objective(loss, link, 6, resolutions)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.copy_(torch.linspace(-20, 60, 6))
    value = objective(eta, count, torch.ones(1, 16, 16, dtype=torch.bool))
    value.backward()
    assert value.dtype == torch.float32 and eta.grad.dtype == dtype
    assert torch.isfinite(value)
    for tensor in (eta, *objective.parameters()):
        assert torch.isfinite(tensor.grad).all()
    assert (eta.grad != 0).any()


@pytest.mark.parametrize("loss", COUNT_LOSSES)
def test_float32_is_as_good_as_float64_over_the_whole_range(loss):
    """Gradients in η, relative to the size of the terms that they balance."""
    log_rate = torch.linspace(math.log(1e-8), math.log(1e4), 60, dtype=torch.float64)
    count = torch.tensor([0, 1, 2, 30, 10_000], dtype=torch.float64)
    eta, count = torch.broadcast_tensors(log_rate[:, None], count)
    eta, count = (x[None, None].expand(1, 5, -1, -1).clone() for x in (eta, count))
    objective = Objective(loss, "exp", 5)
    if loss != "poisson":
        with torch.no_grad():
            objective.log_dispersion.copy_(torch.tensor([-7.0, 0.0, 3.0, 10.0, 30.0]))
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = eta.to(dtype).requires_grad_()
        mask = torch.ones(1, 60, 5, dtype=torch.bool)
        (objective.to(dtype)(x, count, mask) * count.numel()).backward()
        grads.append(x.grad.double())
    scale = 1e-4 + eta.exp() + count
    assert ((grads[0] - grads[1]).abs() / scale).max() < 2e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_output_is_compared_in_float32(maps, loss):
    eta, count, mask = maps
    objective = Objective(loss, "exp", 3)
    rough = eta.bfloat16()
    assert objective(rough, count, mask) == objective(rough.float(), count, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert objective(rough, count, mask) == objective(rough.float(), count, mask)


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_the_same_without_gradients(maps, loss):
    eta, count, mask = maps
    objective = double(loss, "exp")
    with_gradient = objective(eta, count, mask)
    with torch.no_grad():
        without = objective(eta, count, mask)
    assert with_gradient == without and not without.requires_grad


MEAN = dict.fromkeys(
    ("mse", "poisson", "nb", "power-0", "power-0.5", "power-1", "power-1.5", "power-2"), 0.8
)


@pytest.mark.parametrize(
    "loss, expected",
    [
        *MEAN.items(),
        ("mse-log1p", math.exp(math.log(2 * 4) / 5) - 1),
        ("l1", 0.05),  # the median, 0, is not on the grid
        ("sqrt", ((3 * 0.375**0.5 + 1.375**0.5 + 3.375**0.5) / 5) ** 2 - 0.375),
        ("presence", -math.log(3 / 5)),
    ],
)
def test_minimiser_is_the_one_that_is_claimed(loss, expected):
    """A single rate for a sample of counts with mean 0.8, three of five being 0."""
    count = torch.tensor([0.0, 0.0, 0.0, 1.0, 3.0], dtype=torch.float64).view(1, 1, 1, -1)
    mask = torch.ones(1, 1, 5, dtype=torch.bool)
    objective = double(loss, "exp", genes=1)
    rates = torch.linspace(0.05, 3, 591, dtype=torch.float64)
    with torch.no_grad():
        values = [objective(r.log().expand_as(count), count, mask) for r in rates]
    best = rates[torch.stack(values).argmin()].item()
    assert best == pytest.approx(expected, abs=0.003)


def test_dispersion_is_learned_from_counts():
    """Gradient descent on an objective's own parameter finds the θ that drew the counts."""
    counts = stats.nbinom.rvs(0.7, 0.7 / (0.7 + 2), size=(1, 1, 200, 200), random_state=4)
    count, mask = torch.from_numpy(counts), torch.ones(1, 200, 200, dtype=torch.bool)
    eta = count.double().mean().log().expand(1, 1, 200, 200)
    objective = Objective("nb", "exp", 1).double()
    optimiser = torch.optim.LBFGS(
        objective.parameters(), max_iter=30, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = objective(eta, count, mask)
        value.backward()
        return value

    optimiser.step(closure)
    assert objective.log_dispersion.exp().item() == pytest.approx(0.7, rel=0.05)


def test_parameters_of_an_objective():
    objective = Objective("nb", "softplus", 4, (2, 8), masked=False)
    assert {n: tuple(p.shape) for n, p in objective.named_parameters()} == {"log_dispersion": (4,)}
    assert objective.factors == [1, 4]
    assert not list(Objective("mse", "exp", 4).parameters())
    names = {n for n, _ in Objective("zinb", "exp", 4).named_parameters()}
    assert names == {"log_dispersion", "inflation_logit"}
    assert [n for n, _ in Objective("hurdle", "exp", 4).named_parameters()] == ["log_offset"]


def test_every_loss_is_an_entry_of_one_kind():
    kinds = [bin_losses.OF_RATE, bin_losses.OF_LOG_RATE, map_losses.OF_RATE, map_losses.OF_LOG_RATE]
    assert sorted(name for kind in kinds for name in kind) == sorted(LOSSES)


@pytest.mark.parametrize("link", ["log", "Exp", "", None])
def test_unknown_links_and_losses_name_the_choices(link):
    one = torch.ones(1)
    for use in (losses.rate, losses.log_rate, losses.initial_eta):
        with pytest.raises(ValueError, match=f"link '{link}' is unknown: .*softplus, exp"):
            use(one, link)
    with pytest.raises(ValueError, match="link .* is unknown"):
        Objective("mse", link, 3)
    with pytest.raises(ValueError, match=f"loss '{link}' is unknown: .*mse-log1p, poisson, nb"):
        Objective(link, "exp", 3)
