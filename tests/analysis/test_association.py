"""Table S1 and the page of the sparsity association, by hand and on planted effects."""

from __future__ import annotations

import types

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from cells import run_cells
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis import published
from sparsity_trap.analysis.association import GENE_COLUMNS, gene_table, mean_interval
from sparsity_trap.data.genes import CATEGORIES, PANEL, panel_table
from sparsity_trap.settings import UserError


def run_table(seed: int, **scores: np.ndarray) -> pd.DataFrame:
    """A per-gene table as a run writes it; ``scores`` replace columns."""
    rng = np.random.default_rng(seed)
    table = panel_table().rename(columns={"published_sparsity": "sparsity"})
    table["mean_count"] = np.random.default_rng(9).permutation(1 - table["sparsity"])
    for name in ("pcc_2um", "pcc_8um", "ssim_2um", "ssim_8um", "d2", "auprc_base"):
        table[name] = rng.uniform(0, 0.5, len(table))
    return table.assign(**scores)


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Run notebook 04 on two per-gene tables; what it defines, with its numbers as ``quoted``."""

    def run(mse: pd.DataFrame, poisson: pd.DataFrame) -> dict:
        settings = types.SimpleNamespace(folder=tmp_path, source="simulated", main_patient="P5")
        numbers: dict = {}

        def quotes(_settings, _page):
            return lambda prefix, **values: numbers.update(
                {f"{prefix}.{key}": value for key, value in values.items()}
            )

        pair = [types.SimpleNamespace(genes=table) for table in (mse, poisson)]
        long = pd.concat(
            table.assign(arm=arm, patient="P5", seed=0)
            for arm, table in (("D", mse), ("E", poisson))
        )
        for name, value in {
            "open_preset": lambda *_: settings,
            "contrast": lambda _: pair,
            "Quotes": quotes,
            "load_all": lambda _: [],
            "long_table": lambda *_: long,
        }.items():
            monkeypatch.setattr(runs, name, value)
        return run_cells("04_sparsity", {"preset": "", "source": "", "cohort": ""}) | {
            "quoted": numbers
        }

    return run


def planted(slope: float, noise: float = 0.05, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two runs whose gain rises with the rank of sparsity."""
    rng = np.random.default_rng(seed)
    mse = run_table(seed)
    gain = 0.1 + slope * (mse["sparsity"].rank(pct=True) - 0.5) + rng.normal(0, noise, len(mse))
    return mse, run_table(seed + 1, pcc_8um=mse["pcc_8um"] + gain)


# --- shared ---------------------------------------------------------------------------------------


def test_gene_table_joins_two_runs_by_gene():
    mse, poisson = run_table(1), run_table(2)
    poisson.loc[0, "pcc_8um"] = np.nan
    table = gene_table(mse, poisson.sample(frac=1, random_state=0))
    assert tuple(table["gene"]) == PANEL
    assert list(table.columns[:4]) == list(GENE_COLUMNS)
    assert {"pcc_8um_mse", "pcc_8um_poisson"} <= set(table)
    assert "category_mse" not in table
    np.testing.assert_allclose(table["delta_pcc_8um"], poisson["pcc_8um"] - mse["pcc_8um"])
    np.testing.assert_allclose(table["delta_ssim_2um"], poisson["ssim_2um"] - mse["ssim_2um"])
    assert table["improved"].tolist() == (poisson["pcc_8um"] > mse["pcc_8um"]).tolist()
    assert not table["improved"][0]  # an undefined gain is no improvement


def test_gene_table_refuses_runs_that_do_not_match():
    mse, poisson = run_table(1), run_table(2)
    with pytest.raises(UserError, match="same test patient"):
        gene_table(mse, poisson.assign(sparsity=0.5))
    with pytest.raises(UserError, match=r"differ in genes \(MT-ATP6\)"):
        gene_table(mse, poisson.iloc[1:])


def test_interval_of_a_mean_is_that_of_drawn_genes():
    values = np.random.default_rng(0).gamma(1.0, size=50)
    draws = np.random.default_rng(1).choice(values, (100_000, 50)).mean(axis=1)
    np.testing.assert_allclose(mean_interval(values), np.quantile(draws, (0.025, 0.975)), atol=0.01)
    assert mean_interval(values) == mean_interval(pd.Series(values))
    assert np.isnan(mean_interval(values[:1])).all()


# --- the page -------------------------------------------------------------------------------------


def test_a_planted_effect_is_found(page):
    mse, poisson = planted(0.3)
    found = page(mse, poisson)
    table, quoted = found["genes"], found["quoted"]
    pd.testing.assert_frame_equal(table, gene_table(mse, poisson))
    gain = table["delta_pcc_8um"]
    assert quoted["sparsity.rho"] == pytest.approx(
        stats.spearmanr(table["sparsity"], gain).statistic
    )
    assert quoted["sparsity.p_value"] == pytest.approx(2e-4)  # no order of 9,999 is as extreme
    assert 0 < quoted["sparsity.ci_low"] < quoted["sparsity.rho"] < quoted["sparsity.ci_high"] < 1
    assert quoted["sparsity.n_genes"] == 50
    assert quoted["sparsity.n_wins"] == (gain > 0).sum()
    assert quoted["published.p_value"] == pytest.approx(0.089, abs=5e-4)
    assert (found["left_out"]["rho"] > 0.4).all()
    assert found["left_out"]["n_genes"].sum() == 6 * 50
    quartiles = found["quartiles"]
    assert quartiles["quartile"].tolist() == ["Q1", "Q2", "Q3", "Q4"]
    assert sorted(quartiles["n_genes"]) == [12, 12, 13, 13]
    assert quartiles["mean_delta"].is_monotonic_increasing
    saved = pd.read_csv(found["settings"].folder / "tables" / "S3_quartiles.csv")
    pd.testing.assert_frame_equal(saved, quartiles)
    # One patient: no slope, and the table says why.
    assert all("two test patients" in row["note"] for row in found["slopes"])


def test_categories_by_hand(page):
    found = page(*planted(0.0, noise=0.2))
    table, result = found["genes"], found["categories"].set_index("category")
    assert result.index[-1] == "overall"
    assert set(result.index[:-1]) == set(CATEGORIES)
    assert result["mean_delta"].iloc[:-1].is_monotonic_decreasing
    for category in CATEGORIES:
        row, own = result.loc[category], table[table["category"] == category]
        assert row["n_genes"] == len(own)
        assert row["n_wins"] == own["improved"].sum()
        assert row["mean_delta"] == pytest.approx(own["delta_pcc_8um"].mean())
        assert row["mean_sparsity"] == pytest.approx(own["sparsity"].mean())
        assert row["ci_low"] <= row["mean_delta"] <= row["ci_high"]
        expected = stats.wilcoxon(own["pcc_8um_poisson"], own["pcc_8um_mse"]).pvalue
        assert row["p_value"] == pytest.approx(expected)
    # Benjamini and Hochberg by hand: the smallest p of m is multiplied by m at most.
    p = np.sort(result["p_value"].iloc[:-1])
    by_rank = np.minimum.accumulate((p * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    np.testing.assert_allclose(np.sort(result["q_value"].iloc[:-1]), by_rank)
    assert result.loc["overall", "n_genes"] == 50 and np.isnan(result.loc["overall", "q_value"])


def test_partial_correlation_is_a_regression_on_ranks(page):
    found = page(*planted(0.2))
    ranks = found["scored"][["sparsity", "delta_pcc_8um", "mean_count"]].rank()
    fit = smf.ols("delta_pcc_8um ~ sparsity + mean_count", ranks).fit()
    t = fit.tvalues["sparsity"]
    assert found["quoted"]["sparsity.partial_p_value"] == pytest.approx(fit.pvalues["sparsity"])
    assert found["quoted"]["sparsity.partial_rho"] == pytest.approx(t / np.sqrt(t**2 + 47))


def test_an_effect_of_one_category_is_exposed(page):
    mse, poisson = planted(0.0, seed=3)
    poisson.loc[poisson["category"] == "mitochondrial", "pcc_8um"] -= 0.3
    quoted = page(mse, poisson)["quoted"]
    assert quoted["sparsity.p_value"] < 0.01
    assert quoted["sparsity.without_mitochondrial.p_value"] > 0.05


def test_the_page_bears_scores_that_are_undefined(page):
    mse, poisson = planted(0.2)
    poisson.loc[[3, 7], "pcc_8um"] = np.nan
    assert page(mse, poisson)["quoted"]["sparsity.n_genes"] == 48
    # Not one gene has a gain, as after a run that predicts a constant.
    quoted = page(mse, poisson.assign(pcc_8um=np.nan))["quoted"]
    assert quoted["sparsity.n_genes"] == 0
    assert all(np.isnan(quoted[f"sparsity.{key}"]) for key in ("rho", "p_value", "partial_rho"))
    # All gains the same, and mean expression in the opposite order of sparsity.
    same = page(mse, poisson.assign(pcc_8um=mse["pcc_8um"]))["quoted"]
    assert np.isnan(same["sparsity.rho"]) and np.isnan(same["sparsity.sign_p_value"])
    tables = [t.assign(mean_count=1 - t["sparsity"]) for t in planted(0.2)]
    assert np.isnan(page(*tables)["quoted"]["sparsity.partial_rho"])


# --- mixed model ----------------------------------------------------------------------------------


def gains(
    n_patients: int = 3, n_seeds: int = 2, slope: float = 1.0, gene_sd: float = 0.05, seed: int = 0
) -> pd.DataFrame:
    """Gains with a known slope on sparsity and known variances of genes, patients and seeds."""
    rng = np.random.default_rng(seed)
    category = dict(zip(CATEGORIES, rng.normal(0, 0.03, 7), strict=True))
    own = rng.normal(0, gene_sd, 50)
    patients, seeds = rng.normal(0, 0.1, n_patients), rng.normal(0, 0.02, n_seeds)
    rows = []
    for g, (gene, kind, sparsity) in enumerate(panel_table().itertuples(index=False)):
        for p, s in np.ndindex(n_patients, n_seeds):
            delta = slope * sparsity + category[kind] + own[g] + patients[p] + seeds[s]
            rows.append((gene, kind, sparsity, f"P{p}", s, delta + rng.normal(0, 0.03)))
    return pd.DataFrame(rows, columns=["gene", "category", "sparsity", "patient", "seed", "delta"])


@pytest.fixture(scope="module")
def model() -> types.SimpleNamespace:
    """The functions of notebook 04 that fit the slope over patients and seeds."""
    start = "import warnings\nimport numpy as np\nimport statsmodels.formula.api as smf\n"
    namespace: dict = {"LEAST_GENES": 4}
    exec(start, namespace)
    return types.SimpleNamespace(
        **run_cells("04_sparsity", namespace, lambda source: "def mixed_model" in source)
    )


@pytest.mark.parametrize("n_patients", [3, 6])
def test_mixed_model_recovers_the_planted_slope(model, n_patients):
    tables = [gains(n_patients, seed=seed) for seed in range(6)]
    rows = pd.DataFrame([model.slope(table) for table in tables])
    assert rows["note"].eq("").all()
    assert rows["slope"].mean() == pytest.approx(1, abs=0.2)
    assert ((rows["ci_low"] < 1) & (rows["ci_high"] > 1)).sum() >= 4
    assert (rows["p_value"] < 0.01).all()
    fit = model.mixed_model(tables[0])
    variances = dict(zip(sorted(fit.model.exog_vc.names), fit.vcomp, strict=True))
    assert np.sqrt(variances["gene"]) == pytest.approx(0.05, rel=0.3)
    assert np.sqrt(fit.scale) == pytest.approx(0.03, rel=0.15)
    assert ("patient" in variances) == (n_patients == 6)
    assert any("C(patient)" in name for name in fit.params.index) == (n_patients == 3)


def test_mixed_model_is_wider_than_a_regression_that_forgets_genes(model):
    table = gains(n_seeds=3)
    naive = smf.ols("delta ~ sparsity + C(patient) + C(seed)", table).fit()
    row = model.slope(table)
    # Balanced and one sparsity per gene: the gene means carry all there is to know of the slope.
    assert row["slope"] == pytest.approx(naive.params["sparsity"], abs=0.3)
    assert row["ci_high"] - row["ci_low"] > 1.5 * np.ptp(naive.conf_int().loc["sparsity"])


def test_mixed_model_finds_no_slope_where_there_is_none(model):
    p_values = [model.slope(gains(slope=0, seed=seed))["p_value"] for seed in range(8)]
    assert sum(p < 0.05 for p in p_values) <= 2


@pytest.mark.parametrize(
    "table",
    [
        gains(n_patients=1),
        gains().assign(sparsity=0.9),
        gains()[lambda t: t["gene"].isin(PANEL[:3])],
    ],
    ids=["one patient", "constant sparsity", "three genes"],
)
def test_mixed_model_says_why_it_was_not_fitted(model, table):
    row = model.slope(table)
    assert np.isnan(row["slope"]) and row["note"].startswith("needs four genes")


# --- published numbers ----------------------------------------------------------------------------


def test_published_tables_agree_with_each_other():
    categories = published.CATEGORIES.set_index("category")
    published_sparsity = panel_table().groupby("category")["published_sparsity"]
    for category, row in categories.drop("overall").iterrows():
        sparsity = published_sparsity.get_group(category)
        assert row["n_genes"] == len(sparsity)
        assert row["mean_sparsity"] == pytest.approx(sparsity.mean(), abs=1e-3)
    assert categories.loc["overall", "mean_delta"] == published.SUMMARY["mean_delta"]
    assert categories.loc["overall", "n_wins"] == published.SUMMARY["n_wins"]
    assert set(published.RESCUES["gene"]) <= set(PANEL)
    arms = published.ARMS.set_index("arm")
    assert arms.loc["D", "ssim_2um"] == published.SUMMARY["ssim_2um_mse"]
    assert arms.loc["E", "ssim_2um"] == published.SUMMARY["ssim_2um_poisson"]
    assert isinstance(published.SUMMARY["n_genes"], int)
