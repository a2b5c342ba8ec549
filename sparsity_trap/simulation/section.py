"""Simulated Visium HD sections of colorectal cancer, written as Space Ranger output.

Tissue comes from `anatomy`, its picture from `histology`; here cells become transcripts:
per cell type a profile over the panel, per cell a library factor, lateral diffusion, uneven
library size, row and column stripes, and Poisson counts per 2 µm bin.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
import zarr
from PIL import Image
from scipy import ndimage

from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.genes import PANEL, panel_table
from sparsity_trap.files import building
from sparsity_trap.progress import track
from sparsity_trap.settings import SIMULATION, Simulation, UserError
from sparsity_trap.simulation.stain import draw_stain, render
from sparsity_trap.simulation.tissue import (
    STEP_UM,
    Anatomy,
    Kind,
    Region,
    grow_section,
    section_from_kinds,
    smooth_field,
)

LABEL_UM = 8.0

_GROUPS: dict[str, tuple[Kind, ...]] = {
    "epithelium": (Kind.ABSORPTIVE, Kind.GOBLET, Kind.CRYPT_BASE, Kind.TUMOUR),
    "plasma": (Kind.PLASMA_IGA, Kind.PLASMA_IGG),
    "lymphocyte": (Kind.T_CELL, Kind.B_CELL),
    "myeloid": (Kind.MACROPHAGE, Kind.NEUTROPHIL, Kind.MAST),
    "stroma": (Kind.FIBROBLAST, Kind.CAF),
    "muscle": (Kind.SMOOTH_MUSCLE,),
}

#: Relative expression per cell, "kind-or-group=level"; "*" is every other type. Levels are
#: set by hand from marker knowledge, with real tiles of P5 in view; the scale of each gene is
#: calibrated later, so only ratios within a row matter.
_LEVELS: dict[str, str] = {
    "MT-ATP6": "*=1.0 tumour=4.2 absorptive=3.6 goblet=2.2 crypt_base=2.8 muscle=2.2 plasma=2.0",
    "MT-ND4": "*=0.9 tumour=4.5 absorptive=3.2 goblet=2.0 crypt_base=3.0 muscle=2.0 plasma=1.9",
    "MT-CO3": "*=1.0 tumour=4.0 absorptive=3.8 goblet=2.3 crypt_base=2.6 muscle=2.5 plasma=1.8",
    "MT-CO2": "*=1.0 tumour=4.0 absorptive=3.6 goblet=2.2 crypt_base=2.7 muscle=2.4 plasma=1.9",
    "MT-CYB": "*=0.9 tumour=4.4 absorptive=3.3 goblet=2.1 crypt_base=2.8 muscle=2.2 plasma=1.8",
    "MT-ND3": "*=0.8 tumour=4.6 absorptive=3.0 goblet=2.0 crypt_base=2.8 muscle=1.7 plasma=1.7",
    "MT-ND4L": "*=0.8 tumour=4.4 absorptive=2.9 goblet=1.9 crypt_base=2.8 muscle=1.8 plasma=1.7",
    "MT-ND2": "*=0.8 tumour=4.4 absorptive=3.0 goblet=1.9 crypt_base=2.8 muscle=1.8 plasma=1.7",
    "MT-ND1": "*=0.8 tumour=4.2 absorptive=3.0 goblet=1.9 crypt_base=2.7 muscle=1.8 plasma=1.6",
    "MT-ND5": "*=0.8 tumour=4.0 absorptive=2.8 goblet=1.8 crypt_base=2.6 muscle=1.7 plasma=1.6",
    "PIGR": "*=0.10 absorptive=7.0 goblet=4.0 crypt_base=6.0 tumour=1.6",
    "LCN2": "*=0.08 absorptive=2.0 goblet=1.4 crypt_base=1.5 tumour=5.0 neutrophil=5.0",
    "MUC12": "*=0.08 absorptive=9.0 goblet=6.5 crypt_base=1.8 tumour=1.2",
    "FCGBP": "*=0.06 absorptive=1.6 goblet=10.0 crypt_base=2.2 tumour=0.5",
    "CEACAM5": "*=0.10 absorptive=2.6 goblet=3.4 crypt_base=0.9 tumour=6.5",
    "EPCAM": "*=0.10 absorptive=2.6 goblet=2.4 crypt_base=3.2 tumour=5.0",
    "PHGR1": "*=0.10 absorptive=4.2 goblet=3.2 crypt_base=2.2 tumour=3.8",
    "TSPAN8": "*=0.10 absorptive=2.0 goblet=2.2 crypt_base=2.0 tumour=4.2",
    "KRT8": "*=0.12 absorptive=2.4 goblet=1.6 crypt_base=2.2 tumour=5.2",
    "OLFM4": "*=0.08 absorptive=0.7 goblet=1.4 crypt_base=12.0 tumour=5.0",
    "CEACAM6": "*=0.10 absorptive=1.2 goblet=1.3 crypt_base=0.4 tumour=5.8 neutrophil=1.0",
    "CD24": "*=0.12 absorptive=1.4 goblet=1.8 crypt_base=3.0 tumour=3.4 b_cell=0.8",
    "VIM": "*=0.25 stroma=4.2 caf=5.0 endothelial=4.6 glia=4.0 myeloid=3.2 lymphocyte=2.4 "
    "plasma=1.2 adipocyte=2.0 muscle=1.4 tumour=0.35",
    "COL3A1": "*=0.10 fibroblast=5.0 caf=10.0 muscle=0.8 endothelial=0.8",
    "DES": "*=0.06 muscle=9.0 caf=0.3",
    "TAGLN": "*=0.12 muscle=8.0 caf=3.2 endothelial=1.0 fibroblast=0.8",
    "COL1A1": "*=0.08 fibroblast=3.4 caf=11.0 muscle=0.5",
    "COL1A2": "*=0.08 fibroblast=4.2 caf=9.0 muscle=0.6",
    "IGKC": "*=0.35 plasma_iga=12.0 plasma_igg=14.0 b_cell=1.6",
    "IGHG1": "*=0.30 plasma_iga=1.5 plasma_igg=12.0 b_cell=0.6",
    "JCHAIN": "*=0.20 plasma_iga=12.0 plasma_igg=4.0 b_cell=0.4",
    "CD74": "*=0.20 b_cell=5.5 macrophage=6.0 mast=0.8 t_cell=1.2 endothelial=1.2 plasma=0.8 "
    "tumour=0.4",
    "IGHA1": "*=0.20 plasma_iga=14.0 plasma_igg=0.8 b_cell=0.3",
    "IGHM": "*=0.06 b_cell=6.0 plasma_iga=1.0 plasma_igg=1.0",
    "TMSB4X": "*=1.2 lymphocyte=3.4 myeloid=4.2 endothelial=3.2 stroma=2.2 tumour=2.0 muscle=0.8",
    "TMSB10": "*=0.9 lymphocyte=2.6 myeloid=2.6 endothelial=3.0 stroma=2.2 tumour=3.0 muscle=0.6",
    "ACTB": "*=0.9 tumour=2.6 myeloid=2.6 lymphocyte=2.0 endothelial=1.8 muscle=1.2 goblet=1.6 "
    "absorptive=2.4",
    "FTH1": "*=0.9 myeloid=5.0 tumour=2.8 absorptive=1.6 muscle=0.7",
    "B2M": "*=1.0 lymphocyte=2.6 myeloid=2.8 endothelial=2.4 plasma=2.0 tumour=1.3 muscle=0.7",
    "OAZ1": "*=0.6 tumour=2.4 myeloid=1.8 absorptive=1.4 goblet=1.4 crypt_base=1.6",
    "FTL": "*=0.8 macrophage=6.0 tumour=2.4 absorptive=1.6 muscle=0.7",
    "EEF1G": "*=0.6 tumour=2.6 crypt_base=2.6 lymphocyte=1.3 absorptive=1.2 goblet=1.2",
    "CFL1": "*=0.6 tumour=2.2 lymphocyte=1.6 myeloid=1.9 stroma=1.0 crypt_base=1.5",
    "HSPA8": "*=0.5 tumour=2.6 crypt_base=1.8 plasma=1.4 muscle=0.9",
    "S100A6": "*=0.4 tumour=4.4 stroma=2.6 absorptive=1.8 endothelial=1.6 macrophage=2.0 glia=2.0",
    "CST3": "*=0.4 macrophage=6.0 stroma=2.6 tumour=0.8 endothelial=1.2 glia=1.2",
    "S100A10": "*=0.4 tumour=4.0 absorptive=2.6 goblet=1.6 endothelial=1.8 stroma=1.2",
    "LGALS3": "*=0.3 tumour=3.6 absorptive=4.2 goblet=3.0 macrophage=3.8 crypt_base=1.2",
    "SYNGR2": "*=0.2 tumour=3.2 absorptive=2.6 goblet=2.4 crypt_base=2.0",
    "PYGB": "*=0.2 tumour=3.4 absorptive=2.2 goblet=1.6 crypt_base=1.4 muscle=1.0",
}

_AMBIENT = 0.05  # share of all transcripts that float freely over the tissue
_BODY_UM = 2.2  # s.d. of a cell body's transcripts around its centre line

#: The 38 deconvolution labels of the real sections, as cell types of the simulation.
LABEL_KINDS: dict[str, Kind] = {
    "Adipocyte": Kind.ADIPOCYTE,
    "CAF": Kind.CAF,
    "CD4 T cell": Kind.T_CELL,
    "CD8 T cell": Kind.T_CELL,
    "Endothelial": Kind.ENDOTHELIAL,
    "Enteric Glial": Kind.GLIA,
    "Enterocyte": Kind.ABSORPTIVE,
    "Epithelial": Kind.ABSORPTIVE,
    "Fibroblast": Kind.FIBROBLAST,
    "Goblet": Kind.GOBLET,
    "Lymphatic Endothelial": Kind.ENDOTHELIAL,
    "Macrophage": Kind.MACROPHAGE,
    "Mast": Kind.MAST,
    "Mature B": Kind.B_CELL,
    "Memory B": Kind.B_CELL,
    "Myofibroblast": Kind.CAF,
    "NK": Kind.T_CELL,
    "Neuroendocrine": Kind.CRYPT_BASE,
    "Neutrophil": Kind.NEUTROPHIL,
    "Pericytes": Kind.ENDOTHELIAL,
    "Plasma": Kind.PLASMA_IGA,
    "Proliferating Fibroblast": Kind.CAF,
    "Proliferating Immune II": Kind.B_CELL,
    "Proliferating Macrophages": Kind.MACROPHAGE,
    "SM Stress Response": Kind.SMOOTH_MUSCLE,
    "Smooth Muscle": Kind.SMOOTH_MUSCLE,
    "Tuft": Kind.CRYPT_BASE,
    "Tumor I": Kind.TUMOUR,
    "Tumor II": Kind.TUMOUR,
    "Tumor III": Kind.TUMOUR,
    "Tumor IV": Kind.TUMOUR,
    "Tumor V": Kind.TUMOUR,
    "Unknown III (SM)": Kind.SMOOTH_MUSCLE,
    "Vascular Fibroblast": Kind.FIBROBLAST,
    "cDC I": Kind.MACROPHAGE,
    "mRegDC": Kind.MACROPHAGE,
    "pDC": Kind.MACROPHAGE,
    "vSM": Kind.SMOOTH_MUSCLE,
}

#: Coarse class of each `Kind`, for `choose_window`.
_COARSE = np.array([0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 4, 3, -1, 3])

_LABEL_URL = (
    "https://raw.githubusercontent.com/10XGenomics/HumanColonCancer_VisiumHD/main/MetaData/"
)
LABEL_SHA256: dict[str, str] = {
    "P1": "57d6da8e0db912140ab6e060d26e802d31fba32f9a93a04ff5d3d2b753a8cb4b",
    "P2": "9edf48ba9a9daad7d29d8fc58968c8b94e07671c27f381a697ca50d5be554a12",
    "P5": "a77187c81cbdf984d0805ed73d5b9d0dd4367d882302794f82f735ffd99c4368",
}


def profiles() -> np.ndarray:
    """Return relative expression per cell, float32 [gene, kind], genes in panel order."""
    table = np.zeros((len(PANEL), len(Kind)), np.float32)
    for g, gene in enumerate(PANEL):
        levels = dict(item.split("=") for item in _LEVELS[gene].split())
        # Groups first, so that a single type named beside its group wins.
        table[g] = float(levels.pop("*"))
        for name in sorted(levels, key=lambda name: name not in _GROUPS):
            for kind in _GROUPS.get(name, ()) or (Kind[name.upper()],):
                table[g, kind] = float(levels[name])
    return table


def bin_to_pixel(patient: str, settings: Simulation) -> np.ndarray:
    """Return the homography from array position to place in the full-resolution image.

    As in real sections, array rows run against image rows, the grid is turned by up to a degree,
    and a slight perspective makes the map not exactly affine.

    Returns
    -------
    float64 [3, 3]; ``H @ (array_col, array_row, 1)`` is proportional to ``(x, y, 1)`` of the bin's
    centre, in pixel widths from the image's upper left corner.
    """
    rng = _rng(settings, patient, "grid")
    count = round(settings.side_um / BIN_UM)
    side, pixel = settings.side_um, settings.pixel_um
    turn = np.deg2rad(rng.choice([-1, 1]) * rng.uniform(0.3, 0.9))
    tilt = rng.uniform(0.5, 1.0, 2) * rng.choice([-1, 1], 2) * 2.4 / side  # up to 1.2 µm at edges
    centre = np.array([[1, 0, -(count - 1) / 2], [0, 1, -(count - 1) / 2], [0, 0, 1]])
    flip = np.diag([BIN_UM, -BIN_UM, 1.0])
    rotate = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
    lean = np.array([[1, 0, 0], [0, 1, 0], [*(tilt / side), 1]])
    middle = side / 2 + margin_um(settings)
    place = np.array([[1 / pixel, 0, middle / pixel], [0, 1 / pixel, middle / pixel], [0, 0, 1]])
    return place @ lean @ rotate @ flip @ centre


def margin_um(settings: Simulation) -> float:
    """Width of the image around the capture area, µm: room for the turn of the grid."""
    return float(np.ceil(8 + 0.012 * settings.side_um))


def _apply(matrix: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight = matrix[2, 0] * x + matrix[2, 1] * y + matrix[2, 2]
    return (
        (matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]) / weight,
        (matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]) / weight,
    )


def _rng(settings: Simulation, patient: str, purpose: str) -> np.random.Generator:
    """One independent stream per purpose, so that a change in one leaves the others."""
    return np.random.default_rng([settings.seed, zlib.crc32(f"{patient}/{purpose}".encode())])


def simulate_section(
    outs: Path,
    patient: str,
    settings: Simulation,
    *,
    source: Literal["simulated", "tissue-map"] = "simulated",
    labels: Path | None = None,
) -> None:
    """Simulate one section and write it as a Space Ranger ``outs`` folder.

    Parameters
    ----------
    outs
        Folder to write; replaced when it exists. It appears only when complete.
    patient
        ``P1``, ``P2`` or ``P5``.
    settings
        Size, noise and seed. With `patient` and `source` they determine every count and pixel.
    source
        ``simulated`` grows the tissue; ``tissue-map`` lays out the real 8 µm cell-type map.
    labels
        Folder of ``DeconvolutionResults_<patient>CRC.csv.gz``, needed for ``tissue-map``.

    Raises
    ------
    UserError
        The cell-type map is missing and cannot be fetched, differs from the published file, or
        does not exist for this patient.
    """
    bar = track(range(5), f"simulating {patient}", "part")
    matrix = bin_to_pixel(patient, settings)
    if source == "tissue-map":
        anatomy = _anatomy_from_map(patient, settings, labels, matrix)
    else:
        side = settings.side_um + 2 * margin_um(settings)
        anatomy = grow_section(patient, side, _rng(settings, patient, "anatomy"))
    bar.update()

    stain = draw_stain(_rng(settings, patient, "stain"))
    image = render(anatomy, stain, settings.pixel_um, _rng(settings, patient, "paint"))
    bar.update()

    with building(Path(outs)) as partial:
        square = partial / "binned_outputs" / "square_002um"
        (square / "spatial").mkdir(parents=True)
        _write_image(partial, square, image, settings)
        del image
        bar.update()
        tissue = _write_positions(square, anatomy, matrix, settings)
        bar.update()
        _write_counts(partial, square, anatomy, matrix, tissue, patient, settings, source)
        bar.update()
    bar.close()


def _write_image(build: Path, square: Path, image: np.ndarray, settings: Simulation) -> None:
    per_cm = 1e4 / settings.pixel_um
    tifffile.imwrite(
        build / "tissue_image.tif",
        image,
        photometric="rgb",
        tile=(512, 512),
        compression="zlib",
        compressionargs={"level": 4},
        predictor=True,
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        description="simulated haematoxylin-eosin section",
        metadata=None,
    )
    scale = {}
    for name, longest in (("hires", 2000), ("lowres", 600)):
        shrink = max(1, int(np.ceil(max(image.shape) / longest)))
        small = Image.fromarray(image).reduce(shrink)
        small.save(square / "spatial" / f"tissue_{name}_image.png")
        scale[name] = 1 / shrink
    pixel = settings.pixel_um
    factors = {
        "spot_diameter_fullres": BIN_UM / pixel,
        "bin_size_um": BIN_UM,
        "microns_per_pixel": pixel,
        "regist_target_img_scalef": scale["hires"],
        "tissue_lowres_scalef": scale["lowres"],
        "fiducial_diameter_fullres": 330 / pixel,
        "tissue_hires_scalef": scale["hires"],
    }
    (square / "spatial" / "scalefactors_json.json").write_text(json.dumps(factors, indent=4))


def _write_positions(
    square: Path, anatomy: Anatomy, matrix: np.ndarray, settings: Simulation
) -> np.ndarray:
    """Write the positions of all bins; return the tissue mask, bool [array_row, array_col]."""
    count = round(settings.side_um / BIN_UM)
    rows, cols = np.divmod(np.arange(count * count), count)
    x, y = _apply(matrix, cols.astype(float), rows.astype(float))
    # A bin is in tissue when most of it is; lumens and vessels count as tissue, background not.
    covered = ndimage.uniform_filter((anatomy.region != Region.BACKGROUND).astype(np.float32), 3)
    i = np.clip(y * settings.pixel_um / STEP_UM, 0, covered.shape[0] - 1).astype(int)
    j = np.clip(x * settings.pixel_um / STEP_UM, 0, covered.shape[1] - 1).astype(int)
    tissue = covered[i, j] > 0.5
    table = pa.table(
        {
            "barcode": pa.array(_barcodes(rows, cols).astype(str)),
            "in_tissue": pa.array(tissue.astype(np.int32)),
            "array_row": pa.array(rows.astype(np.int32)),
            "array_col": pa.array(cols.astype(np.int32)),
            # Positions count whole numbers from pixel centres, the map from the image's corner.
            "pxl_row_in_fullres": pa.array(y - 0.5),
            "pxl_col_in_fullres": pa.array(x - 0.5),
        }
    )
    pq.write_table(table, square / "spatial" / "tissue_positions.parquet")
    return tissue.reshape(count, count)


def _barcodes(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Space Ranger barcodes of 2 µm bins, as bytes."""
    text = np.char.add(np.char.mod(b"s_002um_%05d_", rows), np.char.mod(b"%05d-1", cols))
    return text.astype("S21")


def _kind_fields(
    anatomy: Anatomy, matrix: np.ndarray, settings: Simulation, rng: np.random.Generator
) -> np.ndarray:
    """Spread the RNA of each cell type over the bins: float32 [kind, array_row, array_col].

    A cell's amount is log-normal around the size of its nucleus. It is laid along the cell body,
    from nucleus to apical end, then widened by the body's own width and by diffusion.
    """
    cells, count = anatomy.cells, round(settings.side_um / BIN_UM)
    spread = np.sqrt(np.log1p(settings.library_cv**2))
    amount = np.exp(rng.normal(-(spread**2) / 2, spread, len(cells)))
    area = cells.major * cells.minor
    area = area.where(area > 0)
    usual = area.groupby(cells.kind).transform("median")
    amount *= np.sqrt(area / usual).fillna(1).to_numpy()
    inverse = np.linalg.inv(matrix)
    fields = np.zeros((len(Kind), count, count), np.float32)
    for share, along in ((0.4, 0.0), (0.35, 0.5), (0.25, 1.0)):
        x = (cells.x + along * cells.apical_x).to_numpy(float) / settings.pixel_um
        y = (cells.y + along * cells.apical_y).to_numpy(float) / settings.pixel_um
        col, row = (np.rint(v).astype(int) for v in _apply(inverse, x, y))
        # Cells outside the capture area shed nothing into it beyond the first bins.
        inside = (col >= 0) & (col < count) & (row >= 0) & (row < count)
        kind = cells.kind.to_numpy()[inside].astype(int)
        at = kind * count * count + row[inside] * count + col[inside]
        np.add.at(fields.reshape(-1), at, (share * amount[inside]).astype(np.float32))
    sigma = np.hypot(settings.diffusion_um, _BODY_UM) / BIN_UM
    for kind in Kind:
        fields[kind] = ndimage.gaussian_filter(fields[kind], sigma, mode="nearest", truncate=4)
    return fields


def stripes(rng: np.random.Generator, count: int, sd: float) -> np.ndarray:
    """Draw row or column factors of period 2 with mean 1, float32 [count].

    Real 2 µm maps alternate between strong and weak lines with some jitter; most of the
    variance of the log factor, `sd` squared, goes to the alternation.
    """
    sign = np.where(np.arange(count) % 2, 1.0, -1.0) * rng.choice([-1, 1])
    log = sd * (0.92 * sign + 0.39 * rng.standard_normal(count))
    factor = np.exp(log)
    return (factor / factor.mean()).astype(np.float32)


def _write_counts(
    build: Path,
    square: Path,
    anatomy: Anatomy,
    matrix: np.ndarray,
    tissue: np.ndarray,
    patient: str,
    settings: Simulation,
    source: str,
) -> None:
    """Draw counts gene by gene; write the matrix and the rates they were drawn from.

    Each gene is scaled so that this section would show the published sparsity; for patients other
    than P5, from whom the published values come, the patient's shift is applied on top.
    """
    count = tissue.shape[0]
    rng = _rng(settings, patient, "expression")
    fields = _kind_fields(anatomy, matrix, settings, rng)
    library = np.exp(0.25 * smooth_field(rng, tissue.shape, min(60.0, count / 6)))
    row_factor, col_factor = (stripes(rng, count, settings.stripe_sd) for _ in range(2))
    weight = np.where(tissue, library * row_factor[:, None] * col_factor, 0).astype(np.float32)
    shift = np.exp(settings.patient_sd * rng.standard_normal(len(PANEL)))
    if patient == "P5":
        shift[:] = 1
    levels = profiles()
    published = panel_table().published_sparsity.to_numpy()

    truth = zarr.create_group(build / "truth.zarr")
    truth.attrs.update(
        {"genes": list(PANEL), "source": source, "seed": settings.seed, "patient": patient}
    )
    truth["row_factor"] = row_factor
    truth["col_factor"] = col_factor
    rates = truth.create_array(
        "rate",
        shape=(len(PANEL), count, count),
        chunks=(1, min(512, count), min(512, count)),
        dtype="float16",
        fill_value=0,
    )
    draw = _rng(settings, patient, "counts")
    bins, genes, values = [], [], []
    for g in range(len(PANEL)):
        rate = np.tensordot(levels[g], fields, axes=1)
        rate = (rate + _AMBIENT * rate[tissue].mean()) * weight
        rate *= scale_to_sparsity(rate[tissue], published[g]) * shift[g]
        # Counts come from the very rates that are stored, rounding included.
        rate = rate.astype(np.float16)
        rates[g] = rate
        drawn = draw.poisson(rate[tissue].astype(np.float32))
        at = np.flatnonzero(drawn)
        bins.append(at.astype(np.int32))
        genes.append(np.full(len(at), g, np.int64))
        values.append(drawn[at].astype(np.int32))
    order = np.argsort(np.concatenate(bins), kind="stable")
    per_bin = np.bincount(np.concatenate(bins), minlength=int(tissue.sum()))
    rows, cols = np.nonzero(tissue)
    _write_matrix(
        square / "filtered_feature_bc_matrix.h5",
        _barcodes(rows, cols),
        np.concatenate(values)[order],
        np.concatenate(genes)[order],
        np.concatenate([[0], np.cumsum(per_bin)]).astype(np.int64),
    )


def scale_to_sparsity(rate: np.ndarray, zeros: float) -> float:
    """Solve mean(exp(-s rate)) = zeros for s, the scale that leaves that share of empty bins.

    Parameters
    ----------
    rate
        Non-negative Poisson rates, any shape.
    zeros
        Wanted share of zero counts, above the share of zero rates and below 1.
    """
    # The left side falls and is convex in s: Newton from 0 rises to the root and never passes it.
    rate = np.asarray(rate, np.float64)
    s = 0.0
    for _ in range(60):
        empty = np.exp(-s * rate)
        step = (empty.mean() - zeros) / (rate * empty).mean()
        s += step
        if step < 1e-7 * s:
            break
    return float(s)


def _write_matrix(
    path: Path, barcodes: np.ndarray, data: np.ndarray, indices: np.ndarray, indptr: np.ndarray
) -> None:
    """Write a Space Ranger (Cell Ranger v3) feature-barcode matrix, bins in columns."""
    panel = len(PANEL)
    features = {
        # Symbols, not Ensembl identifiers: nothing real is claimed of a simulated feature.
        "id": PANEL,
        "name": list(PANEL),
        "feature_type": ["Gene Expression"] * panel,
        "genome": ["GRCh38"] * panel,
        "_all_tag_keys": ["genome"],
    }
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        file.attrs["version"] = 2
        file.attrs["software_version"] = SIMULATION
        file.attrs["chemistry_description"] = "Visium HD v1"
        group = file.create_group("matrix")

        def store(parent: h5py.Group, name: str, values: np.ndarray) -> None:
            chunks = (min(max(len(values), 1), 80_000),)
            parent.create_dataset(
                name, data=values, chunks=chunks, maxshape=(None,), compression="gzip", shuffle=True
            )

        store(group, "barcodes", barcodes)
        store(group, "data", data)
        store(group, "indices", indices)
        store(group, "indptr", indptr)
        store(group, "shape", np.array([panel, len(barcodes)], np.int32))
        inner = group.create_group("features")
        for name, values in features.items():
            store(inner, name, np.array(values, dtype=bytes))


def find_labels(patient: str, folder: Path | None) -> Path:
    """Return the real cell-type map of a patient, fetched once into `folder` and verified.

    Raises
    ------
    UserError
        No such map, no folder, no connection, or a file that differs from the published one.
    """
    if patient not in LABEL_SHA256:
        known = ", ".join(LABEL_SHA256)
        raise UserError(f"patient '{patient}' has no cell-type map: use one of {known}")
    name = f"DeconvolutionResults_{patient}CRC.csv.gz"
    if folder is None:
        raise UserError(f"the source tissue-map needs a folder that holds {name}: give one")
    path = Path(folder) / name
    if not path.is_file():
        import pooch

        try:
            pooch.retrieve(
                _LABEL_URL + name, f"sha256:{LABEL_SHA256[patient]}", fname=name, path=folder
            )
        except Exception as error:
            raise UserError(
                f"{name} could not be fetched ({error}): download {_LABEL_URL}{name} and put it "
                f"into {folder}"
            ) from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != LABEL_SHA256[patient]:
        raise UserError(
            f"{path} is not the published cell-type map (its SHA-256 differs): delete it and "
            f"download {_LABEL_URL}{name}"
        )
    return path


def read_label_grid(path: Path) -> np.ndarray:
    """Read a cell-type map: int8 [array_row, array_col] of `Kind` per 8 µm bin, -1 unlabelled."""
    table = pd.read_csv(path, usecols=["barcode", "DeconvolutionLabel2"], dtype=str)
    # s_008um_RRRRR_CCCCC-1, read as digits: string slicing is slow on 700,000 rows.
    digits = table.barcode.to_numpy().astype("S21").view(np.uint8).reshape(-1, 21).astype(int) - 48
    rows, cols = (digits[:, at : at + 5] @ 10 ** np.arange(4, -1, -1) for at in (8, 14))
    grid = np.full((rows.max() + 1, cols.max() + 1), -1, np.int8)
    grid[rows, cols] = table.DeconvolutionLabel2.map(LABEL_KINDS).fillna(-1).astype(np.int8)
    return grid


def choose_window(grid: np.ndarray, side: int) -> tuple[int, int]:
    """Choose the part of a real section to lay out.

    Blocks of 64 µm take the most frequent coarse class of their labels (normal epithelium,
    tumour, immune, stroma, muscle; adipocytes, where little RNA is found and labels are least
    sure, count as unlabelled). Of all windows on a lattice of an eighth side, take the one that
    maximises the entropy of its blocks times the share of its bins that carry their block's
    class; the first in reading order on a tie. So distinct compartments win over a mixture, and
    labelled bins over unlabelled ones.

    Parameters
    ----------
    grid
        Output of `read_label_grid`.
    side
        Side of the window, bins of 8 µm; at most the side of the grid.

    Returns
    -------
    Row and column of the upper-left bin.
    """
    if side > min(grid.shape):
        raise UserError(
            f"side_um {side * LABEL_UM:g} exceeds the cell-type map of "
            f"{min(grid.shape) * LABEL_UM:g} µm: lower simulation.side_um"
        )
    block = 8
    votes = np.stack([(grid >= 0) & (_COARSE[grid] == c) for c in range(_COARSE.max() + 1)])
    tall, wide = (size // block for size in grid.shape)
    votes = votes[:, : tall * block, : wide * block]
    votes = votes.reshape(-1, tall, block, wide, block).sum(axis=(2, 4))
    agreed = votes.max(axis=0)
    major = np.where(agreed > 0, votes.argmax(axis=0), -1)
    span = min(max(1, side // block), tall, wide)
    step = max(1, span // 8)
    best, where = -1.0, (0, 0)
    for i in range(0, tall - span + 1, step):
        for j in range(0, wide - span + 1, step):
            window = major[i : i + span, j : j + span]
            p = np.bincount(window[window >= 0], minlength=1) / window.size
            p = p[p > 0]
            score = -(p * np.log(p)).sum() * agreed[i : i + span, j : j + span].mean()
            row, col = (min(k * block, s - side) for k, s in zip((i, j), grid.shape, strict=True))
            if score > best:
                best, where = score, (row, col)
    return where


def _anatomy_from_map(
    patient: str, settings: Simulation, labels: Path | None, matrix: np.ndarray
) -> Anatomy:
    """Lay the chosen window of a real cell-type map under the array grid."""
    grid = read_label_grid(find_labels(patient, labels))
    row0, col0 = choose_window(grid, int(np.ceil(settings.side_um / LABEL_UM)))
    side = int(np.ceil((settings.side_um + 2 * margin_um(settings)) / STEP_UM))
    y, x = (np.mgrid[:side, :side].reshape(2, -1) + 0.5) * (STEP_UM / settings.pixel_um)
    col, row = _apply(np.linalg.inv(matrix), x, y)
    ratio = LABEL_UM / BIN_UM
    i = (np.floor((row + 0.5) / ratio) + row0).astype(np.int32)
    j = (np.floor((col + 0.5) / ratio) + col0).astype(np.int32)
    known = (i >= 0) & (i < grid.shape[0]) & (j >= 0) & (j < grid.shape[1])
    number = np.where(known, i * grid.shape[1] + j, -1).reshape(side, side)
    kinds = np.where(number >= 0, grid.ravel()[number], -1)
    return section_from_kinds(kinds, number, _rng(settings, patient, "anatomy"))
