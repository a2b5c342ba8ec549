"""Sums over blocks of bins."""

import numpy as np
import pytest
import torch

from sparsity_trap.bins import bin_mask, bin_sum


def test_bin_sum_adds_blocks_and_keeps_kind():
    x = np.arange(64.0).reshape(1, 8, 8)
    expected = x.reshape(1, 2, 4, 2, 4).sum((2, 4))
    assert np.array_equal(bin_sum(x, 4), expected)
    assert torch.equal(bin_sum(torch.tensor(x), 4), torch.tensor(expected))
    assert np.array_equal(bin_sum(x, 1), x)


def test_bin_sum_does_not_overflow_or_round():
    full = np.full((4, 4), 65535, np.uint16)
    assert bin_sum(full, 4).item() == 16 * 65535
    half = np.full((4, 4), 60000, np.float16)
    assert bin_sum(half, 4).item() == 16 * 60000


def test_bin_sum_is_differentiable():
    x = torch.ones(1, 4, 4, requires_grad=True)
    bin_sum(x, 2).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_bin_sum_refuses_a_remainder():
    with pytest.raises(ValueError, match="6 x 8"):
        bin_sum(np.zeros((6, 8)), 4)


def test_larger_bin_is_in_tissue_when_more_than_half_is():
    mask = np.zeros((4, 8), bool)
    mask[:2] = True  # exactly half of each
    mask[2, 4] = True  # one more than half of the second
    assert bin_mask(mask, 4).tolist() == [[False, True]]
    assert bin_mask(torch.tensor(mask), 4).tolist() == [[False, True]]
