"""Files of predictions, written as others would write them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy import ndimage
from spaceranger import write_outs

GENES = ["EPCAM", "PIGR", "VIM"]
SHAPE = (150, 140)  # neither side a multiple of a patch or of 8 µm


def made_section(folder: Path) -> SimpleNamespace:
    """Space Ranger's output of a small section, and its counts and rates [G, rows, cols].

    A corner is not tissue.
    """
    rng = np.random.default_rng(0)
    rough = rng.normal(size=(3, *SHAPE))
    smooth = ndimage.gaussian_filter(rough, 4, axes=(1, 2))
    rate = np.array([0.1, 0.2, 0.5])[:, None, None] * np.exp(smooth / smooth.std() - 0.5)
    tissue = np.ones(SHAPE, bool)
    tissue[:20, :30] = False
    counts = rng.poisson(rate) * tissue
    outs = write_outs(folder / "outs", counts, GENES, in_tissue=tissue)
    return SimpleNamespace(outs=outs, counts=counts, rate=rate, tissue=tissue, shape=SHAPE)


def barcodes(rows: np.ndarray, cols: np.ndarray, bin_um: int) -> list[str]:
    return [f"s_{bin_um:03d}um_{r:05d}_{c:05d}-1" for r, c in zip(rows, cols, strict=True)]


def table(section: SimpleNamespace, bin_um: int = 2, seed: int = 1, **changes) -> AnnData:
    """The model as AnnData: a row per bin in tissue, in any order."""
    rate, tissue = section.rate * section.tissue, section.tissue
    if bin_um == 8:
        rows, cols = (-(-n // 4) * 4 for n in tissue.shape)
        pad = ((0, rows - tissue.shape[0]), (0, cols - tissue.shape[1]))
        blocks = (rows // 4, 4, cols // 4, 4)
        rate = np.pad(rate, ((0, 0), *pad)).reshape(3, *blocks).sum((2, 4))
        tissue = np.pad(tissue, pad).reshape(blocks).sum((1, 3)) > 8
    rows, cols = np.nonzero(tissue)
    order = np.random.default_rng(seed).permutation(len(rows))
    rows, cols = rows[order], cols[order]
    values = rate[:, rows, cols].T.astype(changes.get("dtype", np.float32))
    if matrix := changes.get("sparse"):
        values = matrix(values)
    obs = pd.DataFrame(index=barcodes(rows, cols, bin_um))
    if changes.get("places"):
        names = [f"bin{i}" for i in range(len(rows))]
        obs = pd.DataFrame({"array_row": rows, "array_col": cols}, index=names)
    return AnnData(values, obs, pd.DataFrame(index=changes.get("genes", GENES)))


SPARSE = {"csr": sp.csr_matrix, "csc": sp.csc_matrix}
