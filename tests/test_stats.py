"""Tables S1 to S3 and the sparsity association, against scipy, by hand and on planted effects."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from sparsity_trap import published, stats
from sparsity_trap.config import UserError
from sparsity_trap.genes import PANEL, PUBLISHED_SPARSITY, panel_table


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
    assert stats.spearman(x, y) == pytest.approx((expected.statistic, expected.pvalue))


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
    assert result.p_value < 1e-4
    assert 0 < result.ci_low < result.rho < result.ci_high < 1
    assert result.n_genes == 50
    assert result.n_wins == (delta > 0).sum()
    assert result.mean_delta == pytest.approx(delta.mean())
    assert (result.without_category["rho"] > 0.4).all()
    assert result.without_category["n_genes"].sum() == 6 * 50
    assert result.by_category.iloc[-1]["n_wins"] == result.n_wins
    assert result.by_quartile["n_genes"].sum() == 50


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
