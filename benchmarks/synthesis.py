"""Space Ranger folders of any size for the benchmark of reading, written in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsity_trap.bins import PATCH_BINS
from sparsity_trap.data.genes import PANEL, panel_table
from sparsity_trap.data.spaceranger import MATRIX, POSITIONS, SCALES, SPATIAL

if TYPE_CHECKING:
    import h5py

GRID = 3350  # bins a side of a 6.5 mm capture area
N_GENES = 18_085
NONZEROS_PER_BIN = 12.0
CHUNK = 80_000
BATCH = 200_000  # bins synthesised at a time
IMAGE_PIXELS, TILE = 20_000, 512
IMAGE_COUNTS = 10**6  # entries of the panel in its section
PATCHES_A_SIDE = 21  # of 128 bins: at 3.7 pixels per µm they fill the image
HDF5 = {"chunks": (CHUNK,), "maxshape": (None,), "compression": "gzip", "shuffle": True}


def write_section(outs: Path, n_bins: int, other_genes: int = 1) -> None:
    """Write a section of ``n_bins`` bins under tissue, in bounded memory.

    With ``other_genes`` of 2, twice as many non-zero entries of genes outside the panel, and the
    same bins and counts of the panel.
    """
    import h5py

    (outs / SPATIAL).mkdir(parents=True)
    rng = np.random.default_rng(n_bins)
    mean, panel_of = _gene_means(rng)
    other, more_rng = mean.copy(), np.random.default_rng([n_bins, 1])
    other[panel_of] = 0
    # Tissue is the middle of the capture area; the matrix lists its bins in random order.
    side = np.abs(np.arange(GRID) - (GRID - 1) / 2)
    distance = np.maximum(side[:, None], side).astype(np.float32).ravel()
    distance += rng.random(distance.size, dtype=np.float32) / 4
    bins = np.argpartition(distance, n_bins - 1).astype(np.int32)
    under_tissue = bins[:n_bins]
    rng.shuffle(under_tissue)
    in_tissue = np.zeros(GRID * GRID, bool)
    in_tissue[under_tissue] = True
    _write_positions(outs, in_tissue.reshape(GRID, GRID))

    panel_nonzeros = 0
    names = np.array([f"GENE{i}" for i in range(N_GENES)], "S")
    names[panel_of] = np.array(PANEL, "S")
    with h5py.File(outs / MATRIX, "w") as file:
        matrix = file.create_group("matrix")
        _write_features(matrix, names)
        indices = matrix.create_dataset("indices", (0,), "int64", **HDF5)
        data = matrix.create_dataset("data", (0,), "int32", **HDF5)
        barcodes = matrix.create_dataset("barcodes", (n_bins,), "S21", **HDF5)
        indptr = np.zeros(n_bins + 1, np.int64)
        cumulative = np.cumsum(mean) / mean.sum()
        for first in range(0, n_bins, BATCH):
            part = under_tissue[first : first + BATCH]
            barcodes[first : first + len(part)] = _barcodes(part)
            bin_, gene, count = _draw(rng, cumulative, len(part), NONZEROS_PER_BIN)
            panel_nonzeros += int(np.isin(gene, panel_of).sum())
            if other_genes == 2:
                more = _draw(more_rng, np.cumsum(other) / other.sum(), len(part), other.sum())
                bin_, gene, count = _add((bin_, gene, count), more)
            at = len(data)
            for dataset, values in ((indices, gene), (data, count)):
                dataset.resize(at + len(values), axis=0)
                dataset[at:] = values
            ends = np.cumsum(np.bincount(bin_, minlength=len(part)))
            indptr[first + 1 : first + 1 + len(part)] = at + ends
        matrix.create_dataset("indptr", data=indptr, **HDF5)
        matrix["shape"] = np.array([N_GENES, n_bins], np.int32)
        nonzeros = len(data)
    (outs / "section.json").write_text(
        json.dumps({"nonzeros": nonzeros, "panel_nonzeros": panel_nonzeros})
    )


def _gene_means(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean non-zero entries per bin of each gene, and the feature number of each panel gene."""
    panel = 1 - panel_table()["published_sparsity"].to_numpy()
    mean = 1 / np.arange(20, 20 + N_GENES) ** 0.9
    mean *= (NONZEROS_PER_BIN - panel.sum()) / mean.sum()
    mean = rng.permutation(mean)
    panel_of = rng.choice(N_GENES, len(PANEL), replace=False)
    mean[panel_of] = panel
    return mean, panel_of


def _draw(
    rng: np.random.Generator, cumulative: np.ndarray, n_bins: int, per_bin: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bin, gene and count of non-zero entries, in the order of bins and genes."""
    bin_ = np.repeat(np.arange(n_bins), rng.poisson(per_bin, n_bins))
    gene = np.searchsorted(cumulative, rng.random(len(bin_)), "right").clip(max=N_GENES - 1)
    entries, count = np.unique(bin_ * N_GENES + gene, return_counts=True)
    bin_, gene = np.divmod(entries, N_GENES)
    return bin_, gene, count.astype(np.int32)


def _add(*drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Sum of what was drawn, again in the order of bins and genes."""
    bin_, gene, count = map(np.concatenate, zip(*drawn, strict=True))
    entries, place = np.unique(bin_ * N_GENES + gene, return_inverse=True)
    return [*np.divmod(entries, N_GENES), np.bincount(place, count).astype(np.int32)]


def _write_features(parent: h5py.Group, names: np.ndarray) -> None:
    features = parent.create_group("features")
    features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(names))], "S")
    features["name"] = names
    features["feature_type"] = np.array(["Gene Expression"] * len(names), "S")
    features["genome"] = np.array(["GRCh38"] * len(names), "S")


def _barcodes(bins: np.ndarray) -> np.ndarray:
    text = np.tile(np.frombuffer(b"s_002um_RRRRR_CCCCC-1", np.uint8), (len(bins), 1))
    row, col = np.divmod(bins, GRID)
    for number, first in ((row, 8), (col, 14)):
        for i in range(5):
            text[:, first + i] = 48 + number // 10 ** (4 - i) % 10
    return text.view("S21")[:, 0]


def _write_positions(outs: Path, in_tissue: np.ndarray, pixels_per_bin: float = 7.3) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, cols = in_tissue.shape
    col = np.arange(cols, dtype=np.uint32)
    writer = None
    for row in range(0, rows, 50):
        tissue = in_tissue[row : row + 50]
        array_row = np.repeat(np.arange(row, row + len(tissue), dtype=np.uint32), cols)
        array_col = np.tile(col, len(tissue))
        barcode = _barcodes(array_row.astype(np.int32) * GRID + array_col.astype(np.int32))
        table = pa.table(
            {
                "barcode": pa.array(barcode.astype("U21")),
                "in_tissue": tissue.ravel().astype(np.uint8),
                "array_row": array_row,
                "array_col": array_col,
                "pxl_row_in_fullres": (array_row + 0.5) * pixels_per_bin,
                "pxl_col_in_fullres": (array_col + 0.5) * pixels_per_bin,
            }
        )
        writer = writer or pq.ParquetWriter(outs / POSITIONS, table.schema)
        writer.write_table(table)
    writer.close()
    scales = {"bin_size_um": 2.0, "microns_per_pixel": 2 / pixels_per_bin}
    (outs / SCALES).write_text(json.dumps(scales))


def write_image_section(outs: Path) -> None:
    """Write a section whose image is a BigTIFF of 20,000 x 20,000 pixels in JPEG tiles."""
    import h5py
    import tifffile

    (outs / SPATIAL).mkdir(parents=True)
    in_tissue = np.ones((PATCHES_A_SIDE * PATCH_BINS,) * 2, bool)
    _write_positions(outs, in_tissue, IMAGE_PIXELS / len(in_tissue))
    rng = np.random.default_rng(0)
    with h5py.File(outs / MATRIX, "w") as file:
        matrix = file.create_group("matrix")
        _write_features(matrix, np.array(PANEL, "S"))
        row, col = np.divmod(
            rng.choice(in_tissue.size, IMAGE_COUNTS, replace=False), len(in_tissue)
        )
        matrix["barcodes"] = _barcodes(row * GRID + col)
        matrix["indices"] = rng.integers(len(PANEL), size=IMAGE_COUNTS)
        matrix["data"] = np.ones(IMAGE_COUNTS, np.int32)
        matrix["indptr"] = np.arange(IMAGE_COUNTS + 1)
    base = rng.integers(120, 255, (TILE // 8, TILE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    n_tiles = (-(-IMAGE_PIXELS // TILE)) ** 2
    tifffile.imwrite(
        outs / "tissue_image.btf",
        (np.roll(base, int(shift), axis=0) for shift in rng.integers(TILE, size=n_tiles)),
        shape=(IMAGE_PIXELS, IMAGE_PIXELS, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="rgb",
        compression="jpeg",
        bigtiff=True,
    )
