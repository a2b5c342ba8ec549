"""Decoders: shapes, geometry of tokens and bins, the token graph."""

from __future__ import annotations

import pytest
import torch

from sparsity_trap.config import Decoder
from sparsity_trap.decoders import build_decoder, token_neighbours

SMALL = Decoder(hidden=32, heads=2, attention_layers=1)


@pytest.mark.parametrize("name", ["hist2st", "linear"])
def test_tokens_become_maps_at_2_um_that_start_at_the_head_bias(name):
    decoder = build_decoder(name, 12, 5, -3.0, SMALL).eval()
    eta = decoder(torch.zeros(2, 12, 16, 16))
    assert eta.shape == (2, 5, 128, 128)
    decoder.head.weight.data.zero_()
    torch.testing.assert_close(decoder(torch.randn(2, 12, 16, 16)), torch.full_like(eta, -3.0))


def test_linear_decoder_moves_a_token_to_its_own_eight_by_eight_bins():
    decoder = build_decoder("linear", 4, 2, 0.0, SMALL)
    tokens = torch.zeros(1, 4, 16, 16)
    tokens[0, 1, 3, 10] = 1
    changed = (decoder(tokens) - decoder(torch.zeros_like(tokens))).abs().sum((0, 1)) > 0
    rows, columns = torch.nonzero(changed, as_tuple=True)
    assert (rows.min(), rows.max()) == (24, 31)
    assert (columns.min(), columns.max()) == (80, 87)


def test_hist2st_output_lies_where_its_token_lies():
    """The change that one token causes is largest in its own bins: no axis is swapped on the way."""
    torch.manual_seed(0)
    decoder = build_decoder("hist2st", 4, 2, 0.0, SMALL).eval()
    tokens = torch.zeros(1, 4, 16, 16)
    before = decoder(tokens)
    tokens[0, :, 3, 10] = 5
    change = (decoder(tokens) - before).abs().sum((0, 1))
    per_token = change.view(16, 8, 16, 8).sum((1, 3))
    assert divmod(int(per_token.argmax()), 16) == (3, 10)


@pytest.mark.parametrize("self_loop", [False, True])
def test_token_graph_has_the_k_nearest_tokens_with_or_without_the_token_itself(self_loop):
    neighbours = token_neighbours(8, self_loop)
    assert neighbours.shape == (256, 9 if self_loop else 8)
    middle = set(neighbours[5 * 16 + 7].tolist()) - {5 * 16 + 7}
    assert middle == {r * 16 + c for r in (4, 5, 6) for c in (6, 7, 8)} - {5 * 16 + 7}
    itself = (neighbours == torch.arange(256)[:, None]).any(1)
    assert itself.all() if self_loop else not itself.any()


def test_published_size_of_hist2st():
    """Hidden 512, 8 heads, k = 8 on Virchow2's 1280 channels: every part is as wide as stated."""
    with torch.device("meta"):
        decoder = build_decoder("hist2st", 1280, 50, -3.0, Decoder())
    assert decoder.project.weight.shape == (512, 1280, 1, 1)
    assert len(decoder.graph) == 4 and len(decoder.mixer) == 2
    assert decoder.neighbours.shape == (256, 8)
    assert decoder.head.weight.shape[0] == 50
