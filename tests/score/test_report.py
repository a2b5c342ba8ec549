"""The report card, what it says of level, and models side by side."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from files import made_section, table
from planted import simulated_maps
from scipy import stats
from sklearn.isotonic import IsotonicRegression

import sparsity_trap as st
from sparsity_trap.evaluation.protocols import PROTOCOLS
from sparsity_trap.evaluation.result import MODEL
from sparsity_trap.score import compare, recalibrate, report
from sparsity_trap.score.__main__ import main
from sparsity_trap.settings import UserError


@pytest.fixture(scope="module")
def section():
    made = simulated_maps(0, patches=8, genes=4, side=32)
    made.good = made.truth.astype(np.float32) + 1e-3
    noise = np.random.default_rng(1).gamma(1, size=made.good.shape)
    made.bad = (made.good * noise).astype(np.float32)
    return made


@pytest.fixture(scope="module")
def pair(section):
    given = {"mask": section.mask, "genes": section.genes}
    return [
        st.evaluate(section.counts, rate, name=name, **given)
        for name, rate in (("bad", section.bad), ("good", section.good))
    ]


# --- recalibration --------------------------------------------------------------------------------


def batches(section, rate):
    return lambda: zip(section.counts, rate, section.mask, strict=True)


def test_a_wrong_level_is_undone_and_said_to_be_one(section):
    level = np.array([0.25, 0.5, 2, 4], np.float32)[:, None, None]
    wrong = recalibrate.recalibration(batches(section, section.good * level), section.genes)
    right = recalibrate.recalibration(batches(section, section.good), section.genes)
    wrong, right = (t.groupby("recalibration", sort=False) for t in (wrong, right))
    for score in ("d2", "ssim_2um", "deviance"):
        rescaled = [t[score].mean()["a factor per gene"] for t in (wrong, right)]
        assert rescaled[0] == pytest.approx(rescaled[1], rel=1e-2)
        as_predicted = [t[score].mean()["as predicted"] for t in (wrong, right)]
        assert abs(as_predicted[0] - as_predicted[1]) > 0.02
    pcc = wrong["pcc_2um"].mean()
    assert pcc["a factor per gene"] == pytest.approx(pcc["as predicted"], abs=1e-6)


def test_the_map_is_the_isotonic_regression_of_scikit_learn(section):
    fit = recalibrate.Calibration(4)
    rate = section.bad.astype(np.float16)
    for counts, p, mask in batches(section, rate)():
        fit.update(counts, p, mask)
    table_of = fit.increasing()
    for g in (0, 3):
        y, p = section.counts[:, g][section.mask], rate[:, g][section.mask].astype(float)
        reference = IsotonicRegression(out_of_bounds="clip").fit(p, y)
        probe = np.quantile(p, [0, 0.1, 0.5, 0.9, 1]).astype(np.float16)
        found = table_of[g][probe.view(np.uint16)]
        np.testing.assert_allclose(found, reference.predict(probe.astype(float)), atol=1e-5)
        assert (np.diff(table_of[g][:0x7C00]) >= 0).all()
        total = section.counts[:, g][section.mask].sum()
        assert fit.factor()[g] == pytest.approx(total / p.sum(), rel=1e-6)


def test_only_held_out_patches_are_scored(section):
    found = recalibrate.recalibration(batches(section, section.good), section.genes)
    own = found[found["recalibration"] == "as predicted"]
    held = slice(1, None, 2)
    expected = st.pcc(section.counts[held], section.good[held], section.mask[held])
    np.testing.assert_allclose(own["pcc_2um"], expected, atol=1e-6)
    with pytest.raises(UserError, match="one patch cannot be fitted on and held out"):
        one = [x[:1] for x in (section.counts, section.good, section.mask)]
        recalibrate.recalibration(lambda: zip(*one, strict=True), section.genes)


# --- comparison -----------------------------------------------------------------------------------


def test_differences_have_the_jackknife_over_patches(section, pair):
    found = compare.differences(*pair)
    scores = [np.array([st.pcc(section.counts[keep], rate[keep], section.mask[keep], 4)
                        for keep in (np.arange(8) != i for i in range(8))])
              for rate in (section.bad, section.good)]  # fmt: skip
    left = scores[1] - scores[0]
    se = np.sqrt(7 / 8 * ((left - left.mean(0)) ** 2).sum(0))
    full = [st.pcc(section.counts, rate, section.mask, 4) for rate in (section.bad, section.good)]
    np.testing.assert_allclose(found["difference"], full[1] - full[0], atol=1e-6)
    half = (found["ci_high"] - found["ci_low"]) / 2
    np.testing.assert_allclose(half, stats.t.ppf(0.975, 7) * se, rtol=1e-4)
    assert (found["q_value"] >= found["p_value"]).all()
    assert ((found["p_value"] < 0.05) == (found["ci_low"] * found["ci_high"] > 0)).all()


def test_summary_counts_genes_and_takes_both_parts_of_the_variance(pair):
    bad, good = pair
    (row,) = compare.summary({"bad": bad, "good": good}).to_dict("records")
    gain = compare.differences(bad, good)["difference"]
    assert row["difference"] == pytest.approx(gain.mean()) and row["n_wins"] == row["n_genes"] == 4
    effect = compare.mean_difference(bad, good)
    assert effect.genes == pytest.approx(gain.std() / 2) and effect.patches > 0
    assert row["ci_low"] < row["difference"] < row["ci_high"]
    sparsity = bad.scores[MODEL]["sparsity"]
    assert row["rho"] == pytest.approx(stats.spearmanr(sparsity, gain).statistic)
    low, high = stats.binomtest(4, 4).proportion_ci(method="exact")
    assert (row["share_low"], row["share_high"]) == pytest.approx((low, high))


def test_models_of_other_bins_or_genes_are_not_compared(section, pair):
    given = section.counts[:4], section.good[:4], section.mask[:4]
    part = st.evaluate(*given, genes=section.genes, name="part")
    with pytest.raises(UserError, match="bad and part were scored over other bins"):
        compare.differences(pair[0], part)
    other = st.evaluate(section.counts, section.good, section.mask, genes=list("abcd"))
    with pytest.raises(UserError, match="share no gene"):
        compare.differences(pair[0], other)


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(pair, section, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "E<b>"
    found = pair[1]
    found.findings = ["<script>alert(1)</script>"]
    return report.write(
        found,
        folder,
        picture=lambda patch: np.full((224, 224, 3), 10 * patch, np.uint8),
        recalibrated=recalibrate.recalibration(batches(section, section.good), section.genes),
        comparison={
            "summary": compare.summary({"bad": pair[0], "good": found}),
            "differences": {"bad minus good": compare.differences(found, pair[0])},
        },
        mark="SIMULATED DATA",
    )


def test_the_page_stands_alone_and_says_what_was_found(card, pair):
    text = card.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:|scores\.csv|card\.json|#)[^\"]*", text)
    assert not re.search(r"https?://", re.sub(r'data:[^"]*', "", text))
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert all(sentence.replace("'", "&#39;") in text for sentence in pair[1].verdict)
    assert all(protocol.title in text for protocol in PROTOCOLS.values())
    assert text.count('<img src="data:image/') == 2 == text.count('alt="')
    assert "SIMULATED DATA" in text and "bad minus good" in text
    assert re.findall(r"<h(\d)", text) == ["1", *("2" * (text.count("<h2 ")))]


def test_numbers_beside_the_page_are_those_of_the_evaluation(card, pair):
    found = pair[1]
    table_of = pd.read_csv(card.with_name("scores.csv"))
    assert len(table_of) == len(found.scores) * 4
    own = table_of[table_of["map"] == "model"]
    np.testing.assert_allclose(own["pcc_8um"], found.scores[MODEL]["pcc_8um"], rtol=1e-5)
    held = json.loads(card.with_name("card.json").read_text())
    assert held["verdict"] == found.verdict
    expected = found.protocols[MODEL]["hest"]
    assert held["protocols"]["model"]["hest"] == pytest.approx(expected)
    assert held["protocols"]["all zeros"]["pcc"] is None
    assert {row["gene"] for row in held["genes"]} == set(found.genes)


def test_best_null_and_share_of_the_ceiling_of_every_gene(pair):
    found = pair[1]
    genes = report.gene_table(found).set_index("gene").loc[list(found.genes)]
    blind = ("shuffled patches", "another patch", "section mean", "all zeros")
    best = np.nanmax([found.scores[of]["pcc_8um"] for of in blind], axis=0)
    np.testing.assert_allclose(genes["best null"], best)
    share = found.scores[MODEL]["pcc_8um"] / found.ceilings["ceiling_8um"]
    np.testing.assert_allclose(genes["share of ceiling"], share)


@pytest.mark.slow
def test_the_page_in_chromium(card, driven):
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driven("Emulation.setEmulatedMedia", features=features)
        driven.open(card.as_uri())
        ground = driven.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    for pixels in (1400, 400):
        driven("Emulation.setDeviceMetricsOverride", width=pixels, height=1000,
               deviceScaleFactor=1, mobile=pixels < 600)  # fmt: skip
        assert driven.value("document.scrollingElement.scrollWidth <= innerWidth")
    last = "[...document.querySelectorAll('table.sortable')].at(-1)"
    names = f"[...{last}.tBodies[0].rows].map(row => row.cells[0].textContent)"
    shown = driven.value(names)
    for order in (shown[::-1], shown):
        driven.value(f"{last}.querySelectorAll('th button')[3].click()")  # by PCC, down first
        assert driven.value(names) in (order, order[::-1])
    driven.value(f"{last}.querySelector('th button').click()")
    assert driven.value(names) == ["G3", "G2", "G1", "G0"]


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_files_are_scored_compared_and_reported(tmp_path, capsys):
    section = made_section(tmp_path)
    for name, seed in (("one", 1), ("two", 2)):
        table(section, seed=seed).write_h5ad(tmp_path / f"{name}.h5ad")
    files = [str(tmp_path / f"{name}.h5ad") for name in ("one", "two")]
    main(
        [*files, "--section", str(section.outs), "--units", "counts", "--out", str(tmp_path / "c")]
    )
    said = capsys.readouterr().out
    assert said.count("Over genes, the mean PCC at 8 µm in tissue is") == 2
    for number in "12":
        held = json.loads((tmp_path / "c" / number / "card.json").read_text())
        assert held["comparison"][0]["difference"] == pytest.approx(0, abs=1e-6)  # the same model
        assert held["about"]["coverage"] == 1 and "recalibration" in held


def test_mistakes_on_the_command_line_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="^absent.h5ad does not exist: give a file of predictions$"):
        main(["absent.h5ad", "--section", "nowhere"])
    section = made_section(tmp_path)
    np.savez(tmp_path / "maps.npz", rate=section.rate, genes=np.array(["EPCAM", "PIGR", "VIM"]))
    given = [str(tmp_path / "maps.npz"), "--section", str(section.outs), "--units", "counts"]
    for text, sentence in [
        ("a,b\n1,2\n", "is not a table with columns gene and mean"),
        ("gene,mean\nPIGR,1\n", "has no mean of gene EPCAM: add it"),
    ]:
        (tmp_path / "mean.csv").write_text(text)
        with pytest.raises(UserError, match=sentence):
            main([*given, "--train-mean", str(tmp_path / "mean.csv")])
