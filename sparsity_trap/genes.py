"""The 50-gene panel: symbols, categories and the sparsity published for patient P5.

The panel is fixed before any section is read, so no patient can influence it.
Sparsity is the percentage of in-tissue 2 µm bins with a count of zero.
"""

from __future__ import annotations

import pandas as pd

#: category -> {symbol: published % of zero bins in patient P5}, in the order of the paper.
PUBLISHED_SPARSITY: dict[str, dict[str, float]] = {
    "mitochondrial": {
        "MT-ATP6": 74.9, "MT-ND4": 75.2, "MT-CO3": 76.4, "MT-CO2": 79.5, "MT-CYB": 79.5,
        "MT-ND3": 85.9, "MT-ND4L": 88.1, "MT-ND2": 90.0, "MT-ND1": 95.2, "MT-ND5": 96.6,
    },
    "secretory": {"PIGR": 92.7, "LCN2": 95.5, "MUC12": 95.7, "FCGBP": 97.5},
    "epithelial": {
        "CEACAM5": 94.7, "EPCAM": 95.3, "PHGR1": 96.2, "TSPAN8": 96.5,
        "KRT8": 97.1, "OLFM4": 97.4, "CEACAM6": 97.5, "CD24": 97.7,
    },
    "stromal": {
        "VIM": 95.6, "COL3A1": 95.6, "DES": 96.4, "TAGLN": 97.0, "COL1A1": 97.4, "COL1A2": 98.0,
    },
    "immune": {
        "IGKC": 90.0, "IGHG1": 96.6, "JCHAIN": 96.9, "CD74": 97.9, "IGHA1": 98.1, "IGHM": 99.2,
    },
    "housekeeping": {
        "TMSB4X": 87.7, "TMSB10": 94.1, "ACTB": 94.7, "FTH1": 95.3, "B2M": 95.8,
        "OAZ1": 96.8, "FTL": 96.9, "EEF1G": 97.9, "CFL1": 98.1, "HSPA8": 98.4,
    },
    "other": {
        "S100A6": 95.9, "CST3": 96.9, "S100A10": 97.9, "LGALS3": 98.2, "SYNGR2": 98.7, "PYGB": 98.8,
    },
}  # fmt: skip

#: Panel order used by every array in the project (axis "gene").
PANEL: tuple[str, ...] = tuple(g for genes in PUBLISHED_SPARSITY.values() for g in genes)


def panel_table() -> pd.DataFrame:
    """Return the panel as a table.

    Returns
    -------
    DataFrame with columns ``gene``, ``category`` and ``published_sparsity`` (fraction 0-1), in
    panel order.
    """
    rows = [
        (gene, category, percent / 100)
        for category, genes in PUBLISHED_SPARSITY.items()
        for gene, percent in genes.items()
    ]
    return pd.DataFrame(rows, columns=["gene", "category", "published_sparsity"])
