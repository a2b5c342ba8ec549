"""Regions, cell types and bodies of the simulated tissue, with their properties from tables.

`cells.csv` holds what cells look like and where they live, `stroma.csv` how many of them lie in a
region without glands, `expression.csv` what they express. All may be edited. Levels of expression
were set by hand from marker knowledge, with real tiles of P5 in view; each gene is scaled to its
share of zero bins later, so only ratios within a row matter.
"""

from __future__ import annotations

from enum import IntEnum
from importlib.resources import files

import numpy as np
import pandas as pd


class Region(IntEnum):
    """What fills a pixel of the region map."""

    BACKGROUND = 0
    LUMEN = 1
    EPITHELIUM = 2
    TUMOUR = 3
    LAMINA_PROPRIA = 4
    SUBMUCOSA = 5
    DESMOPLASIA = 6
    MUSCLE = 7
    LYMPHOID = 8
    NECROSIS = 9
    VESSEL = 10
    VESSEL_WALL = 11
    FAT = 12


class Kind(IntEnum):
    """Cell types."""

    ABSORPTIVE = 0
    GOBLET = 1
    CRYPT_BASE = 2
    TUMOUR = 3
    PLASMA_IGA = 4
    PLASMA_IGG = 5
    T_CELL = 6
    B_CELL = 7
    MACROPHAGE = 8
    NEUTROPHIL = 9
    MAST = 10
    FIBROBLAST = 11
    CAF = 12
    SMOOTH_MUSCLE = 13
    ENDOTHELIAL = 14
    ADIPOCYTE = 15
    GLIA = 16


class Body(IntEnum):
    """Bodies without a nucleus that are painted but express nothing."""

    MUCIN = 0
    RED_CELL = 1
    FAT = 2
    DEBRIS = 3


def read_table(name: str) -> pd.DataFrame:
    """A table of this folder; numbers are those that are written, to the last bit."""
    path = files(__package__).joinpath(name)
    return pd.read_csv(path, float_precision="round_trip", keep_default_na=False, na_values=[""])


#: One row per `Kind`, in its order, with the columns of ``cells.csv``; lengths in µm. ``region``
#: is what a labelled bin speaks for, ``nucleated`` the share of labelled 8 µm bins that cut the
#: nucleus; stain runs from ``haematoxylin`` of the nucleus to ``roughness`` of its outline, and
#: ``cytoplasm`` is given where cells show one.
CELLS = read_table("cells.csv")
if CELLS["kind"].tolist() != [kind.name.lower() for kind in Kind]:
    raise ImportError("simulation/cells.csv: column 'kind' must list the members of Kind in order")

SPINDLE = CELLS["spindle"].to_numpy(bool)
HOME = np.array([Region[name.upper()] for name in CELLS["region"]])

#: Cells per mm² of connective and muscular regions. The order of ``stroma.csv`` is that of draws:
#: another one gives other, equally likely sections.
STROMA: dict[Region, dict[Kind, int]] = {
    Region[name.upper()]: {Kind[row.kind.upper()]: row.cells_per_mm2 for row in rows.itertuples()}
    for name, rows in read_table("stroma.csv").groupby("region", sort=False)
}


def expression() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Genes, their published share of zero bins [gene], and levels per cell [gene, kind]."""
    table = read_table("expression.csv")
    levels = table[[kind.name.lower() for kind in Kind]].to_numpy(np.float32)
    # In rows: sums over cell types keep their order, and so their last digit.
    levels = np.ascontiguousarray(levels)
    return table["gene"].tolist(), table["zero_percent"].to_numpy() / 100, levels
