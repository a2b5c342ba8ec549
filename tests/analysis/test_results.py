"""The page of results on runs whose effects are known: its estimator, its pairs, its collapses."""

from __future__ import annotations

import types

import numpy as np
import pandas as pd
import pytest
from cells import drawn, run_cells
from scipy import stats
from test_effects import GENES, simulated

from sparsity_trap import runs
from sparsity_trap.analysis.effects import contrast

#: Cells with maps, figures, or tables of whole runs.
LEFT_OUT = (
    "mean_table(scores", "runs.contrast(", "nlargest", "interactive.", "run_table(",
    "alive", "described", "published.ARMS", "curves.",
)  # fmt: skip


@pytest.fixture
def page(monkeypatch):
    """Run notebook 03 on a table of scores; what it defines, with its numbers as ``quoted``."""

    def run(scores: pd.DataFrame) -> dict:
        quoted: dict = {}

        def quotes(*_):
            return lambda prefix, **values: quoted.update(
                {f"{prefix}.{key}": value for key, value in values.items()}
            )

        draw = np.random.default_rng(5)
        results = [
            types.SimpleNamespace(
                run=types.SimpleNamespace(name=name), patches=1 + draw.uniform(size=(6, GENES, 6))
            )
            for name in scores["run"].unique()
        ]
        settings = types.SimpleNamespace(main_patient="P5", patients=["P1", "P5"])
        for name, value in {
            "open_preset": lambda *_: settings,
            "Quotes": quotes,
            "load_all": lambda _: results,
            "long_table": lambda *_: scores,
        }.items():
            monkeypatch.setattr(runs, name, value)
        chosen = {"preset": "", "source": "", "cohort": ""}
        found = run_cells(
            "03_results",
            chosen,
            lambda source: not (drawn(source) or any(part in source for part in LEFT_OUT)),
        )
        return found | {"quoted": quoted}

    return run


def scores_of(arms: dict[str, int], **options) -> pd.DataFrame:
    """Runs of arms with the settings that the page reads."""
    scores = simulated(np.random.default_rng(3), arms, patients=("P1", "P5"), **options)
    squared = scores["arm"].str.startswith("D")
    return scores.assign(
        collapsed=False, keep=1.0, lr_times=1.0, epochs_times=1.0,
        loss=np.where(squared, "mse", "poisson"),
        link=np.where(scores["arm"] == "D", "softplus", "exp"),
        bias_value=pd.Series(np.where(scores["arm"] == "D", 0.0, -3.0)).astype(object),
    )  # fmt: skip


def collapse(scores: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The same with some runs failed."""
    failed = scores["run"].isin(names)
    return scores.assign(collapsed=failed, pcc_8um=scores["pcc_8um"].mask(failed))


def test_the_estimator_written_out_is_the_function(page):
    found = page(scores_of({"D": 5, "E": 5, "D-matched": 5}, gain=0.1))
    assert found["n"] == 5 and found["k"] == GENES
    assert found["by_hand"] == pytest.approx(found["by_function"])
    wide = (
        found["scores"]
        .query("patient == 'P5'")
        .pivot(index=["seed", "gene"], columns="arm", values="pcc_8um")
    )
    gain = (wide["E"] - wide["D"]).groupby("seed").mean()
    quoted = found["quoted"]
    assert quoted["delta.pcc_8um"] == pytest.approx(gain.mean())
    assert quoted["delta.least_run"] == pytest.approx(gain.min())
    assert quoted["delta.largest_run"] == pytest.approx(gain.max())
    # Wider than runs and genes alone, as patches add to it.
    genes = (wide["E"] - wide["D"]).groupby("gene").mean()
    least = gain.var() / 5 + genes.var() / GENES
    half = (quoted["delta.ci_high"] - quoted["delta.ci_low"]) / 2
    assert half > stats.norm.ppf(0.975) * np.sqrt(least)


def test_pairs_are_those_that_were_trained(page):
    found = page(scores_of({"D": 3, "E": 3, "D-matched": 3}))
    assert list(found["by_run"]) == ["E − D", "E − D-matched"]
    table = found["pairs_table"].set_index(["pair", "patients"])
    assert list(table.loc["E − D"].index) == ["P5", "P1, P5"]
    over_all = contrast(found["scores"], {"E": 1, "D": -1}, moments=found["patches"])
    row = table.loc[("E − D", "P1, P5")]
    assert row["gain"] == pytest.approx(over_all.value) and row["runs"] == 6
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(over_all.interval)
    assert found["quoted"]["delta.over_patients"] == row["gain"]
    assert "delta.linear.pcc_8um" not in found["quoted"]


def test_collapsed_runs_are_marked_and_counted(page):
    scores = collapse(scores_of({"D": 4, "E": 4}), "D-P5-s1", "D-P1-s0", "D-P1-s2")
    found = page(scores)
    column = found["shown"]["E − D"]
    marked = column.index[column == "collapsed"]
    assert set(marked) == {("P5", 1), ("P1", 0), ("P1", 2)}
    quoted = found["quoted"]
    assert quoted["delta.n_runs"] == 3 and np.isfinite(quoted["delta.ci_low"])
    assert (quoted["collapse.runs"], quoted["collapse.collapsed"]) == (16, 3)
    assert (quoted["collapse.D.runs"], quoted["collapse.D.collapsed"]) == (8, 3)
    assert quoted["collapse.poisson.collapsed"] == 0
    # Clopper and Pearson: quantiles of the beta distribution.
    assert quoted["collapse.D.ci_low"] == pytest.approx(stats.beta.ppf(0.025, 3, 6))
    assert quoted["collapse.D.ci_high"] == pytest.approx(stats.beta.ppf(0.975, 4, 5))
    starts = found["starts"]
    assert starts.loc[("mse", "softplus, 0"), "rate"] == 3 / 8
    assert starts.loc[("poisson", "exp, −3"), "collapsed"] == 0


def test_dials_and_other_budgets_have_no_part_in_the_rate(page):
    scores = collapse(scores_of({"D": 3, "E": 3, "D-lr4": 2}), "D-lr4-P5-s0")
    scores["lr_times"] = np.where(scores["arm"] == "D-lr4", 4.0, 1.0)
    assert page(scores)["quoted"]["collapse.runs"] == 12


def test_runs_once_leave_values_and_no_interval(page):
    quoted = page(scores_of({"D": 1, "E": 1}))["quoted"]
    assert np.isfinite(quoted["delta.pcc_8um"]) and np.isnan(quoted["delta.ci_low"])
