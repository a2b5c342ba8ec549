"""Pages of the weight dial, of rate and budget, and of the shelf, on planted scores."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import planted_results, planted_scores, run_page

from sparsity_trap.analysis.effects import contrast

#: Cells of the page of weights that read models and patches.
MODELS = ("gradient_shares(", "runs.store(", "expected = ")
FEW = ("D", "E", "D-matched")


@pytest.fixture
def planted() -> pd.DataFrame:
    return planted_scores()


@pytest.fixture
def page(monkeypatch):
    """Run a page on a table of scores."""
    return lambda name, scores: run_page(monkeypatch, name, scores, *MODELS)


# --- weight ---------------------------------------------------------------------------------------


def test_the_weight_dial_is_the_planted_one(page, planted):
    found = page("08b_weight", planted)
    curve = found["curve"][found["curve"]["decoder"] == "hist2st"]
    assert curve["p"].tolist() == [0, 0.5, 1, 1.5, 2]
    # MSE lies 0.02 below its level at its own best rate.
    expected = np.array([-0.12, -0.05, 0, 0.01, -0.02])
    level = curve["pcc_8um"] - curve["pcc_8um"].iloc[2]
    np.testing.assert_allclose(level, expected, atol=1e-3)
    np.testing.assert_allclose(
        curve["minus Poisson"].drop(curve.index[2]), expected[[0, 1, 3, 4]], atol=1e-3
    )
    assert set(found["curve"]["decoder"]) == {"hist2st", "linear"} and found["missing"] == []


def test_weights_of_genes_close_the_planted_part_of_the_gap(page, planted):
    quoted = page("08b_weight", planted)["quoted"]
    expected = {
        "whole": 0.12, "closed_from_mse": 0.07, "by_variance": 0.06, "closed_from_poisson": 0.04,
        "left": 0.05, "beyond_half": 0.01,
    }  # fmt: skip
    for question, value in expected.items():
        assert quoted[f"weight.hist2st.{question}.value"] == pytest.approx(value, abs=1e-3)
    reference = contrast(planted, {"E": 1, "D-matched": -1}, patients=["P5"])
    assert quoted["weight.hist2st.whole.value"] == pytest.approx(reference.value)
    assert quoted["weight.hist2st.whole.low"] <= reference.interval[0]  # patches add their part


def test_a_preset_without_the_dial_says_so(page, planted):
    found = page("08b_weight", planted[planted["arm"].isin(FEW)])
    assert not found["trained"] and found["missing"] == ["0.5", "1.5", "2"]
    assert list(found["answers"]["contrast"]) == ["Poisson − MSE"]


# --- rate and budget ------------------------------------------------------------------------------


def test_each_loss_has_its_own_best_rate(page, planted):
    quoted = page("07b_budget", planted)["quoted"]
    assert (quoted["rate.best.mse"], quoted["rate.best.poisson"]) == (2, 1)
    assert quoted["rate.own.value"] == pytest.approx(0.1, abs=1e-3)
    assert quoted["rate.same.value"] == pytest.approx(0.12, abs=1e-3)


def test_rates_are_chosen_on_strips_alone(page, planted):
    """Test scores that would choose another rate change nothing."""
    better = (planted["arm"] == "E-lr4") | (planted["arm"] == "D-matched-lr1_2")
    found = page("07b_budget", planted.assign(pcc_8um=planted["pcc_8um"] + better))
    assert found["quoted"]["rate.best.mse"] == 2 and found["quoted"]["rate.best.poisson"] == 1


def test_budgets_move_means_and_gains_by_what_was_planted(page, planted):
    found = page("07b_budget", planted)
    points = found["points"].set_index("arm")
    assert points.loc["E-epochs2", "change"] == pytest.approx(0.03, abs=1e-3)
    assert points.loc["D-linear-epochs1_2", "change"] == pytest.approx(-0.03, abs=1e-3)
    assert points.loc["E-epochs2", "epochs"] == 2 * points.loc["E", "epochs"]
    moved = found["found"].set_index("mean")["change"]
    assert moved["E − D-matched"] == pytest.approx(0, abs=1e-3)
    assert found["quoted"]["epochs.moved"] == 5 and found["quoted"]["epochs.n"] == 8
    assert "moves 5 of 8 means by more than 0.01: " in found["still"]


def test_a_preset_without_other_rates_says_so(page, planted):
    found = page("07b_budget", planted[planted["arm"].isin(FEW)])
    assert not found["searched"] and found["points"].empty and found["quoted"] == {}


# --- shelf ----------------------------------------------------------------------------------------


def test_the_best_of_a_goal_is_the_planted_one(page, planted):
    found = page("08c_shelf", planted)
    arms = set(found["shelf"]["arm"])
    assert {"D-matched", "E", "l1", "hurdle", "E-linear", "l1-linear", "power-1.5"} <= arms
    assert not arms & {"D", "mse-exp-mean", "mse-per-mean", "E-lr2", "E-epochs2", "keep1_4-mse"}
    chosen = found["chosen"].set_index(["decoder", "goal"])
    assert chosen.loc[("hist2st", "where, at 8 µm"), "best"] == "Variance λ^1.5"
    assert chosen.loc[("hist2st", "calibrated uncertainty"), "best"] == "Poisson"
    assert chosen.loc[("hist2st", "how much"), "value"] == 0
    assert (found["shelf"]["seconds a step"] == 10 / 30).all()


def test_losses_within_the_noise_of_the_best_are_not_told_apart(page, planted):
    """NB is raised to Poisson, up to noise of runs: both may be called the best."""
    draw = np.random.default_rng(1)
    run = planted["run"].map({name: draw.normal(0, 0.02) for name in planted["run"].unique()})
    lifted = planted["d2"] + 0.02 * (planted["arm"] == "nb-exp") + run
    chosen = page("08c_shelf", planted.assign(d2=lifted))["chosen"]
    row = chosen.set_index(["decoder", "goal"]).loc[("hist2st", "calibrated uncertainty")]
    both = {row["best"], *row["not told apart"].split(", ")}
    assert {"NB", "Poisson"} <= both and "Zero-inflated NB" not in both


def test_a_shelf_of_two_is_no_choice(page, planted):
    found = page("08c_shelf", planted[planted["arm"].isin(FEW)])
    assert found["chosen"].empty and set(found["shelf"]["loss"]) == {"MSE", "Poisson"}


def test_planted_runs_have_logs():
    """What the choice of rates reads."""
    log = planted_results()[0].log
    assert log["validation_loss"].idxmin() == 1
