"""What others have printed: tables that are whole, facts about them, rules that can go wrong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cells import drawn, run_cells
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from sparsity_trap import runs
from sparsity_trap.analysis import association, published
from sparsity_trap.analysis.claims import read_claims
from sparsity_trap.analysis.effects import Share
from sparsity_trap.analysis.families import FAMILIES
from sparsity_trap.data.genes import panel_table
from sparsity_trap.show import tables

FIRST, LATER, TWO = published.GENES, published.LATER_GENES, published.TWO_BY_TWO
MITOCHONDRIAL = FIRST["category"] == "mitochondrial"


# --- the tables -----------------------------------------------------------------------------------


def test_every_file_has_its_source():
    readme = (published.FOLDER / "README.md").read_text()
    for path in published.FOLDER.glob("*.csv"):
        assert f"| `{path.name}` |" in readme, path


def test_tables_of_genes_are_whole():
    panel = panel_table().set_index("gene")
    for table in (FIRST, LATER):
        assert set(table["gene"]) == set(panel.index) and len(table) == 50
        assert not table.isna().any().any()
        pcc = table.filter(regex=r"^(pcc|ssim)_")
        assert pcc.shape[1] >= 4 and pcc.min().min() > -0.1 and pcc.max().max() < 1
        assert table["sparsity"].between(0.7, 1).all()
    own = FIRST.set_index("gene").loc[panel.index]
    np.testing.assert_allclose(own["sparsity"], panel["published_sparsity"], atol=1e-9)
    assert own["category"].to_list() == panel["category"].to_list()
    # Also of patient P5: the same sparsities but for a constant, of what lies off the tissue.
    both = FIRST.merge(LATER, on="gene")
    assert stats.pearsonr(both["sparsity_x"], both["sparsity_y"]).statistic > 0.9999


def test_text_of_the_first_work_fits_its_table():
    gain = FIRST["pcc_8um_poisson"] - FIRST["pcc_8um_mse"]
    says = published.SUMMARY
    assert (says["n_genes"], says["n_wins"]) == (len(FIRST), (gain > 0).sum()) == (50, 48)
    assert says["mean_delta"] == pytest.approx(gain.mean(), abs=5e-4)
    for score in ("pcc_8um_mse", "pcc_8um_poisson", "ssim_2um_mse", "ssim_2um_poisson"):
        assert says[score] == pytest.approx(FIRST[score].mean(), abs=5e-4)
    assert says["mean_sparsity"] == pytest.approx(FIRST["sparsity"].mean(), abs=5e-4)
    # Of sparsities that are printed to a tenth of a per cent.
    found = stats.spearmanr(FIRST["sparsity"], gain)
    assert says["rho"] == pytest.approx(found.statistic, abs=2e-3)
    assert says["p_corrected"] == pytest.approx(found.pvalue, abs=2e-3)
    assert says["p_at_first"] < found.pvalue / 50
    printed = published.CATEGORIES.set_index("category")
    by_category = gain.groupby(FIRST["category"])
    for category, row in printed.drop("overall").iterrows():
        own = by_category.get_group(category)
        assert row["mean_delta"] == pytest.approx(own.mean(), abs=6e-4)
        assert (row["n_wins"], row["n_genes"]) == ((own > 0).sum(), len(own))
    # No result: one constant, the mean of the author's own arm E.
    assert FIRST["img2st_pcc_8um"].unique() == says["img2st_pcc_8um"] == says["pcc_8um_poisson"]


def test_text_of_the_later_work_is_about_ssim():
    says = published.LATER_SUMMARY
    pcc = LATER["pcc_poisson"] - LATER["pcc_mse"]
    ssim = LATER["ssim_poisson"] - LATER["ssim_mse"]
    assert says["n_wins_ssim"] == (ssim > 0).sum() == 50
    assert (pcc > 0).sum() == 44
    r = stats.pearsonr(LATER["sparsity"], ssim)
    assert says["pearson_ssim"] == pytest.approx(r.statistic, abs=5e-4)
    assert says["pearson_ssim_p"] == pytest.approx(r.pvalue, rel=0.02)
    assert says["mean_delta_ssim"] == pytest.approx(ssim.mean(), abs=5e-4)
    rest = (LATER["category"] != "mitochondrial").to_numpy()
    assert stats.spearmanr(LATER["sparsity"][rest], pcc[rest]).statistic == pytest.approx(
        0.019, abs=1e-3
    )


def test_mitochondrial_genes_hold_most_of_the_weight():
    rate = -np.log(FIRST["sparsity"])
    assert MITOCHONDRIAL.sum() == 10
    assert np.square(rate[MITOCHONDRIAL]).sum() / np.square(rate).sum() == pytest.approx(
        0.84, abs=0.005
    )
    assert rate[MITOCHONDRIAL].sum() / rate.sum() == pytest.approx(0.54, abs=0.005)


def test_small_tables_agree_with_what_is_printed_twice():
    committed = TWO["source"].str.startswith("committed")
    for _, row in TWO[~committed].iterrows():
        same = TWO[
            committed
            & (
                TWO[["decoder", "loss", "best_epoch"]] == row[["decoder", "loss", "best_epoch"]]
            ).all(axis=1)
        ]
        for score in ("pooled_pcc_2um", "pooled_pcc_8um", "ssim_2um"):
            np.testing.assert_allclose(same[score], row[score], atol=6e-4)
    mse = TWO[(TWO["decoder"] == "Hist2ST") & (TWO["loss"] == "mse")].set_index("best_epoch")
    assert mse["pooled_pcc_8um"].round(3).to_dict() == {19: 0.026, 40: 0.457}
    whole = pd.read_csv(published.FOLDER / "hest_losses.csv")
    assert published.HEST.shape == (7, 7)
    np.testing.assert_allclose(whole["mean"], published.HEST.mean(axis=1), atol=2e-3)
    shuffled = published.LABEL_SHUFFLE.set_index("shuffle")["ssim_2um"]
    assert shuffled.round(3).to_list() == [0.571, 0.493]
    scaled = published.SCALED_TARGET
    assert scaled.groupby("gene")["encoder"].nunique().to_dict() == dict.fromkeys(scaled["gene"], 5)
    assert (
        set(scaled["gene"]) <= set(FIRST["gene"])
        and scaled[["pcc", "ssim"]].stack().between(0, 1).all()
    )
    assert published.RESCUES["pcc_8um_mse"].round(3).to_list() == [
        0.037,
        0.267,
        0.098,
        -0.034,
        0.055,
    ]


# --- a share --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "n"), [(48, 50), (3, 7), (0, 5), (50, 50)])
def test_a_share_is_exact(count, n):
    share = Share(count, n)
    assert share.value == count / n
    assert share.interval == pytest.approx(proportion_confint(count, n, method="beta"))
    draws = stats.binom(n, 0.5)
    assert share.p_above(0.5) == pytest.approx(draws.sf(count - 1))
    assert share.p_below(0.5) == pytest.approx(draws.cdf(count))


def test_p_of_dealt_orders_is_that_of_an_exact_enumeration():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=6), rng.normal(size=6)
    exact = stats.permutation_test(
        (x,),
        lambda x: stats.spearmanr(x, y).statistic,
        permutation_type="pairings",
        n_resamples=np.inf,
    )
    assert association.rho(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert association.dealt(x, y) == pytest.approx(exact.pvalue, abs=0.02)


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Run the page without its figures, on printed tables that ``printed`` replace."""

    def run(*keys: str, **printed: pd.DataFrame) -> dict:
        quoted: dict[str, object] = {}

        def quote(prefix, **numbers):
            quoted.update({f"{prefix}.{name}": number for name, number in numbers.items()})

        for name, table in printed.items():
            monkeypatch.setattr(published, name, table)
        monkeypatch.setattr(runs, "open_preset", lambda *_: SimpleNamespace(folder=tmp_path))
        monkeypatch.setattr(runs, "Quotes", lambda *_: quote)
        monkeypatch.setattr("gc.collect", lambda *_: 0)  # which statsmodels calls in corrections
        bootstrap = stats.bootstrap
        monkeypatch.setattr(
            stats,
            "bootstrap",
            lambda *data, n_resamples, **o: bootstrap(*data, n_resamples=999, **o),
        )

        def wanted(source: str) -> bool:
            mine = not keys or any(f'"{key}"' in source for key in keys)
            others = ("ledger.", "correlations")  # the latter in cells that no claim is based on
            return not drawn(source) and (mine or not any(text in source for text in others))

        found = run_cells("11_record", {"preset": "", "source": "", "cohort": ""}, wanted)
        monkeypatch.setattr(stats, "bootstrap", bootstrap)
        ledger = found["ledger"]
        ledger.listed = {key: ledger.listed[key] for key in ledger.claims}
        ledger.settle()
        return found | {"quoted": quoted}

    return run


@pytest.fixture
def quick(monkeypatch):
    """p of dealt orders plays no part in a verdict, and no table is looked at."""
    monkeypatch.setattr(association, "dealt", lambda *_: 0.5)
    monkeypatch.setattr(tables, "show", lambda *_, **__: None)


def test_page_repeats_the_facts(page):
    found = page()
    assert list(found["ledger"].claims) == list(read_claims(FAMILIES["printed"].script))
    table = found["correlations"].set_index(["table", "score", "genes"])
    gain = FIRST["pcc_8um_poisson"] - FIRST["pcc_8um_mse"]
    for genes, kept in (("all", MITOCHONDRIAL | True), ("without mitochondrial", ~MITOCHONDRIAL)):
        own, reference = (
            table.loc[("first", "pcc_8um", genes)],
            stats.spearmanr(FIRST["sparsity"][kept], gain[kept]),
        )
        assert (own["n"], own["rho"]) == (kept.sum(), pytest.approx(reference.statistic))
        assert own["p_value"] == pytest.approx(reference.pvalue, abs=0.02)
        assert own["ci_low"] < own["rho"] < own["ci_high"]
    quoted = found["quoted"]
    assert quoted["record.first.pcc_8um.n_wins"] == 48 and quoted["record.later.pcc.n_wins"] == 44
    assert quoted["record.later.pcc.rho_without"] == pytest.approx(0.019, abs=1e-3)
    assert quoted["record.shuffle.ssim"] == pytest.approx(0.1364, abs=1e-4)
    assert quoted["record.weights.mse"] == pytest.approx(0.84, abs=0.005)
    rate = -np.log(FIRST["sparsity"].to_numpy())
    assert quoted["record.weights.ratio"] == pytest.approx(
        (rate**3).sum() * rate.sum() / np.square(rate).sum() ** 2
    )
    mean = found["mean_of"](gain)
    assert mean.interval == pytest.approx(DescrStatsW(gain).tconfint_mean())


def genes(first=(), later=()) -> dict[str, pd.DataFrame]:
    """Both tables with columns replaced."""
    return {"GENES": FIRST.assign(**dict(first)), "LATER_GENES": LATER.assign(**dict(later))}


def gaining(first, later, score=("pcc_8um", "pcc")) -> dict[str, pd.DataFrame]:
    """Both tables with these gains of every gene, from 0.1."""
    pairs = zip((first, later), score, strict=True)
    columns = [{f"{s}_mse": 0.1, f"{s}_poisson": 0.1 + np.asarray(gain)} for gain, s in pairs]
    return genes(*columns)


def two(**changes: dict[tuple[str, str], float]) -> dict[str, pd.DataFrame]:
    """The table of decoders and losses with values of README rows, or committed ones, replaced."""
    table = TWO.copy()
    for column, values in changes.items():
        for (decoder, loss), value in values.items():
            table.loc[(table["decoder"] == decoder) & (table["loss"] == loss), column] = value
    return {"TWO_BY_TWO": table}


def hest(loss: str, gain) -> dict[str, pd.DataFrame]:
    table = published.HEST.copy()
    table.loc[loss] = table.loc["MSE"] + np.asarray(gain)
    return {"HEST": table}


def scaled(gain) -> dict[str, pd.DataFrame]:
    at = FIRST.set_index("gene")["pcc_8um_poisson"]
    table = published.SCALED_TARGET.copy()
    table["pcc"] = table["gene"].map(at) + table["gene"].map(
        dict(zip(table["gene"].unique(), gain, strict=True))
    )
    return {"SCALED_TARGET": table}


def shuffled(kept: float) -> dict[str, pd.DataFrame]:
    return {"LABEL_SHUFFLE": published.LABEL_SHUFFLE.assign(ssim_2um=[0.5, 0.5 * kept])}


def said(**values: float) -> dict[str, object]:
    return {"SUMMARY": published.SUMMARY | values}


def arm(value: float) -> dict[str, pd.DataFrame]:
    table = published.ARMS.copy()
    table.loc[table["arm"] == "D", "pcc_2um"] = value
    return {"ARMS": table}


def as_later(values: np.ndarray) -> np.ndarray:
    """Values of the first table's genes in the order of the later one."""
    return pd.Series(values, FIRST["gene"])[LATER["gene"]].to_numpy()


NOISE = np.random.default_rng(1).normal(size=(4, 50))
RANKS = [table["sparsity"].rank(pct=True).to_numpy() - 0.5 for table in (FIRST, LATER)]
OTHERS = [
    np.where(t["category"] == "mitochondrial", 0.5, r)
    for t, r in zip((FIRST, LATER), RANKS, strict=True)
]
SPREAD = np.linspace(-0.3, 0.3, 7)
MULTINOMIAL = "multinomial over a section (ListSTRank)"
S, N, U = "supported", "not supported", "undetermined"

#: claim -> verdict -> printed tables that bear it.
CASES: dict[str, dict[str, dict]] = {
    "printed_most_genes": {
        S: gaining(0.1, 0.1),
        N: gaining(-0.1, 0.1),
        U: gaining(0.1, np.where(np.arange(50) < 29, 0.1, -0.1)),
    },
    "printed_every_category": {
        S: gaining(0.1 + 0.01 * NOISE[0], 0.1),
        N: gaining(-0.1 + 0.01 * NOISE[0], 0.1),
        U: {},
    },
    "printed_sparser_genes": {S: gaining(*RANKS), N: gaining(-RANKS[0], RANKS[1]), U: {}},
    "printed_sparser_genes_without_mitochondrial": {
        S: gaining(*RANKS),
        N: gaining(-OTHERS[0], OTHERS[1]),
        U: {},
    },
    "printed_gains_agree": {
        S: {},
        N: gaining(NOISE[0], -as_later(NOISE[0]), ("pcc_2um", "pcc")),
        U: gaining(NOISE[0], NOISE[1], ("pcc_2um", "pcc")),
    },
    "printed_ssim_sparser_genes": {
        S: {},
        N: gaining(-RANKS[0], RANKS[1], ("ssim_2um", "ssim")),
        U: gaining(NOISE[2], NOISE[3], ("ssim_2um", "ssim")),
    },
    "printed_ssim_is_recovery": {
        S: genes(
            {"ssim_2um_poisson": FIRST["pcc_2um_poisson"]}, {"ssim_poisson": LATER["pcc_poisson"]}
        ),
        N: {},
        U: genes({"ssim_2um_poisson": 0.5 + NOISE[0]}, {"ssim_poisson": LATER["pcc_poisson"]}),
    },
    "printed_label_shuffle": {S: shuffled(0.4), N: {}, U: shuffled(0.6)},
    "printed_all_genes": {S: gaining(0.1, 0.1), N: {}},
    "printed_p": {S: said(rho=0.5), N: {}},
    "printed_baseline": {
        S: genes({"img2st_pcc_8um": FIRST["pcc_8um_poisson"] - 0.1}),
        N: {},
        U: genes({"img2st_pcc_8um": FIRST["pcc_8um_poisson"] + 0.1}),
    },
    "printed_trap_at_2um": {S: arm(0.2), N: {}},
    "printed_trained_longer": {S: two(pooled_pcc_8um={("Hist2ST", "mse"): 0.3}), N: {}},
    "printed_pooled": {
        S: two(pooled_pcc_2um={("Hist2ST", "mse"): 0.1, ("Img2ST", "mse"): 0.1}) | arm(0.2),
        N: two(pooled_pcc_2um={("Hist2ST", "mse"): 0.31, ("Img2ST", "mse"): 0.29}),
        U: {},
    },
    "printed_level": {
        S: two(predicted_over_observed={("Hist2ST", "mse"): 1.1, ("Img2ST", "mse"): 0.9}),
        N: {},
        U: two(predicted_over_observed={("Hist2ST", "mse"): 1.1}),
    },
    "printed_poisson_at_55um": {
        S: hest("Poisson", 0.1 + SPREAD / 50),
        N: hest("Poisson", -0.1 + SPREAD / 50),
        U: {},
    },
    "printed_within_section": {
        S: hest(MULTINOMIAL, 0.1 + SPREAD / 50),
        N: hest(MULTINOMIAL, -0.1 + SPREAD / 50),
        U: {},
    },
    "printed_scaled_target": {
        S: scaled(0.1 + SPREAD / 50),
        N: scaled(-0.1 + SPREAD / 50),
        U: scaled(0.05 + SPREAD),
    },
    "printed_mitochondrial_weight": {
        S: {},
        N: genes({"sparsity": 0.9}, {"sparsity": 0.9}),
        U: genes({"sparsity": 0.9}),
    },
}
#: Counts of a table, and numbers with one bound: nothing lies between.
TWO_WAYS = {"printed_all_genes", "printed_p", "printed_trap_at_2um", "printed_trained_longer"}


def test_every_claim_has_cases():
    assert set(CASES) == set(read_claims(FAMILIES["printed"].script))
    assert {key for key, cases in CASES.items() if len(cases) < 3} == TWO_WAYS


@pytest.mark.parametrize("key", CASES)
def test_every_verdict_can_be_reached(page, quick, monkeypatch, key):
    for verdict, printed in CASES[key].items():
        with monkeypatch.context():
            before = {name: getattr(published, name) for name in printed}
            claim = page(key, **printed)["ledger"].claims[key]
            for name, table in before.items():
                monkeypatch.setattr(published, name, table)
        assert claim.verdict == verdict, (verdict, claim)
        assert claim.family == "printed" and claim.n > 0 and np.isfinite(claim.value)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "r"), [(40, 0.0), (50, 0.3), (50, -0.5)])
def test_interval_of_rho_covers(page, quick, monkeypatch, n, r):
    """Over draws of genes whose ranks correlate, at the sizes of the tables."""
    drawn, bootstrap = page("nothing")["drawn"], stats.bootstrap
    monkeypatch.setattr(
        stats, "bootstrap", lambda *data, n_resamples, **o: bootstrap(*data, n_resamples=399, **o)
    )
    rng = np.random.default_rng(0)
    normal = 2 * np.sin(np.pi * r / 6)  # Pearson's r of normal pairs with that Spearman's ρ
    inside = 0
    for _ in range(200):
        x, y = rng.multivariate_normal([0, 0], [[1, normal], [normal, 1]], n).T
        low, high = drawn(pd.Series(x), pd.Series(y)).interval
        inside += low <= r <= high
    assert 0.9 <= inside / 200 <= 0.99
