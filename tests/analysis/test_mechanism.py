"""Weights and gradient shares against autograd, minimisers against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cells import run_cells
from scipy import optimize
from torch import nn

from sparsity_trap import losses
from sparsity_trap.analysis import mechanism
from sparsity_trap.decoders import Hist2ST


def squared(eta, y, link):
    return (y - losses.rate(eta, link)).square()


def likelihood(eta, y, link):
    return losses.rate(eta, link) - y * losses.log_rate(eta, link)


LOSSES = {"mse": squared, "poisson": likelihood}


# --- weight of a bin ------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["exp", "softplus"])
@pytest.mark.parametrize("loss", ["mse", "poisson"])
def test_weight_on_the_page_times_residual_is_the_gradient(loss, link):
    page = run_cells("07_factorial", {"np": np}, lambda source: source.startswith("rate = "))
    rate = page["rate"]
    weight = page["weights"]["MSE" if loss == "mse" else "Poisson", link]
    eta = losses.initial_eta(torch.from_numpy(rate), link).requires_grad_()
    y = torch.poisson(torch.full_like(eta, 0.7))
    gradient = torch.autograd.grad(LOSSES[loss](eta, y, link).sum(), eta)[0].numpy()
    np.testing.assert_allclose(weight * (rate - y.numpy()), gradient, rtol=1e-9)


# --- gradient share -------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A model as training builds it: anything with a decoder that ends in a head."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens):
        return self.decoder(tokens)


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    model = Tokens(Hist2ST(6, 4, hidden=16, heads=2, layers=1, dropout=0.5))
    tokens = torch.randn(2, 6, 16, 16)
    level = torch.tensor([0.02, 0.1, 0.5, 2.0])[None, :, None, None]
    counts = torch.poisson(level.expand(2, 4, 128, 128))
    mask = torch.zeros(2, 128, 128, dtype=torch.bool)
    mask[:, :, :70] = True
    return model, tokens, counts, mask


def reference(model, tokens, counts, mask, loss):
    """The head's Jacobian by hand: each gene's row of weights times its gradient of η."""
    model.eval()
    eta = model(tokens).detach().requires_grad_()
    gradient = torch.autograd.grad((loss(eta, counts) * mask[:, None]).sum(), eta)[0]
    row = model.decoder.head.weight.detach().flatten(1).square().sum(1)
    norms = gradient.square().sum((0, 2, 3)) * row
    return (norms / norms.sum()).numpy()


@pytest.mark.parametrize("name", ["mse", "poisson"])
def test_share_equals_the_heads_jacobian(batch, name):
    share = mechanism.gradient_share(*batch, losses.Objective(name, "exp", genes=1))
    assert share.shape == (4,)
    assert share.sum() == pytest.approx(1)
    expected = reference(*batch, lambda eta, y: LOSSES[name](eta, y, "exp"))
    np.testing.assert_allclose(share, expected, rtol=1e-4)


def test_weights_of_genes_enter_their_shares(batch):
    weight = torch.tensor([1.0, 0.5, 3.0, 2.0])
    objective = losses.Objective("mse", "exp", genes=1)
    share = mechanism.gradient_share(*batch, objective, weight)
    whole = losses.Objective("mse", "exp", 4, gene_weight=weight)

    def loss(eta, y):
        mask = torch.ones(y.shape[0], *y.shape[2:], dtype=torch.bool)
        per_bin = losses.mse(eta.exp(), y) * whole.gene_weight[:, None, None]
        assert torch.isclose(per_bin.mean(), whole(eta, y, mask))
        return per_bin

    np.testing.assert_allclose(share, reference(*batch, loss), rtol=1e-4)


def test_rich_genes_own_the_gradient_of_mse_more_than_of_poisson(batch):
    def share(name):
        return mechanism.gradient_share(*batch, losses.Objective(name, "softplus", genes=1))

    model = batch[0]
    with torch.no_grad():  # every gene at its own mean, as after training
        head = model.decoder.head
        before = head.bias.clone(), head.weight.clone()
        head.bias.copy_(torch.log(torch.expm1(torch.tensor([0.02, 0.1, 0.5, 2.0]))))
        head.weight.fill_(0.01)
    mse, poisson = share("mse"), share("poisson")
    with torch.no_grad():
        head.bias.copy_(before[0])
        head.weight.copy_(before[1])
    assert mse[3] > 0.7 > poisson[3]
    assert poisson[0] > 20 * mse[0]


def test_share_leaves_the_model_as_it_was(batch):
    model = batch[0]
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        mechanism.gradient_share(*batch, losses.Objective("mse", "exp", genes=1))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_share_of_nothing_is_undefined(batch):
    model, tokens, counts, mask = batch
    objective = losses.Objective("mse", "exp", genes=1)
    share = mechanism.gradient_share(model, tokens, counts, torch.zeros_like(mask), objective)
    assert np.isnan(share).all()


# --- minimisers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    return mechanism.toy_minimisers()


def test_mse_and_poisson_reach_the_same_group_means(toy):
    fits = toy[toy["loss"].isin(["mse", "poisson"])]
    assert fits["converged"].all()
    np.testing.assert_allclose(fits["minimiser"], fits["mean_count"], rtol=1e-5)
    np.testing.assert_allclose(fits["mean_count"], fits["rate"], rtol=0.2)
    assert fits["mean_count"].nunique() == 4  # no constant


def test_mse_on_log1p_stays_below_the_mean(toy):
    fits = toy[toy["loss"] == "mse-log1p"]
    assert fits["converged"].all()
    assert (fits["relative_error"] < -0.2).all()


@pytest.mark.parametrize("loss", ["mse", "mse-log1p", "poisson"])
def test_minimisers_equal_scipys(toy, loss):
    rng = np.random.default_rng(0)
    counts = rng.poisson(np.array([0.03, 0.1, 0.3, 1.0])[:, None], (4, 4000))
    objective = {
        "mse": lambda rate, y: np.mean((y - rate) ** 2),
        "mse-log1p": lambda rate, y: np.mean((np.log1p(y) - np.log1p(rate)) ** 2),
        "poisson": lambda rate, y: np.mean(rate - y * np.log(rate)),
    }[loss]
    expected = [
        optimize.minimize_scalar(
            objective, bounds=(1e-6, 5), args=(y,), method="bounded", options={"xatol": 1e-9}
        ).x
        for y in counts
    ]
    for link in ("softplus", "exp"):
        found = toy[(toy["loss"] == loss) & (toy["link"] == link)]["minimiser"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_mse_takes_longer_for_poor_groups_than_poisson(toy):
    steps = toy.set_index(["loss", "link", "rate"])["steps"]
    for link in ("softplus", "exp"):
        assert steps["mse", link, 0.03] > 10 * steps["poisson", link, 0.03]
        assert steps["mse", link, 0.03] > 20 * steps["mse", link, 1.0]


def test_under_adamw_poor_groups_are_no_slower_than_rich_ones():
    toy = mechanism.toy_minimisers(rates=(0.03, 1.0), lr=6e-3)
    assert toy["converged"].all()
    fits = toy[toy["loss"] != "mse-log1p"]
    np.testing.assert_allclose(fits["minimiser"], fits["mean_count"], rtol=1e-4)
    steps = toy[toy["link"] == "exp"].set_index(["loss", "rate"])["steps"]
    assert steps["mse", 0.03] < steps["mse", 1.0]
    assert steps["mse", 0.03] < 2 * steps["poisson", 0.03]


@pytest.mark.parametrize("loss", ["mse", "mse-log1p", "poisson"])
@pytest.mark.parametrize("link", ["exp", "softplus"])
def test_steps_of_the_toy_are_torchs(loss, link):
    """Gradients against autograd of the losses of arms, AdamW against torch's."""
    count = torch.tensor([0.03, 0.4], dtype=torch.float64)
    eta = torch.full_like(count, -1.0).requires_grad_()

    def gradient():
        seen = losses.rate(eta, link)
        of_rate = {"mse": losses.mse, "mse-log1p": losses.mse_log1p}
        value = (
            losses.poisson(losses.log_rate(eta, link), count)
            if loss == "poisson"
            else of_rate[loss](seen, count)
        )
        return torch.autograd.grad(value.sum(), eta)[0]

    own = mechanism.toy_gradient(loss, link, eta.detach().numpy(), count.numpy())
    np.testing.assert_allclose(own, gradient().numpy(), rtol=1e-9)
    with torch.no_grad():
        eta.fill_(mechanism.PUBLISHED_BIAS[link])
    optimiser = torch.optim.AdamW([eta], 0.01, weight_decay=0, eps=mechanism.EPS)
    for _ in range(20):
        eta.grad = gradient()
        optimiser.step()
    path, _ = mechanism._descend(loss, link, count.numpy(), 20, 0.01)
    np.testing.assert_allclose(path[20], losses.rate(eta.detach(), link).numpy(), rtol=1e-9)


def test_plateau_of_squared_error_is_on_the_page():
    page = run_cells("07_factorial", {"np": np}, lambda source: source.startswith("eta = "))
    for link, seen in page["links"].items():
        expected = losses.rate(torch.from_numpy(page["eta"]), link).numpy()
        np.testing.assert_allclose(seen, expected, rtol=1e-12)
    curvature = {name: np.diff(curve, 2) for name, curve in page["curves"].items()}
    assert (curvature["Poisson", "exp"] > 0).all()
    assert (curvature["MSE", "exp"] < 0).any() and (curvature["MSE", "softplus"] < 0).any()


def test_weights_of_genes_enter_as_their_square(batch):
    objective = losses.Objective("mse", "exp", genes=1)
    plain = mechanism.gradient_share(*batch, objective)
    weight = torch.tensor([4.0, 1.0, 1.0, 0.5])
    weighted = mechanism.gradient_share(*batch, objective, weight)
    expected = plain * weight.numpy() ** 2
    np.testing.assert_allclose(weighted, expected / expected.sum(), rtol=1e-6)


def test_steps_that_run_out_are_reported():
    assert not mechanism.toy_minimisers(max_steps=10)["converged"].any()
