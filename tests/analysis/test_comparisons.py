"""Runs side by side: the right arms are compared, and planted effects come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparsity_trap import scaling
from sparsity_trap.analysis import comparisons
from sparsity_trap.data.genes import panel_table
from sparsity_trap.runs import Result
from sparsity_trap.settings import PUBLISHED_BIAS, load_preset

PRESET = load_preset("laptop")


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """Every run of the laptop preset, with scores to which each setting adds a known amount."""
    draw = np.random.default_rng(0)
    genes = panel_table()[["gene", "category"]].assign(
        sparsity=0.9, mean_count=draw.uniform(0.01, 0.5, 50)
    )
    level = draw.normal(0.3, 0.05, 50)
    found = []
    for run in PRESET.all_runs():
        arm = PRESET.arm(run.arm)
        score = level + {"mse": 0, "mse-log1p": -0.05, "poisson": 0.1, "nb": 0.08}[arm.loss]
        score = score + 0.04 * (arm.link == "exp")
        score += {0.0: 0.0, -3.0: 0.02, "gene-mean": 0.03}[arm.bias]
        if arm.loss == "poisson":
            score = score + 0.01 * np.log2(1 / arm.keep)
        score = score + draw.normal(0, 1e-4, 50)
        scores = {f"pcc_{width}um": score for width in (2, 4, 8, 16)}
        found.append(Result(run, Path(), genes.assign(**scores), pd.DataFrame(), {}, {}))
    return found


@pytest.fixture(scope="module")
def table(results) -> pd.DataFrame:
    return comparisons.long_table(PRESET, results).assign(score=lambda t: t["pcc_8um"])


def test_the_factorial_takes_sixteen_arms_and_no_other(table):
    chosen = comparisons.factorial_runs(table)
    arms = chosen.groupby("arm")[["loss", "link", "bias"]].first()
    assert len(arms) == 16 == len(arms.drop_duplicates())
    assert {"D", "E", "D-matched", "E-matched"} <= set(arms.index)
    assert not any(
        arm.startswith(("A", "B", "C", "V7", "E-keep", "E-linear")) for arm in arms.index
    )


def test_planted_effects_come_back(table):
    effects = comparisons.factorial(table).effects.set_index("term")["effect"]
    assert np.isclose(effects["loss=poisson"], 0.1, atol=1e-3)
    assert np.isclose(effects["loss=mse-log1p"], -0.05, atol=1e-3)
    # With softplus the published bias is 0, with exp it is -3, to which 0.02 was added.
    assert np.isclose(effects["link=exp"], 0.04 + 0.02 / 2, atol=1e-3)
    assert np.isclose(effects["bias=gene-mean"], 0.03 - 0.02 / 2, atol=1e-3)


def test_the_gap_is_shared_among_its_causes(table):
    shares = comparisons.shares_of_gap(table).set_index("factor")["contribution"]
    assert np.allclose(shares[["loss", "link", "bias", "gap"]], [0.1, 0.04, 0.02, 0.16], atol=1e-3)


def test_gains_are_of_the_patients_and_seeds_that_both_arms_have(table):
    gains = comparisons.gains(table, ("D-matched", "E"))
    assert set(gains["patient"]) == {"P1", "P2", "P5"} and len(gains) == 150
    assert np.allclose(gains["delta"], 0.1, atol=1e-3)
    assert set(comparisons.gains(table, ("D-linear", "E-linear"))["patient"]) == {"P5"}
    assert len(comparisons.gains(table, ("D", "never"))) == 0


def test_dials_compare_matched_arms(table):
    keep = comparisons.dial_runs(table, "keep")
    assert set(keep["arm"]) == {
        "E", "D-matched", "E-keep1_4", "E-keep1_16", "D-matched-keep1_4", "D-matched-keep1_16",
    }  # fmt: skip
    width = comparisons.dial_runs(table, "bin_um")
    assert set(width["arm"]) == {
        "E", "E-4um", "C", "E-16um", "D-matched", "D-matched-4um", "D-matched-8um", "D-matched-16um",
    }  # fmt: skip
    dials = comparisons.dials(table)
    assert np.isclose(dials["keep"].slope, -0.01, atol=1e-3)
    assert np.isclose(dials["bin_um"].slope, 0, atol=1e-3)
    # 4 × 4 bins hold sixteen times the counts.
    mean = dials["bin_um"].curve.set_index("bin_um")["mean_count"]
    assert np.isclose(mean[8], 16 * mean[2])


def test_numbers_of_the_prose(results):
    numbers = comparisons.numbers(PRESET, results)
    assert np.isclose(numbers["gap.loss.share"], 0.1 / 0.16, atol=0.01)
    assert np.isclose(numbers["dial.keep.per_halving"], 0.01, atol=1e-3)
    assert numbers["dial.keep.per_halving_low"] < numbers["dial.keep.per_halving_high"]
    assert np.isclose(numbers["factorial.gene-mean.effect"], 0.02, atol=1e-3)


def test_what_was_not_trained_is_left_out(results):
    few = [r for r in results if r.run.arm in ("D", "E")]
    table = comparisons.long_table(PRESET, few).assign(score=lambda t: t["pcc_8um"])
    assert comparisons.factorial(table) is None and comparisons.shares_of_gap(table) is None
    assert comparisons.dials(table) == {} == comparisons.numbers(PRESET, few)


def test_published_bias_is_named_so(table):
    named = table[table["bias"] == "published"]
    assert (named["bias_value"] == named["link"].map(PUBLISHED_BIAS)).all()
    apart = table[table["arm"] == "mse-exp-zero"]
    assert (apart["bias"] == 0).all()


def test_costs_follow_from_shapes():
    preset = load_preset("paper")
    costs = scaling.cost_table(preset, 50, (3, 100))
    patches = (576 + 601 + 570) / 3
    assert np.isclose(costs["tokens"][3], 3 * patches * 16 * 1280 * 256 * 2 / 1e9)
    assert np.isclose(costs["raw"][100] / costs["raw"][3], 100 / 3)
    assert costs["folds"].tolist() == [3, 5]
    # The projection alone: 1280 × 512 weights on 256 tokens, two operations each, three passes.
    assert 3 * 2 * 1280 * 512 * 256 < scaling.decoder_flops(preset, 50) < 1e12
