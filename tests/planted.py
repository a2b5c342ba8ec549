"""Scores and maps with planted effects, for tests of more than one analysis."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cells import run_cells
from scipy import ndimage

from sparsity_trap import runs
from sparsity_trap.data.genes import panel_table
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Arm, Run
from sparsity_trap.show import interactive

#: What the loss adds to a score; besides, exp adds 0.04, and every halving of the counts 0.01 to
#: that of Poisson.
OF_LOSS = {
    "mse": 0.0, "mse-log1p": -0.05, "poisson": 0.1, "nb": 0.08,
    "power-0.5": 0.05, "power-1": 0.1, "power-1.5": 0.11, "power-2": 0.08,
}  # fmt: skip
OF_BIAS = {0.0: 0.0, -3.0: 0.02, "gene-mean": 0.03}
OF_WEIGHT = {"none": 0.0, "1/mean": 0.07, "1/variance": 0.06, "mean": -0.04}
#: The multiple of the learning rate that is best for MSE, others being best at 1; every doubling
#: away from it costs 0.02, every doubling of the epochs adds 0.03.
BEST_RATE_OF_MSE = 2.0


def planted_score(arm: Arm) -> float:
    """What an arm adds to the level of every gene."""
    score = OF_LOSS.get(arm.loss, 0.0) + 0.04 * (arm.link == "exp") + OF_BIAS[arm.bias]
    best = BEST_RATE_OF_MSE if arm.loss == "mse" else 1.0
    score += OF_WEIGHT[arm.gene_weight] - 0.02 * abs(np.log2(arm.lr_times / best))
    score += 0.03 * np.log2(arm.epochs_times)
    return score + 0.01 * np.log2(1 / arm.keep) * (arm.loss == "poisson")


@cache
def planted_results() -> list[runs.Result]:
    """Every arm on P5 with three seeds, D, E and D-matched on all patients.

    Patients but P5 gain 0.5 more from Poisson than P5 does.
    """
    preset, draw = load_preset("laptop"), np.random.default_rng(0)
    genes = panel_table()[["gene", "category"]].assign(
        sparsity=0.9, mean_count=draw.uniform(0.01, 0.5, 50), calibration=1.0, rate_cv=1.0
    )
    level, gain = draw.normal(0.3, 0.05, 50), draw.normal(0, 0.03, 50)
    names = [f"pcc_{width}um" for width in (2, 4, 8, 16)]
    names += ["spearman_8um", "ssim_2um", "ssim_8um", "d2", "auprc"]
    planned = [Run(arm=arm, test_patient="P5", seed=s) for arm in preset.arms for s in range(3)]
    elsewhere = product(("D", "E", "D-matched"), ("P1", "P2"))
    planned += [Run(arm=arm, test_patient=patient, seed=0) for arm, patient in elsewhere]
    found = []
    for run in planned:
        arm = preset.arm(run.arm)
        score = level + planted_score(arm)
        if arm.loss == "poisson":
            score = score + gain - gain.mean() + 0.5 * (run.test_patient != "P5")
        score = score + draw.normal(0, 1e-4, 50)
        log = pd.DataFrame(
            {"validation_loss": [2.0, 1.0], "validation_pcc_8um": [0.0, score.mean()]}
        ).assign(seconds=[10.0, 20.0])
        made = {"epochs": 2, "training_patches": 60, "parameters": 1000, "seconds": 21.0}
        table = genes.assign(**dict.fromkeys(names, score))
        found.append(runs.Result(run, Path(), table, log, {}, made))
    return found


@cache
def planted_scores() -> pd.DataFrame:
    """`runs.long_table` of `planted_results`."""
    return runs.long_table(load_preset("laptop"), planted_results())


def run_page(
    monkeypatch: pytest.MonkeyPatch, name: str, scores: pd.DataFrame, *left_out: str
) -> dict[str, Any]:
    """Run the cells of a notebook on a table of scores; what they define, with its ``quoted``.

    Parameters
    ----------
    monkeypatch
        Puts the table in the place of runs.
    name
        Of the notebook.
    scores
        In the columns of `runs.long_table`.
    left_out
        Cells whose source holds one of these do not run.
    """
    quoted: dict[str, float] = {}

    def quotes(*_):
        return lambda prefix, **values: quoted.update(
            {f"{prefix}.{key}": value for key, value in values.items()}
        )

    for what, value in {
        "open_preset": lambda *_: load_preset("laptop"),
        "Quotes": quotes,
        "load_all": lambda _: planted_results(),
        "long_table": lambda *_: scores,
    }.items():
        monkeypatch.setattr(runs, what, value)
    sums = 1 + np.abs(np.random.default_rng(0).normal(1, 0.1, (4, 50, 6)))
    monkeypatch.setattr(runs.Result, "patches", sums)  # alike in all runs, which have no folder
    monkeypatch.setattr(interactive, "show", lambda plot, name, **_: plot)
    chosen = {"preset": "", "source": "", "cohort": ""}
    found = run_cells(name, chosen, lambda source: not any(text in source for text in left_out))
    return found | {"quoted": quoted}


def simulated_maps(seed: int, patches: int = 12, genes: int = 4, side: int = 64) -> SimpleNamespace:
    """A section of Poisson counts from smooth rates, most of its patches whole."""
    rng = np.random.default_rng(seed)
    rough = rng.normal(size=(patches, genes, side, side))
    smooth = ndimage.gaussian_filter(rough, 5, axes=(2, 3), mode="wrap")
    level = np.array([0.02, 0.05, 0.1, 0.4])[:genes, None, None]
    truth = level * np.exp(1.2 * smooth / smooth.std() - 0.72)
    mask = np.ones((patches, side, side), bool)
    mask[0, :, side // 2 :] = False
    counts = rng.poisson(truth * mask[:, None]).astype(np.uint16)
    return SimpleNamespace(
        counts=counts,
        mask=mask,
        truth=(truth * mask[:, None]).astype(np.float16),
        genes=[f"G{g}" for g in range(genes)],
        origin=side * np.stack(np.divmod(np.arange(patches), 4), axis=1),
    )
