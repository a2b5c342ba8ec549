"""Statistics that a reader recomputes in the page: their numbers and scripts, as HTML.

The script's statistics (``assets/statistics.js``) mirror `analysis.effects` and `analysis.claims`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sparsity_trap.analysis.claims import WORTH, WORTH_RHO, Least, Ledger
from sparsity_trap.analysis.effects import Draws, gains, pcc_without_each
from sparsity_trap.show.page import render
from sparsity_trap.show.tables import TITLES

if TYPE_CHECKING:
    from IPython.display import HTML

#: Scores that a reader may choose from.
SCORES = ("pcc_8um", "pcc_2um", "ssim_2um", "d2")

#: Of more genes, the covariance that patches bring is left out: it grows with their square.
MOST_GENES = 100


def recompute(
    scores: pd.DataFrame,
    comparisons: Mapping[str, Mapping[str, float]],
    moments: Mapping[str, np.ndarray],
) -> HTML:
    """Rank correlation and mean gain over genes, recomputed for what a reader chooses.

    Parameters
    ----------
    scores
        From `runs.long_table`, of the patients that count.
    comparisons
        Name -> weight of each arm, such as ``{"E": 1, "D": -1}``; the first is shown before a
        reader chooses, those that no run has are left out.
    moments
        Run -> sums of its patches at 8 µm, as for `effects.contrast`.
    """
    from IPython.display import HTML

    # In the panel's order, which is that of the moments.
    facts = scores.groupby("gene", sort=False).agg({"category": "first", "sparsity": "mean"})
    found = {
        name: measures
        for name, weights in comparisons.items()
        if (measures := _measures(scores, weights, moments, facts.index))
    }
    data = {"facts": facts.reset_index().to_dict("list"), "comparisons": found}
    return HTML(render("recompute.html", data=data, worth=WORTH, worth_rho=WORTH_RHO))


def bounds(ledger: Ledger) -> HTML:
    """Verdicts of a ledger's tests at another bound of what is worth the name.

    Parameters
    ----------
    ledger
        All claims judged. Claims with a rule of their own, or without evidence, are not shown.
    """
    from IPython.display import HTML

    claims = []
    for key in ledger.tests:
        evidence, above, below = ledger.tested[key]
        text = ledger.claims[key].text
        claims.append(
            {"text": text, "above": above, "below": below, "evidence": _evidence(evidence)}
        )
    return HTML(render("bounds.html", data={"worth": WORTH, "claims": claims}))


def _evidence(evidence: Any) -> dict[str, Any]:
    """What the script needs to test a bound on."""
    if isinstance(evidence, Least):
        return {"least": [_evidence(effect) for effect in evidence.effects]}
    if isinstance(evidence, Draws):
        return {"value": evidence.value, "draws": _plain(evidence.draws[None])[0]}
    return {"value": evidence.value, "se": evidence.se, "df": evidence.df}


def _measures(
    scores: pd.DataFrame,
    weights: Mapping[str, float],
    moments: Mapping[str, np.ndarray],
    genes: pd.Index,
) -> dict[str, dict[str, Any]]:
    """Title of each score -> gains by run and gene, runs of each patient, part of the patches."""
    measures = {}
    for score in (score for score in SCORES if score in scores):
        by_run = gains(scores, weights, score).reindex(columns=genes)
        if by_run.empty:
            continue
        groups = by_run.groupby("patient").indices.values()
        measures[TITLES[score]] = {
            "gains": _plain(by_run.to_numpy()),
            "groups": [group.tolist() for group in groups],
        }
        if score == "pcc_8um" and len(genes) <= MOST_GENES:
            part = patch_covariance(scores, weights, moments, by_run.index)
            measures[TITLES[score]]["patches"] = part
    return measures


def patch_covariance(
    scores: pd.DataFrame,
    weights: Mapping[str, float],
    moments: Mapping[str, np.ndarray],
    runs: pd.MultiIndex,
) -> dict[str, Any]:
    """What patches bring to a contrast of PCC at 8 µm, for any choice of genes.

    Each patch is left out in turn, as in `effects.contrast`. The variance of a mean over genes is
    the mean of the covariance over those genes, rows and columns.

    Parameters
    ----------
    scores, weights, moments
        As for `effects.contrast`.
    runs
        Patient and seed of the runs that count.

    Returns
    -------
    ``covariance`` [G, G], and ``df``, its degrees of freedom.
    """
    rows = scores.set_index(["patient", "seed"]).loc[runs]
    names = rows.groupby(["patient", "arm"])["run"].unique()
    patients = names.index.unique("patient")
    total, least = 0.0, np.inf
    for patient in patients:
        left_out = sum(
            weight
            * np.mean([pcc_without_each(moments[run]) for run in names[patient, arm]], axis=0)
            for arm, weight in weights.items()
        )
        n = len(left_out)
        total = total + (n - 1) ** 2 / n * np.cov(left_out, rowvar=False) / len(patients) ** 2
        least = min(least, n - 1)
    return {"covariance": _plain(total), "df": least}


def _plain(values: np.ndarray) -> list:
    """Numbers as JSON holds them, of five digits: more would be a page's weight without a use."""
    return [[None if np.isnan(v) else float(f"{v:.5g}") for v in row] for row in np.asarray(values)]
