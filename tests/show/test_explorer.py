"""The loss explorer against torch's distributions, in Python and in a real browser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fragment import stands_alone

from sparsity_trap.show import explorer


def test_html_is_well_formed_and_needs_nothing_from_elsewhere():
    stands_alone(explorer.loss_explorer())


def reference(name: str, link: str, rate: float, count: int) -> tuple[float, float]:
    """Loss above its minimum and its derivative by η, from torch.distributions and autograd."""

    def loss(of: torch.Tensor) -> torch.Tensor:
        y = torch.tensor(float(count), dtype=torch.float64)
        if name == "mse":
            return (y - of) ** 2
        if name == "poisson":
            return -torch.distributions.Poisson(of).log_prob(y)
        one = torch.ones((), dtype=torch.float64)
        return -torch.distributions.NegativeBinomial(one, logits=of.log()).log_prob(y)

    given = torch.tensor(rate, dtype=torch.float64)
    eta = (given.log() if link == "exp" else given.expm1().log()).requires_grad_()
    value = loss(eta.exp() if link == "exp" else torch.nn.functional.softplus(eta))
    (gradient,) = torch.autograd.grad(value, eta)
    least = loss(torch.tensor(max(count, 1e-12), dtype=torch.float64))
    return (value - least).item(), gradient.item()


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("name", ["mse", "poisson", "nb"])
def test_losses_and_gradients_agree_with_those_of_distributions(name, count):
    rates = np.array([0.005, 0.05, 1.0, 3.0, 15.0])
    for link in ("exp", "softplus"):
        expected = [reference(name, link, float(rate), count) for rate in rates]
        own = explorer.loss_and_gradient(name, link, rates, count)
        np.testing.assert_allclose(np.transpose(own), expected, rtol=1e-9, atol=1e-9)


def test_loss_explorer_prints_the_losses_of_its_sliders(driven, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        f'<!doctype html><meta charset="utf8"><title>t</title>{explorer.loss_explorer()}'
    )
    driven.open(page.as_uri())
    driven.value("document.querySelector('.le-count-input').focus()")
    driven.key("ArrowRight")
    driven.value("document.querySelector('.le-rate').focus()")
    for _ in range(3):
        driven.key("ArrowRight")
    assert driven.value("document.querySelector('.le-count-value').textContent") == "2"
    rate = 10 ** driven.value("Number(document.querySelector('.le-rate').value)")
    assert rate == pytest.approx(10**-1.15)
    for name in ("mse", "poisson", "nb"):
        cells = driven.value(
            f"Array.from(document.querySelectorAll('tr[data-loss={name}] td'), c => c.textContent)"
        )
        printed = [float(cell.replace("−", "-")) for cell in cells]
        (excess, exp), (_, softplus) = (reference(name, k, rate, 2) for k in ("exp", "softplus"))
        np.testing.assert_allclose(printed, [excess, exp, softplus], atol=6e-4)
    drawn = "document.querySelectorAll('.le-plots svg:nth-child({}) {}').length"
    assert driven.value(drawn.format(1, "path")) == 3
    assert driven.value(drawn.format(2, "path")) == 6
