"""Shift of counts against image, and stripes, where the truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from sparsity_trap.data import alignment as registration
from sparsity_trap.data.geometry import GridFit


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


def test_real_counts_follow_their_image(shared_data):
    """Of patient P5, of one to three genes a tile: as placed, and hardly when turned."""
    with np.load(shared_data / "p5_crc_2um_tiles" / "p5_crc_2um_tiles.npz") as tiles:
        he, tile, counts = tiles["he"], tiles["pair_tile"], tiles["pair_counts"]
    found = []
    for number in range(0, len(he), 2):
        total = counts[tile == number].sum(0, dtype=np.int32)
        fit = GridFit(np.array([[1.0, 0, 0], [0, 1, 0]]), 0, 0)
        found.append(registration.follow(he[number], fit, total, microns_per_pixel=2.0))
    mean = pd.DataFrame(found).mean()
    turned = mean.filter(regex="upside|mirrored")
    assert mean[registration.AS_PLACED] > 0.15 and (turned < 0.1).all() and len(turned) == 6
