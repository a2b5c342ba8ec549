"""Effects of arms on a score, with intervals that hold what runs, genes and patches bring.

A run is one draw: trained again with another seed, the same arm scores differently, and all its
genes move together. So a contrast of arms is taken run by run, and its variance has three parts:
between runs, between genes, between patches. `contrast` estimates each where it can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

#: Fewer pairs than this estimate no variance between runs of their own.
LEAST_PAIRS = 3


class Effect(NamedTuple):
    """An estimate with its standard error; without arguments, evidence that was not computed.

    Attributes
    ----------
    value, se, df
        Estimate, standard error and its degrees of freedom; NaN where there is none.
    n
        Runs behind it: of the arm that has fewest.
    runs, genes, patches
        Standard error of each part.
    """

    value: float = np.nan
    se: float = np.nan
    df: float = np.nan
    n: int = 0
    runs: float = np.nan
    genes: float = np.nan
    patches: float = np.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval, Student's t."""
        half = stats.t.ppf(0.975, self.df) * self.se
        return self.value - half, self.value + half

    def p_above(self, bound: float) -> float:
        """One-sided p of the hypothesis that the effect is ``bound`` or less."""
        return float(stats.t.sf((self.value - bound) / self.se, self.df))

    def p_below(self, bound: float) -> float:
        """One-sided p of the hypothesis that the effect is ``bound`` or more."""
        return float(stats.t.cdf((self.value - bound) / self.se, self.df))


class Draws(NamedTuple):
    """An estimate with draws of a bootstrap, as `Effect` where no variance is at hand."""

    value: float
    draws: np.ndarray
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval, percentiles."""
        low, high = np.quantile(self.draws, [0.025, 0.975])
        return float(low), float(high)

    def p_above(self, bound: float) -> float:
        """Share of draws at ``bound`` or below it."""
        return float((1 + (self.draws <= bound).sum()) / (1 + len(self.draws)))

    def p_below(self, bound: float) -> float:
        """Share of draws at ``bound`` or above it."""
        return float((1 + (self.draws >= bound).sum()) / (1 + len(self.draws)))


class Share(NamedTuple):
    """How many of n have something, such as genes that gain; exact binomial.

    Examples
    --------
    >>> Share(48, 50).interval[0] > 0.5
    True
    """

    k: int
    n: int

    @property
    def value(self) -> float:
        """The share."""
        return self.k / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval (Clopper and Pearson 1934)."""
        low, high = stats.binomtest(self.k, self.n).proportion_ci(method="exact")
        return float(low), float(high)

    def p_above(self, bound: float) -> float:
        """One-sided p of the hypothesis that the share is ``bound`` or less."""
        return float(stats.binomtest(self.k, self.n, bound, "greater").pvalue)

    def p_below(self, bound: float) -> float:
        """One-sided p of the hypothesis that the share is ``bound`` or more."""
        return float(stats.binomtest(self.k, self.n, bound, "less").pvalue)


def combined(value: float, parts: Sequence[tuple[float, float]], n: int) -> Effect:
    """Effect whose variance is a sum of independent estimates (Satterthwaite 1946).

    Parameters
    ----------
    value
        The estimate.
    parts
        Variance and degrees of freedom of runs, genes and patches. A variance of NaN cannot be
        seen, and makes the interval unknown; one of 0 with 0 degrees of freedom is left out.
    n
        Runs behind it.
    """
    used = [(variance, df) for variance, df in parts if df > 0 or np.isnan(variance)]
    total = sum(variance for variance, _ in used)
    weights = sum(variance**2 / df for variance, df in used if df > 0)
    df = total**2 / weights if weights > 0 else np.nan
    errors = [np.sqrt(variance) if df > 0 else np.nan for variance, df in parts]
    return Effect(float(value), float(np.sqrt(total)), float(df), n, *errors)


def run_variance(scores: pd.DataFrame, score: str) -> pd.DataFrame:
    """Variance of a run's mean score between seeds of one arm and patient, pooled per decoder.

    Parameters
    ----------
    scores
        From `runs.long_table`.
    score
        Column.

    Returns
    -------
    DataFrame
        Columns ``variance`` and ``df`` by decoder, with a row ``all``. Only arms with several
        seeds on a patient have a part in it; without any, the variance is NaN.
    """
    means = scores.groupby(["decoder", "arm", "patient", "seed"])[score].mean().dropna()
    by_arm = means.groupby(["decoder", "arm", "patient"]).agg(["var", "size"])
    by_arm["df"] = by_arm["size"] - 1
    by_arm["squares"] = by_arm["var"].fillna(0) * by_arm["df"]
    pooled = by_arm.groupby("decoder")[["squares", "df"]].sum()
    pooled.loc["all"] = pooled.sum()
    variance = pooled["squares"] / pooled["df"].where(pooled["df"] > 0)
    return pd.DataFrame({"variance": variance, "df": pooled["df"]})


def contrast(
    scores: pd.DataFrame,
    weights: Mapping[str, float],
    score: str = "pcc_8um",
    patients: Sequence[str] = (),
    moments: Mapping[str, np.ndarray] | None = None,
) -> Effect:
    """Weighted sum of arms' mean scores, such as the gain of one over another.

    Parameters
    ----------
    scores
        From `runs.long_table`: one row per run and gene. Scores of runs that failed are NaN.
    weights
        Arm -> weight, such as ``{"E": 1, "D": -1}``.
    score
        Column of the score.
    patients
        Test patients, each with equal weight; those that all arms have, where none is named.
    moments
        Run -> sums of its patches at 8 µm (`runs.Result.patches`), for the part of the patches in a
        contrast of ``pcc_8um``; left out where not given.

    Returns
    -------
    Effect
        The mean over patients, runs and genes. Where all arms share seeds enough (`between_runs`),
        the part of the runs is the variance of the contrast over seeds, within patients; else each
        arm has the variance of `run_variance` for its decoder, over its number of runs. NaN where
        an arm has no run that counts.
    """
    rows = scores[scores["arm"].isin(list(weights))].dropna(subset=[score])
    common = set.intersection(*(set(rows.loc[rows["arm"] == arm, "patient"]) for arm in weights))
    wanted = [p for p in (patients or sorted(common)) if p in common]
    if not wanted:
        return Effect()
    rows = rows[rows["patient"].isin(wanted)]
    runs = rows.groupby(["patient", "arm", "seed"])[score].mean()
    paired = runs.unstack("arm").dropna()
    coefficients = pd.Series(weights)
    per_run = paired[coefficients.index] @ coefficients
    variance, df = between_runs(per_run)
    if df > 0 and set(per_run.index.unique("patient")) == set(wanted):
        rows = rows.set_index(["patient", "seed"]).loc[per_run.index].reset_index()
    else:
        variance, df = _unpaired(scores, runs, coefficients, score)
    of_genes = rows.groupby(["gene", "patient", "arm"])[score].mean().unstack("arm")
    gains = (of_genes[coefficients.index] @ coefficients).dropna()
    value = gains.groupby("patient").mean().mean()
    gains = gains.groupby("gene").mean()
    between_genes = (gains.var() / len(gains), len(gains) - 1)
    between_patches = (0.0, 0.0)
    if moments is not None and score == "pcc_8um":
        between_patches = _jackknife(rows, coefficients, wanted, moments)
    n = int(runs.groupby(["patient", "arm"]).size().min())
    return combined(value, ((variance, df), between_genes, between_patches), n)


def between_runs(per_run: pd.Series) -> tuple[float, float]:
    """Variance that runs bring to a mean over patients, and its degrees of freedom.

    Parameters
    ----------
    per_run
        A number per run, by ``patient`` and ``seed``.

    Returns
    -------
    Variance within patients, pooled, over the number of their seeds; NaN and 0 where it would have
    fewer degrees of freedom than `LEAST_PAIRS` seeds of one patient give.
    """
    sizes = per_run.groupby("patient").size()
    df = int((sizes - 1).sum())
    if df < LEAST_PAIRS - 1:
        return np.nan, 0
    squares = (per_run - per_run.groupby("patient").transform("mean")).pow(2).sum()
    return squares / df * (1 / sizes).sum() / len(sizes) ** 2, df


def _unpaired(
    scores: pd.DataFrame, runs: pd.Series, coefficients: pd.Series, score: str
) -> tuple[float, float]:
    """Variance of a contrast from the pooled variance of a run, and its degrees of freedom."""
    pooled = run_variance(scores, score)
    decoder = scores.groupby("arm")["decoder"].first()
    patients = runs.index.get_level_values("patient").nunique()
    total, used = 0.0, set()
    for (_, arm), number in runs.groupby(["patient", "arm"]).size().items():
        kind = decoder[arm] if pooled["df"].get(decoder[arm], 0) > 0 else "all"
        used.add(kind)
        total += coefficients[arm] ** 2 * pooled.loc[kind, "variance"] / number
    return total / patients**2, min(pooled.loc[kind, "df"] for kind in used)


def _jackknife(
    rows: pd.DataFrame,
    coefficients: pd.Series,
    patients: Sequence[str],
    moments: Mapping[str, np.ndarray],
) -> tuple[float, float]:
    """Variance of a contrast between patches: each left out in turn, in all runs alike."""
    total, least = 0.0, np.inf
    for patient in patients:
        own = rows[rows["patient"] == patient]
        parts = []
        for arm, weight in coefficients.items():
            names = own.loc[own["arm"] == arm, "run"].unique()
            pcc = [np.nanmean(pcc_without_each(moments[name]), axis=1) for name in names]
            parts.append(weight * np.mean(pcc, axis=0))
        left_out = np.sum(parts, axis=0)
        n = len(left_out)
        total += (n - 1) ** 2 / n * np.var(left_out, ddof=1) / len(patients) ** 2
        least = min(least, n - 1)
    return total, least


def pcc_without_each(moments: np.ndarray) -> np.ndarray:
    """PCC of each gene with each patch left out in turn.

    Parameters
    ----------
    moments
        [N, G, 6], the fields of `metrics.Moments` per patch and gene.

    Returns
    -------
    float64 [N, G]; NaN where a side is constant.
    """
    n, x, y, xx, yy, xy = np.moveaxis(np.asarray(moments, dtype=float), -1, 0)
    raw = np.stack([n, n * x, n * y, xx + n * x * x, yy + n * y * y, xy + n * x * y])
    n, x, y, xx, yy, xy = raw.sum(1, keepdims=True) - raw
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((n * xx - x * x).clip(min=0)) * np.sqrt((n * yy - y * y).clip(min=0))
        return (n * xy - x * y) / np.where(spread > 0, spread, np.nan)


def gains(
    scores: pd.DataFrame, weights: Mapping[str, float], score: str = "pcc_8um"
) -> pd.DataFrame:
    """Weighted sum of arms, gene by gene, in every patient and seed that all of them have.

    Returns
    -------
    DataFrame, index ``patient`` and ``seed``, a column per gene; runs that failed are left out.
    """
    wide = scores[scores["arm"].isin(list(weights))].pivot(
        index=["patient", "seed", "gene"], columns="arm", values=score
    )
    coefficients = pd.Series(weights)
    of_gene = wide.reindex(columns=coefficients.index) @ coefficients
    return of_gene.unstack("gene").dropna(how="all")


def crossed_draws(gains: pd.DataFrame, statistic: Callable, n_resamples: int = 2000) -> Draws:
    """Bootstrap of a statistic over genes of the mean gain, runs and genes both drawn anew.

    Conservative for a mean (Owen 2007, doi:10.1214/07-AOAS122): what one gene does in one run
    counts in both directions. The few runs would spread too little when drawn: their deviations are
    stretched to the width of a t interval (Hesterberg 2015, doi:10.1080/00031305.2015.1089789).

    Parameters
    ----------
    gains
        From `gains`, runs of one patient or more: drawn within each.
    statistic
        Called with the mean gain of each drawn gene, and the genes' positions; gives a number.
    """
    draw = np.random.default_rng(0)
    values = gains.to_numpy()
    groups = list(gains.groupby("patient").indices.values())
    everything, mean = np.arange(values.shape[1]), values.mean(0)
    value = statistic(mean, everything)
    df = len(values) - len(groups)
    if df < LEAST_PAIRS - 1:
        return Draws(value, np.full(1, np.nan), len(values))
    stretch = np.sqrt(1 + len(groups) / df) * stats.t.ppf(0.975, df) / stats.norm.ppf(0.975)
    found = np.empty(n_resamples)
    for i in range(n_resamples):
        runs = np.concatenate([draw.choice(group, len(group)) for group in groups])
        genes = draw.choice(everything, len(everything))
        drawn = mean + stretch * (values[runs].mean(0) - mean)
        found[i] = statistic(drawn[genes], genes)
    return Draws(value, found, len(values))
