"""Simulated Visium HD sections of colorectal cancer, written as Space Ranger output.

Tissue comes from `tissue` or `label_map`, its picture from `stain`; here cells become transcripts:
per cell type a profile over the panel, per cell a library factor, lateral diffusion, uneven
library size, row and column stripes, and counts per 2 µm bin: Poisson draws, unless the settings
make them depart from that (see `departures`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
import zarr
from PIL import Image
from scipy import ndimage
from scipy import sparse as sp

from sparsity_trap.bins import BIN_UM
from sparsity_trap.files import building
from sparsity_trap.progress import track
from sparsity_trap.settings import Simulation
from sparsity_trap.simulation.cells import Kind, Region, expression
from sparsity_trap.simulation.departures import Departures
from sparsity_trap.simulation.growth import grow_section
from sparsity_trap.simulation.label_map import (
    LABEL_UM,
    choose_window,
    find_labels,
    read_label_grid,
    section_from_kinds,
)
from sparsity_trap.simulation.matrix import barcodes, write_matrix
from sparsity_trap.simulation.segments import cell_name, write_cells
from sparsity_trap.simulation.stain import draw_stain, render
from sparsity_trap.simulation.tissue import STEP_UM, Anatomy, smooth_field

_AMBIENT = 0.05  # share of all transcripts that float freely over the tissue
_BODY_UM = 2.2  # s.d. of a cell body's transcripts around its centre line


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
    bar = track(range(6), f"simulating {patient}", "part")
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

    with building(Path(outs)) as build:
        square = build / "binned_outputs" / "square_002um"
        (square / "spatial").mkdir(parents=True)
        _write_image(build, square, image, settings)
        del image
        bar.update()
        tissue = _write_positions(square, anatomy, matrix, settings)
        bar.update()
        counts = _write_counts(build, square, anatomy, matrix, tissue, patient, settings, source)
        bar.update()
        _write_cells(build, anatomy, matrix, tissue, counts, settings)
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
            "barcode": pa.array(barcodes(rows, cols).astype(str)),
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
) -> sp.csr_array:
    """Draw counts gene by gene; write the matrix and the means of the counts.

    Returns the counts, int32 [bins in tissue, genes].
    """
    count = tissue.shape[0]
    names, zeros, levels = expression()
    rng = _rng(settings, patient, "expression")
    fields = _kind_fields(anatomy, matrix, settings, rng)
    library = np.exp(0.25 * smooth_field(rng, tissue.shape, min(60.0, count / 6)))
    row_factor, col_factor = (stripes(rng, count, settings.stripe_sd) for _ in range(2))
    weight = np.where(tissue, library * row_factor[:, None] * col_factor, 0).astype(np.float32)
    shift = np.exp(settings.patient_sd * rng.standard_normal(len(names)))
    if patient == "P5":  # from whom the published values come
        shift[:] = 1

    truth = zarr.create_group(build / "truth.zarr")
    truth.attrs.update(
        {"genes": names, "source": source, "seed": settings.seed, "patient": patient}
    )
    truth["row_factor"] = row_factor
    truth["col_factor"] = col_factor
    rates = truth.create_array(
        "rate",
        shape=(len(names), count, count),
        chunks=(1, min(512, count), min(512, count)),
        dtype="float16",
        fill_value=0,
    )
    depart = Departures(settings, partial(_rng, settings, patient), len(names), tissue)
    depart.write(truth)
    bins, genes, values = [], [], []
    for g, rate in enumerate(_rates(fields, weight, depart, levels, zeros, shift)):
        rates[g] = rate
        drawn = depart.draw(g, rate[tissue].astype(np.float32))
        at = np.flatnonzero(drawn)
        bins.append(at.astype(np.int32))
        genes.append(np.full(len(at), g, np.int64))
        values.append(drawn[at].astype(np.int32))
    order = np.argsort(np.concatenate(bins), kind="stable")
    per_bin = np.bincount(np.concatenate(bins), minlength=int(tissue.sum()))
    entries = (
        np.concatenate(values)[order],
        np.concatenate(genes)[order],
        np.concatenate([[0], np.cumsum(per_bin)]).astype(np.int64),
    )
    rows, cols = np.nonzero(tissue)
    path = square / "filtered_feature_bc_matrix.h5"
    write_matrix(path, names, barcodes(rows, cols), *entries)
    return sp.csr_array(entries, shape=(len(rows), len(names)))


def _write_cells(
    build: Path,
    anatomy: Anatomy,
    matrix: np.ndarray,
    tissue: np.ndarray,
    counts: sp.csr_array,
    settings: Simulation,
) -> None:
    """Write the section's cells and the counts of those with a bin in tissue."""
    pixel, inverse = settings.pixel_um, np.linalg.inv(matrix)

    def to_um(col: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = _apply(matrix, col, row)
        return x * pixel, y * pixel

    def to_array(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _apply(inverse, x / pixel, y / pixel)

    def to_pixels(col: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = _apply(matrix, col, row)
        return x - 0.5, y - 0.5  # as positions are counted

    cell = write_cells(build, anatomy.cells, to_um, to_array, to_pixels, len(tissue))[tissue]
    held = np.flatnonzero(cell)
    number, place = np.unique(cell[held], return_inverse=True)
    ones = sp.csr_array(
        (np.ones(len(held), np.int32), (place, held)), shape=(len(number), len(cell))
    )
    sums = sp.csr_array(ones @ counts)
    sums.sort_indices()
    write_matrix(
        build / "segmented_outputs" / "filtered_feature_cell_matrix.h5",
        expression()[0],
        np.array([cell_name(n) for n in number.tolist()], "S"),
        sums.data,
        sums.indices.astype(np.int64),
        sums.indptr.astype(np.int64),
    )


def _rates(
    fields: np.ndarray,
    weight: np.ndarray,
    depart: Departures,
    levels: np.ndarray,
    zeros: np.ndarray,
    shift: np.ndarray,
) -> Iterator[np.ndarray]:
    """Mean count of each gene in every bin, float16 [array_row, array_col].

    Each gene is scaled so that this section, without departures, would show its published share of
    zero bins; the patient's shift is applied on top. Counts are drawn around these very means,
    rounding included.

    Parameters
    ----------
    fields
        RNA of each cell type, [kind, array_row, array_col].
    weight
        Factor of each bin: library size and stripes, 0 off tissue.
    depart
        What the section does otherwise, and its tissue.
    levels, zeros, shift
        Expression [gene, kind], share of zero bins and patient's factor [gene].
    """
    tissue = depart.tissue
    for g, level in enumerate(levels):
        told = np.tensordot(level, fields, axes=1)
        told = told + _AMBIENT * told[tissue].mean()
        rate = told * weight
        rate *= scale_to_sparsity(rate[tissue], zeros[g]) * shift[g]
        yield depart.rate(told, weight, rate).astype(np.float16)


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
