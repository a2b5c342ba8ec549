"""Maps from grid to pixels and turns of the grid, against known and real positions."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from spaceranger import DIHEDRAL, turned_grid

from sparsity_trap.data.geometry import (
    Orientation,
    coarse_fit,
    fit_grid_to_pixels,
    orientation_of,
)
from sparsity_trap.settings import UserError


@pytest.mark.parametrize("how", DIHEDRAL)
def test_oriented_grid_runs_like_the_image(how):
    y, x, _ = turned_grid((40, 56), how, degrees=3)
    rows, cols = np.indices(y.shape)
    fit = fit_grid_to_pixels(rows.ravel(), cols.ravel(), y.ravel(), x.ravel())
    assert fit.max_px < 1e-6
    np.testing.assert_allclose(fit(rows, cols), [y, x], atol=1e-6)
    orientation = orientation_of(fit)
    assert orientation == Orientation(*how)
    turned_y, turned_x = orientation.apply(y), orientation.apply(x)
    assert (np.diff(turned_y, axis=0) > 0).all() and (np.diff(turned_x, axis=1) > 0).all()
    rows, cols = np.indices(turned_y.shape)
    turned = fit_grid_to_pixels(rows.ravel(), cols.ravel(), turned_y.ravel(), turned_x.ravel())
    assert np.linalg.det(turned.matrix[:, :2]) > 0  # never mirrored

    window = slice(5, 17), slice(20, 31)
    cut = orientation.apply(y[orientation.array_window(turned_y.shape, *window)])
    assert np.array_equal(cut, turned_y[window])


def test_real_positions(shared_data):
    """Rows of the real section run up; one affine map misses by pixels, maps per patch do not."""
    table = pd.read_parquet(shared_data / "crc_p2_016um_positions" / "tissue_positions.parquet")
    columns = ["array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    row, col, y, x = table[columns].to_numpy(float).T
    section = fit_grid_to_pixels(row, col, y, x)
    assert orientation_of(section) == Orientation(False, True, False)
    scales = json.loads(
        (shared_data / "crc_p2_016um_positions" / "scalefactors_json.json").read_text()
    )
    pixel_um = 16 / np.sqrt(abs(np.linalg.det(section.matrix[:, :2])))
    assert pixel_um == pytest.approx(scales["microns_per_pixel"], rel=0.002)
    # A patch of 128 bins at 2 µm is 16 bins of this table wide.
    patch = [
        fit_grid_to_pixels(*part[["array_row", "array_col"]].to_numpy(float).T,
                           *part[["pxl_row_in_fullres", "pxl_col_in_fullres"]].to_numpy().T)
        for _, part in table.groupby([table.array_row // 16, table.array_col // 16])
        if len(part) == 256
    ]  # fmt: skip
    assert len(patch) == 26 * 26
    worst = max(fit.max_px for fit in patch)
    assert section.max_px > 5 and worst < 0.05, (section.max_px, worst)


def test_fit_needs_bins_that_span_the_plane():
    line = np.arange(5.0)
    with pytest.raises(UserError, match="single line"):
        fit_grid_to_pixels(line, line * 0, line, line)
    with pytest.raises(UserError, match="no bins"):
        fit_grid_to_pixels(line, line, line * np.nan, line)


def test_coarse_fit_is_the_fit_of_all_bins():
    y, x, _ = turned_grid((70, 90), (True, False, True), degrees=2)
    rows, cols = np.indices(y.shape).reshape(2, -1)
    whole = fit_grid_to_pixels(rows, cols, y.ravel(), x.ravel())
    np.testing.assert_allclose(coarse_fit(y, x).matrix, whole.matrix, atol=1e-8)
