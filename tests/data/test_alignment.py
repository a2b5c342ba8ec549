"""Shift of counts against image, and stripes, where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from sparsity_trap.data import alignment as registration


def section(shift: tuple[int, int], patches: int = 4) -> tuple[list, list]:
    """Random dark blobs, and counts drawn from them ``shift`` bins away."""
    draw = np.random.default_rng(5)
    images, counts = [], []
    for _ in range(patches):
        tissue = ndimage.gaussian_filter(draw.standard_normal((192, 192)), 4)
        tissue = np.clip(tissue / tissue.std(), 0, None)
        rate = 0.02 * np.roll(tissue, shift, (0, 1))[32:160, 32:160]
        counts.append(draw.poisson(np.repeat(rate[None], 50, 0)).astype(np.uint16))
        dark = ndimage.zoom(tissue[32:160, 32:160], 224 / 128, order=1)
        images.append(np.repeat((230 - 45 * dark.clip(0, 4))[..., None], 3, 2).astype(np.uint8))
    return images, counts


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (-2, 7), (12, -9)])
def test_shift_is_found_to_half_a_bin(shift):
    found = registration.count_image_shift(*section(shift))
    assert (found.rows, found.columns) == pytest.approx(shift, abs=0.5)
    assert (found.warning is None) == (np.hypot(*shift) <= registration.TOLERATED)


def test_warning_names_direction_and_remedy():
    warning = registration.Shift(3.0, -1.0, np.zeros((1, 1))).warning
    assert "+3.0 rows and -1.0 columns" in warning and "check that this is the image" in warning


def test_stripes_are_estimated_in_spite_of_tissue_edges():
    draw = np.random.default_rng(0)
    rows, cols = (np.exp(0.3 * draw.standard_normal(n)) for n in (300, 260))
    field = np.exp(ndimage.gaussian_filter(draw.standard_normal((300, 260)), 25) * 20)
    tissue = np.hypot(*np.ogrid[-150:150, -130:130]) < 120
    total = draw.poisson(2 * field * rows[:, None] * cols) * tissue
    found = registration.stripe_factors(total, tissue)
    for truth, factor, lines in zip(
        (rows, cols), found, (tissue.any(1), tissue.any(0)), strict=True
    ):
        local = truth / ndimage.uniform_filter1d(truth, 9)
        measured = lines & (factor != 1)
        assert np.corrcoef(np.log(local[measured]), np.log(factor[measured]))[0, 1] > 0.9
        assert (factor[~lines] == 1).all()
