"""Loss, link and head bias as factors: the runs that cross them, and what each has in a gap.

Runs that differ in a factor share genes and test patients, so each gene of a patient and a seed is
a block, and every effect is a mean of differences within blocks. Intervals are over genes: from a
few patients nothing can be said about patients at large.
"""

from __future__ import annotations

from itertools import permutations
from math import prod

import numpy as np
import pandas as pd
from scipy import stats

from sparsity_trap.analysis.association import LEAST_GENES
from sparsity_trap.bins import BIN_UM
from sparsity_trap.settings import PUBLISHED_BIAS, Arm

FACTORS = ("loss", "link", "bias")

#: Losses of the factorial, each crossed with every link and bias; others were trained with one.
CROSSED_LOSSES = ("mse", "mse-log1p", "poisson", "nb")

#: Level of each factor in the arms of the published contrast, D and E, the bias as a number.
ARM_D = ("mse", "softplus", PUBLISHED_BIAS["softplus"])
ARM_E = ("poisson", "exp", PUBLISHED_BIAS["exp"])


def as_published(scores: pd.DataFrame, but: str = "") -> pd.Series:
    """True for runs whose arm differs from D and E in loss, link and bias at most.

    Parameters
    ----------
    scores
        From `runs.long_table`.
    but
        One more setting that may differ: ``keep`` or ``bin_um``.
    """
    optional = {name: field for name, field in Arm.model_fields.items() if not field.is_required()}
    usual = {name: field.default for name, field in optional.items() if name != "resolutions_um"}
    same = pd.Series(True, scores.index)
    for setting, value in (usual | {"bin_um": BIN_UM}).items():
        if setting != but:
            same &= scores[setting].isna() if value is None else scores[setting] == value
    return same


def factorial_runs(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs.long_table` that cross loss, link and bias (published or gene means)."""
    crossed = scores["bias"].isin(["published", "gene-mean"]) & scores["loss"].isin(CROSSED_LOSSES)
    return scores[as_published(scores) & crossed]


def gap_runs(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs.long_table` between arms D and E, ``bias`` being a number in both.

    With the publication's name for it, the bias would go with the link (0 with softplus, -3 with
    exp), and its share of the gap would hide in that of the link.
    """
    between = as_published(scores)
    scores = scores.assign(bias=scores["bias_value"])
    for factor, *ends in zip(FACTORS, ARM_D, ARM_E, strict=True):
        between &= scores[factor].isin(ends)
    return scores[between].astype({"bias": float})


def complete_blocks(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """A score of every gene, patient and seed in every cell of the factorial.

    Parameters
    ----------
    rows
        From `factorial_runs` or `gap_runs`.
    score
        Column of the score.

    Returns
    -------
    DataFrame
        Index ``gene``, ``patient``, ``seed``; columns ``loss``, ``link``, ``bias``. Blocks without
        the score in some cell are left out. Empty where a factor does not vary, a combination of
        the levels was not trained, or fewer than four genes are left.
    """
    cells = rows.pivot_table(
        index=["gene", "patient", "seed"], columns=list(FACTORS), values=score, sort=False
    ).dropna()
    levels = [cells.columns.unique(factor).size for factor in FACTORS] if len(cells) else [0]
    crossed = min(levels) > 1 and prod(levels) == cells.shape[1]
    enough = cells.index.unique("gene").size >= LEAST_GENES
    return cells if crossed and enough else cells.iloc[:0]


def shapley_weights(scores: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Contribution of each factor on the way from arm D to arm E, as a weighted sum of arms.

    Factors are changed one at a time; a factor's contribution is the change of the score when it is
    its turn, averaged over all orders (Shapley value; six orders of three factors, exact).

    Parameters
    ----------
    scores
        From `runs.long_table`.

    Returns
    -------
    Factor -> arm -> weight, for `effects.contrast`; the factors' weights add up to 1 for E and -1
    for D. Empty where one of the eight cells was not trained.
    """
    between = gap_runs(scores)
    arm_of = dict(
        zip(zip(*(between[f] for f in FACTORS), strict=True), between["arm"], strict=True)
    )
    orders = list(permutations(range(len(FACTORS))))
    weights: dict[str, dict[str, float]] = {factor: {} for factor in FACTORS}
    for order in orders:
        cell: tuple[str | float, ...] = ARM_D
        for i in order:
            after = (*cell[:i], ARM_E[i], *cell[i + 1 :])
            if not {cell, after} <= arm_of.keys():
                return {}
            own = weights[FACTORS[i]]
            for at, sign in ((after, 1), (cell, -1)):
                own[arm_of[at]] = own.get(arm_of[at], 0.0) + sign / len(orders)
            cell = after
    return weights


def contributions(cells: pd.DataFrame) -> pd.DataFrame:
    """What each factor adds to a score on the way from arm D to arm E.

    Factors are changed one at a time; a factor's contribution is the change of the score when it is
    its turn, averaged over all orders (Shapley value; six orders of three factors, exact).

    Parameters
    ----------
    cells
        The eight cells between the arms, from `complete_blocks` of `gap_runs`.

    Returns
    -------
    DataFrame, rows as ``cells``, columns ``loss``, ``link`` and ``bias``; they add up to the gap.
    """
    orders = list(permutations(range(len(FACTORS))))
    added = pd.DataFrame(0.0, index=cells.index, columns=list(FACTORS))
    for order in orders:
        cell: tuple[str | float, ...] = ARM_D
        for i in order:
            after = (*cell[:i], ARM_E[i], *cell[i + 1 :])
            added[FACTORS[i]] += (cells[after] - cells[cell]) / len(orders)
            cell = after
    return added


def share_of_gap(added: pd.DataFrame) -> pd.DataFrame:
    """Mean contribution of each factor, and its share of the gap, with intervals over genes.

    Parameters
    ----------
    added
        From `contributions`. A drawn gene brings all its patients and seeds.

    Returns
    -------
    DataFrame
        One row per factor, then ``gap``: ``factor``, ``contribution``, ``contribution_low``,
        ``contribution_high``, ``share``, ``ci_low``, ``ci_high`` (of the share, 95 %) and
        ``n_genes``. Shares are NaN where the interval of the gap includes 0: there is no gap to
        share.
    """
    names = [*added, "gap"]
    per_gene = added.assign(gap=added.sum(axis=1)).groupby("gene", sort=False)
    columns = (*per_gene.sum().to_numpy().T, per_gene.size().to_numpy())

    def contributions_and_shares(*columns: np.ndarray, axis: int) -> np.ndarray:
        *sums, blocks = (column.sum(axis) for column in columns)
        return np.stack([*(s / blocks for s in sums), *(s / sums[-1] for s in sums)])

    value = contributions_and_shares(*columns, axis=-1)
    low, high = stats.bootstrap(
        columns, contributions_and_shares, paired=True, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    found = np.stack([value, low, high], axis=1)
    of_score, shares = found[: len(names)], found[len(names) :]
    if of_score[-1, 1] <= 0 <= of_score[-1, 2]:
        shares = np.full_like(shares, np.nan)
    headings = ["contribution", "contribution_low", "contribution_high", "share"]
    table = pd.DataFrame(np.hstack([of_score, shares]), columns=[*headings, "ci_low", "ci_high"])
    table.insert(0, "factor", names)
    return table.assign(n_genes=len(columns[-1]))
