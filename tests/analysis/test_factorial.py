"""Factorial effects, shares of the gap and the dial, on tables whose effects are known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats as scipy_stats

from sparsity_trap.analysis import factorial as effects
from sparsity_trap.settings import UserError

LOSSES = ("mse", "mse-log1p", "poisson", "nb")
PLANTED = {"mse-log1p": -0.05, "poisson": 0.12, "nb": 0.10}


def factorial(
    losses: tuple[str, ...] = LOSSES,
    biases: tuple[object, ...] = ("published", "gene-mean"),
    n_genes: int = 20,
    patients: tuple[str, ...] = ("P1", "P2", "P5"),
    seeds: tuple[int, ...] = (0, 1),
    noise: float = 0.02,
    interaction: float = 0.04,
    seed: int = 0,
) -> pd.DataFrame:
    """A crossed design: loss effects as planted, exp +0.03, second bias +0.06, poisson x exp.

    Genes differ in level and in how much each gains from the loss.
    """
    rng = np.random.default_rng(seed)
    level = rng.uniform(0.1, 0.4, n_genes)
    gain = rng.normal(0, 0.05, n_genes)
    rows = []
    for loss, link, bias, patient, s in product(
        losses, ("softplus", "exp"), biases, patients, seeds
    ):
        for g in range(n_genes):
            score = level[g] + (PLANTED[loss] + gain[g] if loss != "mse" else 0)
            score += 0.03 * (link == "exp") + 0.06 * (bias == biases[-1])
            score += interaction * (loss == "poisson" and link == "exp")
            score += rng.normal(0, noise)
            run = f"{loss}-{link}-{bias}-{patient}-s{s}"
            rows.append((run, f"g{g}", patient, s, loss, link, bias, score))
    columns = ["run", "gene", "patient", "seed", "loss", "link", "bias", "score"]
    return pd.DataFrame(rows, columns=columns)


# --- effects --------------------------------------------------------------------------------------


def test_effects_equal_the_planted_ones_without_noise():
    table = factorial(noise=0).assign(
        score=lambda t: t["score"] - t.groupby("gene")["score"].transform("mean")
    )
    effect = effects.factorial_effects(table).effects.set_index("term")["effect"]
    gain = factorial(noise=0)
    own = gain[gain["loss"] == "nb"].groupby("gene")["score"].mean().mean()
    own -= gain[gain["loss"] == "mse"].groupby("gene")["score"].mean().mean()
    own -= PLANTED["nb"]  # mean over genes of their own gain
    assert effect["loss=nb"] == pytest.approx(0.10 + own)
    assert effect["loss=mse-log1p"] == pytest.approx(-0.05 + own)
    assert effect["loss=poisson"] == pytest.approx(0.12 + own + 0.04 / 2)
    assert effect["link=exp"] == pytest.approx(0.03 + 0.04 / 4)
    assert effect["bias=gene-mean"] == pytest.approx(0.06)
    assert effect["loss=poisson x link=exp"] == pytest.approx(0.04)
    assert effect["loss=nb x link=exp"] == pytest.approx(0, abs=1e-12)
    assert effect["loss=poisson x link=exp x bias=gene-mean"] == pytest.approx(0, abs=1e-12)


def test_effects_equal_one_regression_with_a_dummy_per_block():
    table = factorial(losses=("mse", "poisson"), seeds=(0,), seed=2)
    for factor, high in (("loss", "poisson"), ("link", "exp"), ("bias", "gene-mean")):
        table[f"x_{factor}"] = np.where(table[factor] == high, 0.5, -0.5)
    fit = smf.ols("score ~ x_loss * x_link * x_bias + C(gene):C(patient)", table).fit(
        cov_type="cluster", cov_kwds={"groups": pd.factorize(table["gene"])[0]}
    )
    result = effects.factorial_effects(table)
    rows = result.effects.set_index("term")
    assert list(rows["order"]) == [1, 1, 1, 2, 2, 2, 3]
    pairs = {
        "loss=poisson": "x_loss",
        "link=exp": "x_link",
        "loss=poisson x link=exp": "x_loss:x_link",
        "loss=poisson x link=exp x bias=gene-mean": "x_loss:x_link:x_bias",
    }
    critical = scipy_stats.t.ppf(0.975, 19)
    for term, name in pairs.items():
        row = rows.loc[term]
        assert row["effect"] == pytest.approx(fit.params[name])
        # The regression's small-sample factor counts its 60 dummies; a mean of blocks has none.
        error = fit.bse[name] / np.sqrt((fit.nobs - 1) / fit.df_resid)
        assert (row["ci_high"] - row["effect"]) / critical == pytest.approx(error)
    assert (result.n_genes, result.n_patients, result.n_dropped) == (20, 3, 0)


def test_interval_covers_and_respects_the_gene():
    """Genes differ in gain by 0.05, so the loss effect is known to 0.05 / sqrt(20) at best."""
    covered, width = [], []
    for seed in range(30):
        table = factorial(losses=("mse", "nb"), seeds=(0,), interaction=0, seed=seed)
        row = effects.factorial_effects(table).effects.set_index("term").loc["loss=nb"]
        covered.append(row["ci_low"] < PLANTED["nb"] < row["ci_high"])
        width.append(row["ci_high"] - row["ci_low"])
    assert np.mean(covered) > 0.85
    assert np.mean(width) == pytest.approx(2 * 2.09 * 0.05 / np.sqrt(20), rel=0.15)


def test_patients_are_listed_apart_and_noted():
    table = factorial(losses=("mse", "poisson"), noise=0)
    table.loc[(table["patient"] == "P2") & (table["loss"] == "poisson"), "score"] -= 0.3
    result = effects.factorial_effects(table)
    own = result.by_patient.set_index(["term", "patient"])["effect"]
    assert own["loss=poisson", "P1"] - own["loss=poisson", "P2"] == pytest.approx(0.3)
    assert "3 patients" in result.note
    one = effects.factorial_effects(table[table["patient"] == "P5"])
    assert "one patient" in one.note


def test_blocks_with_an_undefined_cell_are_left_out():
    table = factorial(losses=("mse", "poisson"))
    table.loc[
        (table["gene"] == "g3") & (table["patient"] == "P1") & (table["seed"] == 0), "score"
    ] = np.nan
    result = effects.factorial_effects(table)
    assert result.n_dropped == 1
    assert result.n_genes == 20


def test_designs_that_cannot_be_used_are_refused():
    table = factorial()
    with pytest.raises(UserError, match="no run has loss nb, link exp, bias published: train"):
        effects.factorial_effects(
            table.query("not (loss == 'nb' and link == 'exp' and bias == 'published')")
        )
    with pytest.raises(UserError, match="different seeds on patient P1"):
        effects.factorial_effects(table.query("not (loss == 'nb' and seed == 1)"))
    with pytest.raises(UserError, match="column 'link' is missing"):
        effects.factorial_effects(table.drop(columns="link"))
    with pytest.raises(UserError, match="share loss, link and bias"):
        effects.factorial_effects(table.query("run.str.startswith('mse-softplus-published')"))
    with pytest.raises(UserError, match="2 genes have a score in every cell"):
        effects.factorial_effects(table[table["gene"].isin(["g0", "g1"])])


# --- share of the gap -----------------------------------------------------------------------------


def test_shares_of_additive_factors_are_their_effects():
    table = factorial(("mse", "poisson"), biases=(0.0, -3), noise=0, interaction=0)
    ends = effects.D_CELL | {"bias": 0}, effects.E_CELL | {"bias": -3.0}
    result = effects.share_of_gap(table, *ends).set_index("factor")
    loss = result.loc["loss", "contribution"]
    assert result.loc["link", "contribution"] == pytest.approx(0.03)
    assert result.loc["bias", "contribution"] == pytest.approx(0.06)
    assert result.loc["gap", "contribution"] == pytest.approx(loss + 0.09)
    assert result.loc["loss", "share"] == pytest.approx(loss / (loss + 0.09))
    assert result["share"].drop("gap").sum() == pytest.approx(1)
    assert result.loc["gap", ["share", "ci_low", "ci_high"]].tolist() == pytest.approx([1, 1, 1])
    assert (result["n_genes"] == 20).all()


def test_shares_split_interactions_as_the_shapley_value_does():
    """Against the textbook formula over coalitions, with cells of arbitrary scores."""
    rng = np.random.default_rng(5)
    worth = {cell: rng.normal() for cell in product((0, 1), repeat=3)}
    levels = (("mse", "poisson"), ("softplus", "exp"), (0, -3))
    rows = []
    for cell, score in worth.items():
        loss, link, bias = (levels[i][on] for i, on in enumerate(cell))
        for g in range(5):
            rows.append((f"{cell}", f"g{g}", "P5", 0, loss, link, bias, score))
    table = pd.DataFrame(
        rows, columns=["run", "gene", "patient", "seed", "loss", "link", "bias", "score"]
    )
    ends = effects.D_CELL | {"bias": 0}, effects.E_CELL | {"bias": -3}
    result = effects.share_of_gap(table, *ends).set_index("factor")["contribution"]
    weight = {0: 2 / 6, 1: 1 / 6, 2: 2 / 6}  # s! (2 - s)! / 3!
    for i, factor in enumerate(effects.FACTORS):
        expected = 0.0
        for cell, score in worth.items():
            if not cell[i]:
                joined = (*cell[:i], 1, *cell[i + 1 :])
                expected += weight[sum(cell)] * (worth[joined] - score)
        assert result[factor] == pytest.approx(expected)
    assert result["gap"] == pytest.approx(worth[1, 1, 1] - worth[0, 0, 0])


def test_published_bias_leaves_two_factors():
    table = factorial(("mse", "poisson"), interaction=0.04, noise=0)
    result = effects.share_of_gap(table).set_index("factor")
    assert list(result.index) == ["loss", "link", "gap"]
    assert result.loc["link", "contribution"] == pytest.approx(0.03 + 0.04 / 2)


def test_share_interval_covers_the_truth():
    # Planted: loss 0.12 + 0.02, link 0.03 + 0.02 of a gap of 0.19.
    covered = []
    for seed in range(30):
        table = factorial(("mse", "poisson"), biases=("published",), seeds=(0,), seed=seed)
        row = effects.share_of_gap(table, n_boot=500).set_index("factor").loc["loss"]
        covered.append(row["ci_low"] < 0.14 / 0.19 < row["ci_high"])
        assert row["contribution_low"] < row["contribution"] < row["contribution_high"]
    assert np.mean(covered) > 0.8


def test_no_gap_has_no_shares():
    table = factorial(("mse", "poisson"), biases=("published",), noise=0.02)
    table["score"] = np.random.default_rng(0).normal(0, 0.1, len(table))
    result = effects.share_of_gap(table)
    assert result["share"].isna().all()
    assert result["contribution"].notna().all()


def test_gaps_that_cannot_be_walked_are_refused():
    table = factorial(("mse", "poisson"))
    with pytest.raises(UserError, match="same cell"):
        effects.share_of_gap(table, effects.D_CELL, effects.D_CELL)
    with pytest.raises(UserError, match="no run has loss mse, link exp, bias published"):
        effects.share_of_gap(
            table.query("not (loss == 'mse' and link == 'exp' and bias == 'published')")
        )


# --- dial -----------------------------------------------------------------------------------------


def dial(slope: float, settings=(1, 0.5, 0.25, 0.125, 0.0625), name: str = "keep", seed: int = 0):
    """Gain 0.1 at setting 1, changing by ``slope`` per doubling; genes and runs vary."""
    rng = np.random.default_rng(seed)
    own = rng.normal(slope, 0.005, 20)
    rows = []
    for setting, g, patient in product(settings, range(20), ("P1", "P5")):
        mse = rng.uniform(0.1, 0.3)
        poisson = mse + 0.1 + own[g] * np.log2(setting) + rng.normal(0, 0.01)
        for loss, score in (("mse", mse), ("poisson", poisson), ("nb", 0.0)):
            rows.append((setting, loss, f"g{g}", patient, score, setting * (g + 1) / 100))
    return pd.DataFrame(rows, columns=[name, "loss", "gene", "patient", "score", "mean_count"])


def test_dial_recovers_the_planted_slope():
    result = effects.dial_curve(dial(-0.02))
    assert result.slope == pytest.approx(-0.02, abs=0.004)
    assert result.ci_low < result.slope < result.ci_high < 0
    assert result.p_value < 0.001
    assert result.n_genes == len(result.slopes) == 20
    curve = result.curve
    assert curve["keep"].tolist() == [0.0625, 0.125, 0.25, 0.5, 1]
    assert curve["delta"].tolist() == pytest.approx([0.18, 0.16, 0.14, 0.12, 0.10], abs=0.02)
    assert curve["mean_count"].iloc[-1] == pytest.approx(0.105)
    assert ((curve["ci_low"] < curve["delta"]) & (curve["delta"] < curve["ci_high"])).all()


def test_dial_slope_of_one_gene_equals_linregress():
    table = dial(-0.02)
    gene = table[table["gene"] == "g7"].pivot_table(index="keep", columns="loss", values="score")
    expected = scipy_stats.linregress(np.log2(gene.index), gene["poisson"] - gene["mse"]).slope
    slopes = effects.dial_curve(table).slopes.set_index("gene")["slope"]
    assert slopes["g7"] == pytest.approx(expected)


def test_dial_without_effect_and_by_bin_size():
    p_values = [effects.dial_curve(dial(0, seed=s), n_boot=50).p_value for s in range(12)]
    assert sum(p < 0.05 for p in p_values) <= 3
    result = effects.dial_curve(
        dial(-0.03, settings=(2, 4, 8, 16), name="bin_um").drop(columns="mean_count"), "bin_um"
    )
    assert result.curve["bin_um"].tolist() == [2, 4, 8, 16]
    assert result.slope == pytest.approx(-0.03, abs=0.005)
    assert result.curve["mean_count"].isna().all()


def test_dial_leaves_out_undefined_scores():
    table = dial(-0.02)
    table.loc[(table["gene"] == "g0") & (table["keep"] < 1), "score"] = np.nan
    table.loc[(table["gene"] == "g1") & (table["keep"] < 0.5), "score"] = np.nan
    result = effects.dial_curve(table)
    assert result.n_genes == 19
    assert result.curve["n_genes"].tolist() == [18, 18, 18, 19, 20]


def test_dial_takes_differences_within_a_patient():
    table = dial(-0.02)
    table.loc[table["patient"] == "P1", "score"] += 1  # easier section
    missing = (table["patient"] == "P1") & (table["loss"] == "mse") & (table["keep"] == 1)
    table.loc[missing, "score"] = np.nan
    assert effects.dial_curve(table).curve["delta"].iloc[-1] == pytest.approx(0.1, abs=0.02)


def test_dials_that_cannot_be_read_are_refused():
    table = dial(0)
    with pytest.raises(UserError, match="at two values of 'keep'"):
        effects.dial_curve(table[table["keep"] == 1])
    with pytest.raises(UserError, match="must hold mse and poisson"):
        effects.dial_curve(table[table["loss"] != "mse"])
    with pytest.raises(UserError, match="must be above 0"):
        effects.dial_curve(table.assign(keep=0))
    with pytest.raises(UserError, match="column 'bin_um' is missing"):
        effects.dial_curve(table, "bin_um")
