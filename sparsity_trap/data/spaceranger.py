"""A Visium HD section at 2 µm on disk, as Space Ranger 3 and 4 write it.

Paths, counts, positions of bins and image scale. Nothing is read that is not asked for.

Libraries for file formats are imported where they are used: training reads only patch stores, and
must start without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.matrix import (
    BLOCK,
    DAMAGE,
    check_present,
    read_all_genes,
    read_features,
    read_genes,
)
from sparsity_trap.inputs import check_file, is_dir, is_file, read_text, unreadable
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import scipy.sparse as sp
    from anndata import AnnData

SQUARE = "square_002um"
#: Files of a section, relative to Space Ranger's ``outs`` folder.
MATRIX = Path("binned_outputs", SQUARE, "filtered_feature_bc_matrix.h5")
SPATIAL = Path("binned_outputs", SQUARE, "spatial")
POSITIONS = SPATIAL / "tissue_positions.parquet"
SCALES = SPATIAL / "scalefactors_json.json"
IMAGE_NAMES = ("tissue_image.tif", "tissue_image.tiff", "tissue_image.btf")

_POSITION_COLUMNS = (
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)
_BATCH = 100_000  # rows of the positions table in hand at a time


class Positions(NamedTuple):
    """Bins laid out on their grid, each array ``[rows, cols]``.

    ``in_tissue`` is bool; ``y`` and ``x`` are the full-resolution pixel row and column of the bin
    centre, float32, NaN where the positions file does not list the bin.
    """

    in_tissue: np.ndarray
    y: np.ndarray
    x: np.ndarray


@dataclass(frozen=True)
class Slide:
    """One section on disk, and what its small tables say.

    Attributes
    ----------
    outs, image
        Space Ranger's folder and the full-resolution H&E.
    microns_per_pixel
        Of that image.
    array_shape
        Rows and columns of the array of 2 µm bins.
    genes
        Symbol of each gene of the matrix, in its order.
    """

    outs: Path
    image: Path
    microns_per_pixel: float
    array_shape: tuple[int, int]
    genes: tuple[str, ...]


def open_slide(outs: Path | str, image: Path | str | None = None) -> Slide:
    """Find the files of one section and read its small tables.

    Parameters
    ----------
    outs
        Space Ranger's ``outs`` folder, which holds ``binned_outputs/square_002um``.
    image
        Full-resolution H&E (TIFF or BigTIFF). Default: ``tissue_image.tif``, ``.tiff`` or ``.btf``
        in ``outs``.

    Raises
    ------
    UserError
        A file is missing or unreadable, or the bins are not 2 µm wide.
    """
    outs = Path(outs)
    if not is_dir(outs):
        raise UserError(f"{outs} does not exist: give the 'outs' folder of Space Ranger")
    if not is_dir((outs / MATRIX).parent):
        raise UserError(
            f"{(outs / MATRIX).parent} does not exist: give the 'outs' folder of a Visium HD run "
            "and unpack its binned_outputs there"
        )
    image = _find_image(outs, image)
    genes = tuple(name for name in read_features(outs / MATRIX) if name is not None)
    return Slide(outs, image, read_scale(outs), read_array_shape(outs), genes)


def read_counts(outs: Path | str, genes: Sequence[str], block: int = BLOCK) -> sp.csc_array:
    """Read the UMI counts of some genes at 2 µm.

    Parameters
    ----------
    outs
        Space Ranger's folder.
    genes
        Symbols. Features that share a symbol are summed: UMIs of one symbol are additive, and
        taking the first feature would silently lose counts.
    block
        Entries of the matrix in one piece of work; a few pieces are in memory at a time.

    Returns
    -------
    csc_array ``[array_rows * array_cols, len(genes)]``, uint16, rows of a column in order. The row
    of a bin is ``array_row * array_cols + array_col``. Zeros are not stored.

    Raises
    ------
    UserError
        A gene is not in the matrix; a count is negative, fractional or above 65535; the file is
        damaged or of another section; a barcode is not that of a 2 µm bin of this grid.
    """
    return read_genes(Path(outs) / MATRIX, genes, read_array_shape(outs), block)


def read_8um_table(outs: Path | str) -> AnnData:
    """Read the counts of all genes, summed to bins of 8 µm: the table that scanpy works on.

    It is made from the 2 µm matrix, which is the only one that downloads need to hold: about 2 GB
    are in memory for 8.7 million bins, half of what scanpy needs to read them.

    Returns
    -------
    AnnData of the 8 µm bins that hold a barcode, in the order of the array, named as Space Ranger
    names them. ``X`` float32 (csr) ``[bins, genes]``; ``obs``: ``array_row`` and ``array_col`` at
    8 µm. Features that share a symbol are summed; other features, such as antibodies, left out.

    Raises
    ------
    UserError
        As from :func:`read_counts`.
    """
    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData

    shape = read_array_shape(outs)
    bins, fine, genes = read_all_genes(Path(outs) / MATRIX, shape)
    wide = -(-shape[1] // 4)
    row, col = (place // 4 for place in np.divmod(bins, shape[1]))
    number, place = np.unique(row * wide + col, return_inverse=True)
    # Sums over bins, as a product with a matrix of ones; its indices decide on those of the sums.
    ones = sp.csr_array(
        (np.ones(len(bins), np.uint16), (place.astype(np.int32), np.arange(len(bins), dtype="i4"))),
        shape=(len(number), len(bins)),
    )
    coarse = ones @ fine
    del fine
    row, col = np.divmod(number, wide)
    obs = pd.DataFrame(
        {"array_row": row, "array_col": col},
        index=[f"s_008um_{r:05d}_{c:05d}-1" for r, c in zip(row, col, strict=True)],
    )
    coarse.data = coarse.data.astype(np.float32)
    return AnnData(sp.csr_matrix(coarse), obs, pd.DataFrame(index=genes))


def read_positions(outs: Path | str) -> Positions:
    """Read tissue flag and pixel position of every bin, laid out ``[rows, cols]``."""
    import pyarrow as pa

    path, shape = Path(outs) / POSITIONS, read_array_shape(outs)
    in_tissue = np.zeros(shape, bool)
    y = np.full(shape, np.nan, np.float32)
    x = np.full(shape, np.nan, np.float32)
    with _open_table(path, _POSITION_COLUMNS) as table:
        for batch in table.iter_batches(batch_size=_BATCH, columns=list(_POSITION_COLUMNS)):
            tissue, row, col, pixel_row, pixel_col = (
                _numbers(batch.column(name), name, path) for name in _POSITION_COLUMNS
            )
            if not np.isin(tissue, (0, 1)).all():
                raise UserError(
                    f"{path}: in_tissue is {tissue[~np.isin(tissue, (0, 1))][0]} in a bin, not 0 "
                    "or 1: give Space Ranger's own table"
                )
            in_tissue[row, col] = tissue == 1
            y[row, col] = pixel_row
            x[row, col] = pixel_col
    pa.default_memory_pool().release_unused()  # or Arrow keeps tens of MB for its next table
    return Positions(in_tissue, y, x)


def _numbers(column: pa.Array, name: str, path: Path) -> np.ndarray:
    """A column of the positions table as numbers, whatever the program that wrote it made of them.

    R writes real numbers, pandas true and false or categories, others text. Pixel positions may be
    missing; they are then NaN.
    """
    import pyarrow as pa

    pixel = name.startswith("pxl_")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count and not pixel:
        raise UserError(
            f"{path}: {name} is missing in {column.null_count} of {len(column)} lines: give Space "
            "Ranger's own table"
        )
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    try:
        if name == "in_tissue" and text:
            column = column.cast(pa.bool_())  # "TRUE", "false", "1"
        column = column.cast(pa.float64() if pixel else pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        reason = " ".join(str(error).split())
        kind = "numbers" if pixel else "whole numbers"
        raise UserError(
            f"{path}: {name} does not hold {kind} ({reason}): give Space Ranger's own table"
        ) from None
    values = column.to_numpy(zero_copy_only=False)
    if not pixel and values.min(initial=0) < 0:
        raise UserError(f"{path}: {name} is {values.min()}: give Space Ranger's own table")
    return values


def read_array_shape(outs: Path | str) -> tuple[int, int]:
    """Rows and columns of the array of bins, from the positions table's own statistics."""
    path = Path(outs) / POSITIONS
    names = ("array_row", "array_col")
    with _open_table(path, names) as table:
        if not table.metadata.num_rows:
            raise UserError(f"{path} lists no bins: copy it again")
        place = {table.metadata.schema.column(i).name: i for i in range(table.metadata.num_columns)}
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        known = [[group.column(place[name]).statistics for group in groups] for name in names]
        if all(found and isinstance(found.max, int) for column in known for found in column):
            rows, cols = (1 + max(found.max for found in column) for column in known)
        else:  # of other types, or without statistics
            columns = (table.read([name]).column(name).combine_chunks() for name in names)
            numbers = [_numbers(c, n, path) for c, n in zip(columns, names, strict=True)]
            rows, cols = (1 + int(values.max()) for values in numbers)
    return rows, cols


def read_scales(outs: Path | str) -> dict[str, float]:
    """Space Ranger's scale factors, the numbers among them."""
    path = Path(outs) / SCALES
    check_present(path)
    text = read_text(path, "a table of scale factors (JSON)")
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("no object at its top")
    except (ValueError, RecursionError) as error:
        what = "a whole table of scale factors (JSON)"
        raise unreadable(path, what, error, own=b"{") from None
    return {key: value for key, value in content.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_scale(outs: Path | str) -> float:
    """Width of a full-resolution pixel in µm; ``UserError`` where bins are not 2 µm wide."""
    path, scales = Path(outs) / SCALES, read_scales(outs)
    if "bin_size_um" not in scales:
        raise UserError(
            f"{path} has no number bin_size_um: give the file of {SQUARE} that Space Ranger 3 or "
            "later wrote, or add it, where bins are 2 µm wide"
        )
    if scales["bin_size_um"] != BIN_UM:
        bin_um = scales["bin_size_um"]
        raise UserError(f"{path}: bin_size_um is {bin_um}, not {BIN_UM}: give the {SQUARE} output")
    if "microns_per_pixel" not in scales and scales.get("spot_diameter_fullres", 0) > 0:
        # The width of a bin in pixels, as early versions wrote it alone.
        scales["microns_per_pixel"] = BIN_UM / scales["spot_diameter_fullres"]
    if "microns_per_pixel" not in scales:
        raise UserError(
            f"{path} has no number microns_per_pixel, as in early versions: add it, the width of a "
            "pixel of the full-resolution image in µm, or run Space Ranger 3 or later again"
        )
    microns_per_pixel = float(scales["microns_per_pixel"])
    if not (np.isfinite(microns_per_pixel) and microns_per_pixel > 0):
        raise UserError(f"{path}: microns_per_pixel is {microns_per_pixel}: copy it again")
    return microns_per_pixel


@contextmanager
def _open_table(path: Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_present(path)
    try:
        with pq.ParquetFile(path) as table:
            missing = [name for name in columns if name not in table.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}: give Space Ranger's own table"
                )
            yield table
    except (pa.ArrowException, *DAMAGE) as error:
        raise unreadable(path, "a whole parquet table", error, own=b"PAR1") from error


def _find_image(outs: Path, image: Path | str | None) -> Path:
    if image is not None:
        check_file(Path(image), "give the path of the full-resolution H&E", "an image")
        return Path(image)
    for name in IMAGE_NAMES:
        if is_file(outs / name):
            check_file(outs / name, "", "an image")
            return outs / name
    remedy = "put the full-resolution H&E there, as .tif, .tiff or .btf"
    check_file(outs / IMAGE_NAMES[0], remedy)
    return outs / IMAGE_NAMES[0]
