"""What more sections cost: disk and memory from shapes, GPU time from what was measured on one."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from sparsity_trap.analysis import published
from sparsity_trap.bins import PATCH_BINS, TOKEN_GRID
from sparsity_trap.data.patches import PATCH_PIXELS
from sparsity_trap.encoders import views
from sparsity_trap.settings import ROOT, Preset

#: Public files of one section: the archive of binned outputs and the image, GB (10x Genomics).
RAW_GB = 16 + 12.5

ENCODER_CHANNELS = 1280  # of Virchow2

#: What `make bench-train` measured on a GPU, at the size of preset ``paper``.
MEASURED = json.loads((ROOT / "results" / "bench" / "training_gpu.json").read_text())

#: Folds of cross-validation once leaving out one patient at a time no longer pays.
FOLDS = 5


def patches_per_section() -> float:
    """Mean number of patches of the published sections."""
    return float(np.mean([published.SUMMARY[f"n_patches.{p}"] for p in ("P1", "P2", "P5")]))


def cost_table(preset: Preset, genes: int, sections: tuple[int, ...]) -> pd.DataFrame:
    """Disk, memory and GPU hours for cohorts of several sizes with Virchow2 tokens.

    Parameters
    ----------
    preset
        Gives views, epochs and precision; its decoder is the one that was measured.
    genes
        Size of the panel G.
    sections
        Numbers of sections.

    Returns
    -------
    DataFrame indexed by the number of sections. Sizes in GB: ``raw``, ``stores`` (images, counts
    and masks before compression), ``tokens`` (all views, float16), ``training`` (tokens of one
    view, counts and masks of the training sections: what must be at hand in every epoch).
    ``folds`` trained per arm; GPU hours ``encoding`` and ``one_arm`` (all folds, validation left
    out) at the speed of the GPU that was measured.
    """
    patches = patches_per_section()
    token_bytes = ENCODER_CHANNELS * TOKEN_GRID**2 * 2
    maps = genes * PATCH_BINS**2
    n_views = len(views(preset.encoder))
    encode = n_views / MEASURED["encoder"]["patches_per_second"] / 3600
    run = MEASURED["run"][preset.training.precision]
    step = run["milliseconds_per_batch"] / run["batch_size"] / 3.6e6
    rows = []
    for n in sections:
        folds = n if n <= FOLDS else FOLDS
        trained = n * (1 - 1 / folds)
        rows.append(
            {
                "sections": n,
                "raw": n * RAW_GB,
                "stores": n * patches * (3 * PATCH_PIXELS**2 + 2 * maps + PATCH_BINS**2) / 1e9,
                "tokens": n * patches * n_views * token_bytes / 1e9,
                "training": trained * patches * (token_bytes + maps + PATCH_BINS**2) / 1e9,
                "folds": folds,
                "encoding": n * patches * encode,
                "one_arm": folds * trained * patches * preset.training.epochs * step,
            }
        )
    return pd.DataFrame(rows).set_index("sections")
