"""Streamed reading of Visium HD sections at 2 µm, as Space Ranger writes them.

Two frames occur. The *array* frame is that of the bins (array row, array column); the *image* frame
is that of the full-resolution H&E (pixel row y, pixel column x; whole numbers are pixel centres).
Array rows often run against image rows, so an :class:`Orientation` turns array grids until they run
like the image, and a :class:`GridFit` maps grid coordinates to pixels.

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
import zarr

from sparsity_trap.config import BIN_UM, UserError

if TYPE_CHECKING:
    import h5py
    import scipy.sparse as sp

SQUARE = "square_002um"
IMAGE_NAMES = ("tissue_image.tif", "tissue_image.tiff", "tissue_image.btf")

_BARCODE = b"s_002um_RRRRR_CCCCC"
_POSITION_COLUMNS = (
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)
_BATCH = 250_000  # barcodes, or rows of the positions table, held at a time
_BLOCK = 4_000_000  # non-zero entries of the matrix held at a time


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
    """One section on disk. Opening it reads only small tables."""

    outs: Path
    image: Path
    bin_um: float
    microns_per_pixel: float
    array_shape: tuple[int, int]
    genes: tuple[str, ...]

    @property
    def matrix_path(self) -> Path:
        """Filtered count matrix (HDF5)."""
        return self.outs / "binned_outputs" / SQUARE / "filtered_feature_bc_matrix.h5"

    @property
    def positions_path(self) -> Path:
        """Table of bin positions (parquet)."""
        return self.outs / "binned_outputs" / SQUARE / "spatial" / "tissue_positions.parquet"

    def counts(self, genes: Sequence[str], block: int = _BLOCK) -> sp.csr_array:
        """Read the UMI counts of some genes, streaming over the matrix.

        Parameters
        ----------
        genes
            Symbols. Features that share a symbol are summed: UMIs of one symbol are additive, and
            taking the first feature would silently lose counts.
        block
            Non-zero entries of the whole matrix held in memory at a time.

        Returns
        -------
        csr_array ``[array_rows * array_cols, len(genes)]``, uint16. The row of a bin is
        ``array_row * array_cols + array_col``. Bins without a barcode have no counts.

        Raises
        ------
        UserError
            A gene is not in the matrix; a count is negative, fractional or above 65535; the file
            is damaged; a barcode is not that of a 2 µm bin of this grid.
        """
        known = set(self.genes)
        missing = [gene for gene in genes if gene not in known]
        if missing:
            raise UserError(
                f"{self.matrix_path} has no gene {', '.join(missing)}: use a matrix of the human "
                "transcriptome with gene symbols, or take the gene out of sparsity_trap/genes.py"
            )
        with _open_matrix(self.matrix_path) as matrix:
            return self._stream(matrix, genes, block)

    def _stream(self, matrix: h5py.Group, genes: Sequence[str], block: int) -> sp.csr_array:
        import scipy.sparse as sp

        column_of_gene = {gene: column for column, gene in enumerate(genes)}
        # Feature index -> column of the result, -1 for features nobody asked for.
        column_of = np.array([column_of_gene.get(name, -1) for name in _names(matrix)], np.int16)
        bins = _bin_of_barcode(matrix["barcodes"], self.array_shape, self.matrix_path)
        indptr = matrix["indptr"][:].astype(np.int64)
        if len(indptr) != len(bins) + 1:
            raise UserError(f"{self.matrix_path}: indptr does not fit barcodes; copy it again")

        rows, columns, values = [], [], []
        first = 0
        while first < len(bins):
            last = max(np.searchsorted(indptr, indptr[first] + block, "right") - 1, first + 1)
            part = slice(indptr[first], indptr[last])
            column = column_of[matrix["indices"][part]]
            kept = np.flatnonzero(column >= 0)
            value = matrix["data"][part][kept]
            _check_counts(value, self.matrix_path)
            barcode = np.searchsorted(indptr[first : last + 1], kept + indptr[first], "right") - 1
            rows.append(bins[first + barcode])
            columns.append(column[kept])
            values.append(value.astype(np.uint32))
            first = last

        shape = (self.array_shape[0] * self.array_shape[1], len(genes))
        if not rows:
            return sp.csr_array(shape, dtype=np.uint16)
        row, column = np.concatenate(rows), np.concatenate(columns).astype(np.int32)
        # The conversion sums entries of one bin and column: features that share a symbol.
        result = sp.coo_array((np.concatenate(values), (row, column)), shape=shape).tocsr()
        if result.nnz and result.data.max() > np.iinfo(np.uint16).max:
            raise UserError(
                f"{self.matrix_path}: a bin holds {result.data.max()} counts of one gene, above "
                "65535; give the raw 2 µm UMI matrix, not scaled values"
            )
        return result.astype(np.uint16)

    def positions(self) -> Positions:
        """Read tissue flag and pixel position of every bin, laid out ``[rows, cols]``."""
        in_tissue = np.zeros(self.array_shape, bool)
        y = np.full(self.array_shape, np.nan, np.float32)
        x = np.full(self.array_shape, np.nan, np.float32)
        for tissue, row, col, pixel_row, pixel_col in _batches(
            self.positions_path, _POSITION_COLUMNS
        ):
            in_tissue[row, col] = tissue == 1
            y[row, col] = pixel_row
            x[row, col] = pixel_col
        return Positions(in_tissue, y, x)

    @contextmanager
    def open_image(self) -> Iterator[zarr.Array | np.ndarray]:
        """Open the full-resolution image; slicing what is yielded reads only the tiles needed.

        Yields an array-like ``[height, width, 3 or 4]`` of uint8. See :func:`read_region`.
        """
        import tifffile

        try:
            tiff = tifffile.TiffFile(self.image)
        except tifffile.TiffFileError as error:
            raise UserError(
                f"{self.image} is not a TIFF image ({error}): give the full-resolution image"
            ) from None
        with tiff:
            series = tiff.series[0]
            shape = series.shape
            if len(shape) != 3 or shape[2] not in (3, 4) or series.dtype != np.uint8:
                raise UserError(
                    f"{self.image} has shape {shape} of {series.dtype}: convert it to 8-bit RGB "
                    "with interleaved channels"
                )
            if tiff.pages[0].is_memmappable:
                # Uncompressed and in one piece: as a zarr array it would be a single chunk.
                yield tifffile.memmap(self.image, page=0, mode="r")
            else:
                store = series.aszarr(level=0)
                yield zarr.open_array(store, mode="r")
                store.close()


def open_slide(outs_dir: Path | str, image: Path | str | None = None) -> Slide:
    """Open the 2 µm output of Space Ranger for one section.

    Parameters
    ----------
    outs_dir
        Space Ranger's ``outs`` folder, which holds ``binned_outputs/square_002um``.
    image
        Full-resolution H&E (TIFF or BigTIFF). Default: ``tissue_image.tif``, ``.tiff`` or ``.btf``
        in ``outs_dir``.

    Raises
    ------
    UserError
        A file is missing or unreadable, or the bins are not 2 µm wide.
    """
    outs = Path(outs_dir)
    square = outs / "binned_outputs" / SQUARE
    if not outs.is_dir():
        raise UserError(f"{outs} does not exist: give the 'outs' folder of Space Ranger")
    if not square.is_dir():
        raise UserError(
            f"{square} does not exist: give the 'outs' folder of a Visium HD run and unpack its "
            "binned_outputs there"
        )
    scales_path = square / "spatial" / "scalefactors_json.json"
    slide = Slide(outs, _find_image(outs, image), BIN_UM, np.nan, (0, 0), ())
    for path in (slide.matrix_path, slide.positions_path, scales_path):
        if not path.is_file():
            raise UserError(f"{path} does not exist: unpack binned_outputs again, {SQUARE} wholly")
    with _open_matrix(slide.matrix_path) as matrix:
        genes = tuple(filter(None, _names(matrix)))
    return Slide(
        outs,
        slide.image,
        BIN_UM,
        _read_scale(scales_path),
        _read_array_shape(slide.positions_path),
        genes,
    )


def read_region(image: zarr.Array | np.ndarray, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    """Read pixels ``[y0:y1, x0:x1]`` of an opened image as RGB.

    The window may reach over the edge; what lies outside is white, like empty glass.

    Returns
    -------
    uint8 array ``[y1 - y0, x1 - x0, 3]``.
    """
    region = np.full((y1 - y0, x1 - x0, 3), 255, np.uint8)
    top, bottom = max(y0, 0), min(y1, image.shape[0])
    left, right = max(x0, 0), min(x1, image.shape[1])
    if top < bottom and left < right:
        region[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right, :3]
    return region


@dataclass(frozen=True)
class GridFit:
    """Affine map from grid coordinates to image pixels.

    ``(y, x) = matrix[:, :2] @ (row, col) + matrix[:, 2]``; ``rms_px`` and ``max_px`` are the root
    mean square and the largest distance, in pixels, between the map and the bins it was fitted to.
    """

    matrix: np.ndarray
    rms_px: float
    max_px: float

    def __call__(self, rows: np.ndarray | float, cols: np.ndarray | float) -> np.ndarray:
        """Pixel positions ``[2, ...]`` (y, x) of grid positions of any one shape."""
        points = np.stack([np.asarray(rows, float), np.asarray(cols, float)])
        offset = self.matrix[:, 2].reshape(2, *[1] * (points.ndim - 1))
        return np.tensordot(self.matrix[:, :2], points, axes=1) + offset


def fit_grid_to_pixels(rows: np.ndarray, cols: np.ndarray, y: np.ndarray, x: np.ndarray) -> GridFit:
    """Fit the map from grid to image by least squares.

    The map of a whole section is not exactly affine (residuals of several pixels in real sections),
    so fit it on the bins of one patch wherever position matters.

    Parameters
    ----------
    rows, cols, y, x
        Grid and pixel coordinates of bins, ``[bins]``; bins whose ``y`` is NaN are left out.

    Raises
    ------
    UserError
        The bins do not span the plane.
    """
    known = np.isfinite(y)
    grid = np.stack([rows[known], cols[known]], axis=1).astype(float)
    pixels = np.stack([y[known], x[known]], axis=1).astype(float)
    if len(grid) == 0:
        raise UserError("tissue_positions.parquet lists no bins here: use the unfiltered table")
    # Centred coordinates keep the least squares well conditioned far from the origin.
    grid_mean, pixel_mean = grid.mean(0), pixels.mean(0)
    linear, _, rank, _ = np.linalg.lstsq(grid - grid_mean, pixels - pixel_mean, rcond=None)
    if rank < 2:
        raise UserError(
            "tissue_positions.parquet lists bins of a single line only: use the unfiltered table"
        )
    matrix = np.column_stack([linear.T, pixel_mean - grid_mean @ linear])
    distance2 = ((grid @ linear + matrix[:, 2] - pixels) ** 2).sum(1)
    return GridFit(matrix, float(np.sqrt(distance2.mean())), float(np.sqrt(distance2.max())))


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to turn an array grid: transpose first, then flip."""

    transpose: bool
    flip_rows: bool
    flip_cols: bool

    def apply(self, grid: np.ndarray) -> np.ndarray:
        """Turn the last two axes of an array grid; a view, not a copy."""
        if self.transpose:
            grid = grid.swapaxes(-1, -2)
        if self.flip_rows:
            grid = grid[..., ::-1, :]
        if self.flip_cols:
            grid = grid[..., ::-1]
        return grid

    def array_window(self, shape: tuple[int, int], rows: slice, cols: slice) -> tuple[slice, slice]:
        """Array-frame slices of a window of the oriented grid.

        ``apply(array[array_window(shape, rows, cols)])`` equals ``apply(array)[rows, cols]``;
        ``shape`` is that of the oriented grid.
        """
        if self.flip_rows:
            rows = slice(shape[0] - rows.stop, shape[0] - rows.start)
        if self.flip_cols:
            cols = slice(shape[1] - cols.stop, shape[1] - cols.start)
        return (cols, rows) if self.transpose else (rows, cols)


def orientation_of(fit: GridFit) -> Orientation:
    """Orientation after which grid rows run down and columns run right in the image.

    Since both axes then run like those of the image, the oriented grid is never mirrored.
    """
    (y_row, y_col), (x_row, x_col) = fit.matrix[:, :2]
    transpose = abs(y_col) + abs(x_row) > abs(y_row) + abs(x_col)
    down, right = (y_col, x_row) if transpose else (y_row, x_col)
    return Orientation(bool(transpose), bool(down < 0), bool(right < 0))


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


def _read_scale(path: Path) -> float:
    try:
        scales = json.loads(path.read_text())
        bin_um, microns_per_pixel = scales["bin_size_um"], scales["microns_per_pixel"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path} is incomplete ({error}): copy it again") from None
    if bin_um != BIN_UM:
        raise UserError(f"{path}: bin_size_um is {bin_um}, not {BIN_UM}: give the {SQUARE} output")
    return float(microns_per_pixel)


def _read_array_shape(path: Path) -> tuple[int, int]:
    shape = np.zeros(2, int)
    for row, col in _batches(path, ("array_row", "array_col")):
        shape = np.maximum(shape, [row.max() + 1, col.max() + 1])
    if not shape.all():
        raise UserError(f"{path} lists no bins: copy it again")
    return int(shape[0]), int(shape[1])


def _batches(path: Path, columns: Sequence[str]) -> Iterator[list[np.ndarray]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet table ({error}): copy it again") from None
    with table:
        missing = [name for name in columns if name not in table.schema_arrow.names]
        if missing:
            raise UserError(
                f"{path} has no column {', '.join(missing)}: give Space Ranger's own table"
            )
        for batch in table.iter_batches(batch_size=_BATCH, columns=list(columns)):
            if batch.num_rows:
                yield [batch.column(name).to_numpy(zero_copy_only=False) for name in columns]


@contextmanager
def _open_matrix(path: Path) -> Iterator[h5py.Group]:
    import h5py

    try:
        with h5py.File(path) as file:
            yield file["matrix"]
    except (KeyError, OSError) as error:
        raise UserError(
            f"{path} is not a whole Space Ranger matrix, version 3 ({error}): copy it again"
        ) from None


def _names(matrix: h5py.Group) -> list[str | None]:
    """Symbol of each feature; None for features that are not genes, such as antibodies."""
    features = matrix["features"]
    return [
        name.decode() if kind == b"Gene Expression" else None
        for name, kind in zip(features["name"][:], features["feature_type"][:], strict=True)
    ]


def _bin_of_barcode(barcodes: h5py.Dataset, shape: tuple[int, int], path: Path) -> np.ndarray:
    """Bin number (row * cols + col, int32) of each barcode, from the digits in its text."""
    bins = np.empty(len(barcodes), np.int32)
    power = 10 ** np.arange(4, -1, -1)
    for start in range(0, len(bins), _BATCH):
        # A fixed width turns the texts into a byte table without a Python object per barcode.
        text = barcodes[start : start + _BATCH].astype(f"S{len(_BARCODE)}")
        table = text.view(np.uint8).reshape(len(text), len(_BARCODE))
        digits = table.astype(np.int32) - ord("0")
        row, col = digits[:, 8:13] @ power, digits[:, 14:19] @ power
        number = digits[:, [*range(8, 13), *range(14, 19)]]
        if (table[:, :8] != np.frombuffer(_BARCODE[:8], np.uint8)).any() or not (
            (number >= 0) & (number <= 9)
        ).all():
            raise UserError(
                f"{path}: barcode {text[0].decode()} is not that of a 2 µm bin "
                f"(s_002um_00000_00000-1): give the matrix in {SQUARE}"
            )
        if row.max() >= shape[0] or col.max() >= shape[1]:
            raise UserError(
                f"{path}: a barcode lies outside the grid of {shape[0]} x {shape[1]} bins in "
                "tissue_positions.parquet: give both files of the same section"
            )
        bins[start : start + _BATCH] = row * shape[1] + col
    return bins


def _check_counts(values: np.ndarray, path: Path) -> None:
    if values.size and (values.min() < 0 or (values != np.floor(values)).any()):
        bad = values[(values < 0) | (values != np.floor(values))][0]
        raise UserError(
            f"{path}: {bad} is not a count: give the raw UMI matrix, not normalised values"
        )
