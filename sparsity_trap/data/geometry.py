"""Where bins lie in the image: maps from grid to pixels, and turns of the grid.

Two frames occur. The *array* frame is that of the bins (array row, array column); the *image* frame
is that of the full-resolution H&E (pixel row y, pixel column x; whole numbers are pixel centres).
Array rows often run against image rows, so an :class:`Orientation` turns array grids until they run
like the image, and a :class:`GridFit` maps grid coordinates to pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsity_trap.settings import UserError


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
        Grid and pixel coordinates of bins, ``[bins]``; bins without a position, NaN, are left out.

    Raises
    ------
    UserError
        The bins do not span the plane.
    """
    known = np.isfinite(y) & np.isfinite(x)
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


def coarse_fit(y: np.ndarray, x: np.ndarray, stride: int = 16) -> GridFit:
    """Fit one map to a whole grid, from every ``stride``-th bin in both directions.

    A thousandth of the bins determines six numbers as well as all 11 million, which take seconds.

    Parameters
    ----------
    y, x
        Pixel row and column of each bin, ``[rows, cols]``, NaN where unknown.
    """
    rows, cols = np.mgrid[0 : y.shape[0] : stride, 0 : y.shape[1] : stride].reshape(2, -1)
    return fit_grid_to_pixels(rows, cols, y[rows, cols], x[rows, cols])


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
