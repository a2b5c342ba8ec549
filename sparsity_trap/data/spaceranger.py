"""Streamed reading of Visium HD sections at 2 µm, as Space Ranger 3 and 4 write them.

Two frames occur. The *array* frame is that of the bins (array row, array column); the *image* frame
is that of the full-resolution H&E (pixel row y, pixel column x; whole numbers are pixel centres).
Array rows often run against image rows, so an :class:`Orientation` turns array grids until they run
like the image, and a :class:`GridFit` maps grid coordinates to pixels.

Counts come from ``filtered_feature_bc_matrix.h5`` or, with less to inflate, ``feature_slice.h5``, which
holds one map per gene. Inflating and putting in order bound the reading; both go on in threads.

Libraries for file formats are imported where they are used: training reads only patch stores, and
must start without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import zarr

from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.inflate import in_threads, numbers, pieces, read_all, reader
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    import h5py
    import pyarrow.parquet as pq
    import scipy.sparse as sp
    from tifffile import TiffFile, TiffPageSeries

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
_BATCH = 100_000  # rows of the positions table, or sorted entries, in hand at a time
_BLOCK = 400_000  # entries of one piece of work
_LARGEST_GRID = 20_000  # bins a side; a capture area of 6.5 mm has 3350
#: Datasets of a matrix and the kinds of value they hold; fractions are refused as counts later.
_MATRIX = {
    "barcodes": "SO", "data": "iuf", "indices": "iu", "indptr": "iu",
    "features/name": "SO", "features/feature_type": "SO",
}  # fmt: skip
_PAIR = "give both files of the same section"  # remedy where two files disagree


class Positions(NamedTuple):
    """Bins laid out on their grid, each array ``[rows, cols]``.

    ``in_tissue`` is bool; ``y`` and ``x`` are the full-resolution pixel row and column of the bin
    centre, float32, NaN where the positions file does not list the bin.
    """

    in_tissue: np.ndarray
    y: np.ndarray
    x: np.ndarray


class GeneTotals(NamedTuple):
    """Sums over the bins of a section, int64 ``[features]`` in the order of ``Slide.genes``.

    ``umis`` adds up the counts, ``squares`` their squares, ``bins`` the bins with any count;
    ``n_bins`` is the number of bins in the matrix. Features that share a symbol stay apart.
    """

    umis: np.ndarray
    squares: np.ndarray
    bins: np.ndarray
    n_bins: int


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
    def slices_path(self) -> Path:
        """Maps of single genes (HDF5); Space Ranger writes it, downloads often lack it."""
        return self.outs / "feature_slice.h5"

    @property
    def positions_path(self) -> Path:
        """Table of bin positions (parquet)."""
        return self.outs / "binned_outputs" / SQUARE / "spatial" / "tissue_positions.parquet"

    def counts(self, genes: Sequence[str], block: int = _BLOCK) -> sp.csc_array:
        """Read the UMI counts of some genes, from ``feature_slice.h5`` where there is one.

        Parameters
        ----------
        genes
            Symbols. Features that share a symbol are summed: UMIs of one symbol are additive, and
            taking the first feature would silently lose counts.
        block
            Entries of the matrix in one piece of work; a few pieces are in memory at a time.

        Returns
        -------
        csc_array ``[array_rows * array_cols, len(genes)]``, uint16, rows of a column in order. The
        row of a bin is ``array_row * array_cols + array_col``. Bins without a barcode in the
        filtered matrix have no counts, whichever file was read. Zeros are not stored.

        Raises
        ------
        UserError
            A gene is not in the matrix; a count is negative, fractional or above 65535; a file
            is damaged or of another section; a barcode is not that of a 2 µm bin of this grid.
        """
        self._check_genes(genes)
        if self.slices_path.is_file():
            return self._read_slices(genes)
        return self._read_matrix(genes, block, with_totals=False)[0]

    def counts_and_totals(
        self, genes: Sequence[str], block: int = _BLOCK
    ) -> tuple[sp.csc_array, GeneTotals]:
        """Read the counts of some genes and the totals of all, in one pass over the matrix.

        As :meth:`counts`; ``genes`` may be empty, and every count of the matrix is checked.
        """
        self._check_genes(genes)
        return self._read_matrix(genes, block, with_totals=True)

    def _check_genes(self, genes: Sequence[str]) -> None:
        known = set(self.genes)
        missing = [gene for gene in genes if gene not in known]
        if missing:
            raise UserError(
                f"{self.matrix_path} has no gene {', '.join(missing)}: use a matrix of the human "
                "transcriptome with gene symbols, or take the gene out of the panel (key genes.panel)"
            )

    def _read_matrix(
        self, genes: Sequence[str], block: int, with_totals: bool
    ) -> tuple[sp.csc_array, GeneTotals]:
        parts, totals = self._matrix_parts(genes, block, with_totals)

        def fill(i: int, bins: np.ndarray, values: np.ndarray) -> None:
            np.concatenate([b[e[i] : e[i + 1]] for b, _, e in parts], out=bins)
            np.concatenate([v[e[i] : e[i + 1]] for _, v, e in parts], out=values)

        lengths = np.diff([ends for _, _, ends in parts]).sum(0)
        return self._assemble(lengths.tolist(), fill, None, self.matrix_path), totals

    def _matrix_parts(
        self, genes: Sequence[str], block: int, with_totals: bool
    ) -> tuple[list[tuple[np.ndarray, np.ndarray, list[int]]], GeneTotals]:
        """Entries of some genes, piece by piece: bins, counts, and where each gene begins and ends."""
        path = self.matrix_path
        with _open_matrix(path) as matrix:
            names = _names(matrix["features"])
            column_of = _columns(names, genes)
            bins, _ = _listed_bins(matrix["barcodes"], self.array_shape, path)
            indptr = read_all(matrix["indptr"], _BLOCK)
            indices, data = matrix["indices"], matrix["data"]
            if (
                len(indptr) != len(bins) + 1
                or indptr[0] != 0
                or {len(indices), len(data)} != {int(indptr[-1])}
                or (indptr[1:] < indptr[:-1]).any()
            ):
                raise UserError(f"{path}: indptr does not fit barcodes and data; copy it again")
            n_bins, totals = len(bins), np.zeros((3, len(names)), np.int64)
            read_index, read_value = reader(indices), reader(data)

            def work(start: int, stop: int) -> tuple[np.ndarray | int, tuple]:
                index = read_index(start, stop)
                if index.size and not 0 <= index.min() <= index.max() < len(names):
                    raise UserError(f"{path}: indices name features it does not list; copy again")
                column = column_of.take(index)
                kept = np.flatnonzero(column >= 0)
                values = read_value(start, stop)
                sums: np.ndarray | int = 0
                if with_totals:
                    _check_counts(values, path)
                    sums = _totals(index, values, len(names))
                column = column.take(kept)
                kept = kept.take(np.argsort(column, kind="stable"))
                value = _small(values.take(kept), path)
                # Of one type, or the search would convert all pointers.
                first = np.searchsorted(indptr, indptr.dtype.type(start), "right") - 1
                last = np.searchsorted(indptr, indptr.dtype.type(stop))
                ends = indptr[first : last + 1].clip(start, stop)
                bin_ = np.repeat(bins[first:last], np.diff(ends)).take(kept)
                ends = np.cumsum(np.bincount(column, minlength=len(genes)))
                return sums, (bin_, value, [0, *ends.tolist()])

            parts = []
            for sums, part in in_threads(partial(work, *piece) for piece in pieces(indices, block)):
                totals += sums
                parts.append(part)
        is_gene = np.array([name is not None for name in names], bool)
        umis, squares, filled = totals[:, is_gene]
        return parts, GeneTotals(umis, squares, filled, n_bins)

    def _read_slices(self, genes: Sequence[str]) -> sp.csc_array:
        """Read from ``outs/feature_slice.h5``.

        Its layout and place are those of 10x Genomics' page "Feature Slice H5" and of the public
        source of Space Ranger (``hd_feature_slice.py``): ``feature_slices/<i>/{row,col,data}``
        for each feature ``i`` of ``features`` that has a UMI, over all bins of the *raw* matrix;
        ``masks/filtered/{row,col,data}`` lists the barcodes of the filtered one.
        """
        path = self.slices_path
        rows, cols = self.array_shape
        with _open_matrix(self.matrix_path) as matrix:
            names, n_barcodes = _names(matrix["features"]), len(matrix["barcodes"])
        with _open_h5(path, "feature_slice.h5") as file:
            if _names(file["features"]) != names:
                raise UserError(f"{path} lists other features than {self.matrix_path}: {_PAIR}")

            def along(axis: int, planes: np.ndarray, dtype: np.dtype) -> np.ndarray:
                place = numbers(planes, dtype)
                outside = place.size and (
                    place.max() >= self.array_shape[axis]
                    or (place.dtype.kind != "u" and place.min() < 0)
                )
                if outside:
                    raise UserError(
                        f"{path}: a bin lies outside the grid of {rows} x {cols} bins in "
                        f"tissue_positions.parquet: {_PAIR}"
                    )
                return place

            def bins_of(group: h5py.Group, length: int) -> Callable[[int, int], np.ndarray]:
                members = group["row"], group["col"]
                if {len(member) for member in members} != {length}:
                    raise OSError(f"datasets of different lengths in {group.name}")
                if any(member.dtype.kind not in "iu" for member in members):
                    raise OSError(f"no whole numbers in {group.name}")
                read_row, read_col = (
                    reader(member, partial(along, axis, dtype=member.dtype))
                    for axis, member in enumerate(members)
                )

                def read(start: int, stop: int) -> np.ndarray:
                    bins = read_row(start, stop).astype(np.int32)
                    bins *= cols
                    bins += read_col(start, stop)
                    return bins

                return read

            if "masks/filtered" in file:
                mask = file["masks/filtered"]
                if len(mask["row"]) != n_barcodes:
                    raise UserError(
                        f"{path} has {len(mask['row'])} bins under tissue, {self.matrix_path} "
                        f"{n_barcodes}: {_PAIR}"
                    )
                listed = np.zeros(rows * cols, bool)
                read_bins = bins_of(mask, n_barcodes)

                def mark(start: int, stop: int) -> None:
                    listed[read_bins(start, stop)] = True

                for _ in in_threads(partial(mark, *piece) for piece in pieces(mask["row"], _BLOCK)):
                    pass
            else:
                with _open_matrix(self.matrix_path) as matrix:
                    _, listed = _listed_bins(matrix["barcodes"], self.array_shape, path)

            columns: list[list[tuple[h5py.Group, h5py.Dataset]]] = [[] for _ in genes]
            column_of, maps = _columns(names, genes), file["feature_slices"]
            for feature in np.flatnonzero(column_of >= 0):
                group = maps.get(str(feature))
                if group is not None:
                    columns[column_of[feature]].append((group, group["data"]))
            lengths = [sum(len(data) for _, data in maps_) for maps_ in columns]

            def fill(i: int, bins: np.ndarray, values: np.ndarray) -> None:
                at = 0
                for group, data in columns[i]:
                    read_bins, read_value = bins_of(group, len(data)), reader(data)
                    for start, stop in pieces(data, _BLOCK):
                        here = slice(at + start, at + stop)
                        bins[here] = read_bins(start, stop)
                        values[here] = _small(read_value(start, stop), path)
                    at += len(data)

            return self._assemble(lengths, fill, listed, path)

    def _assemble(
        self,
        lengths: Sequence[int],
        fill: Callable[[int, np.ndarray, np.ndarray], None],
        listed: np.ndarray | None,
        path: Path,
    ) -> sp.csc_array:
        """Make columns in threads, where they will stay: memory is slow when it is first touched.

        ``fill(i, bins, values)`` writes the ``lengths[i]`` entries of column ``i``, in any order.
        """
        import scipy.sparse as sp

        starts = np.cumsum([0, *lengths]).tolist()
        bins, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.uint16)

        def column(i: int) -> int:
            place = slice(starts[i], starts[i + 1])
            fill(i, bins[place], values[place])
            return in_order(bins[place], values[place], path, listed)

        ends = [0]
        for start, size in zip(
            starts, in_threads(partial(column, i) for i in range(len(lengths))), strict=False
        ):
            for array in (bins, values):
                array[ends[-1] : ends[-1] + size] = array[start : start + size]
            ends.append(ends[-1] + size)
        indptr = np.array(ends, np.int32 if starts[-1] < 2**31 else np.int64)
        shape = (self.array_shape[0] * self.array_shape[1], len(lengths))
        return sp.csc_array((values[: ends[-1]], bins[: ends[-1]], indptr), shape=shape)

    def positions(self) -> Positions:
        """Read tissue flag and pixel position of every bin, laid out ``[rows, cols]``."""
        import pyarrow as pa

        in_tissue = np.zeros(self.array_shape, bool)
        y = np.full(self.array_shape, np.nan, np.float32)
        x = np.full(self.array_shape, np.nan, np.float32)
        for tissue, row, col, pixel_row, pixel_col in _batches(
            self.positions_path, _POSITION_COLUMNS
        ):
            in_tissue[row, col] = tissue == 1
            y[row, col] = pixel_row
            x[row, col] = pixel_col
        pa.default_memory_pool().release_unused()  # or Arrow keeps tens of MB for its next table
        return Positions(in_tissue, y, x)

    @contextmanager
    def open_image(self) -> Iterator[zarr.Array | np.ndarray]:
        """Open the full-resolution image; slicing what is yielded reads only the tiles needed.

        TIFF, BigTIFF, OME-TIFF and SVS are read by region, PNG and JPEG as a whole.

        Yields an array-like ``[height, width, 3 or 4]`` of uint8. See :func:`read_region`.
        """
        import tifffile

        if self.image.suffix.lower() in (".png", ".jpg", ".jpeg"):
            yield _read_picture(self.image)
            return
        try:
            tiff = tifffile.TiffFile(self.image)
        except (tifffile.TiffFileError, OSError) as error:
            raise UserError(
                f"{self.image} is not a readable TIFF image ({error}): give the full-resolution "
                "image"
            ) from None
        with tiff:
            series = _whole_series(tiff, self.image)
            shape = series.shape
            planar = len(shape) == 3 and shape[0] in (3, 4) and shape[2] not in (3, 4)
            channels = shape[0 if planar else 2] if len(shape) == 3 else 0
            if channels not in (3, 4) or series.dtype != np.uint8:
                raise UserError(
                    f"{self.image} has shape {shape} of {series.dtype}: convert it to 8-bit RGB"
                )
            try:
                if tiff.pages[0].is_memmappable and not planar:
                    # Uncompressed and in one piece: as a zarr array it would be a single chunk.
                    yield tifffile.memmap(self.image, page=0, mode="r")
                else:
                    store = series.aszarr(level=0)
                    array = zarr.open_array(store, mode="r")
                    yield _ChannelsLast(array) if planar else array
                    store.close()
            except (tifffile.TiffFileError, RuntimeError) as error:
                codec = type(error).__module__.startswith("imagecodecs")
                if isinstance(error, RuntimeError) and not codec:
                    raise
                raise UserError(f"{self.image} is damaged ({error}): copy it again") from None


def _whole_series(tiff: TiffFile, path: Path) -> TiffPageSeries:
    """First image of a file that holds all the bytes that its directory promises."""
    if not tiff.series:
        raise UserError(f"{path} lists no image, its end may be missing: copy it again")
    series = tiff.series[0]
    pages: list[Any] = [page for page in series.levels[0].pages if page is not None]
    end = max(
        offset + size
        for page in pages
        for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True)
    )
    if end > tiff.filehandle.size:
        raise UserError(f"{path} ends after {tiff.filehandle.size} of {end} bytes: copy it again")
    return series


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
        genes = tuple(name for name in _names(matrix["features"]) if name is not None)
    return Slide(
        outs,
        slide.image,
        BIN_UM,
        _read_scale(scales_path),
        _read_array_shape(slide.positions_path),
        genes,
    )


class _ChannelsLast:
    """An array ``[channel, height, width]``, as OME-TIFF has it, sliced like ``[height, width, channel]``."""

    def __init__(self, array: zarr.Array):
        self._array = array
        self.shape = (*array.shape[1:], array.shape[0])

    def __getitem__(self, window: tuple[slice, slice, slice]) -> np.ndarray:
        rows, cols, channels = window
        return np.moveaxis(self._array[channels, rows, cols], 0, -1)


def _read_picture(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} cannot be read as a picture ({error}): give the full-resolution image as TIFF"
        ) from None


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
        bin_um, microns_per_pixel = scales["bin_size_um"], float(scales["microns_per_pixel"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is incomplete ({error}): copy it again") from None
    if not (np.isfinite(microns_per_pixel) and microns_per_pixel > 0):
        raise UserError(f"{path}: microns_per_pixel is {microns_per_pixel}: copy it again")
    if bin_um != BIN_UM:
        raise UserError(f"{path}: bin_size_um is {bin_um}, not {BIN_UM}: give the {SQUARE} output")
    return microns_per_pixel


def _read_array_shape(path: Path) -> tuple[int, int]:
    columns = ("array_row", "array_col")
    largest = _largest(path, columns)
    if largest is None:
        largest = [-1, -1]
        for batch in _batches(path, columns):
            largest = [max(a, int(b.max())) for a, b in zip(largest, batch, strict=True)]
    if min(largest) < 0:
        raise UserError(f"{path} lists no bins: copy it again")
    if max(largest) >= _LARGEST_GRID:
        raise UserError(
            f"{path} lists array row {largest[0]} and column {largest[1]}, more than any slide has: "
            "copy it again"
        )
    return largest[0] + 1, largest[1] + 1


def _largest(path: Path, columns: Sequence[str]) -> list[int] | None:
    """Largest value of each column, from the file's own statistics; None where it keeps none."""
    with _open_table(path, columns) as table:
        place = {table.metadata.schema.column(i).name: i for i in range(table.metadata.num_columns)}
        largest = []
        for name in columns:
            parts = [
                table.metadata.row_group(group).column(place[name]).statistics
                for group in range(table.num_row_groups)
            ]
            if not parts or any(part is None or not part.has_min_max for part in parts):
                return None
            largest.append(int(max(part.max for part in parts)))
    return largest


@contextmanager
def _open_table(path: Path, columns: Sequence[str]) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            missing = [name for name in columns if name not in table.schema_arrow.names]
            if missing:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}: give Space Ranger's own table"
                )
            for name in columns:
                kind = table.schema_arrow.field(name).type
                whole = pa.types.is_integer(kind)
                if not (whole or (name.startswith("pxl_") and pa.types.is_floating(kind))):
                    raise UserError(
                        f"{path}: column {name} holds {kind}, not numbers: give Space Ranger's own "
                        "table"
                    )
            if table.metadata.num_rows > _LARGEST_GRID**2:
                raise UserError(
                    f"{path} claims {table.metadata.num_rows} rows, more than bins of any slide: "
                    "copy it again"
                )
            yield table
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole parquet table ({reason}): copy it again") from None


def _batches(path: Path, columns: Sequence[str]) -> Iterator[list[np.ndarray]]:
    with _open_table(path, columns) as table:
        for batch in table.iter_batches(batch_size=_BATCH, columns=list(columns)):
            if not batch.num_rows:
                continue
            values = [batch.column(name).to_numpy(zero_copy_only=False) for name in columns]
            for name, column in zip(columns, values, strict=True):
                if not name.startswith("pxl_") and (
                    batch.column(name).null_count or column.min() < 0
                ):
                    raise UserError(
                        f"{path}: column {name} has a negative or missing value: copy it again"
                    )
            yield values


@contextmanager
def _open_h5(path: Path, what: str) -> Iterator[h5py.File]:
    import h5py

    try:
        with h5py.File(path) as file:
            yield file
    except (KeyError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole {what} ({error}): copy it again") from None


@contextmanager
def _open_matrix(path: Path) -> Iterator[h5py.Group]:
    with _open_h5(path, "Space Ranger matrix, version 3") as file:
        matrix = file["matrix"]
        for name, kinds in _MATRIX.items():
            values = matrix.get(name)  # a missing one is reported where it is needed
            if values is not None and (
                getattr(values, "ndim", None) != 1 or values.dtype.kind not in kinds
            ):
                raise UserError(
                    f"{path}: {name} is not laid out as Space Ranger does, version 3: copy it again"
                )
        if len(matrix["features/name"]) != len(matrix["features/feature_type"]):
            raise UserError(f"{path}: features have more names than types: copy it again")
        yield matrix


def _names(features: h5py.Group) -> list[str | None]:
    """Symbol of each feature; None for features that are not genes, such as antibodies."""
    return [
        name.decode() if kind == b"Gene Expression" else None
        for name, kind in zip(features["name"][:], features["feature_type"][:], strict=True)
    ]


def _columns(names: Sequence[str | None], genes: Sequence[str]) -> np.ndarray:
    """Column of the result for each feature; -1 for features nobody asked for."""
    column_of_gene: dict[str | None, int] = {gene: column for column, gene in enumerate(genes)}
    # The narrower, the faster columns are sorted.
    dtype = np.int8 if len(genes) < 128 else np.int16
    return np.array([column_of_gene.get(name, -1) for name in names], dtype)


def _totals(index: np.ndarray, values: np.ndarray, n_features: int) -> np.ndarray:
    """Sum of counts, of their squares, and of non-zero entries: int64 ``[3, n_features]``."""
    entries = np.bincount(index, minlength=n_features)
    # Most counts are one: only the others need sums with weights, which are slower.
    other = np.flatnonzero(values != 1)
    index, values = index[other], values[other].astype(np.float64)
    return np.stack(
        [
            entries + np.bincount(index, weights, n_features).astype(np.int64)
            for weights in (values - 1, values**2 - 1, (values > 0) - 1.0)
        ]
    )


def in_order(
    bins: np.ndarray, values: np.ndarray, path: Path, listed: np.ndarray | None = None
) -> int:
    """Sort entries by their bin and add up those of one bin, in place.

    Parameters
    ----------
    bins, values
        int32, not negative, and uint16; changed. Zeros are dropped.
    path
        File they come from.
    listed
        Whether each bin is to be kept; None keeps all.

    Returns
    -------
    Number of entries that remain; they stand at the start of both arrays.

    Raises
    ------
    UserError
        A sum is above 65535.
    """
    if not len(bins):
        return 0
    # Bin and value in one number: numpy sorts plain numbers many at a time, without other memory.
    # Nearly always both fit into 32 bits, which takes half as long as 64.
    bits = min(32 - int(bins.max()).bit_length(), 16)
    keys = bins.view(np.uint32)
    if int(values.max()).bit_length() > bits:
        keys, bits = bins.astype(np.uint64), 16
    keys <<= bits
    keys |= values
    keys.sort()
    size, value = 0, 2**bits - 1
    for part in np.array_split(keys, len(keys) // _BATCH + 1):
        kept = part & value > 0
        if listed is not None:
            kept &= listed.take(part >> bits)
        part = part.compress(kept)  # a copy: it may be written where it was read
        place = slice(size, size + len(part))
        np.right_shift(part, bits, out=bins[place], casting="unsafe")
        np.bitwise_and(part, value, out=values[place], casting="unsafe")
        size += len(part)
    again = bins[1:size] == bins[: size - 1]
    if again.any():
        first = np.flatnonzero(np.concatenate([[True], ~again]))
        sums = _small(np.add.reduceat(values[:size], first, dtype=np.int64), path)
        bins[: len(sums)], values[: len(sums)] = bins[first], sums
        size = len(sums)
    return size


def _listed_bins(
    barcodes: h5py.Dataset, shape: tuple[int, int], path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Bin number (row * cols + col, int32) of each barcode, and whether each bin has one."""
    listed = np.zeros(shape[0] * shape[1], bool)

    def bins_of(text: np.ndarray) -> np.ndarray:
        """Bins of barcodes whose characters are ``[width, barcodes]``."""
        width = len(_BARCODE)
        if len(text) < width:
            text = np.pad(text, ((0, width - len(text)), (0, 0)))
        fixed = text[[*range(8), 13]] != np.frombuffer(_BARCODE, np.uint8)[[*range(8), 13], None]
        digits = text[[*range(8, 13), *range(14, 19)]] - np.uint8(ord("0"))
        if fixed.any() or digits.max(initial=0) > 9:
            wrong = fixed.any(0) | (digits > 9).any(0)
            barcode = bytes(text[:, wrong.argmax()]).rstrip(b"\0").decode(errors="replace")
            raise UserError(
                f"{path}: barcode {barcode} is not that of a 2 µm bin "
                f"(s_002um_00000_00000-1): give the matrix in {SQUARE}"
            )
        # Two digits at a time, which a byte holds.
        pairs = digits.reshape(2, 5, -1)[:, 1::2] * np.uint8(10)
        pairs += digits.reshape(2, 5, -1)[:, 2::2]
        row, col = digits[::5].astype(np.int32)
        for number, (hundreds, ones) in zip((row, col), pairs, strict=True):
            number *= 100
            number += hundreds
            number *= 100
            number += ones
        if row.max(initial=0) >= shape[0] or col.max(initial=0) >= shape[1]:
            raise UserError(
                f"{path}: a barcode lies outside the grid of {shape[0]} x {shape[1]} bins in "
                f"tissue_positions.parquet: {_PAIR}"
            )
        row *= shape[1]
        row += col
        listed[row.astype(np.intp)] = True  # faster than numpy's own conversion
        return row

    bins = read_all(barcodes, _BLOCK, bins_of)
    if listed.sum() != len(bins):
        raise UserError(f"{path} lists a barcode twice: give Space Ranger's own file")
    return bins, listed


def _check_counts(values: np.ndarray, path: Path) -> None:
    if values.dtype.kind == "u" or not values.size:
        return
    bad = values < 0 if values.dtype.kind == "i" else ~((values >= 0) & (values % 1 == 0))
    if bad.any():
        raise UserError(
            f"{path}: {values[bad][0]} is not a count: give the raw UMI matrix, not normalised "
            "values"
        )


def _small(values: np.ndarray, path: Path) -> np.ndarray:
    """Counts as uint16; checks them."""
    _check_counts(values, path)
    if values.size and values.max() > np.iinfo(np.uint16).max:
        raise UserError(
            f"{path}: a bin holds {values.max()} counts of one gene, above 65535; give the raw "
            "2 µm UMI matrix, not scaled values"
        )
    return values.astype(np.uint16, copy=False)
