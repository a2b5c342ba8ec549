"""Ceilings of PCC, on maps whose truth is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cells import run_cells
from planted import simulated_maps
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis import ceilings
from sparsity_trap.bins import bin_mask, bin_sum


@pytest.fixture(scope="module")
def store() -> SimpleNamespace:
    return simulated_maps(0)


@pytest.mark.parametrize("factor", [1, 4])
def test_poisson_ceiling_is_the_correlation_of_the_rate_with_its_counts(store, factor):
    rng = np.random.default_rng(3)
    rate, mask = store.truth.astype(float), store.mask
    ceiling = ceilings.poisson_ceiling(rate, mask, factor)
    inside = bin_mask(mask, factor)
    flat = np.moveaxis(bin_sum(rate, factor), 1, 0)[:, inside]
    expected = [
        np.mean([stats.pearsonr(x, rng.poisson(x)).statistic for _ in range(20)]) for x in flat
    ]
    np.testing.assert_allclose(ceiling, expected, atol=0.02)


def test_poisson_ceiling_of_constant_and_empty_rates():
    mask = np.ones((2, 8, 8), bool)
    rate = np.full((2, 2, 8, 8), 0.3)
    rate[:, 1] = 0
    ceiling = ceilings.poisson_ceiling(rate, mask, 1)
    assert ceiling[0] == 0
    assert np.isnan(ceiling[1])
    assert np.isnan(ceilings.poisson_ceiling(rate, ~mask, 1)).all()


@pytest.mark.parametrize("factor", [2, 4])
def test_split_ceiling_finds_the_exact_one(factor):
    section = simulated_maps(4, patches=20)
    exact = ceilings.poisson_ceiling(section.truth, section.mask, factor)
    estimate = ceilings.split_ceiling(section.counts, section.mask, factor)
    np.testing.assert_allclose(estimate, exact, atol=0.04)
    assert np.ptp(exact) > 0.2  # so an estimate that were the same for all genes would fail
    again = ceilings.split_ceiling(section.counts, section.mask, factor)
    np.testing.assert_array_equal(estimate, again)
    assert (ceilings.split_ceiling(section.counts, section.mask, factor, seed=1) != again).all()


def test_split_ceiling_is_undefined_without_structure():
    rng = np.random.default_rng(5)
    mask = np.ones((4, 32, 32), bool)
    counts = np.zeros((4, 3, 32, 32), np.uint16)
    counts[:, 0] = 1  # halves of a constant exclude each other
    counts[:, 1] = rng.binomial(1, 0.5, (4, 32, 32))  # and so do those of under-dispersed counts
    assert np.isnan(ceilings.split_ceiling(counts, mask, 1)).all()
    assert np.isnan(ceilings.split_ceiling(counts, ~mask, 1)).all()
    with pytest.raises(ValueError, match="at least one split"):
        ceilings.split_ceiling(counts, mask, repeats=0)


def test_ceilings_written_out_on_the_page_are_those_of_the_gene(store):
    page = {
        "np": np, "stats": stats, "bin_mask": bin_mask, "bin_sum": bin_sum, "gene": 3,
        "mask": store.mask, "counts": store.counts[:, [3]],
        "store": SimpleNamespace(truth=SimpleNamespace(oindex=store.truth.astype(float))),
        "pd": SimpleNamespace(DataFrame=list),
        "tables": SimpleNamespace(show=lambda *_, **__: None),
    }  # fmt: skip
    found = run_cells("06_controls", page, lambda source: source.startswith("inside = "))
    exact = ceilings.poisson_ceiling(store.truth, store.mask, 4)[3]
    assert found["of_gene"]["known rate"] == pytest.approx(exact)
    assert found["of_gene"]["one split"] == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("known", [True, False])
def test_real_sections_are_split(store, known, monkeypatch):
    section = SimpleNamespace(**{**vars(store), "truth": store.truth if known else None})
    monkeypatch.setattr(runs, "kept_table", lambda _, name, made_from, compute: compute())
    monkeypatch.setattr(runs, "store", lambda *_: section)
    found = ceilings.best_pcc(None, "P5")
    assert found["gene"].tolist() == store.genes
    for column, factor in (("ceiling_2um", 1), ("ceiling_8um", 4)):
        if known:
            expected = ceilings.poisson_ceiling(store.truth, store.mask, factor)
        else:
            expected = ceilings.split_ceiling(store.counts, store.mask, factor)
        np.testing.assert_array_equal(found[column], expected)
