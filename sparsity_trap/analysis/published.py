"""Numbers printed in the published paper, shown beside the reproduced ones and never mixed in.

All are for test patient P5, Hist2ST decoder on Virchow2. They stand in the ``published_*.csv``
files of this folder. Copy a table before changing it.
"""

from __future__ import annotations

import json
from importlib.resources import files

import pandas as pd


def _read(name: str, **options: object) -> pd.DataFrame:
    with files("sparsity_trap.analysis").joinpath(f"published_{name}.csv").open() as file:
        return pd.read_csv(file, **options)


#: Results table. PCC and SSIM as printed: pooled or averaged as the paper did, at 8 µm without the
#: tissue mask.
ARMS = _read("arms")

#: Mean sparsity (fraction), mean gain in PCC at 8 µm and genes won by Poisson, per category.
CATEGORIES = _read("categories")

#: Genes shown as rescued: PCC at 8 µm of both arms and gain in SSIM at 2 µm.
RESCUES = _read("rescues")

#: Per-gene summary of arms D (MSE) and E (Poisson), the sparsity association, and sizes.
SUMMARY: dict[str, float] = {
    # As JSON, so that whole numbers stay whole.
    row.key: json.loads(row.value)
    for row in _read("summary", dtype=str).itertuples()
}
