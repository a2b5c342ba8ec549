"""Effects of what was set on purpose: the factors loss, link and head bias, and the sparsity dial.

Runs that differ in a factor share genes and test patients, so each gene of each patient is a block
and every effect is a mean of differences within blocks. Intervals are over genes: with three
patients nothing can be said about patients at large, whose effects are therefore listed one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, permutations, product
from math import prod
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from sparsity_trap.analysis.association import LEAST_GENES, mean_interval
from sparsity_trap.settings import UserError

FACTORS = ("loss", "link", "bias")

#: Level of each factor against which its others are compared.
REFERENCE = {"loss": "mse", "link": "softplus", "bias": "published"}

#: The two ends of the published contrast, arms D and E.
D_CELL = {"loss": "mse", "link": "softplus", "bias": "published"}
E_CELL = {"loss": "poisson", "link": "exp", "bias": "published"}


# --- factorial ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FactorialEffects:
    """Main effects and interactions of the factorial.

    Attributes
    ----------
    effects
        One row per term: ``term`` (such as ``loss=poisson`` or ``loss=poisson x link=exp``),
        ``order`` (1 for main effects, 2 and 3 for interactions), ``effect``, ``ci_low``,
        ``ci_high`` (95 %), ``p_value``.
    by_patient
        ``term``, ``patient``, ``effect``.
    n_genes, n_patients, n_dropped
        Genes and patients in complete blocks, and blocks left out because a cell had no score.
    note
        What the intervals do not cover.
    """

    effects: pd.DataFrame
    by_patient: pd.DataFrame
    n_genes: int
    n_patients: int
    n_dropped: int
    note: str


def factorial_effects(
    table: pd.DataFrame, reference: Mapping[str, object] = REFERENCE
) -> FactorialEffects:
    """Main effects and interactions of loss, link and head bias on a per-gene score.

    A main effect is a difference of marginal means: the level's mean over all cells of the other
    factors, minus that of the reference level. An interaction is a difference of such differences
    (not halved). Each is a mean over blocks (gene and patient, seeds averaged) of the same contrast
    of cells, with a t interval from the cluster-robust variance, clusters being genes (statsmodels
    OLS), so that a gene's patients do not count as independent.

    Parameters
    ----------
    table
        One row per run and gene: ``run``, ``gene``, ``patient``, ``seed``, ``loss``, ``link``,
        ``bias`` (``published`` or ``gene-mean``; numbers count as levels of their own) and
        ``score``. Every combination of the levels found must have been run.
    reference
        Level of each factor that its others are compared with; a factor whose reference was not
        run is compared with its first level.

    Raises
    ------
    UserError
        A column is missing, a cell of the factorial was not run or was run on other seeds, nothing
        varies, or fewer than 4 genes have a score in every cell.
    """
    cells = _cells(table)
    levels = {f: list(dict.fromkeys(cells.columns.get_level_values(f))) for f in FACTORS}
    for factor, names in levels.items():
        names.sort(key=lambda name: name != _level(reference[factor]))  # reference first
    for cell in product(*levels.values()):
        if cell not in cells:
            raise UserError(
                f"factorial: no run has {_cell_name(cell)}: train that arm, or leave out the level "
                "that lacks it"
            )
    blocks, n_dropped = _complete(cells)
    genes = blocks.index.get_level_values("gene")
    patients = blocks.index.get_level_values("patient")
    varied = [f for f in FACTORS if len(levels[f]) > 1]
    if not varied:
        raise UserError("factorial: all runs share loss, link and bias: add arms that differ")
    effects, by_patient = [], []
    for order in range(1, len(varied) + 1):
        for factors in combinations(varied, order):
            for chosen in product(*(levels[f][1:] for f in factors)):
                term = " x ".join(f"{f}={v}" for f, v in zip(factors, chosen, strict=True))
                contrast = _contrast(blocks, levels, dict(zip(factors, chosen, strict=True)))
                effects.append({"term": term, "order": order} | _clustered_mean(contrast, genes))
                for patient, part in contrast.groupby(patients, sort=False):
                    by_patient.append((term, patient, part.mean()))
    n_patients = patients.nunique()
    note = "Intervals are over genes; "
    note += (
        "one patient was tested, so they say nothing about others."
        if n_patients == 1
        else f"{n_patients} patients were tested, too few to speak for others."
    )
    return FactorialEffects(
        effects=pd.DataFrame(effects),
        by_patient=pd.DataFrame(by_patient, columns=["term", "patient", "effect"]),
        n_genes=genes.nunique(),
        n_patients=n_patients,
        n_dropped=n_dropped,
        note=note,
    )


def share_of_gap(
    table: pd.DataFrame,
    start: Mapping[str, object] = D_CELL,
    end: Mapping[str, object] = E_CELL,
    n_boot: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of the gap between two cells each factor explains.

    Factors are changed one at a time from ``start`` to ``end``; a factor's contribution is the
    change of the mean score when it is its turn, averaged over all orders (Shapley value; six
    orders of three factors, exact). Contributions add up to the gap.

    The published bias goes with the link (0 with softplus, -3 with exp), so between D and E with
    ``bias`` "published" the link's share holds that of the bias. Give runs whose bias is a number
    and ``start`` and ``end`` with 0 and -3 to tell them apart; that takes all eight cells.

    Parameters
    ----------
    table
        As for ``factorial_effects``; only the cells between ``start`` and ``end`` are used.
    start, end
        Level of every factor at either end.
    n_boot, seed
        Bootstrap draws over genes; a drawn gene brings all its patients.

    Returns
    -------
    DataFrame
        One row per factor that changes, then ``gap``: ``factor``, ``contribution``,
        ``contribution_low``, ``contribution_high``, ``share``, ``ci_low``, ``ci_high`` (of the
        share, 95 %) and ``n_genes``. Shares are NaN where the interval of the gap includes 0:
        there is no gap to share.

    Raises
    ------
    UserError
        A column is missing, a cell on the way was not run, the ends are the same cell, or fewer
        than 4 genes have a score in every cell.
    """
    first, last = (tuple(_level(cell[f]) for f in FACTORS) for cell in (start, end))
    changed = [i for i in range(len(FACTORS)) if first[i] != last[i]]
    if not changed:
        raise UserError(f"share of gap: start and end are the same cell ({_cell_name(first)})")
    cells = _cells(table)
    between = list(product(*({a: None, b: None} for a, b in zip(first, last, strict=True))))
    for cell in between:
        if cell not in cells:
            raise UserError(f"share of gap: no run has {_cell_name(cell)}: train that arm")
    blocks, _ = _complete(cells[between])
    contributions = pd.DataFrame(0.0, index=blocks.index, columns=[FACTORS[i] for i in changed])
    orders = list(permutations(changed))
    for order in orders:
        cell = first
        for i in order:
            after = (*cell[:i], last[i], *cell[i + 1 :])
            contributions[FACTORS[i]] += (blocks[after] - blocks[cell]) / len(orders)
            cell = after
    contributions["gap"] = contributions.sum(axis=1)
    # Sums and block counts per gene: a resample of genes is then a matrix product.
    per_gene = contributions.groupby("gene", sort=False)
    sums, sizes = per_gene.sum().to_numpy(), per_gene.size().to_numpy()
    draws = _draw_genes(len(sizes), n_boot, seed)
    drawn = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1, keepdims=True)
    mean = contributions.mean()
    gap_low, gap_high = _interval(drawn[:, -1])
    there_is_a_gap = gap_low > 0 or gap_high < 0
    rows = []
    for j, name in enumerate(contributions):
        low, high = _interval(drawn[:, j])
        share = (np.nan,) * 3
        if there_is_a_gap:
            share = (mean[name] / mean["gap"], *_interval(drawn[:, j] / drawn[:, -1]))
        rows.append((name, mean[name], low, high, *share, len(sizes)))
    columns = ["factor", "contribution", "contribution_low", "contribution_high"]
    return pd.DataFrame(rows, columns=[*columns, "share", "ci_low", "ci_high", "n_genes"])


def _draw_genes(n: int, n_boot: int, seed: int) -> np.ndarray:
    """Indices of ``n_boot`` samples of ``n`` genes with replacement, [n_boot, n]."""
    return np.random.default_rng(seed).integers(n, size=(n_boot, n))


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval; draws in which the statistic is undefined are left out."""
    draws = draws[np.isfinite(draws)]
    if draws.size == 0:
        return np.nan, np.nan
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """Scores with a row per block (gene, patient) and a column per cell, averaged over seeds."""
    columns = ("run", "gene", "patient", "seed", *FACTORS, "score")
    _check_columns(table, columns, "factorial")
    table = table.assign(**{f: table[f].map(_level) for f in FACTORS})
    seeds = table.groupby([*FACTORS, "patient"])["seed"].agg(lambda s: tuple(sorted(set(s))))
    for patient, used in seeds.groupby("patient"):
        if used.nunique() > 1:
            raise UserError(
                f"factorial: cells were run with different seeds on patient {patient} "
                f"({_cell_name(used.index[0][:3])}: {used.iloc[0]}): train every cell with the same"
            )
    return table.pivot_table(
        index=["gene", "patient"],
        columns=list(FACTORS),
        values="score",
        # An undefined score in one seed makes the cell's mean incomparable: leave the block out.
        aggfunc=lambda s: s.mean(skipna=False),
        dropna=False,
        sort=False,
    ).dropna(axis=1, how="all")


def _complete(cells: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    blocks = cells.dropna()
    n_genes = blocks.index.get_level_values("gene").nunique()
    if n_genes < LEAST_GENES:
        raise UserError(
            f"factorial: {n_genes} genes have a score in every cell, but {LEAST_GENES} are needed: "
            "test all cells on the same patients"
        )
    return blocks, len(cells) - len(blocks)


def _contrast(
    blocks: pd.DataFrame, levels: Mapping[str, list[str]], chosen: Mapping[str, str]
) -> pd.Series:
    """The effect of ``chosen`` levels against the reference levels, in every block."""
    weight = pd.Series(0.0, index=blocks.columns)
    others = prod(len(names) for factor, names in levels.items() if factor not in chosen)
    for cell in product(*levels.values()):
        value = 1 / others
        for factor, level in zip(FACTORS, cell, strict=True):
            if factor in chosen:
                value *= {chosen[factor]: 1, levels[factor][0]: -1}.get(level, 0)
        weight[cell] = value
    return blocks @ weight


def _clustered_mean(contrast: pd.Series, genes: pd.Index) -> dict[str, float]:
    codes = pd.factorize(genes)[0]
    from statsmodels.regression.linear_model import OLS  # takes seconds to import

    fit = OLS(contrast.to_numpy(), np.ones((len(contrast), 1))).fit(
        cov_type="cluster", cov_kwds={"groups": codes}, use_t=True
    )
    low, high = fit.conf_int()[0]
    return {
        "effect": float(fit.params[0]),
        "ci_low": float(low),
        "ci_high": float(high),
        "p_value": float(fit.pvalues[0]),
    }


def _level(value: Any) -> str:
    """Name of a level; 0, 0.0 and "0" are one."""
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)


def _cell_name(cell: tuple[str, ...]) -> str:
    return ", ".join(f"{f} {v}" for f, v in zip(FACTORS, cell, strict=True))


def _check_columns(table: pd.DataFrame, columns: tuple[str, ...], name: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(
            f"{name}: column '{missing[0]}' is missing (found {', '.join(map(str, table.columns))})"
        )


# --- sparsity dial --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DialCurve:
    """Gain of Poisson over MSE at each setting of the dial, and its slope.

    Attributes
    ----------
    curve
        One row per setting, in ascending order: the setting (``keep`` or ``bin_um``),
        ``mean_count`` (counts per bin, mean over genes; NaN where not given), ``delta`` with
        ``ci_low`` and ``ci_high`` (95 %, bootstrap over genes) and ``n_genes``.
    gains
        ``gene``, the setting, its ``delta`` and its ``mean_count`` (NaN where not given).
    slopes
        ``gene`` and ``slope``: change of the gain per doubling of the setting, least squares.
    slope, ci_low, ci_high, p_value
        Mean slope over genes, its 95 % bootstrap interval, and Wilcoxon's signed rank test that it
        is 0. With ``keep``, a negative slope means that the gain grows as counts get sparser.
    n_genes
        Genes with a gain at two settings or more.
    """

    curve: pd.DataFrame
    gains: pd.DataFrame
    slopes: pd.DataFrame
    slope: float
    ci_low: float
    ci_high: float
    p_value: float
    n_genes: int


def dial_curve(table: pd.DataFrame, dial: str = "keep", n_boot: int = 5000) -> DialCurve:
    """How the gain of Poisson over MSE moves when the counts of the same genes are made sparser.

    Parameters
    ----------
    table
        One row per run and gene: ``keep`` (share of training counts kept, 1 to 1/16) or ``bin_um``,
        ``loss`` (``mse`` or ``poisson``; others are ignored), ``gene``, ``score``, and if there are
        any ``patient``, ``seed`` (gains are averaged over them) and ``mean_count``. Both losses should share link
        and head bias, or the dial turns more than sparsity.
    dial
        Name of the setting's column: ``keep`` or ``bin_um``.
    n_boot
        Bootstrap draws over genes.

    Raises
    ------
    UserError
        A column is missing, a setting is not positive, or there are fewer than two settings with
        both losses.
    """
    _check_columns(table, (dial, "loss", "gene", "score"), "dial")
    if not (table[dial] > 0).all():
        raise UserError(f"dial: column '{dial}' must be above 0")
    # Differences are taken within a patient and seed, or a missing score would unbalance them.
    pair = ["gene", dial, *(c for c in ("patient", "seed") if c in table)]
    scores = table.pivot_table(index=pair, columns="loss", values="score")
    if not {"mse", "poisson"} <= set(scores):
        raise UserError("dial: column 'loss' must hold mse and poisson")
    delta = (scores["poisson"] - scores["mse"]).groupby(["gene", dial]).mean()
    delta = delta.unstack(dial).dropna(axis=1, how="all")
    if delta.shape[1] < 2:
        raise UserError(f"dial: both losses are needed at two values of '{dial}' or more")
    gains = delta.stack().rename("delta").reset_index()
    of_gene = table.assign(mean_count=table.get("mean_count", np.nan))
    of_gene = of_gene.groupby(["gene", dial], as_index=False)["mean_count"].mean()
    means = of_gene.groupby(dial)["mean_count"].mean()
    curve = []
    for setting in delta:
        values = delta[setting].dropna().to_numpy()
        low, high = mean_interval(values, n_boot)
        curve.append((setting, means[setting], values.mean(), low, high, len(values)))
    doublings = np.log2(delta.columns.to_numpy(dtype=float))
    slopes = delta[delta.notna().sum(axis=1) >= 2].apply(
        lambda row: np.polyfit(doublings[row.notna()], row.dropna(), 1)[0], axis=1
    )
    values = slopes.to_numpy()
    low, high = mean_interval(values, n_boot)
    return DialCurve(
        curve=pd.DataFrame(
            curve, columns=[dial, "mean_count", "delta", "ci_low", "ci_high", "n_genes"]
        ),
        gains=gains.merge(of_gene, on=["gene", dial]),
        slopes=slopes.rename("slope").reset_index(),
        slope=float(values.mean()),
        ci_low=low,
        ci_high=high,
        p_value=float(stats.wilcoxon(values).pvalue) if np.any(values) else np.nan,
        n_genes=len(values),
    )
