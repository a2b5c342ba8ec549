"""The trained model: interpolation of coarse bins."""

from __future__ import annotations

import numpy as np
import torch

from sparsity_trap.decoders import build_decoder
from sparsity_trap.model import Model


def cubic_matrix(bins: int, factor: int) -> np.ndarray:
    """Cubic convolution (Keys 1981, a = -0.75) on half-pixel centres with edges repeated."""
    matrix = np.zeros((bins * factor, bins))
    for i in range(bins * factor):
        x = (i + 0.5) / factor - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            t, a = abs(x - j), -0.75
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[i, min(max(j, 0), bins - 1)] += near if t <= 1 else far
    return matrix


def test_bicubic_prediction_is_the_coarse_sum_interpolated():
    torch.manual_seed(0)
    decoder = build_decoder("linear", 3, 2, bias=-3.0)
    mean, std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    tokens = 3 * torch.randn(2, 3, 16, 16)
    fine = Model(decoder, mean, std, "exp").rate(tokens).detach().numpy()
    found = Model(decoder, mean, std, "exp", 8).rate(tokens).detach().numpy()
    coarse = fine.reshape(2, 2, 32, 4, 32, 4).sum((3, 5))
    cubic = cubic_matrix(32, 4)
    expected = (cubic @ coarse @ cubic.T) / 16
    assert expected.min() < 0
    np.testing.assert_allclose(found, expected.clip(0), rtol=1e-4, atol=1e-6)


def test_interpolation_takes_nothing_from_beyond_the_tissue():
    """Whatever stands off the tissue, where no loss was taken, rates within stay as they are."""
    torch.manual_seed(0)
    mean, std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    mask = torch.rand(2, 128, 128) < 0.9
    mask[0, :, 50:] = mask[1, 90:] = False

    class Fixed(torch.nn.Module):
        def forward(self, eta):
            return self.eta

    model = Model(Fixed(), mean, std, "softplus", 8)
    tokens, eta = torch.zeros(2, 3, 16, 16), torch.randn(2, 2, 128, 128) - 3
    model.decoder.eta = eta
    before = model.rate(tokens, mask)
    model.decoder.eta = torch.where(mask[:, None], eta, 5.0)
    after = model.rate(tokens, mask)
    inside = mask[:, None].expand_as(before)
    torch.testing.assert_close(before[inside], after[inside])
    # A constant rate stays what it is up to the edge; mixed with the bins beyond, it did not.
    model.decoder.eta = torch.where(mask[:, None], torch.full_like(eta, -2.0), 5.0)
    flat = model.rate(tokens, mask)[inside]
    expected = torch.nn.functional.softplus(torch.tensor(-2.0))
    torch.testing.assert_close(flat, expected.expand_as(flat))
    assert (model.rate(tokens)[inside] > 2 * expected).any()
