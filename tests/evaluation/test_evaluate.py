"""`evaluate`: the scores of a model and its nulls, from arrays or as patches pass by."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import simulated_maps
from scipy import stats
from sklearn.metrics import average_precision_score

import sparsity_trap as st
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.evaluation import ceilings, map_scores
from sparsity_trap.evaluation.result import MODEL, ORACLE, Evaluation


@pytest.fixture(scope="module")
def section() -> SimpleNamespace:
    """Seven patches of 32 bins, and a model that errs by a factor per token."""
    made = simulated_maps(0, patches=7, genes=3, side=32)
    tokens = np.random.default_rng(1).gamma(4, 0.25, (7, 3, 4, 4)).repeat(8, 2).repeat(8, 3)
    made.rate = np.maximum(made.truth.astype(float) * tokens, 1e-3).astype(np.float16)
    made.mean = np.array([0.03, 0.05, 0.1])
    return made


@pytest.fixture(scope="module")
def found(section) -> Evaluation:
    maps = section.counts, section.rate, section.mask, section.mean, section.genes
    return st.evaluate(*maps, true_rate=section.truth)


def same(one: Evaluation, other: Evaluation) -> None:
    assert one.scores.keys() == other.scores.keys()
    for of, columns in one.scores.items():
        for name, column in columns.items():
            np.testing.assert_array_equal(column, other.scores[of][name], err_msg=f"{of}, {name}")
        assert one.protocols[of] == pytest.approx(other.protocols[of], nan_ok=True)


def test_scores_of_a_model_and_of_its_nulls_are_those_of_gene_scores(section, found):
    on = np.where(section.mask[:, None], section.rate, 0)
    mean = np.broadcast_to(section.mean[:, None, None], on.shape)
    shifted = np.concatenate([on[..., :1].repeat(16, -1), on[..., :-16]], -1)
    maps = {
        MODEL: section.rate, "all zeros": np.zeros_like(on), "training mean": mean,
        "another patch": np.roll(on, 1, axis=0), "shifted 32 µm": shifted, ORACLE: section.truth,
    }  # fmt: skip
    for of, rate in maps.items():
        scores = st.GeneScores(section.genes, train_mean=section.mean)
        known = section.truth if of == MODEL else None
        scores.update(section.counts, rate, section.mask, known)
        for name, column in scores.compute().items():
            got = found.scores[of][name]
            np.testing.assert_allclose(got, column, rtol=1e-6, atol=1e-7, err_msg=f"{of}, {name}")


def test_arrays_iterators_and_batches_are_the_same(section, found):
    given = section.counts, section.rate, section.mask, section.truth
    batches = ([x[i : i + 3] for x in given] for i in range(0, 7, 3))
    same(found, st.evaluate(batches, train_mean=section.mean, genes=section.genes))
    parts = [iter([x[:2], x[2:]]) for x in given]
    tensors = [(torch.from_numpy(x) for x in part) for part in parts[:3]]
    maps = *tensors, section.mean, section.genes
    same(found, st.evaluate(*maps, true_rate=parts[3]))


def test_batches_may_be_written_into_the_same_memory(section, found):
    held = [np.empty_like(x[:2]) for x in (section.counts, section.rate, section.mask)]

    def batches():
        for i in range(0, 7, 2):
            parts = [x[i : i + 2] for x in (section.counts, section.rate, section.mask)]
            for into, part in zip(held, parts, strict=True):
                into[: len(part)] = part
            yield [into[: len(parts[0])] for into in held]

    again = st.evaluate(batches(), train_mean=section.mean, genes=section.genes)
    for of in again.scores:
        expected = found.scores[of]["pcc_8um"]
        np.testing.assert_array_equal(again.scores[of]["pcc_8um"], expected)


def test_bins_off_tissue_may_hold_anything(section, found):
    rate = np.where(section.mask[:, None], section.rate, np.nan)
    other = st.evaluate(section.counts, rate, section.mask, section.mean, section.genes)
    for of in found.scores.keys() - {ORACLE}:
        for name in ("pcc_8um", "ssim_2um", "d2", "auprc"):
            expected = found.scores[of][name]
            np.testing.assert_allclose(other.scores[of][name], expected, rtol=1e-6)


def test_ceilings_are_those_of_the_rate_or_of_split_counts(section, found):
    split = st.evaluate(section.counts, section.rate, section.mask)
    for name, factor in (("ceiling_2um", 1), ("ceiling_8um", 4)):
        exact = ceilings.poisson_ceiling(section.truth, section.mask, factor)
        np.testing.assert_array_equal(found.ceilings[name], exact)
        expected = ceilings.split_ceiling(section.counts, section.mask, factor)
        np.testing.assert_array_equal(split.ceilings[name], expected)
    assert ORACLE not in split.scores and "section mean" in split.scores


def test_without_a_training_mean_d2_is_against_the_section_and_iterators_have_no_mean(section):
    maps = section.counts, section.rate, section.mask
    own = np.array([y[section.mask].mean() for y in np.moveaxis(section.counts, 1, 0)])
    expected = st.d2(section.counts, section.rate, own, section.mask)
    for found in (st.evaluate(*maps), st.evaluate(iter([maps]))):
        np.testing.assert_allclose(found.scores[MODEL]["d2"], expected)
    assert not {"section mean", "depth only"} & found.scores.keys()


# --- units and bins -------------------------------------------------------------------------------


def test_log1p_counts_are_taken_back(section, found):
    logs = np.log1p(section.rate.astype(np.float64))
    back = st.evaluate(section.counts, logs, section.mask, section.mean, units="log1p counts")
    for name in ("pcc_8um", "d2", "calibration"):
        expected = found.scores[MODEL][name]
        np.testing.assert_allclose(back.scores[MODEL][name], expected, rtol=1e-4)


def test_scale_free_scores_of_z_scores_are_those_of_scipy_and_scikit_learn(section, found):
    rate = section.rate.astype(np.float64)
    level, spread = rate.mean((0, 2, 3))[:, None, None], rate.std((0, 2, 3))[:, None, None]
    z = ((rate - level) / spread).astype(np.float32)
    got = st.evaluate(section.counts, z, section.mask, section.mean, units="z-score")
    scores, mask8 = got.scores[MODEL], bin_mask(section.mask, 4)
    assert not {"d2", "mse", "calibration", "ssim_2um", "pcc_8um_unmasked"} & scores.keys()
    inside = [np.where(section.mask[:, None], x, 0) for x in (section.counts, z)]
    for g in range(3):
        y8, z8 = (bin_sum(x[:, g], 4)[mask8] for x in inside)
        assert scores["pcc_8um"][g] == pytest.approx(stats.pearsonr(y8, z8).statistic)
        assert scores["spearman_8um"][g] == pytest.approx(stats.spearmanr(y8, z8).statistic)
        y, p = section.counts[:, g][section.mask], z[:, g][section.mask].astype(np.float16)
        assert scores["auprc"][g] == pytest.approx(average_precision_score(y > 0, p))
        assert scores["pcc_2um"][g] == pytest.approx(found.scores[MODEL]["pcc_2um"][g], abs=1e-6)
    assert set(got.protocols[MODEL]) == {"pcc", "img2st_pcc", "best_genes", "nonzero", "top_k"}
    assert any("need counts" in sentence for sentence in got.verdict)


def test_floats_keep_their_order_as_numbers():
    values = np.array([-60000, -1.5, -1e-7, -0.0, 0.0, 1e-7, 0.5, 60000])
    for kind in (np.float16, np.float32):
        own = values.astype(kind)
        order = map_scores.in_order(own).astype(np.int64)
        assert (np.sign(np.diff(order)) == np.sign(np.diff(own))).all()
    ranked = map_scores.ranked(values)
    assert np.isfinite(ranked).all() and (ranked >= 0).all()
    assert (np.diff(ranked) > 0).tolist() == [True, True, True, False, True, True, True]


def test_bins_of_8_um_are_compared_as_they_are(section):
    counts8 = bin_sum(np.where(section.mask[:, None], section.counts, 0), 4)
    rate8 = bin_sum(np.where(section.mask[:, None], section.rate, 0), 4).astype(np.float16)
    mask8 = bin_mask(section.mask, 4)
    found = st.evaluate(counts8, rate8, mask8, bin_um=8.0)
    scores = found.scores[MODEL]
    assert {"pcc_8um", "pcc_32um", "ssim_8um"} < scores.keys() and "pcc_2um" not in scores
    assert found.main == "pcc_8um" and set(found.ceilings) == {"ceiling_8um"}
    for g in range(3):
        y, p = counts8[:, g][mask8], rate8[:, g][mask8]
        assert scores["pcc_8um"][g] == pytest.approx(stats.pearsonr(y, p).statistic)
        assert scores["spearman_8um"][g] == pytest.approx(stats.spearmanr(y, p).statistic)


# --- bad input ------------------------------------------------------------------------------------


def test_one_patch_has_no_null_of_another(section):
    found = st.evaluate(section.counts[:1], section.rate[:1], section.mask[:1])
    assert not {"another patch", "shuffled patches"} & found.scores.keys()
    assert found.verdict and len(found.to_dataframe()) == 3 * len(found.scores)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"units": "tpm"}, "units are 'tpm': choose among counts"),
        ({"genes": ["A"]}, "1 genes are named, maps have 3"),
        ({"mask": None}, "give counts, rate and mask, or one iterator"),
        ({"mask": np.ones((7, 32, 31), bool)}, "does not fit maps"),
        ({"counts": np.full((7, 3, 32, 32), 0.5)}, "counts hold 0.5, which is not a count"),
        ({"rate": np.zeros((7, 2, 32, 32))}, "maps differ in shape"),
        (
            {"rate": -np.ones((7, 3, 32, 32))},
            "mine: gene G0 has a rate in patch 0 that",
        ),
        ({"rate": np.full((7, 3, 32, 32), np.nan)}, "not a number"),
        (
            {"rate": np.full((7, 3, 32, 32), np.inf), "units": "z-score"},
            "mine: gene G0 has values that are not finite",
        ),
    ],
)
def test_bad_input_is_one_sentence(section, change, sentence):
    given = {"counts": section.counts, "rate": section.rate, "mask": section.mask}
    given |= {"genes": section.genes, "name": "mine"} | change
    with pytest.raises(ValueError, match=sentence):
        st.evaluate(**given)


@pytest.mark.parametrize("units", ["counts", "z-score"])
def test_the_true_rate_is_given_for_every_patch_or_none(section, units):
    batches = [(section.counts[[i]], section.rate[[i]], section.mask[[i]]) for i in range(2)]
    batches[1] += (section.truth[[1]],)
    for given in (batches, batches[::-1]):
        with pytest.raises(ValueError, match="give the true rate of every patch, or of none"):
            st.evaluate(given, genes=section.genes, units=units)


def test_no_patch_is_one_sentence():
    with pytest.raises(ValueError, match="no patches to score"):
        st.evaluate(iter([]))


# --- sentences ------------------------------------------------------------------------------------


def test_verdict_says_what_the_scores_say(section, found):
    blind = ("shuffled patches", "another patch")  # constants have no correlation
    means = {of: np.nanmean(found.scores[of]["pcc_8um"]) for of in (MODEL, "depth only", *blind)}
    model, depth = means[MODEL], means["depth only"]
    best = max(blind, key=means.get)
    said = " ".join(found.verdict)
    assert f"is {model:.3f}; the best null that sees nothing of the counts, {best}, has" in said
    assert f"has {means[best]:.3f}: better than nothing" in said
    assert f"other genes, has {depth:.3f}; the model is ahead of it in 3 of 3 genes" in said
    share = model / found.ceilings["ceiling_8um"].mean()
    assert f"the model reaches {share:.0%}" in said
    worse = st.evaluate(
        section.counts, np.roll(section.rate, 3, 0), section.mask, section.mean, section.genes
    )
    said = " ".join(worse.verdict)
    assert "not better than nothing" in said and "It fails" in said
    assert "protocols a null scores as high or higher (per-gene PCC" in said


def test_constants_scale_and_silent_genes_are_named(section):
    rate, counts = 16 * section.rate.astype(np.float32), section.counts.copy()
    rate[:, 1], counts[:, 2] = 0.5, 0
    found = st.evaluate(counts, rate, section.mask, genes=section.genes)
    assert found.findings[0] == "The prediction is the same in every bin for G1."
    assert found.findings[1].startswith("No count was measured of G2")
    rate = 16 * section.rate.astype(np.float32)
    (said,) = st.evaluate(section.counts, rate, section.mask).findings
    assert "times the observed, near that of the areas of 8 µm and 2 µm bins: is" in said
