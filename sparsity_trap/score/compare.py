"""Two models or more on the same bins: differences gene by gene, with intervals over patches.

Statistics are those of the chapters on sparsity and on the factorial: the mean difference with
Student's t over genes and patches, Spearman's correlation with sparsity, shares with exact limits.
One prediction of each model tells nothing of what another training would have changed, and no
interval here holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from sparsity_trap.analysis.association import LEAST_GENES, dealt, rho
from sparsity_trap.analysis.effects import Effect, Share, combined, pcc_without_each
from sparsity_trap.evaluation.result import MODEL, Evaluation
from sparsity_trap.metrics import Moments
from sparsity_trap.settings import UserError


def differences(one: Evaluation, other: Evaluation) -> pd.DataFrame:
    """Difference of the PCC over larger bins, gene by gene: ``other`` minus ``one``.

    Intervals are Student's t with the jackknife over patches: each is left out in turn, in both
    alike, since patches and not bins are independent. ``q`` are their p corrected for the number of
    genes (Benjamini and Hochberg 1995).

    Returns
    -------
    DataFrame
        ``gene``, ``sparsity``, ``one``, ``other``, ``difference``, ``ci_low``, ``ci_high``,
        ``p_value``, ``q_value``; NaN with one patch, or where a PCC is undefined.

    Raises
    ------
    UserError
        The two were scored for other genes, or over other bins.
    """
    genes = check_alike(one, other)
    first, second = (_moments(found, genes) for found in (one, other))
    pcc = [_pcc(moments) for moments in (first, second)]
    left = pcc_without_each(second) - pcc_without_each(first)  # [N, G]
    n = len(left)
    difference = pcc[1] - pcc[0]
    se = np.sqrt((n - 1) ** 2 / n * left.var(0, ddof=1)) if n > 1 else np.full(len(genes), np.nan)
    half = stats.t.ppf(0.975, n - 1) * se if n > 1 else se
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stats.t.sf(np.abs(difference) / se, max(n - 1, 1))
    known = ~np.isnan(p)
    q = np.full(len(p), np.nan)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    place = [one.genes.index(gene) for gene in genes]
    return pd.DataFrame(
        {
            "gene": genes,
            "sparsity": one.scores[MODEL]["sparsity"][place],
            "one": pcc[0],
            "other": pcc[1],
            "difference": difference,
            "ci_low": difference - half,
            "ci_high": difference + half,
            "p_value": p,
            "q_value": q,
        }
    )


def mean_difference(one: Evaluation, other: Evaluation) -> Effect:
    """Mean difference over genes, with the variance that genes and patches bring."""
    genes = check_alike(one, other)
    first, second = (_moments(found, genes) for found in (one, other))
    gain = _pcc(second) - _pcc(first)
    gain = gain[~np.isnan(gain)]
    if not len(gain):
        return Effect()
    left = np.nanmean(pcc_without_each(second), 1) - np.nanmean(pcc_without_each(first), 1)
    n = len(left)
    of_patches = ((n - 1) ** 2 / n * left.var(ddof=1), n - 1) if n > 1 else (np.nan, 0)
    of_genes = (gain.var(ddof=1) / len(gain), len(gain) - 1) if len(gain) > 1 else (np.nan, 0)
    return combined(gain.mean(), ((0.0, 0), of_genes, of_patches), 1)


def summary(found: Mapping[str, Evaluation]) -> pd.DataFrame:
    """One row per pair of models.

    Returns
    -------
    DataFrame
        ``one``, ``other``; ``difference``, ``ci_low``, ``ci_high`` of the mean over genes;
        ``n_wins`` of ``n_genes``, with the exact limits ``share_low`` and ``share_high``; ``rho``
        of the difference with sparsity and its ``p_value``, from orders dealt anew.
    """
    rows = []
    for (a, one), (b, other) in combinations(found.items(), 2):
        table = differences(one, other).dropna(subset=["difference"])
        mean = mean_difference(one, other)
        row: dict[str, Any] = {"one": a, "other": b, "difference": mean.value}
        row |= dict(zip(("ci_low", "ci_high"), mean.interval, strict=True))
        row |= {"n_wins": int((table["difference"] > 0).sum()), "n_genes": len(table)}
        share = Share(row["n_wins"], len(table)).interval if len(table) else (np.nan, np.nan)
        row |= dict(zip(("share_low", "share_high"), share, strict=True))
        x, y = table["sparsity"].to_numpy(), table["difference"].to_numpy()
        varies = len(table) >= LEAST_GENES and np.ptp(x) > 0 and np.ptp(y) > 0
        row |= {"rho": float(rho(x, y)), "p_value": dealt(x, y)} if varies else {}
        rows.append(row)
    return pd.DataFrame(rows).reindex(
        columns=["one", "other", "difference", "ci_low", "ci_high", "n_wins", "n_genes",
                 "share_low", "share_high", "rho", "p_value"]
    )  # fmt: skip


def check_alike(one: Evaluation, other: Evaluation) -> list[str]:
    """Genes that both were scored for.

    Raises
    ------
    UserError
        There is none; or bins differ in width, patch or number.
    """
    names = one.about["name"], other.about["name"]
    genes = [gene for gene in one.genes if gene in set(other.genes)]
    if not genes:
        raise UserError(
            f"{names[0]} and {names[1]} share no gene: compare models of the same genes"
        )
    alike = one.about["wide_um"] == other.about["wide_um"] and len(one.moments) == len(
        other.moments
    )
    if not alike or not np.array_equal(one.moments[:, 0, 0], other.moments[:, 0, 0]):
        raise UserError(
            f"{names[0]} and {names[1]} were scored over other bins: predict the same bins, of the "
            "same width, in both"
        )
    return genes


def _moments(found: Evaluation, genes: list[str]) -> np.ndarray:
    return found.moments[:, [found.genes.index(gene) for gene in genes]]


def _pcc(moments: np.ndarray) -> np.ndarray:
    parts = [Moments(*patch.T) for patch in moments]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.pcc()
