"""Effects of the factorial and parts of the gap, on tables whose effects are known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from planted import planted_scores, run_page

from sparsity_trap.analysis import factorial
from sparsity_trap.analysis.effects import contrast
from sparsity_trap.settings import PUBLISHED_BIAS

#: Cells of the page that need trained models, take long, or draw what no score has a part in.
MECHANISM = ("gradient_shares(", "powers", "toy_minimisers(", "steps = ", "style.subplots(1, 2, ")
#: Cells that draw scores.
DRAWING = ("style.subplots(", "interactive.show(")


@pytest.fixture
def planted() -> pd.DataFrame:
    return planted_scores()


@pytest.fixture
def page(monkeypatch):
    """Run the page of the factorial on a table of scores, but for some cells."""
    return lambda scores, *left_out: run_page(
        monkeypatch, "07_factorial", scores, *MECHANISM, *left_out
    )


# --- which runs -----------------------------------------------------------------------------------


def test_cells_are_the_arms_that_differ_in_the_factors_alone(planted):
    chosen = factorial.factorial_runs(planted)
    arms = chosen.groupby("arm")[list(factorial.FACTORS)].first()
    assert len(arms) == 16 == len(arms.drop_duplicates())
    assert {"D", "E", "D-matched", "E-matched"} <= set(arms.index)
    assert set(arms["loss"]) == {"mse", "mse-log1p", "poisson", "nb"}
    gap = factorial.gap_runs(planted)
    assert gap["arm"].nunique() == 8 and set(gap["bias"]) == {0.0, -3.0}
    assert set(gap["patient"]) == {"P5"}  # others have D, E and D-matched alone


def test_losses_that_are_not_crossed_are_left_out(planted):
    left = factorial.factorial_runs(planted[planted["arm"] != "nb-exp"])
    assert set(left["loss"]) == {"mse", "mse-log1p", "poisson"}


def test_designs_that_are_not_crossed_have_no_runs(planted):
    for part in (
        planted[planted["bias"] == "published"],
        planted[planted["arm"].isin(["D", "E"])],
        planted[planted["loss"] == "mse"],
        planted.iloc[:0],
    ):
        assert factorial.factorial_runs(part).empty and factorial.gap_runs(part).empty
        assert factorial.shapley_weights(part) == {}


def test_published_bias_is_that_of_the_link(planted):
    named = planted[planted["bias"] == "published"]
    assert (named["bias_value"] == named["link"].map(PUBLISHED_BIAS)).all()
    assert (planted.loc[planted["arm"] == "mse-exp-zero", "bias"] == 0).all()


def collapse(scores: pd.DataFrame, arm: str, *seeds: int) -> pd.DataFrame:
    """The table with some runs of an arm collapsed."""
    gone = (scores["arm"] == arm) & scores["seed"].isin(seeds) & (scores["patient"] == "P5")
    return scores.assign(pcc_8um=scores["pcc_8um"].mask(gone), collapsed=scores["collapsed"] | gone)


def test_collapsed_runs_are_counted_and_have_no_part_in_a_mean(planted):
    rows = factorial.gap_runs(planted)
    table = factorial.cells(rows, "pcc_8um").set_index("arm")
    assert (table["runs"] == 3).all() and (table["collapsed"] == 0).all()
    raised = collapse(rows.assign(pcc_8um=rows["pcc_8um"] + (rows["seed"] == 1)), "D", 1)
    found = factorial.cells(raised, "pcc_8um").set_index("arm")
    assert found.loc["D", ["runs", "collapsed"]].tolist() == [3, 1]
    assert found.loc["D", "pcc_8um"] == pytest.approx(table.loc["D", "pcc_8um"], abs=1e-3)
    assert found.loc["E", "pcc_8um"] == pytest.approx(table.loc["E", "pcc_8um"] + 1 / 3)


# --- effects --------------------------------------------------------------------------------------


def test_planted_effects_come_back(page, planted):
    found = page(planted, *DRAWING)
    effect = found["on_pcc"].set_index("term")["effect"]
    # With softplus the published bias is 0, with exp it is -3, to which 0.02 was added. Poisson
    # gains more from the best rate of others, which is not MSE's: 0.02 in every cell.
    expected = {
        "loss=poisson": 0.12,
        "loss=mse-log1p": -0.03,
        "loss=nb": 0.1,
        "link=exp": 0.04 + 0.02 / 2,
        "bias=gene-mean": 0.03 - 0.02 / 2,
        "link=exp x bias=gene-mean": -0.02,
        "loss=poisson x link=exp": 0,
    }
    for term, value in expected.items():
        assert effect[term] == pytest.approx(value, abs=1e-3), term
    assert found["on_pcc"]["order"].value_counts().to_dict() == {1: 5, 2: 7, 3: 3}
    quoted = found["quoted"]
    assert quoted["factorial.gene-mean.effect"] == effect["bias=gene-mean"]
    assert quoted["between.poisson.effect"] == pytest.approx(0.12, abs=1e-3)
    assert quoted["between.poisson-x-minus3.effect"] == pytest.approx(0, abs=1e-3)
    assert quoted["gap.loss.contribution"] == pytest.approx(0.12, abs=1e-3)
    assert quoted["gap.gap.contribution"] == pytest.approx(0.18, abs=1e-3)


def test_effects_are_means_and_differences_of_cells(page, planted):
    """Against arithmetic on the cells, with an interaction, and intervals of those contrasts."""
    rows = factorial.gap_runs(planted)
    helped = (rows["loss"] == "poisson") & (rows["bias"] == 0)
    noise = np.random.default_rng(0).normal(0, 0.02, len(rows))
    rows = rows.assign(pcc_8um=rows["pcc_8um"] + 0.2 * helped + noise)
    changed = planted.drop(index=rows.index)
    scores = pd.concat([changed, rows.assign(bias=planted["bias"])])
    found = page(scores, *DRAWING)["on_gap"].set_index("term")
    table = factorial.cells(rows, "pcc_8um").set_index(list(factorial.FACTORS))
    mean = table["pcc_8um"].unstack("loss")
    of_loss = mean["poisson"] - mean["mse"]
    assert found.loc["loss=poisson", "effect"] == pytest.approx(of_loss.mean())
    by_bias = of_loss.groupby("bias").mean()
    term = "loss=poisson x bias=-3.0"
    assert found.loc[term, "effect"] == pytest.approx(by_bias[-3.0] - by_bias[0.0])
    assert found.loc[term, "effect"] == pytest.approx(-0.2, abs=0.01)
    signs = {"poisson": 0.25, "mse": -0.25}
    weights = {arm: signs[loss] for (loss, *_), arm in table["arm"].items()}
    interval = contrast(rows, weights).interval
    assert found.loc["loss=poisson", ["ci_low", "ci_high"]].tolist() == pytest.approx(interval)


def test_a_cell_that_collapsed_leaves_no_effect(page, planted):
    found = page(collapse(planted, "mse-exp-zero", 0, 1, 2))
    assert found["on_gap"]["effect"].isna().all()
    assert found["shares"].set_index("factor")["contribution"].isna().tolist() == [
        True, True, True, False,
    ]  # fmt: skip
    assert found["on_pcc"]["effect"].notna().all()  # of other cells


def test_a_preset_without_the_factorial_has_a_page(page, planted):
    found = page(planted[planted["arm"].isin(["D", "E", "D-matched"])])
    assert not found["trained"] and len(found["between"]) == 0 and found["shares"].empty
    assert not any(key.startswith(("between", "gap", "factorial")) for key in found["quoted"])


# --- parts of the gap -----------------------------------------------------------------------------


def test_contributions_are_shapley_values(planted):
    """Against the textbook formula over coalitions, with cells of arbitrary scores."""
    rng = np.random.default_rng(5)
    worth = {cell: rng.normal() for cell in product((0, 1), repeat=3)}
    rows = factorial.gap_runs(planted)
    level = [
        worth[tuple(int(x == end) for x, end in zip(cell, factorial.ARM_E, strict=True))]
        for cell in rows[list(factorial.FACTORS)].itertuples(index=False)
    ]
    rows = rows.assign(pcc_8um=level)
    weight = {0: 2 / 6, 1: 1 / 6, 2: 2 / 6}  # s! (2 - s)! / 3!
    weights = factorial.shapley_weights(planted)
    for i, factor in enumerate(factorial.FACTORS):
        expected = sum(
            weight[sum(cell)] * (worth[*cell[:i], 1, *cell[i + 1 :]] - value)
            for cell, value in worth.items()
            if not cell[i]
        )
        assert contrast(rows, weights[factor]).value == pytest.approx(expected)
    total = pd.DataFrame(weights).sum(axis=1)
    assert total[["E", "D"]].tolist() == pytest.approx([1, -1])
    assert total.drop(["E", "D"]).to_numpy() == pytest.approx(np.zeros(6))
