"""Two arms side by side, gene by gene: what several pages share.

The unit is the gene of one test section. Its gain ("delta") is Poisson minus MSE.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from sparsity_trap.data.genes import not_symbols
from sparsity_trap.frames import as_frame
from sparsity_trap.settings import Arm, UserError

#: Columns that describe the gene in the test section, the same whichever arm predicted it.
GENE_COLUMNS = ("gene", "category", "sparsity", "mean_count")

#: Statistics over fewer genes are not reported: four orders of four genes decide nothing.
LEAST_GENES = 4

#: Columns of `runs.long_table` that say what a run was.
_OF_RUN = {"run", "arm", "patient", "seed", "collapsed", "bin_um", "bias_value", *Arm.model_fields}

#: Scores whose gain has a column of its own in table S1.
_GAINS = ("pcc_8um", "ssim_2um")


def rho(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's rank correlation along an axis."""
    return stats.spearmanrho(x, y, axis=axis).statistic


def dealt(x: np.ndarray, y: np.ndarray) -> float:
    """Two-sided p of `rho`, from 9,999 orders in which ``x`` is dealt anew.

    It is twice the share of orders whose ρ lies as far from 0 as the observed one, or farther, on
    the same side; that takes the pairs as independent.
    """
    orders = {"permutation_type": "pairings", "n_resamples": 9999, "batch": 500, "rng": 0}
    return stats.permutation_test((x,), lambda x, axis: rho(x, y, axis), **orders).pvalue


def gene_table(mse: Any, poisson: Any) -> pd.DataFrame:
    """Table S1: one row per gene, both runs side by side.

    Parameters
    ----------
    mse, poisson
        Per-gene tables of two runs on the same test patient, from wherever
        `sparsity_trap.frames.as_frame` takes them.

    Returns
    -------
    DataFrame
        ``gene``, ``category``, ``sparsity``, ``mean_count``, each metric with the suffix ``_mse``
        and ``_poisson``, ``delta_pcc_8um``, ``delta_ssim_2um`` (Poisson - MSE) and ``improved``
        (gain in PCC at 8 µm above 0), in the gene order of ``mse``.

    Raises
    ------
    UserError
        The runs differ in genes or in test patient; a table lacks a column, or a spreadsheet has
        damaged its genes.
    """
    mse, poisson = (
        _scores(table, f"the table of {x}") for table, x in ((mse, "MSE"), (poisson, "Poisson"))
    )
    if set(mse["gene"]) != set(poisson["gene"]):
        odd = ", ".join(sorted(set(mse["gene"]) ^ set(poisson["gene"])))
        raise UserError(f"the two runs differ in genes ({odd}): score both with the same panel")
    # What describes the gene comes from one side; the other must agree, or the patients differ.
    other = poisson.set_index("gene").loc[mse["gene"], ["sparsity", "mean_count"]]
    if not np.allclose(mse[["sparsity", "mean_count"]], other, equal_nan=True):
        raise UserError(
            "the two runs differ in the genes' sparsity, so in test patient: "
            "compare runs of the same test patient"
        )
    scores = poisson.drop(columns=[*GENE_COLUMNS[1:], "auprc_base"], errors="ignore")
    table = mse.drop(columns="auprc_base", errors="ignore").merge(
        scores, on="gene", suffixes=("_mse", "_poisson"), validate="one_to_one"
    )
    for score in _GAINS:
        table[f"delta_{score}"] = table[f"{score}_poisson"] - table[f"{score}_mse"]
    return table.assign(improved=table["delta_pcc_8um"] > 0)


def _scores(table: Any, what: str) -> pd.DataFrame:
    frame = as_frame(table, what, text=GENE_COLUMNS[:2], numbers=[*GENE_COLUMNS[2:], *_GAINS])
    # Where all are numbers, they may be what the table's author calls the genes.
    if not frame["gene"].str.isdecimal().all() and (said := not_symbols(frame["gene"])):
        raise UserError(f"{what}: {said}")
    return frame.assign(category=frame["category"].replace("", "other"))


def mean_table(scores: Any, patient: str, mse: str, poisson: str) -> pd.DataFrame:
    """`gene_table` of two arms: each score is the mean over the arm's runs on one patient.

    Parameters
    ----------
    scores
        From `runs.long_table`, or as it was kept in a file. Of seeds in which one arm
        `runs.collapsed` or was not trained, neither arm counts; where no seed is left, each arm
        keeps what it has.
    patient
        Test patient.
    mse, poisson
        Names of the arms.

    Raises
    ------
    UserError
        An arm has no run on the patient.
    """
    names = [*GENE_COLUMNS[:2], "arm", "patient"]
    scores = as_frame(scores, "the table of runs", text=names, numbers=[*GENE_COLUMNS[2:], *_GAINS])
    own = scores[(scores["patient"] == patient) & scores["arm"].isin([mse, poisson])]
    for arm in (mse, poisson):
        if not own["arm"].eq(arm).any():
            raise UserError(
                f"no run of arm '{arm}' with test patient '{patient}': add it to 'runs' of the "
                "preset"
            )
    count = own.dropna(subset=["pcc_8um"]).groupby("seed")["arm"].nunique()
    if (count == 2).any():
        own = own[own["seed"].isin(count.index[count == 2])]
    measured = own.columns.difference([*_OF_RUN, *GENE_COLUMNS], sort=False)
    how = dict.fromkeys(GENE_COLUMNS[1:], "first") | dict.fromkeys(measured, "mean")
    means = {arm: rows.groupby("gene", sort=False).agg(how) for arm, rows in own.groupby("arm")}
    return gene_table(means[mse].reset_index(), means[poisson].reset_index())
