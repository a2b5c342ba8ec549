"""Intervals of effects: their parts against textbook formulas, their coverage by simulation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sparsity_trap.analysis import effects
from sparsity_trap.metrics import Moments

GENES = 24


def simulated(
    draw, arms, *, patients=("P5",), gain=0.03, run=0.02, gene=0.06, both=0.05, genes=GENES
) -> pd.DataFrame:
    """Scores with a gain per gene of every arm but the first, and noise of runs and genes in runs.

    ``arms`` are numbers of seeds by arm.
    """
    rows = skeleton(tuple(arms.items()), patients, genes)
    other = (rows["arm"].to_numpy() != next(iter(arms))).reshape(-1, genes)
    score = draw.normal(0.4, 0.1, genes) + draw.normal(gain, gene, genes) * other
    score = score + draw.normal(0, run / 2**0.5, (len(other), 1))
    score += draw.normal(0, both / 2**0.5, score.shape)
    return rows.assign(pcc_8um=score.ravel())


@cache
def skeleton(arms: tuple[tuple[str, int], ...], patients: tuple[str, ...], genes: int):
    """A row per run and gene, without scores."""
    runs = [(arm, p, seed) for arm, seeds in arms for p in patients for seed in range(seeds)]
    table = pd.DataFrame(runs, columns=["arm", "patient", "seed"]).assign(decoder="hist2st")
    table["run"] = table["arm"] + "-" + table["patient"] + "-s" + table["seed"].astype(str)
    return table.merge(pd.DataFrame({"gene": [f"g{g}" for g in range(genes)]}), how="cross")


PAIR = {"E": 1, "D": -1}


def coverage(arms, weights=PAIR, repeats=140, truth=0.03, lost=(), **options) -> float:
    """Share of intervals that hold the truth; ``lost`` are patients without their last run."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(repeats):
        scores = simulated(draw, arms, **options)
        last = scores["seed"] == scores["seed"].max()
        scores = scores[~(scores["patient"].isin(lost) & last)]
        low, high = effects.contrast(scores, weights).interval
        hits += low <= truth <= high
    return hits / repeats


@pytest.mark.parametrize(
    ("arms", "options"),
    [
        ({"D": 3, "E": 3}, {}),
        ({"D": 5, "E": 5}, {}),
        ({"D": 5, "E": 5}, {"run": 0.05}),
        ({"D": 3, "E": 3}, {"patients": ("P1", "P2", "P5")}),
        ({"D": 3, "E": 3}, {"patients": ("P1", "P5"), "lost": ("P1",)}),  # a run that collapsed
        ({"D": 5, "E": 5}, {"genes": 4}),
        # On real tiles, which take the place of genes.
        ({"D": 5, "E": 5}, {"genes": 73, "run": 0.004, "gene": 0.1}),
        ({"D": 3, "E": 3}, {"genes": 73, "run": 0.02, "gene": 0.1}),
        # In another world, beside the same arms at home.
        ({"D": 2, "E": 2, "C": 5, "F": 5}, {}),
        # Arms that a preset runs once, beside some that it repeats.
        ({"D": 1, "E": 1, "C": 5, "F": 5}, {}),
        ({"D": 5, "E": 1}, {}),
    ],
)  # fmt: skip
def test_intervals_cover(arms, options):
    """At the numbers of runs and genes in use, with effects that a run's genes share."""
    assert 0.9 <= coverage(arms, **options) <= 0.995


def test_an_interval_over_genes_alone_does_not_cover():
    """What the simulation is about: it can fail."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        gain = effects.gains(simulated(draw, {"D": 1, "E": 1}), PAIR).iloc[0]
        low, high = stats.ttest_1samp(gain, 0).confidence_interval()
        hits += low <= 0.03 <= high
    assert hits / 200 < 0.9


def test_one_gene_with_seeds_is_the_paired_t_test():
    scores = simulated(np.random.default_rng(0), {"D": 5, "E": 5}, genes=2)
    scores = scores.assign(pcc_8um=scores.groupby("run")["pcc_8um"].transform("mean"))
    by_arm = scores.drop_duplicates("run").pivot(index="seed", columns="arm", values="pcc_8um")
    reference = stats.ttest_rel(by_arm["E"], by_arm["D"])
    found = effects.contrast(scores, PAIR)
    assert found.value == pytest.approx((by_arm["E"] - by_arm["D"]).mean())
    assert found.interval == pytest.approx(tuple(reference.confidence_interval()))
    assert 2 * found.p_above(0) == pytest.approx(reference.pvalue)
    assert found.p_above(0) + found.p_below(0) == pytest.approx(1)
    assert found.n == 5 and found.genes == 0


def test_runs_alike_leave_the_t_test_over_genes():
    scores = simulated(np.random.default_rng(0), {"D": 4, "E": 4}, run=0, both=0)
    gain = effects.gains(scores, PAIR).mean()
    found = effects.contrast(scores, PAIR)
    assert found.interval == pytest.approx(tuple(stats.ttest_1samp(gain, 0).confidence_interval()))


def test_pooled_variance_is_that_of_an_analysis_of_variance():
    import statsmodels.formula.api as smf

    scores = simulated(np.random.default_rng(0), {"D": 4, "E": 3, "F": 1}, patients=("P1", "P5"))
    means = scores.groupby(["arm", "patient", "seed"])["pcc_8um"].mean().reset_index()
    fit = smf.ols("pcc_8um ~ C(arm) * C(patient)", means).fit()
    found = effects.run_variance(scores, "pcc_8um")
    assert found.loc["hist2st", "variance"] == pytest.approx(fit.mse_resid)
    assert found.loc["hist2st", "df"] == found.loc["all", "df"] == fit.df_resid


def test_patients_count_alike_and_shared_ones_alone():
    scores = simulated(np.random.default_rng(0), {"D": 4, "E": 4}, patients=("P1", "P5"))
    scores = scores[~((scores["patient"] == "P1") & (scores["seed"] == 3))]
    alone = simulated(np.random.default_rng(1), {"D": 9}, patients=("P2",), gain=9)
    per_run = effects.gains(scores, PAIR).mean(axis=1)
    found = effects.contrast(pd.concat([scores, alone]), PAIR)
    assert found.value == pytest.approx(per_run.groupby("patient").mean().mean())
    assert np.isnan(effects.contrast(scores, PAIR, patients=["P2"]).value)
    only = effects.contrast(scores, PAIR, patients=["P5"])
    assert only.value == pytest.approx(per_run["P5"].mean())


def test_without_a_repeated_run_there_is_a_value_and_no_interval():
    found = effects.contrast(simulated(np.random.default_rng(0), {"D": 1, "E": 1}), PAIR)
    assert np.isfinite(found.value) and np.isnan(found.interval).all()
    assert np.isnan(effects.Effect().interval).all()
    assert np.isnan(effects.Effect().p_above(0))


def test_failed_runs_are_left_out_in_pairs():
    scores = simulated(np.random.default_rng(0), {"D": 4, "E": 4})
    dead = (scores["arm"] == "D") & (scores["seed"] == 2)
    scores.loc[dead, "pcc_8um"] = np.nan
    found = effects.contrast(scores, PAIR)
    assert found.n == 3
    assert found.value == pytest.approx(effects.contrast(scores[scores["seed"] != 2], PAIR).value)
    scores.loc[scores["arm"] == "D", "pcc_8um"] = np.nan
    assert np.isnan(effects.contrast(scores, PAIR).value)


def test_patches_left_out_one_by_one():
    draw = np.random.default_rng(0)
    rate = draw.gamma(1, size=(5, 3, 16, 16))
    counts, mask = draw.poisson(rate), draw.random((5, 16, 16)) < 0.8
    moments = [Moments.of(*maps) for maps in zip(counts, rate, mask, strict=True)]
    fields = ("n", "mean_x", "mean_y", "xx", "yy", "xy")
    sums = np.stack([np.stack([getattr(m, f) for f in fields], -1) for m in moments])
    found = effects.pcc_without_each(sums)
    for left in range(5):
        keep = np.arange(5) != left
        for gene in range(3):
            pair = (maps[keep, gene][mask[keep]] for maps in (counts, rate))
            assert found[left, gene] == pytest.approx(stats.pearsonr(*pair).statistic)


def test_patches_add_their_part():
    draw = np.random.default_rng(0)
    scores = simulated(draw, {"D": 3, "E": 3})
    moments = {run: np.abs(draw.normal(1, 0.1, (6, GENES, 6))) + 1 for run in scores["run"]}
    with_patches = effects.contrast(scores, PAIR, moments=moments)
    without = effects.contrast(scores, PAIR)
    assert with_patches.se**2 == pytest.approx(without.se**2 + with_patches.patches**2)
    assert with_patches.value == without.value


def spearman(x):
    ranks = stats.rankdata(x)
    return lambda gain, genes: np.corrcoef(ranks[genes], stats.rankdata(gain))[0, 1]


def test_draws_of_a_mean_are_no_narrower_than_its_t_interval():
    scores = simulated(np.random.default_rng(0), {"D": 6, "E": 6})
    draws = effects.crossed_draws(effects.gains(scores, PAIR), lambda gain, _: gain.mean())
    assert draws.value == pytest.approx(effects.contrast(scores, PAIR).value)
    assert np.std(draws.draws) > 0.9 * effects.contrast(scores, PAIR).se
    assert draws.interval[0] < draws.value < draws.interval[1]


def test_intervals_of_a_rank_correlation_cover():
    """Of the correlation that the mean over this many runs has, not of that without noise."""
    x = np.linspace(0, 1, GENES)
    draw = np.random.default_rng(2)

    def table(repeats=5):
        slope = draw.normal(0, 0.04, repeats)  # a run leans its genes one way
        gain = draw.normal(0, 0.05, GENES) + 0.03 * x
        noise = draw.normal(0, 0.05, (repeats, GENES)) + slope[:, None] * (x - 0.5)
        index = pd.MultiIndex.from_product([["P5"], range(repeats)], names=["patient", "seed"])
        return pd.DataFrame(gain + noise, index)

    truth = np.mean([spearman(x)(table().to_numpy().mean(0), np.arange(GENES)) for _ in range(300)])
    hits = 0
    for _ in range(60):
        low, high = effects.crossed_draws(table(), spearman(x), n_resamples=200).interval
        hits += low <= truth <= high
    assert hits / 60 >= 0.9


def test_runs_once_leave_no_draws():
    gains = effects.gains(simulated(np.random.default_rng(0), {"D": 1, "E": 1}), PAIR)
    draws = effects.crossed_draws(gains, lambda gain, _: gain.mean())
    assert np.isfinite(draws.value) and np.isnan(draws.interval).all()
