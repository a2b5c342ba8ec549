"""What a page recomputes, in a real browser, against scipy and the analysis on the same numbers."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fragment import stands_alone
from scipy import stats
from statsmodels.stats.multitest import multipletests

from sparsity_trap.analysis import claims, effects
from sparsity_trap.show import recompute

PAIR = {"E": 1.0, "D": -1.0}
CATEGORIES = ["secretory", "stromal", "immune"]
GENES = [f"G{i}" for i in range(12)]


def simulated(seeds: dict[str, int]) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Scores of two arms on some patients, one gene undefined, and the sums of five patches."""
    draw = np.random.default_rng(1)
    level, gain = draw.normal(0.3, 0.1, 12), draw.normal(0.03, 0.05, 12)
    tables, moments = [], {}
    for patient, seed, arm in (
        (p, s, a) for p, n in seeds.items() for s, a in product(range(n), PAIR)
    ):
        name = f"{arm}-{patient}-s{seed}"
        score = level + draw.normal(0, 0.02) + draw.normal(0, 0.02, 12) + gain * (arm == "E")
        score[3] = np.nan
        facts = {"gene": GENES, "category": 4 * CATEGORIES, "sparsity": np.round(gain, 2)}
        run = {"run": name, "arm": arm, "patient": patient, "seed": seed, "decoder": "linear"}
        tables.append(pd.DataFrame(facts | run | dict.fromkeys(recompute.SCORES, score)))
        moments[name] = np.abs(draw.normal(1, 0.1, (5, 12, 6))) + 1
    return pd.concat(tables, ignore_index=True), moments


@pytest.fixture(scope="module")
def planted():
    return simulated({"P1": 3, "P5": 4})


@pytest.fixture
def shown(driven, planted, tmp_path):
    """A browser with the page of the planted scores."""
    compared = {"E − D": PAIR, "not trained": {"E": 1, "F": -1}, "neither": {"G": 1, "F": -1}}
    open_page(driven, recompute.recompute(planted[0], compared, planted[1]).data, tmp_path)
    return driven


def open_page(driven, html: str, folder: Path) -> None:
    page = folder / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf8"><title>t</title>{html}')
    driven.open(page.as_uri())


def call(driven, expression: str, **values):
    """Value of an expression of the script's statistics S, and of values given by name."""
    given = "".join(f"const {name} = {json.dumps(value)};" for name, value in values.items())
    code = f"(() => {{ const S = window.sparsityStatistics; {given} return {expression}; }})()"
    return driven.value(code)


def chosen(planted, categories) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of defined genes of some categories, and their gains."""
    scores = planted[0].dropna(subset=["pcc_8um"])
    scores = scores[scores["category"].isin(categories)]
    names = [gene for gene in GENES if gene in set(scores["gene"])]
    return scores, effects.gains(scores, PAIR)[names]


def test_html_is_well_formed_and_needs_nothing_from_elsewhere(planted):
    stands_alone(recompute.recompute(planted[0], {"E − D": PAIR}, planted[1]).data)


def test_distributions_and_ranks_are_those_of_scipy(shown):
    draw = np.random.default_rng(0)
    x, y = np.round(draw.normal(size=(2, 30)), 1)  # with ties
    assert call(shown, "S.ranks(x)", x=x.tolist()) == stats.rankdata(x).tolist()
    found = stats.spearmanr(x, y)
    own = call(shown, "[S.rho(x, y), S.rhoP(S.rho(x, y), 30)]", x=x.tolist(), y=y.tolist())
    assert own == pytest.approx([found.statistic, found.pvalue], rel=1e-9)
    grid = [(t, df) for t in (-30, -2.5, -0.1, 0, 1, 8.0) for df in (1, 2.7, 12, 4000)]
    below = call(shown, "grid.map(([t, df]) => S.tBelow(t, df))", grid=grid)
    assert below == pytest.approx([stats.t.cdf(t, df) for t, df in grid], rel=1e-8, abs=1e-300)
    ends = call(shown, "grid.map(([, df]) => S.tQuantile(0.975, df))", grid=grid)
    assert ends == pytest.approx([stats.t.ppf(0.975, df) for _, df in grid], rel=1e-8)
    values = np.sort(x)
    own = call(shown, "[0, 0.025, 0.4, 1].map(q => S.quantile(x, q))", x=values.tolist())
    assert own == pytest.approx(np.quantile(values, [0, 0.025, 0.4, 1]).tolist())
    ps = [0.01, 0.04, 0.03, 0.6, 0.01]
    holm = multipletests(ps, method="holm")[1]
    assert call(shown, "S.holm(ps)", ps=ps) == pytest.approx(holm.tolist())


@pytest.mark.parametrize("categories", [CATEGORIES, CATEGORIES[:2]])
def test_mean_gain_is_that_of_the_contrast(shown, planted, categories):
    scores, _ = chosen(planted, categories)
    places = [GENES.index(gene) for gene in scores["gene"].unique()]
    moments = {run: sums[:, places] for run, sums in planted[1].items()}
    expected = effects.contrast(scores, PAIR, moments=moments)
    found = shown.value(
        "(() => { const data = JSON.parse(document.querySelector('.rc-data').textContent);"
        "return window.sparsityRecompute.compute(data.facts, data.comparisons['E − D']['PCC 8 µm'],"
        f"{json.dumps(categories)}, 0.02, 0.1).gain; }})()"
    )
    own = [found["value"], found["se"], found["df"], *found["interval"]]
    expected_numbers = [expected.value, expected.se, expected.df, *expected.interval]
    assert own == pytest.approx(expected_numbers, rel=1e-4)
    verdict, p = claims._test(expected, 0.0, 0.02)
    assert found["p"] == pytest.approx(p, rel=1e-3)
    assert found["verdict"] == (verdict if p <= claims.LEVEL else "undetermined")


def test_draws_of_runs_and_genes_are_those_of_the_analysis(shown, planted, monkeypatch):
    _, gains = chosen(planted, CATEGORIES)
    sparsity = planted[0].groupby("gene")["sparsity"].first()[gains.columns].to_numpy()
    draw, picked = np.random.default_rng(5), []

    class Recorded:
        def choice(self, values, size):
            places = draw.integers(len(values), size=size)
            picked.extend(places.tolist())
            return np.asarray(values)[places]

    monkeypatch.setattr(effects.np.random, "default_rng", lambda seed: Recorded())
    expected = effects.crossed_draws(
        gains, lambda gain, genes: stats.spearmanr(sparsity[genes], gain).statistic, n_resamples=60
    )
    groups = [group.tolist() for group in gains.groupby("patient").indices.values()]
    given = {"x": sparsity.tolist(), "gains": gains.to_numpy().tolist(), "groups": groups}
    draws = "(() => { let i = 0; return S.rhoDraws(x, gains, groups, 60, () => picked[i++]); })()"
    asked = "[d.value, ...d.interval, d.pAbove(0), d.pBelow(0.1)]"
    code = f"(() => {{ const d = {draws}; return {asked}; }})()"
    own = call(shown, code, picked=picked, **given)
    numbers = [expected.value, *expected.interval, expected.p_above(0), expected.p_below(0.1)]
    assert own == pytest.approx(numbers, rel=1e-9)


def cells(driven, row: str) -> list[str]:
    return driven.value(f"[...document.querySelectorAll('.rc-{row} td')].map(c => c.textContent)")


def said(driven) -> str:
    return driven.value("document.querySelector('.rc-said').textContent")


def test_a_choice_changes_what_is_shown(shown, planted):
    options = "[...document.querySelector('.rc-comparison').options].map(o => o.value)"
    assert shown.value(options) == ["E − D"]
    before = cells(shown, "gain")
    assert "4 " not in said(shown)[:2] and "7 runs of each on 2 patients" in said(shown)
    box = "document.querySelector('.rc-categories input[value=immune]')"
    shown.value(f"{box}.click()")
    _, gains = chosen(planted, CATEGORIES[:2])
    value = gains.groupby("patient").mean().mean(axis=1).mean()
    assert float(cells(shown, "gain")[0].replace("−", "-")) == pytest.approx(value, abs=6e-4)
    assert cells(shown, "gain") != before
    shown.value(
        "(i => { i.value = 5; i.dispatchEvent(new Event('change', {bubbles: true})); })"
        "(document.querySelector('.rc-worth'))"
    )
    assert cells(shown, "gain")[3] == "not supported"
    for category in CATEGORIES[:2]:
        shown.value(f"document.querySelector('.rc-categories input[value={category}]').click()")
    assert (
        said(shown).startswith("Fewer than 4 genes are left") and cells(shown, "rho") == ["–"] * 4
    )


def drop(driven, text: str) -> None:
    """Let a file fall on the page, and wait until it was read."""
    driven.promised(
        "(async () => { const moved = new DataTransfer();"
        f"moved.items.add(new File([{json.dumps(text)}], 'own.csv'));"
        "const about = {dataTransfer: moved, bubbles: true, cancelable: true};"
        "document.querySelector('.recompute').dispatchEvent(new DragEvent('drop', about));"
        "await new Promise(done => setTimeout(done, 50)); })()"
    )


def test_a_readers_own_table_speaks_of_its_runs_alone(shown):
    draw = np.random.default_rng(3)
    table = pd.DataFrame({"gene": GENES, "sparsity": draw.random(12)})
    table = table.assign(score_1=draw.random(12), score_2=draw.random(12) + 0.5)
    drop(shown, table.to_csv(index=False))
    gain = table["score_2"] - table["score_1"]
    rho = stats.spearmanr(table["sparsity"], gain)
    expected = stats.ttest_1samp(gain, 0).confidence_interval()
    value, interval, _, verdict = (text.replace("−", "-") for text in cells(shown, "gain"))
    assert float(value) == pytest.approx(gain.mean(), abs=6e-4)
    assert [float(end) for end in interval.split(" to ")] == pytest.approx(expected, abs=6e-4)
    assert verdict == "supported, in these runs" and "they speak of these runs" in said(shown)
    assert float(cells(shown, "rho")[0].replace("−", "-")) == pytest.approx(rho.statistic, abs=6e-4)
    assert f"p = {float(f'{rho.pvalue:.2g}'):g} (Student" in said(shown)


def test_a_table_of_several_runs_has_their_variance(shown, planted):
    _, gains = chosen(planted, CATEGORIES)
    one = gains.loc["P5"].stack().rename("pcc_8um_poisson").reset_index()
    one = one.rename(columns={"seed": "run"}).assign(pcc_8um_mse=0, sparsity=0.5, category="own")
    one["sparsity"] = one["gene"].map(planted[0].groupby("gene")["sparsity"].first())
    drop(shown, one.to_csv(index=False, sep=";"))
    expected = effects.contrast(chosen(planted, CATEGORIES)[0], PAIR, patients=["P5"])
    interval = [float(end.replace("−", "-")) for end in cells(shown, "gain")[1].split(" to ")]
    assert interval == pytest.approx(expected.interval, abs=6e-4)
    assert "these runs" not in said(shown)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name,sparsity\na,0.5\n", "own.csv: The first line has no column “gene”."),
        ("gene,sparsity,score_1\na,0.5,1\n", "own.csv: The first line has no two scores"),
        ("gene,sparsity,score_1,score_2\na,0.5,x,1\n", "Line 2, column “score_1”: “x” is not a"),
        ("gene,sparsity,score_1,score_2\na,0.5,1,1\na,0.5,1,1\n", "Line 3: gene “a” stands there"),
        ("gene,sparsity,score_1,score_2\na,0.5,1,1\n", "Fewer than 4 genes are left"),
        ("", "The first line has no column “gene”."),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_in_words(shown, text, problem):
    drop(shown, text)
    assert problem in said(shown)


NOTEBOOK = "".join(f"# (claim-{key})=\n# ### {key}.\n#\n# *Rule.* Of {key}.\n\n" for key in "abcd")


def settled(folder: Path, times: float) -> claims.Ledger:
    """A ledger of evidence of each kind, judged with all bounds at a multiple."""
    (folder / "claims.py").write_text(NOTEBOOK)
    ledger = claims.Ledger("build", folder / "claims.py")
    draws = np.random.default_rng(2).normal(0.3, 0.1, 400)
    pair = claims.Least([effects.Effect(0.05, 0.01, 8.0, 5), effects.Effect(0.03, 0.008, 4.0, 5)])
    ledger.judge("a", "gain", effects.Effect(0.031, 0.01, 14.0, 5), below=0.02 * times)
    ledger.judge("b", "rho", effects.Draws(0.3, draws, 5), below=0.1 * times)
    ledger.judge("c", "smallest", pair, below=0.005 * times)
    ledger.judge("d", "surplus", effects.Effect(-0.04, 0.01, 7.5, 5), below=0.0)
    return ledger


@pytest.mark.parametrize("times", [0.5, 3, 8])
def test_a_ledger_at_another_bound_is_the_ledger_judged_with_it(driven, tmp_path, times):
    ledger = settled(tmp_path, times=1)
    ledger.settle()
    html = recompute.bounds(ledger).data
    stands_alone(html)
    open_page(driven, html, tmp_path)
    driven.value(
        f"(i => {{ i.value = {0.02 * times}; i.dispatchEvent(new Event('change')); }})"
        "(document.querySelector('.rc-bound'))"
    )
    expected = settled(tmp_path, times).settle()
    rows = driven.value(
        "[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert [row[4] for row in rows] == expected["verdict"].to_list()
    ps = [float(row[3].replace("−", "-")) for row in rows]
    assert ps == pytest.approx(expected["p"].to_list(), rel=0.05)
    supported = (expected["verdict"] == "supported").sum()
    assert f"Of 4 claims that are tested, {supported} are" in said(driven)
