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
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
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
    if not outs.is_dir():
        raise UserError(f"{outs} does not exist: give the 'outs' folder of Space Ranger")
    if not (outs / MATRIX).parent.is_dir():
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

    shape = read_array_shape(outs)
    in_tissue = np.zeros(shape, bool)
    y = np.full(shape, np.nan, np.float32)
    x = np.full(shape, np.nan, np.float32)
    with _open_table(Path(outs) / POSITIONS, _POSITION_COLUMNS) as table:
        for batch in table.iter_batches(batch_size=_BATCH, columns=list(_POSITION_COLUMNS)):
            tissue, row, col, pixel_row, pixel_col = (
                batch.column(name).to_numpy(zero_copy_only=False) for name in _POSITION_COLUMNS
            )
            in_tissue[row, col] = tissue == 1
            y[row, col] = pixel_row
            x[row, col] = pixel_col
    pa.default_memory_pool().release_unused()  # or Arrow keeps tens of MB for its next table
    return Positions(in_tissue, y, x)


def read_array_shape(outs: Path | str) -> tuple[int, int]:
    """Rows and columns of the array of bins, from the positions table's own statistics."""
    path = Path(outs) / POSITIONS
    with _open_table(path, ("array_row", "array_col")) as table:
        if not table.metadata.num_rows:
            raise UserError(f"{path} lists no bins: copy it again")
        place = {table.metadata.schema.column(i).name: i for i in range(table.metadata.num_columns)}
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        rows, cols = (
            1 + max(int(group.column(place[name]).statistics.max) for group in groups)
            for name in ("array_row", "array_col")
        )
    return rows, cols


def read_scale(outs: Path | str) -> float:
    """Width of a full-resolution pixel in µm; ``UserError`` where bins are not 2 µm wide."""
    path = Path(outs) / SCALES
    check_present(path)
    try:
        scales = json.loads(path.read_text())
        bin_um, microns_per_pixel = scales["bin_size_um"], float(scales["microns_per_pixel"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is incomplete ({error}): copy it again") from None
    if not (np.isfinite(microns_per_pixel) and microns_per_pixel > 0):
        raise UserError(f"{path}: microns_per_pixel is {microns_per_pixel}: copy it again")
    if bin_um != BIN_UM:
        raise UserError(f"{path}: bin_size_um is {bin_um}, not {BIN_UM}: give the {SQUARE} output")
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
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole parquet table ({reason}): copy it again") from error


def _find_image(outs: Path, image: Path | str | None) -> Path:
    if image is not None:
        if not Path(image).is_file():
            raise UserError(f"{image} does not exist: give the path of the full-resolution H&E")
        return Path(image)
    for name in IMAGE_NAMES:
        if (outs / name).is_file():
            return outs / name
    raise UserError(
        f"{outs / IMAGE_NAMES[0]} does not exist: put the full-resolution H&E there, as .tif, "
        ".tiff or .btf"
    )
