"""The sparsity dials: the gain of Poisson over MSE when the same genes are made sparser or denser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsity_trap.analysis.association import mean_interval
from sparsity_trap.analysis.factorial import as_published
from sparsity_trap.bins import BIN_UM

#: Settings that are turned: share of training counts kept, and width of the bins compared.
DIALS = ("keep", "bin_um")


@dataclass(frozen=True, eq=False)
class Dial:
    """Gains of Poisson over MSE at the settings of one dial.

    Attributes
    ----------
    gains
        One row per gene and setting: ``gene``, the setting (``keep`` or ``bin_um``), ``delta``
        (mean over patients and seeds) and ``mean_count`` (counts of the gene in a bin that the loss
        sees).
    curve
        One row per setting, in ascending order: the setting, the mean over genes of ``mean_count``
        and ``delta``, ``ci_low`` and ``ci_high`` (95 %, bootstrap over genes) and ``n_genes``.
    slopes
        Change of a gene's gain per doubling of the setting, by least squares, for the genes with a
        gain at every setting.
    """

    gains: pd.DataFrame
    curve: pd.DataFrame
    slopes: pd.Series


def dial_runs(table: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Scored rows of MSE and Poisson at link exp and bias −3 that differ in one setting.

    Parameters
    ----------
    table
        From `runs.long_table`.
    setting
        ``keep``, scored at 8 µm, or ``bin_um``, scored at that width.

    Returns
    -------
    Rows of the table with ``score``, and ``mean_count`` as the loss sees it: the test patient's
    per 2 µm bin, times the share kept or the area of the bin.
    """
    same = as_published(table, but=("loss", "link", "bias", setting))
    same &= (table["link"] == "exp") & (table["bias"] == "published")
    rows = table[same & table["loss"].isin(["mse", "poisson"]) & table[setting].notna()]
    if setting == "keep":
        return rows.assign(score=rows["pcc_8um"], mean_count=rows["mean_count"] * rows["keep"])
    score = [row[f"pcc_{row['bin_um']:g}um"] for _, row in rows.iterrows()]
    area = (rows["bin_um"] / BIN_UM) ** 2
    return rows.assign(score=score, mean_count=rows["mean_count"] * area)


def turn(table: pd.DataFrame, setting: str) -> Dial | None:
    """Gains at each setting of a dial; None where fewer than two were trained with both losses."""
    rows = dial_runs(table, setting)
    # Differences are taken within a patient and seed, or a missing score would unbalance them.
    pairs = rows.pivot_table(
        index=["gene", setting, "patient", "seed"], columns="loss", values="score"
    )
    if not {"mse", "poisson"} <= set(pairs):
        return None
    delta = (pairs["poisson"] - pairs["mse"]).groupby(["gene", setting]).mean()
    wide = delta.unstack(setting).dropna(axis=1, how="all")
    if wide.shape[1] < 2:
        return None
    counts = rows.groupby(["gene", setting])["mean_count"].mean()
    gains = pd.concat([wide.stack().rename("delta"), counts], axis=1, join="inner").reset_index()
    curve = gains.groupby(setting).agg(
        mean_count=("mean_count", "mean"), delta=("delta", "mean"), n_genes=("gene", "size")
    )
    low_high = [mean_interval(wide[value].dropna().to_numpy()) for value in curve.index]
    curve[["ci_low", "ci_high"]] = low_high
    whole = wide.dropna()  # genes with a gain at every setting
    slopes = np.polyfit(np.log2(whole.columns.astype(float)), whole.T, 1)[0]
    columns = [setting, "mean_count", "delta", "ci_low", "ci_high", "n_genes"]
    return Dial(
        gains=gains, curve=curve.reset_index()[columns], slopes=pd.Series(slopes, whole.index)
    )
