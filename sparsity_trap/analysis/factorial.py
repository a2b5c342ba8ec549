"""Loss, link and head bias as factors: the runs that cross them, and what each has in a gap.

Every effect is a weighted sum of the cells' arms, for `effects.contrast`.
"""

from __future__ import annotations

from itertools import permutations

import pandas as pd

from sparsity_trap.bins import BIN_UM
from sparsity_trap.settings import PUBLISHED_BIAS, Arm

FACTORS = ("loss", "link", "bias")

#: Level of each factor in the arms of the published contrast, D and E, the bias as a number.
ARM_D = ("mse", "softplus", PUBLISHED_BIAS["softplus"])
ARM_E = ("poisson", "exp", PUBLISHED_BIAS["exp"])


def as_published(scores: pd.DataFrame, *but: str) -> pd.Series:
    """True for runs whose arm differs from D and E in loss, link and bias at most.

    Parameters
    ----------
    scores
        From `runs.long_table`.
    but
        More settings that may differ, such as ``keep`` or ``bin_um``.
    """
    optional = {name: field for name, field in Arm.model_fields.items() if not field.is_required()}
    usual = {name: field.default for name, field in optional.items() if name != "resolutions_um"}
    same = pd.Series(True, scores.index)
    for setting, value in (usual | {"bin_um": BIN_UM}).items():
        if setting not in but:
            same &= scores[setting].isna() if value is None else scores[setting] == value
    return same


def factorial_runs(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs.long_table` that cross loss, link and bias (published or gene means)."""
    named = scores["bias"].isin(["published", "gene-mean"])
    return _complete(scores[as_published(scores) & named])


def gap_runs(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs.long_table` between arms D and E, ``bias`` being a number in both.

    With the publication's name for it, the bias would go with the link (0 with softplus, -3 with
    exp), and its share of the gap would hide in that of the link.
    """
    between = as_published(scores)
    scores = scores.assign(bias=scores["bias_value"])
    for factor, *ends in zip(FACTORS, ARM_D, ARM_E, strict=True):
        between &= scores[factor].isin(ends)
    return _complete(scores[between].astype({"bias": float}))


def _complete(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of losses that were trained with both links at both biases, on patients with all.

    Empty with fewer than two such losses.
    """
    cells = rows.drop_duplicates(list(FACTORS)).groupby("loss").size()
    rows = rows[rows["loss"].isin(cells.index[cells == 4])]
    arms = rows.groupby("patient")["arm"].nunique()
    rows = rows[rows["patient"].isin(arms.index[arms == rows["arm"].nunique()])]
    return rows if rows["loss"].nunique() > 1 else rows.iloc[:0]


def cells(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """The arm of each cell, how many runs it has, how many collapsed, and the mean of the others.

    Parameters
    ----------
    rows
        From `factorial_runs` or `gap_runs`.
    score
        Column of the score, the heading of its mean.

    Returns
    -------
    DataFrame, columns ``arm``, ``loss``, ``link``, ``bias``, the score, ``runs``, ``collapsed``.
    """
    by_run = rows.groupby([*FACTORS, "arm", "run"], sort=False)
    found = by_run.agg(mean=(score, "mean"), collapsed=("collapsed", "first"))
    by_cell = found.groupby([*FACTORS, "arm"], sort=False)
    table = by_cell.agg(
        **{score: ("mean", "mean"), "runs": ("mean", "size"), "collapsed": ("collapsed", "sum")}
    )
    table = table.reset_index().sort_values(list(FACTORS), ignore_index=True)
    return table[["arm", *FACTORS, score, "runs", "collapsed"]]


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
