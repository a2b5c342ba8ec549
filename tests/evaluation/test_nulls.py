"""Nulls: what they are made of, and what they score where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

import sparsity_trap as st
from sparsity_trap.evaluation import nulls


def dealt(n: int, size: int | None) -> tuple[list[tuple[int, int]], nulls.Dealt]:
    """Which patch's prediction every patch got, and what dealt them."""
    buffer, got, mask = nulls.Dealt(size), [], np.ones((2, 2), bool)
    held = []
    for i in range(n):
        counts, rate = (np.full((1, 2, 2), i, kind) for kind in ("u2", "f4"))
        got += list(buffer.push(counts, rate, mask))
        held.append(len(buffer.held))
    got += list(buffer.rest())
    assert max(held) <= (size or 32)
    return [(int(y.flat[0]), int(p.flat[0])) for y, p, _ in got], buffer


@pytest.mark.parametrize("size", [1, 3, None])
@pytest.mark.parametrize("n", [2, 3, 7, 100])
def test_every_prediction_goes_to_one_other_patch(n, size):
    pairs, _ = dealt(n, size)
    patches, sources = zip(*pairs, strict=True)
    assert sorted(patches) == sorted(sources) == list(range(n))
    assert all(patch != source for patch, source in pairs)


def test_a_buffer_of_one_gives_the_patch_before_and_a_large_one_mixes():
    pairs, _ = dealt(6, 1)
    assert sorted(pairs) == [(i, (i - 1) % 6) for i in range(6)]
    mixed, _ = dealt(200, 32)
    assert np.std([patch - source for patch, source in mixed if patch > source]) > 10


def test_one_patch_has_no_other_and_large_patches_fill_a_smaller_buffer():
    assert dealt(1, None)[0] == []
    buffer, big = nulls.Dealt(), np.zeros((1, 4096, 2048), np.float32)
    list(buffer.push(big, big, np.ones(big.shape[1:], bool)))
    assert buffer.size == 2


def test_depth_is_the_total_of_the_other_genes_times_the_mean():
    counts, mean = np.random.default_rng(0).poisson(2, (3, 4, 5)), np.array([0.5, 1.0, 2.0])
    found = nulls.depth(counts, mean)
    for g in range(3):
        others = [h for h in range(3) if h != g]
        expected = mean[g] * counts[others].sum(0) / mean[others].sum()
        np.testing.assert_allclose(found[g], expected, rtol=1e-6)
    assert not nulls.depth(counts[:1], mean[:1]).any()


def test_blur_over_tissue_is_the_normalised_one_of_scipy():
    rng = np.random.default_rng(1)
    rate, mask = rng.gamma(1, size=(2, 24, 16)), rng.random((24, 16)) < 0.7
    options = {"sigma": 1.5, "mode": "nearest"}
    share = ndimage.gaussian_filter(mask.astype(float), **options)
    expected = [ndimage.gaussian_filter(np.where(mask, r, 0), **options) / share for r in rate]
    np.testing.assert_allclose(nulls.blurred(rate, mask, 1.5), expected, rtol=1e-4)
    garbage = np.where(mask, rate, np.nan)
    np.testing.assert_array_equal(nulls.blurred(garbage, mask, 1.5), nulls.blurred(rate, mask, 1.5))


# --- scores with a known answer -------------------------------------------------------------------


def test_constant_maps_have_no_correlation_and_the_share_of_counts_as_auprc():
    rng = np.random.default_rng(2)
    counts, mask = rng.poisson(0.3, (3, 2, 16, 16)), np.ones((3, 16, 16), bool)
    mean = counts.mean((0, 2, 3))
    found = st.evaluate(counts, rng.gamma(1, size=counts.shape), mask, mean)
    for null in ("all zeros", "training mean"):
        scores = found.scores[null]
        assert np.isnan([scores["pcc_2um"], scores["pcc_8um"], scores["spearman_8um"]]).all()
        np.testing.assert_allclose(scores["auprc"], (counts > 0).mean((0, 2, 3)))
    np.testing.assert_allclose(found.scores["training mean"]["d2"], 0, atol=1e-6)
    np.testing.assert_array_equal(found.scores["all zeros"]["calibration"], 0)
    np.testing.assert_allclose(found.scores["all zeros"]["mse"], (counts**2.0).mean((0, 2, 3)))


def test_patch_mean_has_the_share_of_variance_between_patches():
    rng = np.random.default_rng(3)
    level = rng.gamma(2, 0.2, (5, 2, 1, 1))
    counts, mask = rng.poisson(level * np.ones((16, 16))), np.ones((5, 16, 16), bool)
    found = st.evaluate(counts, rng.gamma(1, size=counts.shape), mask).scores["patch mean"]
    between = counts.mean((2, 3)).var(0) / counts.var((0, 2, 3))
    np.testing.assert_allclose(found["pcc_2um"], np.sqrt(between), rtol=1e-6)


def test_patches_that_are_all_alike_lose_nothing_when_they_are_dealt_anew():
    rng = np.random.default_rng(4)
    rate = np.repeat(rng.gamma(1, size=(1, 2, 16, 16)), 5, 0)
    mask = np.ones((5, 16, 16), bool)
    found = st.evaluate(np.repeat(rng.poisson(rate[:1]), 5, 0), rate, mask).scores
    for null in ("shuffled patches", "another patch"):
        for name in ("pcc_2um", "ssim_2um", "d2", "auprc", "spearman_8um"):
            np.testing.assert_allclose(found[null][name], found["model"][name], atol=1e-9)
    differing = rng.gamma(1, size=rate.shape)  # independent patches share nothing
    found = st.evaluate(rng.poisson(differing), differing, mask).scores
    assert abs(found["shuffled patches"]["pcc_2um"]).max() < 0.1 < found["model"]["pcc_2um"].min()


def test_stripes_lose_nothing_when_they_are_shifted_along():
    rng = np.random.default_rng(5)
    rate = np.repeat(rng.gamma(1, size=(2, 2, 32, 1)), 32, 3)
    found = st.evaluate(rng.poisson(rate), rate, np.ones((2, 32, 32), bool)).scores
    np.testing.assert_allclose(found["shifted 32 µm"]["pcc_2um"], found["model"]["pcc_2um"])
    assert (found["blurred 8 µm"]["pcc_2um"] < found["model"]["pcc_2um"]).all()  # across, it does


def test_depth_alone_is_the_oracle_where_genes_differ_in_nothing_else():
    rng = np.random.default_rng(6)
    deep, share = rng.gamma(1, size=(4, 1, 16, 16)), np.array([0.5, 5, 50])[None, :, None, None]
    counts, mask = rng.poisson(deep * share), np.ones((4, 16, 16), bool)
    rate = rng.gamma(1, size=counts.shape)
    found = st.evaluate(counts, rate, mask, true_rate=deep * share).scores
    # The rarest gene is told its depth by 55 counts per bin.
    rare = [found[of]["pcc_2um"][0] for of in ("depth only", "oracle")]
    assert rare[0] == pytest.approx(rare[1], abs=0.02) and rare[1] > 0.3
