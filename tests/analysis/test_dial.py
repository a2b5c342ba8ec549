"""The dials, on planted gains."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import planted_scores, run_page
from scipy import stats

from sparsity_trap.analysis import dial


@pytest.fixture
def planted() -> pd.DataFrame:
    return planted_scores()


@pytest.fixture
def page(monkeypatch):
    """Run the page of the dials on a table of scores."""
    return lambda scores: run_page(monkeypatch, "08_dial", scores)


def test_dials_compare_matched_arms(planted):
    keep = dial.dial_runs(planted, "keep")
    assert set(keep["arm"]) == {
        "E", "D-matched", "E-keep1_4", "E-keep1_16", "D-matched-keep1_4", "D-matched-keep1_16",
    }  # fmt: skip
    width = dial.dial_runs(planted, "bin_um")
    assert set(width["arm"]) == {
        "E", "E-4um", "C", "E-16um",
        "D-matched", "D-matched-4um", "D-matched-8um", "D-matched-16um",
    }  # fmt: skip
    # Each width is scored at itself; 4 × 4 bins hold sixteen times the counts.
    apart = planted.assign(pcc_8um=planted["pcc_8um"] + 1)
    moved = dial.dial_runs(apart, "bin_um")["score"] - width["score"]
    assert (moved.round(9) == (width["bin_um"] == 8)).all()
    mean = width[width["arm"].isin(["E", "C"]) & (width["patient"] == "P5")]
    mean = mean.groupby("bin_um")["mean_count"].mean()
    assert mean[8] == pytest.approx(16 * mean[2])


def test_gains_are_of_patients_tested_at_every_setting(planted):
    """P1 and P2 were tested with all counts only, and gain more: they would bend the curve."""
    gains = dial.gains(planted, "keep")
    assert gains.columns.tolist() == ["gene", "keep", "delta", "mean_count"]
    mean = gains.groupby("keep")["delta"].mean()
    assert mean.index.tolist() == [0.0625, 0.25, 1] and (gains["keep"].value_counts() == 50).all()
    np.testing.assert_allclose(mean, [0.14, 0.12, 0.1], atol=1e-3)
    counts = gains.groupby("keep")["mean_count"].mean()
    np.testing.assert_allclose(counts / counts[1], [0.0625, 0.25, 1])


def test_genes_without_a_gain_at_some_setting_are_left_out(planted):
    gone = (planted["gene"] == "PIGR") & (planted["keep"] == 0.25) & (planted["loss"] == "mse")
    gains = dial.gains(planted.assign(pcc_8um=planted["pcc_8um"].mask(gone)), "keep")
    assert gains["gene"].nunique() == 49 and "PIGR" not in set(gains["gene"])


def test_dials_that_were_not_turned_have_no_gains(planted):
    few = planted["gene"].isin(planted["gene"].unique()[:3])
    for rows in (
        planted[planted["arm"].isin(["D", "E"])],
        planted[planted["loss"] == "poisson"],
        planted[few],
        planted.iloc[:0],
    ):
        assert dial.gains(rows, "keep").empty and dial.gains(rows, "bin_um").empty


def test_slopes_on_the_page_are_the_planted_ones(page, planted):
    quoted = page(planted)["quoted"]
    assert quoted["dial.keep.slope"] == pytest.approx(-0.01, abs=1e-3)
    assert quoted["dial.keep.ci_low"] < quoted["dial.keep.slope"] < quoted["dial.keep.ci_high"] < 0
    assert quoted["dial.keep.per_halving"] == -quoted["dial.keep.slope"]
    assert quoted["dial.keep.per_halving_low"] == -quoted["dial.keep.ci_high"]
    assert quoted["dial.keep.p_value"] < 0.001
    assert quoted["dial.bin_um.slope"] == pytest.approx(0, abs=1e-3)


def test_the_slope_of_a_gene_is_its_regression(page, planted):
    found = page(planted)
    gains = found["dials"]["bin_um"]
    slopes = dict(zip(found["wide"].index, found["slopes"], strict=True))
    for gene, part in list(gains.groupby("gene"))[:5]:
        expected = stats.linregress(np.log2(part["bin_um"]), part["delta"]).slope
        assert slopes[gene] == pytest.approx(expected, abs=1e-12)


def test_a_preset_without_dials_has_a_page(page, planted):
    found = page(planted[planted["arm"].isin(["D", "E", "D-matched"])])
    assert found["quoted"] == {} and found["dials"] == {}
