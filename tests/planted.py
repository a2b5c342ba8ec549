"""Runs of the laptop preset with planted scores, which the factorial and the dials take apart."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cells import run_cells

from sparsity_trap import runs
from sparsity_trap.data.genes import panel_table
from sparsity_trap.settings import load_preset
from sparsity_trap.show import interactive

#: What the loss adds to a score; besides, exp adds 0.04, and every halving of the counts 0.01 to
#: that of Poisson.
OF_LOSS = {"mse": 0.0, "mse-log1p": -0.05, "poisson": 0.1, "nb": 0.08}
OF_BIAS = {0.0: 0.0, -3.0: 0.02, "gene-mean": 0.03}


@cache
def planted_scores() -> pd.DataFrame:
    """`runs.long_table` of every run; patients but P5 gain 0.5 more from Poisson than P5 does."""
    preset, draw = load_preset("laptop"), np.random.default_rng(0)
    genes = panel_table()[["gene", "category"]].assign(
        sparsity=0.9, mean_count=draw.uniform(0.01, 0.5, 50)
    )
    level, gain = draw.normal(0.3, 0.05, 50), draw.normal(0, 0.03, 50)
    found = []
    for run in preset.all_runs():
        arm = preset.arm(run.arm)
        score = level + OF_LOSS[arm.loss] + 0.04 * (arm.link == "exp") + OF_BIAS[arm.bias]
        if arm.loss == "poisson":
            score = score + gain - gain.mean() + 0.01 * np.log2(1 / arm.keep)
            score += 0.5 * (run.test_patient != "P5")
        score = score + draw.normal(0, 1e-4, 50)
        names = [f"pcc_{width}um" for width in (2, 4, 8, 16)]
        names += ["spearman_8um", "ssim_2um", "ssim_8um", "d2", "auprc"]
        table = genes.assign(**dict.fromkeys(names, score))
        found.append(runs.Result(run, Path(), table, pd.DataFrame(), {}, {}))
    return runs.long_table(preset, found)


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
        "load_all": lambda _: [],
        "long_table": lambda *_: scores,
    }.items():
        monkeypatch.setattr(runs, what, value)
    monkeypatch.setattr(interactive, "show", lambda plot, name, **_: plot)
    chosen = {"preset": "", "source": "", "cohort": ""}
    found = run_cells(name, chosen, lambda source: not any(text in source for text in left_out))
    return found | {"quoted": quoted}
