"""Numbers that others have printed about real tissue, never mixed with those of a build.

The tables lie in ``published/``, with the source of each in its README. Copy a table before
changing it.
"""

from __future__ import annotations

import json

import pandas as pd

from sparsity_trap.settings import ROOT

FOLDER = ROOT / "published"


def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(FOLDER / f"{name}.csv")


def _statements(work: str) -> dict[str, float]:
    table = pd.read_csv(FOLDER / "statements.csv", dtype=str)
    rows = table[table["work"] == work]
    # As JSON, so that whole numbers stay whole.
    return {row.key: json.loads(row.value) for row in rows.itertuples()}


#: Table S1 of the work reproduced here: arms D and E with Hist2ST on Virchow2, patient P5.
GENES = _read("benchmark_genes")

#: Its results table. PCC and SSIM as printed: pooled or averaged as the author did, at 8 µm without
#: the tissue mask.
ARMS = _read("benchmark_arms")

#: Mean sparsity (fraction), mean gain in PCC at 8 µm and genes won by Poisson, per category.
CATEGORIES = _read("benchmark_categories")

#: Genes shown as rescued: their rows of table S1, with the gain in SSIM at 2 µm.
RESCUES = (
    GENES.assign(delta_ssim_2um=GENES["ssim_2um_poisson"] - GENES["ssim_2um_mse"])
    .set_index("gene")
    .loc[["MUC12", "MT-ND3", "JCHAIN", "DES", "FCGBP"]]
    .reset_index()
)

#: What its text says of arms D (MSE) and E (Poisson), the sparsity association, and sizes.
SUMMARY = _statements("benchmark")

#: Table S1 of the author's later manuscript, and what its text says.
LATER_GENES = _read("publication_genes")
LATER_SUMMARY = _statements("publication")

#: Decoder by loss, on the same patient.
TWO_BY_TWO = _read("two_by_two")

#: A Poisson model with its labels, and with labels dealt anew over patches.
LABEL_SHUFFLE = _read("label_shuffle")

#: Squared error on targets scaled gene by gene, at 8 µm.
SCALED_TARGET = _read("scaled_mse_8um_genes")

#: Seven losses with one linear decoder, a column per task of HEST-1k.
HEST = _read("hest_losses").drop(columns="mean").set_index("loss")
