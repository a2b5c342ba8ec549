"""Turned and shifted predictions are found, and others are left alone."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage, stats

from sparsity_trap.evaluation.placement import REACH, TURNS, Placement, _products, turned


@pytest.fixture(scope="module")
def maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    rough = rng.normal(size=(4, 3, 64, 64))
    rate = np.exp(ndimage.gaussian_filter(rough, 3, axes=(2, 3)) * 8)
    mask = np.ones((4, 64, 64), bool)
    mask[1, 40:] = mask[2, :, :9] = False
    return rng.poisson(0.3 * rate), rate, mask


def look(counts, rate, mask) -> Placement:
    placement = Placement()
    for patch in zip(counts, rate, mask, strict=True):
        placement.update(*patch)
    return placement


@pytest.mark.parametrize("turn", TURNS)
def test_each_turn_is_found_by_what_undoes_it(maps, turn):
    counts, rate, mask = maps
    whole = np.ones_like(mask)
    found = look(counts, turned(rate, turn), whole).best()
    if not any(turn):
        assert found is None
        return
    undo = {v: k for k, v in TURNS.items()}[found.turn]
    np.testing.assert_array_equal(turned(turned(rate, turn), undo), rate)
    assert (found.down, found.right) == (0, 0) and found.pcc > found.given + 0.1
    assert f"fits better {found.turn}: mean PCC" in found.sentence(2)


@pytest.mark.parametrize("shift", [(3, 0), (0, -2), (-8, 5)])
def test_shifts_are_found(maps, shift):
    counts, rate, mask = maps
    found = look(counts, np.roll(rate, shift, (2, 3)), mask).best()
    assert (found.turn, found.down, found.right) == ("as given", *shift)
    words = found.sentence(2)
    assert (f"{2 * abs(shift[0])} µm {'up' if shift[0] > 0 else 'down'}" in words) == bool(shift[0])


def test_what_lies_right_or_tells_nothing_is_left_alone(maps):
    counts, rate, mask = maps
    assert look(counts, rate, mask).best() is None
    rng = np.random.default_rng(1)
    noise = np.exp(ndimage.gaussian_filter(rng.normal(size=rate.shape), 3, axes=(2, 3)) * 8)
    assert look(counts, noise, mask).best() is None
    assert look(counts, np.ones_like(rate), mask).best() is None
    assert look(counts[:1], rate[:1], mask[:1]).best() is None  # one patch has no halves
    assert look(0 * counts, rate, mask).best() is None
    assert Placement().best() is None


def test_sums_at_a_shift_are_those_of_the_bins_paired(maps):
    counts, rate, mask = (x[1] for x in maps)
    d, e = 5, -8
    n, y, p, yy, pp, yp = _products(counts * mask, mask, rate * mask, mask)[
        :, :, REACH + d, REACH + e
    ]
    inner = np.s_[REACH : 64 - REACH]
    rows, cols = np.indices((64, 64))[:, inner, inner].reshape(2, -1)
    both = mask[rows, cols] & mask[rows + d, cols + e]
    rows, cols = rows[mask[rows, cols]], cols[mask[rows, cols]]
    assert n[0] == pytest.approx(both.sum(), abs=0.1)
    for g in range(3):
        a, b = counts[g, rows, cols], (rate * mask)[g, rows + d, cols + e]
        known = mask[rows + d, cols + e]
        expected = stats.pearsonr(a[known], b[known]).statistic
        # y is summed where p is known too: products with a mask of it.
        size = known.sum()
        cov = yp[g] - y[g] * p[g] / size
        spread = np.sqrt((yy[g] - y[g] ** 2 / size) * (pp[g] - p[g] ** 2 / size))
        assert cov / spread == pytest.approx(expected, abs=1e-3)


def test_maps_that_are_not_square_are_not_transposed():
    rng = np.random.default_rng(2)
    rate = np.exp(ndimage.gaussian_filter(rng.normal(size=(4, 2, 32, 64)), 3, axes=(2, 3)) * 8)
    placement = look(rng.poisson(rate), rate[..., ::-1], np.ones((4, 32, 64), bool))
    assert placement.best().turn == "flipped left to right" and len(placement.turns) == 4
