"""Table S1 and the page of the sparsity association, by hand and on planted effects."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pandas as pd
import pytest
from cells import drawn, run_cells
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis import effects, published
from sparsity_trap.analysis.association import (
    GENE_COLUMNS,
    gene_table,
    mean_table,
)
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


SEEDS = 4


def long(mse: pd.DataFrame, poisson: pd.DataFrame, noise: float = 0.02, **patients) -> pd.DataFrame:
    """Runs of arms D and E, as `runs.long_table` has them: tables of scores, and noise of each run.

    ``patients`` have tables of their own, a pair each.
    """
    draw = np.random.default_rng(7)
    parts = []
    for patient, pair in {"P5": (mse, poisson), **patients}.items():
        for (arm, table), seed in itertools.product(zip("DE", pair, strict=True), range(SEEDS)):
            shift = draw.normal(0, noise) + draw.normal(0, noise, len(table))
            run = {"arm": arm, "patient": patient, "seed": seed, "run": f"{arm}-{patient}-s{seed}"}
            parts.append(table.assign(pcc_8um=table["pcc_8um"] + shift, collapsed=False, **run))
    return pd.concat(parts, ignore_index=True).assign(decoder="hist2st", loss="of the arm")


def sums(seed: list[int], genes: int) -> np.ndarray:
    """Sums of six patches of a run."""
    return 1 + np.random.default_rng(seed).uniform(size=(6, genes, 6))


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Run notebook 04 on a table of runs; what it defines, with its numbers as ``quoted``.

    Its plots are left out, but with ``plots``.
    """

    def run(scores: pd.DataFrame, plots: bool = False) -> dict:
        monkeypatch.setattr(effects.crossed_draws, "__defaults__", (150,))
        settings = types.SimpleNamespace(folder=tmp_path, source="simulated", main_patient="P5")
        numbers: dict = {}

        def quotes(_settings, _page):
            return lambda prefix, **values: numbers.update(
                {f"{prefix}.{key}": value for key, value in values.items()}
            )

        results = [
            types.SimpleNamespace(
                run=types.SimpleNamespace(name=name), genes=table,
                patches=sums([*name.encode()], len(table)),
            )
            for name, table in scores.groupby("run")
        ]  # fmt: skip
        for name, value in {
            "open_preset": lambda *_: settings,
            "Quotes": quotes,
            "load_all": lambda _: results,
            "long_table": lambda *_: scores,
        }.items():
            monkeypatch.setattr(runs, name, value)

        def wanted(source: str) -> bool:
            others = ("interactive.show", "recompute.recompute")
            return plots or not (drawn(source) or any(text in source for text in others))

        parameters = {"preset": "", "source": "", "cohort": ""}
        return run_cells("04_sparsity", parameters, wanted) | {"quoted": numbers}

    return run


def planted(slope: float, noise: float = 0.05, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two tables whose gain rises with the rank of sparsity."""
    rng = np.random.default_rng(seed)
    mse = run_table(seed)
    gain = 0.1 + slope * (mse["sparsity"].rank(pct=True) - 0.5) + rng.normal(0, noise, len(mse))
    return mse, run_table(seed + 1, pcc_8um=mse["pcc_8um"] + gain)


def gain_of_runs(scores: pd.DataFrame) -> pd.DataFrame:
    """Gain in PCC at 8 µm on P5, a row per gene of the panel, a column per seed."""
    own = scores[scores["patient"] == "P5"]
    wide = own.pivot(index="gene", columns=["arm", "seed"], values="pcc_8um").loc[list(PANEL)]
    return wide["E"] - wide["D"]


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


def test_tables_of_any_kind_give_the_same(tmp_path):
    mse, poisson = planted(0.1)
    expected = gene_table(mse, poisson)
    poisson.to_csv(tmp_path / "poisson.csv", index=False)
    own = pd.CategoricalDtype([*CATEGORIES, "of no gene"])
    kinds = [poisson.convert_dtypes(), poisson.astype({"category": own}), tmp_path / "poisson.csv"]
    for table in kinds:
        pd.testing.assert_frame_equal(gene_table(mse.to_dict("list"), table), expected)
    scores = long(mse, poisson).replace({"patient": {"P5": "001"}})
    scores.to_csv(tmp_path / "runs.csv", index=False)
    pd.testing.assert_frame_equal(
        mean_table(tmp_path / "runs.csv", "001", "D", "E"), mean_table(scores, "001", "D", "E")
    )


def test_tables_without_what_is_needed_are_refused():
    mse, poisson = planted(0.1)
    with pytest.raises(UserError, match="the table of MSE has no column pcc_8um"):
        gene_table(mse.drop(columns="pcc_8um"), poisson)
    damaged = poisson.replace({"gene": {PANEL[3]: "1-Mar", PANEL[4]: "1-Mar"}})
    with pytest.raises(UserError, match="the table of Poisson: 1-Mar is a date"):
        gene_table(mse, damaged)
    numbered = [table.assign(gene=range(len(table))) for table in (mse, poisson)]
    assert gene_table(*numbered)["gene"].tolist() == [str(i) for i in range(len(mse))]


def test_mean_table_is_over_the_seeds_that_both_arms_have():
    scores = long(*planted(0.1))
    failed = (scores["arm"] == "D") & (scores["seed"] == 1)
    scores.loc[failed, ["pcc_8um", "ssim_2um"]] = np.nan
    scores = scores[~((scores["arm"] == "E") & (scores["seed"] == 3))]
    table = mean_table(scores, "P5", "D", "E")
    pd.testing.assert_index_equal(table.columns, gene_table(*planted(0.1)).columns)
    assert tuple(table["gene"]) == PANEL
    for arm, column in (("D", "pcc_8um_mse"), ("E", "pcc_8um_poisson")):
        own = scores[(scores["arm"] == arm) & scores["seed"].isin([0, 2])]
        expected = own.groupby("gene")["pcc_8um"].mean()[list(PANEL)]
        np.testing.assert_allclose(table[column], expected)
    # All runs of one arm failed: the other keeps its own.
    scores.loc[scores["arm"] == "D", "pcc_8um"] = np.nan
    table = mean_table(scores, "P5", "D", "E")
    assert table["pcc_8um_mse"].isna().all() and table["pcc_8um_poisson"].notna().all()
    with pytest.raises(UserError, match="no run of arm 'E' with test patient 'P1'"):
        mean_table(scores.assign(patient="P1")[lambda t: t["arm"] == "D"], "P1", "D", "E")


# --- the page -------------------------------------------------------------------------------------


def test_a_planted_effect_is_found(page):
    scores = long(*planted(0.3))
    found = page(scores)
    table, quoted = found["genes"], found["quoted"]
    by_seed = gain_of_runs(scores)
    gain = by_seed.mean(axis=1)
    np.testing.assert_allclose(table["delta_pcc_8um"], gain)
    sparsity = table["sparsity"].to_numpy()
    assert quoted["sparsity.rho"] == pytest.approx(stats.spearmanr(sparsity, gain).statistic)
    assert 0 < quoted["sparsity.ci_low"] < quoted["sparsity.rho"] < quoted["sparsity.ci_high"] < 1
    assert quoted["sparsity.n_genes"] == 50 and quoted["sparsity.n_runs"] == SEEDS
    assert quoted["sparsity.n_wins"] == (gain > 0).sum()
    assert quoted["published.p_value"] == pytest.approx(0.089, abs=5e-4)
    single = found["single"].set_index("seed")
    for seed, own in by_seed.items():
        assert single.loc[seed, "rho"] == pytest.approx(stats.spearmanr(sparsity, own).statistic)
    assert (single["p_value"] <= 2e-4 + 1e-9).all()  # no order of 9,999 is as extreme
    assert quoted["sparsity.least_run"] == single["rho"].min()
    assert quoted["sparsity.largest_run"] == single["rho"].max()
    assert (found["left_out"]["rho"] > 0.4).all()
    assert found["left_out"]["n_genes"].sum() == 6 * 50
    quartiles = found["quartiles"]
    assert quartiles["quartile"].tolist() == ["Q1", "Q2", "Q3", "Q4"]
    assert sorted(quartiles["n_genes"]) == [12, 12, 13, 13]
    assert quartiles["mean_delta"].is_monotonic_increasing
    folder = found["settings"].folder / "tables"
    pd.testing.assert_frame_equal(pd.read_csv(folder / "S3_quartiles.csv"), quartiles)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "S1_genes.csv"), table)
    assert quoted["sparsity.with_mean_count"] == pytest.approx(
        stats.spearmanr(sparsity, table["mean_count"]).statistic
    )


def test_runs_that_differ_widen_the_interval(page):
    """Genes and their mean gains alike; only what runs add differs."""
    calm, rough = (page(long(*planted(0.3), noise=noise)) for noise in (0.001, 0.3))
    width = [
        f["quoted"]["sparsity.ci_high"] - f["quoted"]["sparsity.ci_low"] for f in (calm, rough)
    ]
    assert width[1] > 1.5 * width[0]
    of_all = [f["categories"].set_index("category").loc["overall"] for f in (calm, rough)]
    assert np.subtract(*of_all[1][["ci_high", "ci_low"]]) > 2 * np.subtract(
        *of_all[0][["ci_high", "ci_low"]]
    )


def test_categories_by_hand(page):
    scores = long(*planted(0.0, noise=0.2))
    found = page(scores)
    table, result = found["genes"], found["categories"].set_index("category")
    assert result.index[-1] == "overall"
    assert set(result.index[:-1]) == set(CATEGORIES)
    assert result["mean_delta"].iloc[:-1].is_monotonic_decreasing
    by_seed = gain_of_runs(scores)
    for category in CATEGORIES:
        row, own = result.loc[category], table[table["category"] == category]
        assert row["n_genes"] == len(own)
        assert row["n_wins"] == own["improved"].sum()
        assert row["mean_delta"] == pytest.approx(own["delta_pcc_8um"].mean())
        assert row["mean_sparsity"] == pytest.approx(own["sparsity"].mean())
        # Runs and genes by hand, and a little more for patches, by Student's t.
        gain = by_seed.loc[own["gene"]]
        least = gain.mean().var() / SEEDS + gain.mean(axis=1).var() / len(own)
        half = (row["ci_high"] - row["ci_low"]) / 2
        assert row["ci_low"] + half == pytest.approx(row["mean_delta"])
        assert half > stats.norm.ppf(0.975) * np.sqrt(least)
    assert result.loc["overall", "n_genes"] == 50
    assert not {"p_value", "q_value"} & set(result)


def test_an_effect_of_one_category_is_exposed(page):
    mse, poisson = planted(0.0, seed=3)
    poisson.loc[poisson["category"] == "mitochondrial", "pcc_8um"] -= 0.3
    quoted = page(long(mse, poisson))["quoted"]
    assert quoted["sparsity.ci_low"] > 0
    assert quoted["sparsity.without_mitochondrial.ci_low"] < 0


def test_the_page_bears_scores_that_are_undefined(page):
    mse, poisson = planted(0.2)
    scores = long(mse, poisson)
    gone = scores["gene"].isin([PANEL[3], PANEL[7]]) & (scores["arm"] == "E")
    once = scores.assign(pcc_8um=scores["pcc_8um"].mask(gone & (scores["seed"] == 1)))
    assert page(once)["quoted"]["sparsity.n_genes"] == 48
    # Every run of one arm collapsed.
    lost = scores.assign(pcc_8um=scores["pcc_8um"].where(scores["arm"] == "D"))
    quoted = page(lost, plots=True)["quoted"]
    assert quoted["sparsity.n_genes"] == quoted["sparsity.n_runs"] == 0
    assert all(np.isnan(quoted[f"sparsity.{key}"]) for key in ("rho", "ci_low", "slope"))
    # All gains the same.
    same = long(mse, poisson.assign(pcc_8um=mse["pcc_8um"]), noise=0)
    assert np.isnan(page(same, plots=True)["quoted"]["sparsity.rho"])
    # One run of each arm: values, and no interval.
    quoted = page(scores[scores["seed"] == 0], plots=True)["quoted"]
    assert np.isfinite(quoted["sparsity.rho"]) and np.isnan(quoted["sparsity.ci_low"])


def test_a_run_that_collapsed_takes_its_pair_along(page):
    scores = long(*planted(0.3))
    failed = (scores["arm"] == "D") & (scores["seed"] == 2)
    found = page(scores.assign(pcc_8um=scores["pcc_8um"].mask(failed)))
    rest = page(scores[scores["seed"] != 2])
    assert found["quoted"]["sparsity.n_runs"] == SEEDS - 1
    np.testing.assert_allclose(found["genes"]["delta_pcc_8um"], rest["genes"]["delta_pcc_8um"])
    for key in ("rho", "ci_low", "slope"):
        assert found["quoted"][f"sparsity.{key}"] == pytest.approx(
            rest["quoted"][f"sparsity.{key}"]
        )
    pd.testing.assert_frame_equal(found["categories"], rest["categories"])


# --- slopes ---------------------------------------------------------------------------------------


def leaning(slopes: dict[str, list[float]], seed: int = 0) -> pd.DataFrame:
    """Runs of D and E, those of a patient with these slopes of the gain, per unit of sparsity."""
    draw = np.random.default_rng(seed)
    parts = []
    for patient, of_runs in slopes.items():
        base = run_table(seed)
        for i, slope in enumerate(of_runs):
            noise = draw.normal(0, 0.02, len(base))
            gain = slope * (base["sparsity"] - 0.9) + noise
            for arm, extra in (("D", 0), ("E", gain)):
                run = {"arm": arm, "patient": patient, "seed": i, "run": f"{arm}-{patient}-s{i}"}
                parts.append(base.assign(pcc_8um=base["pcc_8um"] + extra, collapsed=False, **run))
    return pd.concat(parts, ignore_index=True).assign(decoder="hist2st")


def test_slopes_are_those_of_a_line_through_each_run(page):
    scores = leaning({"P1": [1.0, 2.0], "P5": [0.0, 1.0, 2.0, 3.0, 4.0]})
    quoted = page(scores)["quoted"]
    wide = scores.pivot(index=["patient", "seed", "gene"], columns="arm", values="pcc_8um")
    gain = (wide["E"] - wide["D"]).rename("gain").reset_index()
    gain["sparsity"] = gain["gene"].map(run_table(0).set_index("gene")["sparsity"])
    by_run = gain.groupby(["patient", "seed"])[["sparsity", "gain"]].apply(
        lambda t: np.polyfit(10 * t["sparsity"], t["gain"], 1)[0]
    )
    assert quoted["sparsity.slope_runs"] == 7
    assert quoted["sparsity.slope"] == pytest.approx(by_run.groupby("patient").mean().mean())
    # Student's t over runs within patients, each patient counting alike.
    within = by_run.groupby("patient").agg(["var", "size"])
    df = (within["size"] - 1).sum()
    variance = (within["var"] * (within["size"] - 1)).sum() / df
    half = stats.t.ppf(0.975, df) * np.sqrt(variance * (1 / within["size"]).sum()) / 2
    low, high = quoted["sparsity.slope"] - half, quoted["sparsity.slope"] + half
    assert quoted["sparsity.slope_low"] == pytest.approx(low)
    assert quoted["sparsity.slope_high"] == pytest.approx(high)


def test_an_interval_over_runs_holds_slopes_that_differ_by_run(page_slopes):
    draw, hits = np.random.default_rng(0), 0
    for seed in range(40):
        slopes = list(1 + draw.normal(0, 1, 4))
        low, high = page_slopes(leaning({"P5": slopes}, seed))
        hits += low <= 0.1 <= high
    assert hits >= 34


@pytest.fixture
def page_slopes():
    """The slope from D to E by the functions of notebook 04."""

    def run(scores):
        start = (
            "import numpy as np\nimport pandas as pd\nimport statsmodels.formula.api as smf\n"
            "from sparsity_trap.analysis.effects import LEAST_PAIRS, gains\n"
        )
        namespace: dict = {"LEAST_GENES": 4, "scores": scores}
        exec(start, namespace)
        cells = run_cells("04_sparsity", namespace, lambda source: "def slope_of_run" in source)
        found = cells["slope"]({"E": 1, "D": -1})[1]
        return found["ci_low"], found["ci_high"]

    return run


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.assign(sparsity=0.9),
        lambda t: t[t["gene"].isin(PANEL[:3])],
        lambda t: t[t["seed"] < 2],
    ],
    ids=["constant sparsity", "three genes", "two runs"],
)
def test_there_is_no_interval_where_it_cannot_be_had(page_slopes, change):
    assert np.isnan(page_slopes(change(leaning({"P5": [1.0, 2.0, 3.0]})))).all()


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
