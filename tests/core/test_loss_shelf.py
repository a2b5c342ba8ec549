"""Losses beside squared error and Poisson, against statsmodels, scipy, scikit-image and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats
from skimage.metrics import structural_similarity
from sklearn.metrics import mean_tweedie_deviance
from statsmodels.discrete.count_model import ZeroInflatedNegativeBinomialP

from sparsity_trap import losses, map_losses
from sparsity_trap.losses import Objective

POWERS = (0, 0.5, 1, 1.5, 2)
MASK = torch.ones(1, 20, 20, dtype=torch.bool)


@pytest.fixture
def bins():
    """log λ and counts, 400 each."""
    draw = torch.Generator().manual_seed(3)
    log_rate = torch.randn(400, generator=draw, dtype=torch.float64) - 0.5
    return log_rate, torch.poisson(1.5 * log_rate.exp(), generator=draw)


@pytest.fixture
def maps():
    """Rates, counts and tissue: three patches, two genes, 20 × 20 bins."""
    draw = torch.Generator().manual_seed(4)
    rate = torch.randn(3, 2, 20, 20, generator=draw, dtype=torch.float64).exp()
    tissue = torch.rand(3, 20, 20, generator=draw) > 0.3
    return rate, torch.poisson(rate, generator=draw), tissue


def gradient(loss: str, log_rate, count, **settings):
    """Of the sum of a loss in log λ."""
    x = log_rate.clone().view(1, 1, 20, 20).requires_grad_()
    (Objective(loss, "exp", 1, **settings).double()(x, count.view_as(x), MASK) * 400).backward()
    return x.grad.flatten()


# --- weight dial ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", POWERS)
def test_power_weighs_the_residual_by_the_variance(bins, p):
    log_rate, count = bins
    rate = log_rate.exp()
    expected = (rate - count) / rate**p * rate  # in λ, times the slope of the link
    torch.testing.assert_close(gradient(f"power-{p}", log_rate, count), expected)


def test_powers_0_and_1_are_squared_error_and_poisson(bins):
    torch.testing.assert_close(gradient("power-0", *bins), gradient("mse", *bins) / 2)
    torch.testing.assert_close(gradient("power-1", *bins), gradient("poisson", *bins))
    torch.testing.assert_close(
        losses.power(*bins, 0) + bins[1].square() / 2, losses.mse(bins[0].exp(), bins[1]) / 2
    )


@pytest.mark.parametrize("p", POWERS)
def test_power_is_half_a_tweedie_deviance_but_for_a_constant(bins, p):
    log_rate, count = bins
    count = count + 1  # the deviance of powers above 1 needs positive counts; between 0 and 1 …
    rate, other = log_rate.exp(), log_rate.flip(0).exp()
    values = [losses.power(r.log(), count, p).mean() for r in (rate, other)]
    if p == 0.5:  # … scikit-learn has none: ∫ (λ − y) / √λ
        deviance = [4 * (r**1.5 / 3 - count * r**0.5).mean() for r in (rate, other)]
    else:
        deviance = [mean_tweedie_deviance(count, r, power=p) for r in (rate, other)]
    assert (values[0] - values[1]).item() == pytest.approx((deviance[0] - deviance[1]) / 2)


def test_gamma_likelihood_of_a_gene_without_counts_has_a_floor():
    log_rate = torch.tensor([-1e3, -39.0], requires_grad=True)
    value = losses.power(log_rate, torch.zeros(2), 2)
    value.sum().backward()
    assert value.tolist() == [-40, -39] and log_rate.grad.tolist() == [0, 1]


def test_gene_weights_multiply_the_loss_of_each_gene(maps):
    rate, count, tissue = maps
    weight = torch.tensor([1.0, 3.0])
    for loss in ("poisson", "mse", "nb", "pearson", "multinomial"):
        weighted = Objective(loss, "exp", 2, (2, 4), gene_weight=weight)
        alone = Objective(loss, "exp", 1, (2, 4))
        own = [alone(rate.log()[:, g, None], count[:, g, None], tissue) for g in range(2)]
        expected = (0.5 * own[0] + 1.5 * own[1]) / 2  # weights of mean 1
        torch.testing.assert_close(weighted(rate.log(), count, tissue), expected)
    assert weighted.state_dict().keys() == {"gene_weight"}
    assert not Objective("mse", "exp", 2).state_dict()


@pytest.mark.parametrize("weight", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan]])
def test_gene_weights_that_cannot_be_are_refused(weight):
    with pytest.raises(ValueError, match="gene_weight must hold 2 positive numbers"):
        Objective("mse", "exp", 2, gene_weight=torch.tensor(weight))


def test_mse_over_the_mean_has_poissons_balance_and_poisson_times_the_mean_that_of_mse():
    """Expected gradient of each gene at a small relative error of its rate."""
    rate = torch.tensor([0.01, 1.0], dtype=torch.float64)[:, None, None]
    eta = (1.1 * rate).log().expand(1, 2, 20, 20)

    def balance(loss: str, weight=None) -> float:
        x = eta.clone().requires_grad_()
        Objective(loss, "exp", 2, gene_weight=weight)(x, rate.expand_as(x), MASK).backward()
        return (x.grad[0, 1].sum() / x.grad[0, 0].sum()).item()

    mean = rate.flatten()
    assert balance("mse") == pytest.approx(1e4)
    assert balance("mse", 1 / mean) == pytest.approx(balance("poisson")) == pytest.approx(100)
    assert balance("poisson", mean) == pytest.approx(balance("mse"))


# --- elementwise losses of the shelf --------------------------------------------------------------


def test_l1_and_square_roots_written_out(bins):
    rate, count = bins[0].exp(), bins[1]
    y, x = count.numpy(), rate.numpy()
    np.testing.assert_allclose(losses.l1(rate, count), np.abs(y - x))
    expected = (2 * np.sqrt(y + 0.375) - 2 * np.sqrt(x + 0.375)) ** 2
    np.testing.assert_allclose(losses.sqrt(rate, count), expected)


def test_presence_is_binary_cross_entropy(bins):
    log_rate, count = bins
    share = 1 - torch.exp(-log_rate.exp())
    expected = torch.nn.functional.binary_cross_entropy(
        share, (count > 0).double(), reduction="none"
    )
    torch.testing.assert_close(losses.presence(log_rate, count), expected)
    assert losses.presence(log_rate, 9 * count).equal(losses.presence(log_rate, count))


def test_presence_weighs_its_residual_as_documented(bins):
    log_rate, count = bins
    share = -torch.expm1(-log_rate.exp())
    expected = log_rate.exp() / share * (share - (count > 0).double())
    torch.testing.assert_close(gradient("presence", log_rate, count), expected)


def test_hurdle_with_one_rate_is_poisson(bins):
    zero = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(losses.hurdle(*bins, zero), losses.poisson(*bins))


@pytest.mark.parametrize("offset", [-2.0, 0.7])
def test_hurdle_is_presence_and_a_truncated_poisson(bins, offset):
    log_rate, count = bins
    ours = losses.hurdle(log_rate, count, torch.tensor(offset)).numpy()
    rate, y = log_rate.exp().numpy(), count.numpy()
    mu = rate * math.exp(offset)
    positive = stats.poisson.logpmf(y, mu) - np.log(-np.expm1(-mu)) + np.log(-np.expm1(-rate))
    expected = -np.where(y == 0, stats.poisson.logpmf(0, rate), positive)
    np.testing.assert_allclose(ours + special.gammaln(y + 1), expected)


def test_the_rate_of_a_sparse_hurdle_is_its_expected_count():
    log_rate, offset = torch.tensor(-5.0).double(), torch.tensor(0.5).double()
    count = torch.arange(60, dtype=torch.float64)
    mass = torch.exp(-losses.hurdle(log_rate.expand(60), count, offset) - torch.lgamma(count + 1))
    assert mass.sum().item() == pytest.approx(1)
    assert (mass * count).sum().item() == pytest.approx(log_rate.exp().item(), rel=0.01)


@pytest.mark.parametrize("theta, inflation", [(0.4, 0.3), (5.0, 0.01), (50.0, 0.8)])
def test_zero_inflated_nb_agrees_with_statsmodels_and_has_the_rate_as_its_mean(theta, inflation):
    rate = 1.3
    count = torch.arange(2000, dtype=torch.float64)
    log_theta, logit = torch.tensor([math.log(theta), math.log(inflation / (1 - inflation))])
    log_rate = torch.tensor(math.log(rate), dtype=torch.float64).expand(2000)
    ours = losses.zero_inflated(log_rate, count, log_theta.double(), logit.double())
    ours = ours + torch.lgamma(count + 1)
    some = count[:40].numpy()
    model = ZeroInflatedNegativeBinomialP(some, np.ones((40, 1)), p=2)
    parameters = [logit.item(), math.log(rate / (1 - inflation)), 1 / theta]
    np.testing.assert_allclose(ours[:40], -model.loglikeobs(parameters), rtol=1e-5, atol=1e-6)
    mass = torch.exp(-ours)
    assert mass.sum().item() == pytest.approx(1, rel=1e-5)
    assert (mass * count).sum().item() == pytest.approx(rate, rel=1e-4)


def test_zero_inflated_nb_without_inflation_is_nb(bins):
    log_rate, count = bins
    log_theta, never = torch.tensor(0.7).double(), torch.tensor(-60.0).double()
    found = losses.zero_inflated(log_rate, count, log_theta, never)
    torch.testing.assert_close(found, losses.negative_binomial(log_rate, count, log_theta))


def test_inflation_is_learned_from_counts():
    draw = np.random.default_rng(5)
    y = stats.nbinom.rvs(3, 3 / (3 + 2), size=40_000, random_state=draw)
    y = np.where(draw.random(40_000) < 0.4, 0, y).reshape(1, 1, 200, 200)
    count, mask = torch.from_numpy(y), torch.ones(1, 200, 200, dtype=torch.bool)
    objective = Objective("zinb", "exp", 1).double()
    eta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    parameters = [eta, *objective.parameters()]
    optimiser = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = objective(eta.expand(1, 1, 200, 200), count, mask)
        value.backward()
        return value

    optimiser.step(closure)
    assert objective.inflation_logit.sigmoid().item() == pytest.approx(0.4, abs=0.03)
    assert objective.log_dispersion.exp().item() == pytest.approx(3, rel=0.2)
    assert eta.exp().item() == pytest.approx(y.mean(), rel=0.02)


@pytest.mark.parametrize(
    "loss", ["presence", "hurdle", "zinb", "power-0.5", "power-1.5", "power-2"]
)
def test_float32_is_as_good_as_float64_over_the_whole_range(loss):
    """Gradients in η, relative to the size of the terms that they balance."""
    log_rate = torch.linspace(math.log(1e-8), math.log(1e4), 60, dtype=torch.float64)
    count = torch.tensor([0, 1, 2, 30, 10_000], dtype=torch.float64)
    eta, count = (x[None, None].clone() for x in torch.broadcast_tensors(log_rate[:, None], count))
    mask = torch.ones(1, 60, 5, dtype=torch.bool)
    grads = []
    for dtype in (torch.float32, torch.float64):
        x = eta.to(dtype).requires_grad_()
        (Objective(loss, "exp", 1).to(dtype)(x, count, mask) * count.numel()).backward()
        grads.append(x.grad.double())
    weight = torch.exp(-float(loss[6:]) * eta) if loss.startswith("power") else 1 / eta.exp()
    scale = 1e-4 + (eta.exp() + count) * weight * eta.exp()
    assert ((grads[0] - grads[1]).abs() / scale).max() < 5e-5


# --- losses over maps -----------------------------------------------------------------------------


def test_pearson_equals_scipy(maps):
    rate, count, tissue = maps
    found = map_losses.pearson(rate, count, tissue)
    for g in range(2):
        r = stats.pearsonr(rate[:, g][tissue], count[:, g][tissue]).statistic
        assert found[g].item() == pytest.approx(1 - r, abs=1e-6)
    error = (rate - count).movedim(1, -1)[tissue].square().mean(0)
    torch.testing.assert_close(map_losses.mse(rate, count, tissue), error)
    both = map_losses.mse_pearson(rate, count, tissue)
    torch.testing.assert_close(both, error + found / 2)


def test_pearson_asks_for_neither_level_nor_scale(maps):
    rate, count, tissue = maps
    found = map_losses.pearson(rate, count, tissue)
    torch.testing.assert_close(map_losses.pearson(1e-6 * rate, count, tissue), found)
    shifted = map_losses.pearson(rate + 5, count, tissue)
    torch.testing.assert_close(shifted, found, rtol=0, atol=1e-5)


def test_pearson_of_a_constant_side(maps):
    rate, count, tissue = maps
    count[:, 0], flat = 3.0, torch.full_like(rate, 0.05).requires_grad_()
    value = map_losses.pearson(rate, count, tissue)
    assert value[0] == 1 and value[1] < 1
    map_losses.pearson(flat, count, tissue).sum().backward()
    assert torch.isfinite(flat.grad).all()
    assert not flat.grad[:, 0].any() and flat.grad[:, 1].any()


def test_ssim_equals_scikit_image(maps):
    rate, count, tissue = maps
    found = map_losses.ssim(rate, count, tissue)
    for g in range(2):
        inside = []
        for patch in range(3):
            x, y = ((m[patch, g] * tissue[patch]).numpy() for m in (rate, count))
            span = max(1, y.max())
            _, full = structural_similarity(x, y, win_size=7, data_range=span, full=True)
            inside.append(full[3:-3, 3:-3][tissue[patch].numpy()[3:-3, 3:-3]])
        assert found[g].item() == pytest.approx(1 - np.concatenate(inside).mean())
    both = map_losses.mse_ssim(rate, count, tissue)
    torch.testing.assert_close(both, found + map_losses.mse(rate, count, tissue))


def test_ssim_rewards_emptiness(maps):
    """Zeros beat the true rate of a sparse gene, which squared error does not say."""
    rate, _, tissue = maps
    sparse = 0.01 * rate
    count = torch.poisson(sparse, generator=torch.Generator().manual_seed(6))
    truth, zeros = (map_losses.ssim(x, count, tissue) for x in (sparse, torch.zeros_like(rate)))
    assert (zeros < truth).all()


def test_ssim_needs_a_window(maps):
    with pytest.raises(ValueError, match="maps of 2 x 2 bins are smaller than the 7 x 7 of SSIM"):
        map_losses.ssim(*(torch.ones(1, 1, 2, 2),) * 2, torch.ones(1, 2, 2, dtype=torch.bool))


def test_multinomial_equals_scipy(maps):
    rate, count, tissue = maps
    found = map_losses.multinomial(rate.log(), count, tissue)
    for g in range(2):
        gain = 0.0
        for patch in range(3):
            x, y = (m[patch, g][tissue[patch]].numpy() for m in (rate, count))
            for sign, share in ((1, x / x.sum()), (-1, np.full(len(x), 1 / len(x)))):
                gain += sign * stats.multinomial.logpmf(y, y.sum(), share)
        assert found[g].item() == pytest.approx(-gain / tissue.sum().item())


def test_multinomial_is_poisson_with_the_level_of_each_patch_and_gene_at_its_best(maps):
    rate, count, tissue = maps
    inside = tissue[:, None]
    level = (count * inside).sum((2, 3), keepdim=True) / (rate * inside).sum((2, 3), keepdim=True)
    x = rate.log().requires_grad_()
    map_losses.multinomial(x, count, tissue).sum().backward()
    expected = torch.where(inside, level * rate - count, 0.0) / tissue.sum()
    torch.testing.assert_close(x.grad, expected)
    scaled = map_losses.multinomial(rate.log() + torch.randn(3, 2, 1, 1), count, tissue)
    torch.testing.assert_close(scaled, map_losses.multinomial(rate.log(), count, tissue))


# --- exposure -------------------------------------------------------------------------------------


def test_exposure_is_the_total_in_blocks_of_8_um_over_its_mean(maps):
    _, count, tissue = maps
    found = map_losses.log_exposure(count.to(torch.uint8), tissue).exp()
    total = (count.sum(1) * tissue).numpy()
    mean = total.sum() / tissue.sum().item()
    block = tissue[1, 4:8, 12:16].numpy()
    expected = total[1, 4:8, 12:16].sum() / block.sum() / mean
    np.testing.assert_allclose(found[1, 4:8, 12:16], expected)
    fixed = map_losses.log_exposure(count, tissue, mean_depth=2 * mean).exp()
    torch.testing.assert_close(fixed, found / 2)
    assert map_losses.log_exposure(count[..., :1, :5], tissue[..., :1, :5]).shape == (3, 1, 5)


def test_exposure_scales_the_rate_of_poisson(maps):
    rate, count, tissue = maps
    for link, eta in (("exp", rate.log()), ("softplus", torch.log(torch.expm1(rate)))):
        found = Objective("poisson-depth", link, 2, mean_depth=1.7)(eta, count, tissue)
        expected_count = rate * map_losses.log_exposure(count, tissue, 1.7).exp()[:, None]
        plain = Objective("poisson", "exp", 2)(expected_count.log(), count, tissue)
        torch.testing.assert_close(found, plain)


def test_bins_of_an_empty_block_have_no_say():
    count = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    count[..., 4:] = 2
    eta = torch.ones_like(count).requires_grad_()
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    Objective("poisson-depth", "exp", 2)(eta, count, mask).backward()
    assert eta.grad[..., :4].abs().max() < 1e-8 < eta.grad[..., 4:].abs().min()


def test_depth_is_conditioned_out():
    """Where depth varies and the share of each gene does not, one rate per gene fits all bins."""
    draw = torch.Generator().manual_seed(7)
    depth = torch.ones(1, 1, 64, 64, dtype=torch.float64)
    depth[..., 32:] = 9.0
    share = torch.tensor([0.5, 2.0], dtype=torch.float64).view(1, 2, 1, 1)
    count = torch.poisson((depth * share).expand(1, 2, 64, 64), generator=draw)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    mean = count.sum(1).mean().item()
    eta = (5 * share).log().expand_as(count).clone().requires_grad_()  # counts at mean depth
    Objective("poisson-depth", "exp", 2, mean_depth=mean)(eta, count, mask).backward()
    halves = [eta.grad[0, :, :, part].sum((1, 2)) for part in (slice(32), slice(32, None))]
    assert torch.stack(halves).abs().max() < 0.02


# --- minimisers of losses over maps ---------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mse+pearson", "pearson", "multinomial", "poisson"])
def test_minimisers_over_maps_are_the_mean_in_some_unit(loss):
    """Three strips of one rate each, fitted; pearson leaves level and scale open."""
    strip = torch.arange(60) // 20
    truth = torch.tensor([0.2, 0.5, 2.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(8)
    count = torch.poisson(truth[strip].expand(1, 1, 60, 60), generator=draw)
    mask = torch.ones(1, 60, 60, dtype=torch.bool)
    mean = torch.stack([count[..., strip == i].mean() for i in range(3)])
    eta = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64, requires_grad=True)
    objective = Objective(loss, "exp", 1)
    optimiser = torch.optim.LBFGS([eta], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = objective(eta[strip].expand(1, 1, 60, 60), count, mask)
        value.backward()
        return value

    optimiser.step(closure)
    found = eta.detach().exp()
    if loss == "pearson":
        found = (found - found[0]) / (found[2] - found[0]) * (mean[2] - mean[0]) + mean[0]
    elif loss == "multinomial":
        found = found * mean.sum() / found.sum()
    torch.testing.assert_close(found, mean, rtol=1e-3, atol=1e-3)


def test_ssim_draws_the_rate_of_a_sparse_gene_below_its_mean():
    draw = torch.Generator().manual_seed(9)
    count = torch.poisson(torch.full((1, 1, 64, 64), 0.02), generator=draw)
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    objective = Objective("mse+ssim", "exp", 1)
    rates = torch.logspace(-5, -1, 60)
    values = [objective(r.log().expand_as(count), count, mask) for r in rates]
    assert rates[torch.stack(values).argmin()] < 0.1 * count.mean()
