"""Tables S1 to S3 and the sparsity association, against scipy, by hand and on planted effects."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats as scipy_stats

from sparsity_trap.analysis import association as stats
from sparsity_trap.analysis import published
from sparsity_trap.data.genes import PANEL, PUBLISHED_SPARSITY, panel_table
from sparsity_trap.settings import UserError


def run_table(seed: int) -> pd.DataFrame:
    """A per-gene table as a run writes it."""
    rng = np.random.default_rng(seed)
    table = panel_table().rename(columns={"published_sparsity": "sparsity"})
    table["mean_count"] = 1 - table["sparsity"]
    for metric in ("pcc_2um", "pcc_8um", "ssim_2um", "ssim_8um", "deviance", "mse", "calibration"):
        table[metric] = rng.uniform(0, 0.5, len(table))
    return table


def association_table(slope: float = 0.0, noise: float = 0.05, seed: int = 0) -> pd.DataFrame:
    """Published sparsity of the panel with a gain that rises with the rank of sparsity."""
    rng = np.random.default_rng(seed)
    table = panel_table().rename(columns={"published_sparsity": "sparsity"})
    table["pcc_8um_mse"] = rng.uniform(0.1, 0.3, len(table))
    gain = 0.1 + slope * (table["sparsity"].rank(pct=True) - 0.5)
    table["pcc_8um_poisson"] = table["pcc_8um_mse"] + gain + rng.normal(0, noise, len(table))
    return table


# --- table S1 -------------------------------------------------------------------------------------


def test_gene_table_joins_two_runs_by_gene():
    mse, poisson = run_table(1), run_table(2)
    table = stats.gene_table(mse, poisson.sample(frac=1, random_state=0))
    assert tuple(table["gene"]) == PANEL
    assert list(table.columns[:4]) == list(stats.GENE_COLUMNS)
    assert {"pcc_8um_mse", "pcc_8um_poisson", "mse_mse", "mse_poisson"} <= set(table)
    assert "category_mse" not in table
    np.testing.assert_allclose(table["delta_pcc_8um"], poisson["pcc_8um"] - mse["pcc_8um"])
    np.testing.assert_allclose(table["delta_ssim_2um"], poisson["ssim_2um"] - mse["ssim_2um"])
    assert table["improved"].tolist() == (poisson["pcc_8um"] > mse["pcc_8um"]).tolist()


def test_gene_table_counts_an_undefined_gain_as_no_improvement():
    mse, poisson = run_table(1), run_table(2)
    poisson.loc[0, "pcc_8um"] = np.nan
    table = stats.gene_table(mse, poisson)
    assert np.isnan(table["delta_pcc_8um"][0])
    assert not table["improved"][0]


def test_gene_table_refuses_runs_that_do_not_match():
    mse, poisson = run_table(1), run_table(2)
    with pytest.raises(UserError, match="column 'sparsity'.*same test patient"):
        stats.gene_table(mse, poisson.assign(sparsity=0.5))
    with pytest.raises(UserError, match=r"differ in genes \(MT-ATP6\)"):
        stats.gene_table(mse, poisson.iloc[1:])
    with pytest.raises(UserError, match="Poisson per-gene table: column 'ssim_2um' is missing"):
        stats.gene_table(mse, poisson.drop(columns="ssim_2um"))


# --- tables S2 and S3 -----------------------------------------------------------------------------


def test_category_table_by_hand():
    table = association_table(noise=0.2)
    result = stats.category_table(table).set_index("category")
    delta = table["pcc_8um_poisson"] - table["pcc_8um_mse"]
    assert result.index[-1] == "overall"
    assert set(result.index[:-1]) == set(PUBLISHED_SPARSITY)
    assert result["mean_delta"].iloc[:-1].is_monotonic_decreasing
    for category in PUBLISHED_SPARSITY:
        row, genes = result.loc[category], (table["category"] == category)
        assert row["n_genes"] == genes.sum()
        assert row["n_wins"] == (delta[genes] > 0).sum()
        assert row["mean_delta"] == pytest.approx(delta[genes].mean())
        assert row["mean_sparsity"] == pytest.approx(table["sparsity"][genes].mean())
        assert row["ci_low"] <= row["mean_delta"] <= row["ci_high"]
        expected = scipy_stats.wilcoxon(
            table["pcc_8um_poisson"][genes], table["pcc_8um_mse"][genes]
        ).pvalue
        assert row["p_value"] == pytest.approx(expected)
        assert row["q_value"] >= row["p_value"]
    assert result.loc["overall", "n_genes"] == 50
    assert result.loc["overall", "mean_delta"] == pytest.approx(delta.mean())
    assert np.isnan(result.loc["overall", "q_value"])


def test_benjamini_hochberg_by_hand():
    p_values = pd.Series([0.01, 0.04, np.nan, 0.03, 0.005])
    # sorted 0.005 0.01 0.03 0.04 times 4 / rank: 0.02 0.02 0.04 0.04
    np.testing.assert_allclose(
        stats._benjamini_hochberg(p_values), [0.02, 0.04, np.nan, 0.04, 0.02]
    )


def test_quartile_table_splits_genes_evenly_by_sparsity():
    table = association_table(slope=0.3)
    result = stats.quartile_table(table)
    assert result["quartile"].tolist() == ["Q1", "Q2", "Q3", "Q4"]
    assert sorted(result["n_genes"]) == [12, 12, 13, 13]
    assert result["mean_sparsity"].is_monotonic_increasing
    assert result["mean_delta"].is_monotonic_increasing
    assert list(result.columns[1:]) == list(stats.category_table(table).columns[1:])


def test_groups_without_a_test_are_nan():
    table = association_table()
    table["category"] = ["alone"] + ["many"] * 49
    alone = stats.category_table(table).set_index("category").loc["alone"]
    assert np.isnan(alone["ci_low"])
    assert alone["n_genes"] == 1
    table["pcc_8um_poisson"] = table["pcc_8um_mse"]
    assert stats.category_table(table)["p_value"].isna().all()


# --- association ----------------------------------------------------------------------------------


def test_published_rho_is_not_significant():
    p_value = stats.spearman_p_value(published.SUMMARY["rho"], published.SUMMARY["n_genes"])
    assert p_value == pytest.approx(0.089, abs=5e-4)


def test_spearman_equals_scipy_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(6, size=40), rng.normal(size=40)
    expected = scipy_stats.spearmanr(x, y)
    rho, p_value = stats.spearman(x, y)
    assert rho == pytest.approx(expected.statistic)
    assert stats.spearman_p_value(rho, 40) == pytest.approx(expected.pvalue)
    # 9,999 permutations place a p-value of 0.1 within 0.003 (one standard error).
    assert p_value == pytest.approx(expected.pvalue, abs=0.01)


def test_permutation_p_value_equals_scipy_beyond_eight_genes():
    rng = np.random.default_rng(4)
    x = rng.integers(4, size=12)
    y = x + rng.normal(0, 2, 12)
    expected = scipy_stats.permutation_test(
        (x,),
        lambda order: scipy_stats.spearmanr(order, y).statistic,
        permutation_type="pairings",
        n_resamples=2000,
        rng=1,
    )
    rho, p_value = stats.spearman(x, y)
    assert rho == pytest.approx(expected.statistic)
    assert 0.01 < p_value < 0.5
    assert p_value == pytest.approx(expected.pvalue, abs=0.04)
    assert stats.spearman(x, y, seed=1)[1] != p_value


def test_spearman_of_few_genes_is_exact():
    rho, p_value = stats.spearman(np.arange(4.0), np.arange(4.0))
    assert rho == pytest.approx(1)
    assert p_value == pytest.approx(2 / 24)  # two of 4! orders are as extreme
    assert np.isnan(stats.spearman(np.arange(3.0), np.arange(3.0))).all()
    assert np.isnan(stats.spearman(np.ones(9), np.arange(9.0))).all()


def test_planted_effect_is_recovered():
    table = association_table(slope=0.3)
    result = stats.sparsity_association(table)
    delta = table["pcc_8um_poisson"] - table["pcc_8um_mse"]
    assert result.rho == pytest.approx(scipy_stats.spearmanr(table["sparsity"], delta).statistic)
    assert result.p_value == pytest.approx(1e-4)  # no order of 9,999 is as extreme
    assert 0 < result.ci_low < result.rho < result.ci_high < 1
    assert result.n_genes == 50
    assert result.n_wins == (delta > 0).sum()
    assert result.mean_delta == pytest.approx(delta.mean())
    assert (result.without_category["rho"] > 0.4).all()
    assert result.without_category["n_genes"].sum() == 6 * 50
    assert result.by_category.iloc[-1]["n_wins"] == result.n_wins
    assert result.by_quartile["n_genes"].sum() == 50
    without = result.without_category
    assert (without["ci_low"] < without["rho"]).all()
    assert (without["rho"] < without["ci_high"]).all()


def test_partial_correlation_equals_regression_on_ranks():
    rng = np.random.default_rng(1)
    given = rng.lognormal(size=30)
    x = given + rng.lognormal(size=30)
    y = np.log(given) + rng.normal(0, 2, 30)
    ranks = pd.DataFrame({"x": x, "y": y, "given": given}).rank()
    fit = smf.ols("y ~ x + given", ranks).fit()
    rho, p_value = stats.partial_spearman(x, y, given)
    assert p_value == pytest.approx(fit.pvalues["x"])
    t = fit.tvalues["x"]
    assert rho == pytest.approx(t / np.sqrt(t**2 + 27))
    assert stats.partial_spearman(x, y, np.log(given)) == (rho, p_value)


def test_partial_correlation_removes_what_expression_explains():
    rng = np.random.default_rng(0)
    table = association_table()
    expression = rng.normal(size=50)
    table["mean_count"] = np.exp(expression)
    table["sparsity"] = 0.8 - 0.03 * expression + rng.normal(0, 0.02, 50)
    table["pcc_8um_poisson"] = table["pcc_8um_mse"] - 0.05 * expression + rng.normal(0, 0.03, 50)
    result = stats.sparsity_association(table)
    assert result.rho > 0.4 and result.p_value < 0.01
    assert abs(result.partial_rho) < 0.35 and result.partial_p_value > 0.01
    table.loc[:9, "mean_count"] = np.nan
    part = table.iloc[10:]
    assert stats.sparsity_association(table).partial_rho == pytest.approx(
        stats.partial_spearman(
            part["sparsity"], part["pcc_8um_poisson"] - part["pcc_8um_mse"], part["mean_count"]
        )[0]
    )


def test_partial_correlation_is_undefined_without_own_variation():
    table = association_table()
    assert np.isnan(stats.sparsity_association(table).partial_rho)  # no mean_count
    table["mean_count"] = 1 - table["sparsity"]  # the same order, reversed
    result = stats.sparsity_association(table)
    assert np.isnan(result.partial_rho) and np.isnan(result.partial_p_value)


def test_sign_test_by_hand():
    # One loss among five: 2 * (1 + 5) / 32.
    assert stats.sign_test(np.array([1, 2, 3, 4, -9])) == pytest.approx(12 / 32)
    assert stats.sign_test(np.array([1, 2, 3, 4, -9, 0, 0])) == pytest.approx(12 / 32)
    assert np.isnan(stats.sign_test(np.zeros(5)))
    table = association_table()
    gain = np.linspace(0.1, 0.2, 50) * np.where(np.arange(50) < 48, 1, -1)
    table["pcc_8um_poisson"] = table["pcc_8um_mse"] + gain
    result = stats.sparsity_association(table)
    assert result.sign_p_value == pytest.approx(2 * scipy_stats.binom.cdf(2, 50, 0.5))


def test_other_metrics_have_their_own_row():
    table = association_table()
    rank = table["sparsity"].rank(pct=True)
    table["ssim_2um_mse"], table["ssim_2um_poisson"] = 0.1, 0.1 + 0.3 * rank
    table["d2_mse"], table["d2_poisson"] = -3.0, -3.0 - rank
    table.loc[:4, "d2_poisson"] = np.nan
    result = stats.sparsity_association(table)
    rows = result.by_metric.set_index("metric")
    assert list(rows.index) == ["pcc_8um", "ssim_2um", "d2"]
    assert rows.loc["pcc_8um", ["rho", "p_value", "ci_low", "ci_high"]].tolist() == [
        result.rho, result.p_value, result.ci_low, result.ci_high,
    ]  # fmt: skip
    assert rows.loc["ssim_2um", "rho"] == pytest.approx(1)
    assert rows.loc["d2", "rho"] == pytest.approx(-1)
    assert rows["n_genes"].tolist() == [50, 50, 45]
    assert rows["n_wins"].tolist() == [result.n_wins, 50, 0]
    assert result.n_genes == 50


def test_without_category_exposes_an_effect_of_one_category():
    table = association_table(seed=3)
    mitochondrial = table["category"] == "mitochondrial"
    table.loc[mitochondrial, "pcc_8um_poisson"] -= 0.3
    result = stats.sparsity_association(table)
    without = result.without_category.set_index("category")
    assert result.p_value < 0.01
    assert without.loc["mitochondrial", "p_value"] > 0.05
    assert without.loc["mitochondrial", "n_genes"] == 40


def test_no_effect_gives_uniform_p_values_and_covering_intervals():
    tables = [association_table(seed=seed) for seed in range(40)]
    results = [stats.sparsity_association(table, n_boot=200) for table in tables]
    p_values = [r.p_value for r in results]
    assert scipy_stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean([r.ci_low <= 0 <= r.ci_high for r in results]) > 0.85


def test_result_is_frozen_and_seeded():
    table = association_table()
    first, second = stats.sparsity_association(table), stats.sparsity_association(table)
    assert (first.ci_low, first.ci_high) == (second.ci_low, second.ci_high)
    assert stats.sparsity_association(table, seed=1).ci_low != first.ci_low
    pd.testing.assert_frame_equal(first.by_category, second.by_category)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.rho = 0


def test_missing_values_are_dropped_and_counted(tmp_path):
    table = association_table()
    table.loc[[3, 7], "pcc_8um_mse"] = np.nan
    path = tmp_path / "genes.csv"
    table.to_csv(path, index=False)
    result = stats.sparsity_association(path)
    assert (result.n_genes, result.n_dropped) == (48, 2)
    assert result.rho == pytest.approx(stats.sparsity_association(table.drop([3, 7])).rho)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="sparsity"), "column 'sparsity' is missing: add it"),
        (lambda t: t.assign(sparsity=t["sparsity"] * 100), "'sparsity'.*divide percentages by 100"),
        (lambda t: t.assign(sparsity=-0.5), "'sparsity' must lie between 0 and 1"),
        (lambda t: t.assign(pcc_8um_mse=-2.0), "'pcc_8um_mse' must lie between -1 and 1"),
        (lambda t: t.assign(pcc_8um_mse="high"), "'pcc_8um_mse' holds text"),
        (lambda t: t.assign(d2_mse="high"), "'d2_mse' holds text"),
        (lambda t: t.assign(mean_count=-1.0), "'mean_count' must lie between 0 and inf"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "'gene' repeats MT-ATP6: keep one row per gene"),
        (lambda t: t.iloc[:3], "3 complete rows.*at least 4 genes"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        stats.sparsity_association(change(association_table()))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.csv does not exist"):
        stats.sparsity_association(tmp_path / "none.csv")


# --- mixed model ----------------------------------------------------------------------------------


def gains(
    n_patients: int = 3, n_seeds: int = 2, slope: float = 1.0, gene_sd: float = 0.05, seed: int = 0
) -> pd.DataFrame:
    """Gains with a known slope on sparsity and known variances of genes, patients and seeds."""
    rng = np.random.default_rng(seed)
    panel = panel_table()
    category = dict(zip(PUBLISHED_SPARSITY, rng.normal(0, 0.03, 7), strict=True))
    own = rng.normal(0, gene_sd, 50)
    patients, seeds = rng.normal(0, 0.1, n_patients), rng.normal(0, 0.02, n_seeds)
    rows = []
    for g, (gene, kind, sparsity) in enumerate(panel.itertuples(index=False)):
        for p, s in np.ndindex(n_patients, n_seeds):
            delta = slope * sparsity + category[kind] + own[g] + patients[p] + seeds[s]
            rows.append((gene, kind, sparsity, f"P{p}", s, delta + rng.normal(0, 0.03)))
    return pd.DataFrame(rows, columns=["gene", "category", "sparsity", "patient", "seed", "delta"])


@pytest.mark.parametrize("n_patients", [3, 6])
def test_mixed_model_recovers_the_planted_slope(n_patients):
    fits = [stats.mixed_model(gains(n_patients, seed=seed)) for seed in range(8)]
    assert all(fit.converged and not fit.problem for fit in fits)
    assert np.mean([fit.coefficient for fit in fits]) == pytest.approx(1, abs=0.15)
    assert sum(fit.ci_low < 1 < fit.ci_high for fit in fits) >= 6
    assert all(fit.p_value < 0.01 for fit in fits)
    gene_sd = np.sqrt(np.mean([fit.variances["gene"] for fit in fits]))
    residual_sd = np.sqrt(np.mean([fit.variances["residual"] for fit in fits]))
    assert gene_sd == pytest.approx(0.05, rel=0.15)
    assert residual_sd == pytest.approx(0.03, rel=0.1)
    assert fits[0].fixed == (("patient", "seed") if n_patients == 3 else ("seed",))
    assert ("patient" in fits[0].variances) == (n_patients == 6)
    assert (fits[0].n_genes, fits[0].n_patients, fits[0].n_seeds) == (50, n_patients, 2)


def test_mixed_model_takes_tables_put_together():
    table = gains()
    parts = [part.reset_index(drop=True) for _, part in table.groupby("patient")]
    again = stats.mixed_model(pd.concat(parts))
    assert again.coefficient == pytest.approx(stats.mixed_model(table).coefficient)


def test_mixed_model_is_wider_than_a_regression_that_forgets_genes():
    table = gains(n_seeds=3)
    naive = smf.ols("delta ~ sparsity + C(patient) + C(seed)", table).fit()
    fit = stats.mixed_model(table)
    # Balanced and one sparsity per gene: the gene means carry all there is to know of the slope.
    assert fit.coefficient == pytest.approx(naive.params["sparsity"], abs=0.3)
    assert fit.ci_high - fit.ci_low > 1.5 * np.ptp(naive.conf_int().loc["sparsity"])


def test_mixed_model_finds_no_slope_where_there_is_none():
    p_values = [stats.mixed_model(gains(slope=0, seed=seed)).p_value for seed in range(12)]
    assert sum(p < 0.05 for p in p_values) <= 3
    assert stats.mixed_model(gains(slope=0, gene_sd=0, n_seeds=1)).n_seeds == 1


def test_mixed_model_says_why_it_was_not_fitted():
    one = stats.mixed_model(gains(n_patients=1))
    assert "one patient" in one.problem
    assert np.isnan(one.coefficient) and not one.converged
    constant = stats.mixed_model(gains().assign(sparsity=0.9))
    assert "singular" in constant.problem
    few = stats.mixed_model(gains()[lambda t: t["gene"].isin(PANEL[:3])])
    assert "Fewer than 4 genes" in few.problem
    with pytest.raises(UserError, match="column 'seed' is missing"):
        stats.mixed_model(gains().drop(columns="seed"))


# --- published numbers ----------------------------------------------------------------------------


def test_published_tables_agree_with_each_other():
    categories = published.CATEGORIES.set_index("category")
    for category, row in categories.drop("overall").iterrows():
        percent = list(PUBLISHED_SPARSITY[category].values())
        assert row["n_genes"] == len(percent)
        assert row["mean_sparsity"] == pytest.approx(np.mean(percent) / 100, abs=1e-3)
    assert categories.loc["overall", "mean_delta"] == published.SUMMARY["mean_delta"]
    assert categories.loc["overall", "n_wins"] == published.SUMMARY["n_wins"]
    assert set(published.RESCUES["gene"]) <= set(PANEL)
    arms = published.ARMS.set_index("arm")
    assert arms.loc["D", "ssim_2um"] == published.SUMMARY["ssim_2um_mse"]
    assert arms.loc["E", "ssim_2um"] == published.SUMMARY["ssim_2um_poisson"]
