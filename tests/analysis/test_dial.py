"""The dials, on planted gains."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import planted_scores, run_page

from sparsity_trap.analysis import dial
from sparsity_trap.analysis.effects import contrast

#: Cells of the page that read patches.
PATCHES = ("runs.store(", "def gradient_norm", "moved(keep")


@pytest.fixture
def planted() -> pd.DataFrame:
    return planted_scores()


@pytest.fixture
def page(monkeypatch):
    """Run the page of the dials on a table of scores."""
    return lambda scores: run_page(monkeypatch, "08_dial", scores, *PATCHES)


def test_dials_compare_arms_with_one_start(planted):
    keep = dial.dial_runs(planted, "keep")
    shares = ("1_2", "1_4", "1_8", "1_16")
    thinned = {f"keep{share}-{loss}" for share in shares for loss in ("mse", "poisson")}
    assert set(keep["arm"]) == thinned | {"mse-exp-mean", "poisson-exp-mean"}
    width = dial.dial_runs(planted, "bin_um")
    wide = {f"{bins}um-{loss}" for bins in (4, 8, 16) for loss in ("mse", "poisson")}
    assert set(width["arm"]) == wide | {"mse-exp-mean", "poisson-exp-mean"}
    # Each width is scored at itself; 4 × 4 bins hold sixteen times the counts.
    apart = planted.assign(pcc_8um=planted["pcc_8um"] + 1)
    moved = dial.dial_runs(apart, "bin_um")["score"] - width["score"]
    assert (moved.round(9) == (width["bin_um"] == 8)).all()
    mean = width.groupby("bin_um")["mean_count"].mean()
    assert mean[8] == pytest.approx(16 * mean[2])


def test_gains_are_of_patients_tested_at_every_setting(planted):
    """A patient that was tested with all counts only, and gains more, would bend the curve."""
    whole = planted["arm"].isin(["mse-exp-mean", "poisson-exp-mean"])
    other = planted[whole].assign(patient="P1")
    other["pcc_8um"] += 0.5 * (other["loss"] == "poisson")
    gains = dial.gains(pd.concat([planted, other]), "keep")
    assert gains.columns.tolist() == ["gene", "keep", "delta", "mean_count"]
    mean = gains.groupby("keep")["delta"].mean()
    assert mean.index.tolist() == [0.0625, 0.125, 0.25, 0.5, 1]
    assert (gains["keep"].value_counts() == 50).all()
    np.testing.assert_allclose(mean, [0.16, 0.15, 0.14, 0.13, 0.12], atol=1e-3)
    counts = gains.groupby("keep")["mean_count"].mean()
    np.testing.assert_allclose(counts / counts[1], counts.index)


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
    for rows in (planted[planted["loss"] == "poisson"], planted.iloc[:0]):
        assert dial.arms(dial.dial_runs(rows, "keep"), "keep").empty
        assert dial.slope_weights(rows, "keep") == {}


def test_slope_is_the_regression_of_the_gain_on_halvings(planted):
    noise = np.random.default_rng(0).normal(0, 0.05, len(planted))
    noisy = planted.assign(pcc_8um=planted["pcc_8um"] + noise)
    rows = dial.dial_runs(noisy, "keep")
    mean = rows.groupby(["keep", "loss"])["score"].mean().unstack()
    halvings = -np.log2(mean.index.to_numpy(float))
    expected = np.polyfit(halvings, mean["poisson"] - mean["mse"], 1)[0]
    found = contrast(rows, dial.slope_weights(noisy, "keep"), "score")
    assert found.value == pytest.approx(expected)


def test_slopes_on_the_page_are_the_planted_ones(page, planted):
    found = page(planted)
    quoted = found["quoted"]
    assert quoted["dial.keep.per_halving"] == pytest.approx(0.01, abs=1e-3)
    assert quoted["dial.keep.low"] < quoted["dial.keep.per_halving"] < quoted["dial.keep.high"]
    assert quoted["dial.bin_um.per_halving"] == pytest.approx(0, abs=1e-3)
    # A halving of the mean count, by either dial: the widths' slope is flat.
    assert quoted["dial.per_count.difference.value"] == pytest.approx(0.01, abs=1e-3)
    curve = found["curves"]["keep"].set_index("keep")
    assert curve.loc[0.125, "delta"] == pytest.approx(0.15, abs=1e-3)
    assert set(curve["runs"]) == {3}
    assert found["verdict"].startswith("In this build ")


def test_collapsed_runs_are_left_out_and_named(page, planted):
    gone = (planted["arm"] == "keep1_4-mse") & (planted["seed"] == 1)
    dead = planted.assign(
        pcc_8um=planted["pcc_8um"].mask(gone), collapsed=planted["collapsed"] | gone
    )
    found = page(dead)
    curve = found["curves"]["keep"].set_index("keep")
    assert curve.loc[0.25, "runs"] == 2
    assert found["gone"] == {"keep1_4-mse: 1 of 3"}


def test_a_preset_without_dials_has_a_page(page, planted):
    found = page(planted[planted["arm"].isin(["D", "E", "D-matched"])])
    assert found["quoted"] == {} and found["curves"] == {}
    assert "cannot tell" in found["verdict"]
