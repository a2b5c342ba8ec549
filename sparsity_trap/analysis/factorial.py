"""The factors loss, link and head bias: which runs are cells of the factorial, and shares of a gap.

Runs that differ in a factor share genes and test patients, so each gene of each patient is a block,
and every effect is a mean of differences within blocks. Cells are found by what their arms are, not
by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations, product

import numpy as np
import pandas as pd

from sparsity_trap.analysis.association import LEAST_GENES
from sparsity_trap.losses import LINKS, LOSSES
from sparsity_trap.settings import Arm

FACTORS = ("loss", "link", "bias")

#: Both ends of the published contrast, arms D and E, with the bias as a number.
GAP = (
    {"loss": "mse", "link": "softplus", "bias": 0.0},
    {"loss": "poisson", "link": "exp", "bias": -3.0},
)


def factorial_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs.long_table` of loss × link × bias (published or gene means), all else equal.

    Empty where a cell was not trained.
    """
    rows = table[as_published(table, but=FACTORS) & table["bias"].isin(["published", "gene-mean"])]
    cells = set(rows[list(FACTORS)].itertuples(index=False, name=None))
    wanted = set(product(LOSSES, LINKS, ("published", "gene-mean")))
    return rows if cells == wanted else rows.iloc[:0]


def gap_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `runs.long_table` of the cells between both ends of `GAP`, ``bias`` being a number.

    Empty where a cell was not trained.
    """
    rows = table[as_published(table, but=FACTORS) & (table["bias"] != "gene-mean")]
    rows = rows.assign(bias=rows["bias_value"].astype(float))
    cells = pd.MultiIndex.from_frame(rows[list(FACTORS)])
    wanted = list(product(*({start[f], end[f]} for start, end in [GAP] for f in FACTORS)))
    rows = rows[cells.isin(wanted)]
    return rows if set(cells) >= set(wanted) else rows.iloc[:0]


def as_published(table: pd.DataFrame, but: tuple[str, ...]) -> pd.Series:
    """True where everything but the named settings is that of arms D and E."""
    defaults = Arm(title="", loss="mse", link="exp", bias=0).model_dump()
    same = pd.Series(True, table.index)
    for key in ("decoder", "masked", "keep", "bicubic_from_um", "bin_um", "bias"):
        if key not in but:
            wanted = {"bin_um": 2, "bias": "published"}.get(key, defaults.get(key))
            same &= table[key].isna() if wanted is None else table[key] == wanted
    return same


def complete_blocks(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """One row per cell of every block in which all cells have a score.

    Parameters
    ----------
    rows
        From `factorial_runs` or `gap_runs`.
    score
        Column that is compared.

    Returns
    -------
    DataFrame with ``gene``, ``patient``, `FACTORS` and ``score``, the mean over seeds; empty with
    fewer than 4 genes. A score that is undefined under one seed makes the cell's mean
    incomparable, so its block is left out.
    """
    keys = ["gene", "patient", *FACTORS]
    if rows.empty:
        return pd.DataFrame(columns=[*keys, "score"])
    # Cells are compared within a patient on the seeds that all of them were run with.
    seeds = (
        rows.groupby(["patient", *FACTORS])["seed"]
        .agg(set)
        .groupby("patient")
        .agg(lambda of_cells: set.intersection(*of_cells))
    )
    rows = rows[[seed in seeds[p] for p, seed in zip(rows["patient"], rows["seed"], strict=True)]]
    cells = rows.groupby(keys, sort=False)[score].agg(lambda s: s.mean(skipna=False))
    wide = cells.unstack(list(FACTORS)).dropna()
    if wide.index.get_level_values("gene").nunique() < LEAST_GENES:
        wide = wide.iloc[:0]
    return wide.stack(list(FACTORS), future_stack=True).rename("score").reset_index()


def contributions(
    blocks: pd.DataFrame, start: Mapping[str, object] = GAP[0], end: Mapping[str, object] = GAP[1]
) -> pd.DataFrame:
    """Part of each factor in the gap between two cells, per block.

    Factors are changed one at a time from ``start`` to ``end``; a factor's contribution is the
    change of the score when it is its turn, averaged over all orders (Shapley value; six orders of
    three factors, exact). Contributions add up to the gap.

    Parameters
    ----------
    blocks
        From `complete_blocks` of all cells between the ends.
    start, end
        Level of every factor at either end.

    Returns
    -------
    DataFrame indexed by ``gene`` and ``patient``, with a column for each factor and ``gap``.
    """
    wide = blocks.set_index(["gene", "patient", *FACTORS])["score"].unstack(list(FACTORS))
    parts = pd.DataFrame(0.0, index=wide.index, columns=list(FACTORS))
    orders = list(permutations(FACTORS))
    for order in orders:
        now = dict(start)
        for factor in order:
            after = now | {factor: end[factor]}
            change = wide[tuple(after.values())] - wide[tuple(now.values())]
            parts[factor] += change / len(orders)
            now = after
    return parts.assign(gap=parts.sum(axis=1))


def share_of_gap(parts: pd.DataFrame, n_boot: int = 5000, seed: int = 0) -> pd.DataFrame:
    """Mean contributions and their shares of the gap, with 95 % intervals over genes.

    Parameters
    ----------
    parts
        From `contributions`.
    n_boot, seed
        Bootstrap draws over genes; a drawn gene brings all its patients.

    Returns
    -------
    DataFrame
        One row per factor, then ``gap``: ``factor``, ``contribution``, ``contribution_low``,
        ``contribution_high``, ``share``, ``ci_low``, ``ci_high`` (of the share) and ``n_genes``.
        Shares are NaN where the interval of the gap includes 0: there is no gap to share.
    """
    # Sums and block counts per gene: a resample of genes is then a matrix product.
    per_gene = parts.groupby("gene", sort=False)
    sums, sizes = per_gene.sum().to_numpy(), per_gene.size().to_numpy()
    draws = np.random.default_rng(seed).integers(len(sizes), size=(n_boot, len(sizes)))
    drawn = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1, keepdims=True)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    shares = drawn / drawn[:, -1:]
    share_low, share_high = np.quantile(shares, [0.025, 0.975], axis=0)
    mean = parts.mean().to_numpy()
    table = pd.DataFrame(
        {
            "factor": parts.columns, "contribution": mean, "contribution_low": low,
            "contribution_high": high, "share": mean / mean[-1], "ci_low": share_low,
            "ci_high": share_high, "n_genes": len(sizes),
        }
    )  # fmt: skip
    if low[-1] <= 0 <= high[-1]:
        table[["share", "ci_low", "ci_high"]] = np.nan
    return table
