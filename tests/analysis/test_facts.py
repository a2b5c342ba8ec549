"""Facts of a world, on counts of known variance."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from planted import simulated_maps

from sparsity_trap.analysis.worlds import facts
from sparsity_trap.settings import UserError


class Store(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.counts)


@pytest.fixture(scope="module")
def home() -> Store:
    return Store(**vars(simulated_maps(0)))


def test_poisson_counts_have_a_fano_factor_of_one_around_their_rate(home):
    found = facts(home, home)
    inside = home.counts.transpose(1, 0, 2, 3)[:, home.mask].astype(float)
    np.testing.assert_allclose(found["mean_count"], inside.mean(1))
    np.testing.assert_allclose(found["sparsity"], (inside == 0).mean(1))
    np.testing.assert_allclose(found["fano"], inside.var(1) / inside.mean(1))
    np.testing.assert_allclose(found["fano_around_rate"], 1, atol=0.06)
    assert (found["fano"] >= found["fano_around_rate"] - 0.01).all()
    np.testing.assert_allclose(found["agreement"], 1)


def test_dispersed_counts_have_a_larger_one_and_other_rates_agree_less(home):
    rng = np.random.default_rng(1)
    rate = home.truth.astype(float)
    counts = rng.poisson(rate * rng.gamma(0.5, 2, rate.shape)).astype(np.uint16)
    found = facts(Store(**vars(home) | {"counts": counts}), home)
    square = (rate**2).sum((0, 2, 3)) / rate.sum((0, 2, 3))
    np.testing.assert_allclose(found["fano_around_rate"], 1 + square / 0.5, rtol=0.08)
    turned = Store(**vars(home) | {"truth": home.truth[:, :, ::-1]})
    assert (facts(turned, home)["agreement"] < 0.6).all()


def test_real_sections_are_refused(home):
    real = Store(**vars(home) | {"truth": None, "path": "stores/P5.zarr"})
    with pytest.raises(UserError, match=r"stores/P5.zarr has no true rates"):
        facts(real, home)
