"""What more sections cost in disk, memory and GPU time: arithmetic on shapes, no measurement."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsity_trap.analysis import published
from sparsity_trap.bins import PATCH_BINS, TOKEN_GRID
from sparsity_trap.data.patches import PATCH_PIXELS
from sparsity_trap.decoders import build_decoder
from sparsity_trap.encoders import views
from sparsity_trap.settings import Preset

#: Public files of one section: the archive of binned outputs and the image, GB (10x Genomics).
RAW_GB = 16 + 12.5

#: Virchow2: parameters and tokens of a patch, prefix tokens included.
ENCODER_PARAMETERS, ENCODER_TOKENS, ENCODER_CHANNELS = 631e6, 261, 1280

#: Dense bf16 rate of an H100 SXM as its maker states it, FLOP/s, and the share taken as reached.
PEAK_FLOPS, REACHED = 989e12, 0.4

#: Folds of cross-validation once leaving out one patient at a time no longer pays.
FOLDS = 5


def patches_per_section() -> float:
    """Mean number of patches of the published sections."""
    return float(np.mean([published.SUMMARY[f"n_patches.{p}"] for p in ("P1", "P2", "P5")]))


def decoder_flops(preset: Preset, genes: int) -> float:
    """Floating point operations of one training step of Hist2ST per patch.

    Counted on the forward pass without computing it; the backward pass takes about twice as many.
    """
    with torch.device("meta"):
        decoder = build_decoder(
            "hist2st", ENCODER_CHANNELS, genes, **preset.decoder.model_dump()
        ).eval()
        tokens = torch.empty(1, ENCODER_CHANNELS, TOKEN_GRID, TOKEN_GRID)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        decoder(tokens)
    return 3.0 * counter.get_total_flops()


def cost_table(preset: Preset, genes: int, sections: tuple[int, ...]) -> pd.DataFrame:
    """Disk, memory and GPU hours for cohorts of several sizes with Virchow2 tokens.

    Parameters
    ----------
    preset
        Gives views, decoder size and epochs.
    genes
        Size of the panel G.
    sections
        Numbers of sections.

    Returns
    -------
    DataFrame indexed by the number of sections. Sizes in GB: ``raw``, ``stores`` (images, counts
    and masks before compression), ``tokens`` (all views, float16), ``training`` (tokens of one
    view, counts and masks of the training sections: what must be at hand in every epoch).
    ``folds`` trained per arm; GPU hours ``encoding`` and ``one_arm`` (all folds) at ``REACHED`` of
    the card's stated bf16 rate, a bound that decoders of this size, which move more bytes than
    they compute, do not reach.
    """
    patches = patches_per_section()
    token_bytes = ENCODER_CHANNELS * TOKEN_GRID**2 * 2
    maps = genes * PATCH_BINS**2
    n_views = len(views(preset.encoder))
    step = decoder_flops(preset, genes)
    encode = 2 * ENCODER_PARAMETERS * ENCODER_TOKENS * n_views
    rows = []
    for n in sections:
        folds = n if n <= FOLDS else FOLDS
        trained = n * (1 - 1 / folds)
        rate = PEAK_FLOPS * REACHED * 3600
        rows.append(
            {
                "sections": n,
                "raw": n * RAW_GB,
                "stores": n * patches * (3 * PATCH_PIXELS**2 + 2 * maps + PATCH_BINS**2) / 1e9,
                "tokens": n * patches * n_views * token_bytes / 1e9,
                "training": trained * patches * (token_bytes + maps + PATCH_BINS**2) / 1e9,
                "folds": folds,
                "encoding": n * patches * encode / rate,
                "one_arm": folds * trained * patches * preset.training.epochs * step / rate,
            }
        )
    return pd.DataFrame(rows).set_index("sections")
