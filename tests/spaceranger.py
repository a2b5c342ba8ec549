"""Writes small Space Ranger folders with known content, independently of the simulator."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import tifffile
import zarr

DIHEDRAL = list(itertools.product([False, True], repeat=3))  # transpose, reverse y, reverse x


def write_outs(
    outs: Path,
    counts: np.ndarray,
    genes: Sequence[str],
    *,
    y: np.ndarray | None = None,
    x: np.ndarray | None = None,
    in_tissue: np.ndarray | None = None,
    image: np.ndarray | None = None,
    microns_per_pixel: float = 0.5,
    bin_um: float = 2.0,
    prefix: str = "s_002um",
    index_dtype: str = "int64",
    data_dtype: str = "int32",
    kinds: Sequence[str] | None = None,
    truth: np.ndarray | None = None,
    measured: np.ndarray | None = None,
) -> Path:
    """Write counts ``[G, rows, cols]`` of bins that lie at pixels ``y, x`` ``[rows, cols]``.

    Barcodes, of bins in tissue or of ``measured`` ones, and positions are written in two different
    random orders.
    """
    rng = np.random.default_rng(0)
    shape = counts.shape[1:]
    rows, cols = np.indices(shape)
    y = rows * 4.0 if y is None else y
    x = cols * 4.0 if x is None else x
    in_tissue = np.ones(shape, bool) if in_tissue is None else in_tissue
    if image is None:
        height, width = (max(64, int(np.nanmax(pixel)) + 2) for pixel in (y, x))
        image = np.full((height, width, 3), 200, np.uint8)
    square = outs / "binned_outputs" / "square_002um"
    (square / "spatial").mkdir(parents=True)

    order = rng.permutation(np.flatnonzero(in_tissue if measured is None else measured))
    per_bin = counts.reshape(len(genes), -1)[:, order].T
    bin_index, gene_index = np.nonzero(per_bin)
    all_names = np.array([f"{prefix}_{r:05d}_{c:05d}-1" for r, c in np.ndindex(shape)], "S")
    kinds = ["Gene Expression"] * len(genes) if kinds is None else kinds
    chunks = {"compression": "gzip", "shuffle": True, "chunks": (1000,), "maxshape": (None,)}
    with h5py.File(square / "filtered_feature_bc_matrix.h5", "w") as file:
        matrix = file.create_group("matrix")
        matrix["barcodes"] = all_names[order]
        matrix.create_dataset(
            "data", data=per_bin[bin_index, gene_index].astype(data_dtype), **chunks
        )
        matrix.create_dataset("indices", data=gene_index.astype(index_dtype), **chunks)
        ends = np.cumsum(np.bincount(bin_index, minlength=len(order)))
        matrix["indptr"] = np.concatenate([[0], ends]).astype(index_dtype)
        matrix["shape"] = np.array([len(genes), len(order)], "int32")
        features = matrix.create_group("features")
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(genes))], "S")
        features["name"] = np.array(genes, "S")
        features["feature_type"] = np.array(kinds, "S")
        features["genome"] = np.array(["GRCh38"] * len(genes), "S")

    table = pd.DataFrame(
        {
            "barcode": all_names.astype(str),
            "in_tissue": in_tissue.ravel().astype("uint8"),
            "array_row": rows.ravel().astype("uint32"),
            "array_col": cols.ravel().astype("uint32"),
            "pxl_row_in_fullres": y.ravel(),
            "pxl_col_in_fullres": x.ravel(),
        }
    )
    table = table.sample(frac=1, random_state=0)
    table.to_parquet(square / "spatial" / "tissue_positions.parquet", row_group_size=5000)
    scales = {"bin_size_um": bin_um, "microns_per_pixel": microns_per_pixel}
    (square / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    tifffile.imwrite(
        outs / "tissue_image.tif", image, tile=(256, 256), photometric="rgb", compression="zlib"
    )
    if truth is not None:
        group = zarr.create_group(outs / "truth.zarr", attributes={"genes": list(genes)})
        group.create_array("rate", data=truth.astype("float16"))
    return outs


def turned_grid(
    shape: tuple[int, int],
    how: tuple[bool, bool, bool],
    *,
    pixels_per_bin: float = 4.0,
    degrees: float = 1.5,
    kink_px: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Pixel positions ``y, x`` of an array grid lying in an image in one of the eight ways.

    The grid is rotated by some degrees and, with ``kink_px``, bent at the 128th bin from the left,
    so that no affine map fits all of it but one fits each patch.

    Returns
    -------
    y, x
        ``[rows, cols]`` each.
    image_shape
        Height and width that hold all bins.
    """
    transpose, reverse_y, reverse_x = how
    rows, cols = np.indices(shape).astype(float)
    down, right = (cols, rows) if transpose else (rows, cols)
    down = down.max() - down if reverse_y else down
    right = right.max() - right if reverse_x else right
    angle = np.deg2rad(degrees)
    y = pixels_per_bin * (np.cos(angle) * down + np.sin(angle) * right)
    x = pixels_per_bin * (-np.sin(angle) * down + np.cos(angle) * right)
    y = y + kink_px * np.abs(right - 127.5) / 128
    y, x = y - y.min() + 20.3, x - x.min() + 31.7
    return y, x, (int(y.max()) + 25, int(x.max()) + 25)


def paint(image_shape: tuple[int, int], of: Callable[..., np.ndarray]) -> np.ndarray:
    """RGB image whose channels are ``of(y, x)`` (three values in 0-255)."""
    y, x = np.indices(image_shape).astype(float)
    return np.rint(np.stack(of(y, x), axis=-1)).astype(np.uint8)
