"""Runs laid side by side: factorial, dials, mechanism and controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from sparsity_trap import losses, runs
from sparsity_trap.analysis import controls
from sparsity_trap.analysis.factorial import (
    DialCurve,
    FactorialEffects,
    dial_curve,
    factorial_effects,
    share_of_gap,
)
from sparsity_trap.analysis.mechanism import gradient_share
from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.genes import panel
from sparsity_trap.predict import load_model
from sparsity_trap.runs import Result, gains, long_table, plain  # noqa: F401
from sparsity_trap.settings import Arm, Preset
from sparsity_trap.training import initial_model, open_tokens

#: Both ends of the published contrast with the bias as a number, for `effects.share_of_gap`.
GAP = (
    {"loss": "mse", "link": "softplus", "bias": 0},
    {"loss": "poisson", "link": "exp", "bias": -3},
)


def factorial_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `long_table` of loss × link × bias (published or gene means), all else as published."""
    levels = table["bias"].isin(["published", "gene-mean"]) & (table["loss"] != "zinb")
    return table[_as_published(table, but=("loss", "link", "bias")) & levels]


def gap_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `long_table` of the eight cells between arms D and E, ``bias`` being a number."""
    chosen = _as_published(table, but=("loss", "link", "bias")) & (table["bias"] != "gene-mean")
    chosen &= table["loss"].isin(["mse", "poisson"])
    return table[chosen].assign(bias=table["bias_value"])


def factorial(table: pd.DataFrame) -> FactorialEffects | None:
    """Effects of the factorial on ``score``; None where a cell was not trained."""
    runs = factorial_runs(table)
    complete = len(runs[["loss", "link", "bias"]].drop_duplicates()) == 16
    return factorial_effects(runs) if complete else None


def shares_of_gap(table: pd.DataFrame) -> pd.DataFrame | None:
    """Shares of loss, link and bias in the gap of ``score``; None where a cell was not trained."""
    runs = gap_runs(table)
    complete = len(runs[["loss", "link", "bias"]].drop_duplicates()) == 8
    return share_of_gap(runs, *GAP) if complete else None


def dial_runs(table: pd.DataFrame, setting: str) -> pd.DataFrame:
    """Rows of `long_table` of MSE and Poisson at link exp and bias −3 that differ in one setting.

    Parameters
    ----------
    table
        From `long_table`.
    setting
        ``keep`` (share of training counts) or ``bin_um`` (bin width that the loss compares).
    """
    matched = (table["link"] == "exp") & (table["bias"] == "published")
    same = _as_published(table, but=("loss", "link", "bias", setting))
    chosen = table[matched & same & table["loss"].isin(["mse", "poisson"])]
    return chosen[chosen[setting].notna()]


def dials(table: pd.DataFrame) -> dict[str, DialCurve]:
    """Curves of the dials that were turned: ``keep`` scored at 8 µm, ``bin_um`` at that width.

    Mean counts are those of the training bins that the loss sees, up to differences between
    patients: the test patient's per 2 µm bin, times the share kept or the area of the bin.
    """
    found = {}
    for name in ("keep", "bin_um"):
        rows = dial_runs(table, name)
        if (rows.groupby(name)["loss"].nunique() == 2).sum() < 2:
            continue
        if name == "keep":
            rows = rows.assign(score=rows["pcc_8um"], mean_count=rows["mean_count"] * rows["keep"])
        else:
            area = (rows["bin_um"] / BIN_UM) ** 2
            score = [row[f"pcc_{row['bin_um']:g}um"] for _, row in rows.iterrows()]
            rows = rows.assign(score=score, mean_count=rows["mean_count"] * area)
        found[name] = dial_curve(rows, name)
    return found


def _as_published(table: pd.DataFrame, but: tuple[str, ...]) -> pd.Series:
    """True where everything but the named settings is that of arms D and E."""
    defaults = Arm(title="", loss="mse", link="exp", bias=0).model_dump()
    same = pd.Series(True, table.index)
    for key in ("decoder", "masked", "keep", "bicubic_from_um", "bin_um", "bias"):
        if key in but:
            continue
        wanted = {"bin_um": 2, "bias": "published"}.get(key, defaults.get(key))
        same &= table[key].isna() if wanted is None else table[key] == wanted
    return same


def gradient_shares(preset: Preset, result: Result, patches: int = 8) -> pd.DataFrame:
    """Share of each gene in the gradient of the shared decoder, before and after training.

    For arms of MSE and Poisson.

    Parameters
    ----------
    preset, result
        A run and its preset.
    patches
        Patches of the first training patient that are looked at, spread over its section.

    Returns
    -------
    DataFrame with columns ``gene``, ``category``, ``mean_count``, ``panel`` (arm and moment) and
    ``share``.
    """
    arm = preset.arm(result.run.arm)
    patient = preset.training_patients(result.run.test_patient)[0]
    store = runs.store(preset, patient)
    chosen = np.unique(np.linspace(0, len(store) - 1, patches).astype(int))
    counts, mask = (torch.from_numpy(a.oindex[chosen]) for a in (store.counts, store.mask))
    tokens = torch.from_numpy(open_tokens(preset, patient)[0].oindex[chosen, 0])

    def loss(eta: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if arm.loss == "poisson":
            return losses.poisson(losses.log_rate(eta, arm.link), count)
        return losses.mse(losses.rate(eta, arm.link), count)

    moments = {
        "start": initial_model(preset, result.run),
        "end": load_model(result.folder).model.cpu(),
    }
    parts = []
    for moment, model in moments.items():
        share = gradient_share(model, tokens, counts.float(), mask, loss)
        parts.append(
            result.genes[["gene", "category", "mean_count"]].assign(
                panel=f"{result.run.arm}, {moment}", share=share
            )
        )
    return pd.concat(parts)


# --- evidence -------------------------------------------------------------------------------------


def control_scores(preset: Preset, result: Result) -> pd.DataFrame:
    """Per-gene scores of an empty map and of a run's predictions shuffled between patches.

    Returns
    -------
    DataFrame with ``control`` ("all-zeros" or "shuffled"), ``gene`` and the columns of the
    per-gene table.
    """
    store = runs.store(preset, result.run.test_patient)
    maps = {"all-zeros": controls.zeros(store)}
    if len(store) > 1:
        maps["shuffled"] = controls.shuffled(result.predictions, seed=0)
    return pd.concat(
        pd.DataFrame(controls.score(store, rates, name=name).compute()).assign(
            control=name, gene=store.genes
        )
        for name, rates in maps.items()
    )


def ceilings(preset: Preset) -> pd.DataFrame:
    """Best attainable PCC per gene on the main patient: exact in simulation, else by splitting.

    Returns
    -------
    DataFrame with ``gene``, ``category``, ``pcc_2um`` and ``pcc_8um``.
    """
    store = runs.store(preset, preset.main_patient)
    mask = store.mask[:]
    columns = {}
    for name, factor in (("pcc_2um", 1), ("pcc_8um", 4)):
        if store.truth is not None:
            columns[name] = controls.poisson_ceiling(store.truth, mask, factor)
        else:
            columns[name] = controls.split_ceiling(store.counts, mask, factor)
    category = panel(preset).set_index("gene")["category"]
    return pd.DataFrame({"gene": store.genes, **columns}).assign(
        category=lambda t: t["gene"].map(category)
    )


def numbers(preset: Preset, results: list[Result]) -> dict[str, object]:
    """Effects of the factorial, shares of the gap and slopes of the dials, where they were run.

    Keys such as ``factorial.poisson.effect``, ``gap.loss.share`` and ``dial.keep.slope``.
    """
    values: dict[str, Any] = {}
    table = long_table(preset, results).assign(score=lambda t: t["pcc_8um"])
    effects = factorial(table)
    if effects is not None:
        main = effects.effects[effects.effects["order"] == 1]
        for row in main.to_dict("records"):
            name = row["term"].split("=")[1]
            keys = ("effect", "ci_low", "ci_high", "p_value")
            values |= {f"factorial.{name}.{key}": row[key] for key in keys}
    shares = shares_of_gap(table)
    if shares is not None:
        for row in shares.to_dict("records"):
            keys = ("contribution", "share", "ci_low", "ci_high")
            values |= {f"gap.{row['factor']}.{key}": row[key] for key in keys}
    for name, dial in dials(table).items():
        keys = ("slope", "ci_low", "ci_high", "p_value")
        values |= {f"dial.{name}.{key}": getattr(dial, key) for key in keys}
    if "dial.keep.slope" in values:
        # Prose speaks of halving the counts, the curve of doubling them.
        low, high = values["dial.keep.ci_low"], values["dial.keep.ci_high"]
        values["dial.keep.per_halving"] = -values["dial.keep.slope"]
        values |= {"dial.keep.per_halving_low": -high, "dial.keep.per_halving_high": -low}
    return {key: plain(value) for key, value in values.items()}
