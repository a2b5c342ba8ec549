"""Every protocol against a plain implementation of what was published."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT
from planted import simulated_maps
from scipy import stats
from skimage.metrics import structural_similarity

import sparsity_trap as st
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.evaluation import protocols
from sparsity_trap.evaluation.protocols import PROTOCOLS
from sparsity_trap.evaluation.verdict import beaten_under


@pytest.fixture(scope="module")
def maps():
    section = simulated_maps(3, patches=5, genes=4, side=32)
    rate = np.random.default_rng(0).gamma(4, 0.25, section.counts.shape) * section.truth
    rate[:, 3] = 0.25  # a constant
    rate[~np.broadcast_to(section.mask[:, None], rate.shape)] = 0.05
    return section.counts, rate.astype(np.float16), section.mask


@pytest.fixture(scope="module")
def scored(maps):
    return st.evaluate(*maps)


@pytest.fixture(scope="module")
def wide(maps):
    counts, rate, mask = maps
    inside = bin_mask(mask, 4)
    on = (np.where(mask[:, None], x, 0) for x in (counts, rate))
    return *(bin_sum(x, 4) * inside[:, None] for x in on), inside


def pcc(x, y) -> float:
    return stats.pearsonr(x, y).statistic if np.ptp(x) > 0 and np.ptp(y) > 0 else np.nan


def by_gene(x, y, where) -> list[float]:
    return [pcc(x[:, g][where], y[:, g][where]) for g in range(x.shape[1])]


def expected(maps, wide) -> dict[str, float]:
    (counts, rate, mask), (y8, p8, inside) = maps, wide
    whole = np.ones_like(inside)
    everything = by_gene(bin_sum(counts, 4), bin_sum(rate, 4), whole)
    own = np.broadcast_to(mask[:, None], counts.shape)
    logs = np.log1p(y8), np.log1p(p8)
    samples = [by_gene(*(x[i : i + 1] for x in (*logs, inside))) for i in range(len(mask))]
    in_tissue = by_gene(y8, p8, inside)
    ssim, joint = [], []
    for y, p, m in zip(counts, rate, mask, strict=True):
        for a, b in zip(np.where(m, y, 0.0), np.where(m, p, 0.0), strict=True):
            span = max(a.max(), b.max()) - min(a.min(), b.min())
            ssim.append(structural_similarity(a, b, data_range=span))
    for y, p in zip(y8, p8, strict=True):
        span = max(y.max(), p.max()) - min(y.min(), p.min())
        channels = np.moveaxis(y, 0, -1).astype(float), np.moveaxis(p, 0, -1).astype(float)
        joint.append(structural_similarity(*channels, data_range=span, channel_axis=-1))
    precision = []
    for g in range(3):  # of the constant, the base rate
        y, p = counts[:, g][mask] > 0, rate[:, g][mask]
        k = y.sum()
        cut = np.sort(p)[::-1][k - 1]
        above, at = p > cut, p == cut
        precision.append((y[above].sum() + (k - above.sum()) * y[at].mean()) / k)
    precision.append((counts[:, 3][mask] > 0).mean())
    nonzero = [pcc(*(x[:, g][inside & (y8[:, g] > 0)] for x in (y8, p8))) for g in range(4)]
    return {
        "pcc": np.nanmean(in_tissue),
        "pcc_unmasked": np.nanmean(everything),
        "pooled": pcc(counts[own], rate[own].astype(float)),
        "hest": np.nanmean(by_gene(*logs, inside)),
        "hest_per_sample": np.nanmean(np.nanmean(samples, axis=0)),
        "img2st_pcc": np.nan_to_num(in_tissue).mean(),
        "img2st_ssim": np.mean(joint),
        "ssim": np.mean(np.reshape(ssim, (5, 4)).mean(0)),
        "best_genes": np.mean(sorted(np.array(in_tissue)[~np.isnan(in_tissue)])[-2:]),
        "nonzero": np.nanmean(nonzero),
        "top_k": np.mean(precision),
    }


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_every_protocol_is_what_was_published(maps, wide, scored):
    by_hand = expected(maps, wide)
    assert list(scored.protocols["model"]) == list(by_hand) == list(PROTOCOLS)
    for name, value in by_hand.items():
        assert scored.protocols["model"][name] == pytest.approx(value, abs=1e-6), name


def test_an_empty_patch_is_1_and_an_undefined_gene_0(scored):
    empty = np.zeros((2, 8, 8))
    assert protocols.joint_ssim(empty, empty) == 1
    assert scored.protocols["all zeros"]["img2st_pcc"] == 0
    assert np.isnan(scored.protocols["all zeros"]["pcc"])


def test_moments_where_bins_differ_from_gene_to_gene():
    rng = np.random.default_rng(1)
    x, y, where = rng.poisson(3, (3, 9)) + 0.0, rng.gamma(1, size=(3, 9)), rng.random((3, 9)) < 0.6
    where[2] = False
    y[1] = 0.3
    found = protocols.moments_where(x, y, where)
    assert found.n.tolist() == where.sum(1).tolist()
    assert found.pcc()[0] == pytest.approx(pcc(x[0, where[0]], y[0, where[0]]))
    assert np.isnan(found.pcc()[1:]).all() and found.yy[1] == 0
    total = (found + protocols.moments_where(x, y, ~where)).pcc()
    assert total[0] == pytest.approx(pcc(x[0], y[0]))


def test_the_better_half_of_a_small_panel_and_50_of_a_large_one():
    assert protocols.best_genes(np.array([0.1, np.nan, 0.3, 0.5])) == pytest.approx(0.4)
    large = np.random.default_rng(2).normal(size=200)
    assert protocols.best_genes(large) == pytest.approx(np.sort(large)[-50:].mean())


def test_nulls_that_score_as_high_are_named_best_first():
    table = {
        "model": {"a": 0.3, "b": 0.3, "c": np.nan}, "x": {"a": 0.3, "b": 0.1, "c": 0.0},
        "y": {"a": 0.5, "b": np.nan, "c": np.nan}, "oracle": {"a": 1, "b": 1, "c": 1},
        "blurred 8 µm": {"a": 1, "b": 1, "c": 1},
    }  # fmt: skip
    assert beaten_under(table) == {"a": ["y", "x"], "b": [], "c": ["x"]}


def test_sources_are_in_the_bibliography():
    known = (ROOT / "book" / "references.bib").read_text()
    for protocol in PROTOCOLS.values():
        assert not protocol.source or f"{{{protocol.source}," in known
