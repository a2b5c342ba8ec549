"""The sparsity dial: the same genes made sparser, and the gain of Poisson over MSE at each setting.

Two dials are turned: the share of training counts that is kept, and the width of the bins that the
loss compares. Both losses share link and bias throughout, or more than sparsity would be turned.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from sparsity_trap.analysis.association import LEAST_GENES
from sparsity_trap.analysis.factorial import as_published
from sparsity_trap.bins import BIN_UM


def dial_runs(scores: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Rows of MSE and Poisson with link exp, started at the gene means, that differ in one setting.

    The start goes with the counts: a fixed one would lie nearer to the mean at some settings.

    Parameters
    ----------
    scores
        From `runs.long_table`.
    setting
        ``keep`` (share of training counts) or ``bin_um`` (bin width that the loss compares).

    Returns
    -------
    DataFrame
        The rows, with ``score`` (PCC at 8 µm for ``keep``, at the width itself for ``bin_um``) and
        ``mean_count`` of the training bins that the loss sees, up to differences between patients:
        the test patient's per 2 µm bin, times the share kept or the area of the bin.
    """
    matched = (scores["link"] == "exp") & (scores["bias"] == "gene-mean")
    matched &= scores["loss"].isin(["mse", "poisson"]) & scores[setting].notna()
    rows = scores[as_published(scores, setting) & matched]
    if setting == "keep":
        return rows.assign(score=rows["pcc_8um"], mean_count=rows["mean_count"] * rows["keep"])
    score = pd.Series(float("nan"), rows.index)
    for width, part in rows.groupby("bin_um"):
        score[part.index] = part[f"pcc_{width:g}um"]
    area = (rows["bin_um"] / BIN_UM) ** 2
    return rows.assign(score=score, mean_count=rows["mean_count"] * area)


def gains(scores: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Gain of Poisson over MSE of every gene at every setting of a dial.

    Differences are taken within a patient and seed, and averaged over those that have one at every
    setting: a patient that was tested at some only would tilt the curve.

    Parameters
    ----------
    scores, setting
        As for `dial_runs`.

    Returns
    -------
    DataFrame
        ``gene``, the setting, ``delta`` and ``mean_count``, by ascending setting. Empty where the
        dial was not turned (fewer than two settings with both losses), or fewer than four genes
        have a gain at every setting.
    """
    rows = dial_runs(scores, setting)
    block = ["gene", "patient", "seed"]
    losses = rows.pivot_table(index=[*block, setting], columns="loss", values="score")
    if {"mse", "poisson"} <= set(losses):
        delta = (losses["poisson"] - losses["mse"]).unstack(setting)
        delta = delta.dropna(axis=1, how="all").dropna()
    else:
        delta = pd.DataFrame(index=losses.index[:0])
    if delta.shape[1] < 2 or delta.index.unique("gene").size < LEAST_GENES:
        return pd.DataFrame(columns=["gene", setting, "delta", "mean_count"])
    counts = rows.pivot_table(index=block, columns=setting, values="mean_count")
    counts = counts.loc[delta.index, delta.columns]
    long = pd.concat({"delta": delta, "mean_count": counts}, axis=1).groupby("gene").mean()
    return long.stack(setting, future_stack=True).reset_index().sort_values([setting, "gene"])


def arms(rows: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Arms of both losses at each setting of a dial, where both were trained.

    Parameters
    ----------
    rows, setting
        From and for `dial_runs`.

    Returns
    -------
    DataFrame, index the setting, ascending, columns ``mse`` and ``poisson``; empty where the dial
    was not turned.
    """
    scored = rows.dropna(subset=["score"]) if len(rows) else rows
    found = scored.groupby([setting, "loss"])["arm"].first().unstack("loss")
    found = found.reindex(columns=["mse", "poisson"]).dropna()
    return found if len(found) > 1 else found.iloc[:0]


def slope_weights(scores: pd.DataFrame, setting: str) -> dict[str, float]:
    """Change of the gain of Poisson over MSE per halving of a setting, as a weighted sum of arms.

    Parameters
    ----------
    scores, setting
        As for `dial_runs`.

    Returns
    -------
    Arm -> weight, for `effects.contrast` of the ``score`` of `dial_runs`: the least-squares slope
    over the settings that both losses were trained at. Empty with fewer than two of them.
    """
    turned = arms(dial_runs(scores, setting), setting)
    if turned.empty:
        return {}
    steps = -np.log2(turned.index.to_numpy(dtype=float))  # halvings
    slope = (steps - steps.mean()) / ((steps - steps.mean()) ** 2).sum()
    return dict(zip(turned["poisson"], slope, strict=True)) | dict(
        zip(turned["mse"], -slope, strict=True)
    )
