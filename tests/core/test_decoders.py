"""Decoders: shapes, geometry of tokens and bins, the token graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsity_trap.decoders import (
    DECODERS,
    Doubling,
    Head,
    Hist2ST,
    Img2ST,
    Linear,
    build_decoder,
    neighbour_mean,
    token_neighbours,
)

SMALL = {"hidden": 32, "heads": 2, "layers": 1}


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_become_maps_at_2_um_that_start_at_the_head_bias(name):
    decoder = build_decoder(name, 12, 5, bias=-3.0, **SMALL).eval()
    eta = decoder(torch.zeros(2, 12, 16, 16))
    assert eta.shape == (2, 5, 128, 128)
    decoder.head.weight.data.zero_()
    torch.testing.assert_close(decoder(torch.randn(2, 12, 16, 16)), torch.full_like(eta, -3.0))


def test_linear_decoder_moves_a_token_to_its_own_eight_by_eight_bins():
    decoder = build_decoder("linear", 4, 2, bias=0.0, **SMALL)
    tokens = torch.zeros(1, 4, 16, 16)
    tokens[0, 1, 3, 10] = 1
    changed = (decoder(tokens) - decoder(torch.zeros_like(tokens))).abs().sum((0, 1)) > 0
    rows, columns = torch.nonzero(changed, as_tuple=True)
    assert (rows.min(), rows.max()) == (24, 31)
    assert (columns.min(), columns.max()) == (80, 87)


@pytest.mark.parametrize("name", DECODERS)
def test_head_bias_may_differ_between_genes(name):
    bias = torch.tensor([-9.0, -3.0, 0.0, 0.5, 2.0])
    decoder = build_decoder(name, 12, 5, bias=bias, **SMALL).eval()
    decoder.head.weight.data.zero_()
    eta = decoder(torch.randn(2, 12, 16, 16))
    torch.testing.assert_close(eta, bias[:, None, None].expand_as(eta))


@pytest.mark.parametrize("name", ["hist2st", "img2st"])
def test_output_lies_where_its_token_lies(name):
    """The change that one token causes is largest in its own bins: no axis is swapped."""
    torch.manual_seed(0)
    decoder = build_decoder(name, 4, 2, bias=0.0, **SMALL).eval()
    tokens = torch.zeros(1, 4, 16, 16)
    before = decoder(tokens)
    tokens[0, :, 3, 10] = 5
    change = (decoder(tokens) - before).abs().sum((0, 1))
    per_token = change.view(16, 8, 16, 8).sum((1, 3))
    assert divmod(int(per_token.argmax()), 16) == (3, 10)


def test_img2st_sees_a_token_and_its_neighbours_only():
    """Three 3 × 3 convolutions, on 4, 2 and 1 bin, reach 7 bins beyond a token's own eight."""
    torch.manual_seed(0)
    decoder = build_decoder("img2st", 4, 2, bias=0.0, **SMALL).eval()
    tokens = torch.zeros(1, 4, 16, 16)
    before = decoder(tokens)
    tokens[0, :, 3, 10] = 5
    rows, columns = torch.nonzero((decoder(tokens) - before)[0].abs().sum(0), as_tuple=True)
    assert (rows.min(), rows.max()) == (24 - 7, 31 + 7)
    assert (columns.min(), columns.max()) == (80 - 7, 87 + 7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_head_is_a_pointwise_convolution(layout):
    head = Head(6, 3)
    x = torch.randn(2, 6, 8, 4).contiguous(memory_format=layout)
    ours, reference = (x.clone(memory_format=layout).requires_grad_() for _ in range(2))
    parameters = list(head.parameters())
    eta = head(2 * ours)
    expected = F.conv2d(2 * reference, head.weight, head.bias)
    torch.testing.assert_close(eta, expected)
    assert eta.is_contiguous()
    upstream = torch.randn_like(eta)
    found = torch.autograd.grad(eta, [ours, *parameters], upstream)
    wanted = torch.autograd.grad(expected, [reference, *parameters], upstream)
    torch.testing.assert_close(found, wanted)


def test_neighbour_mean_is_the_mean_of_gathered_tokens():
    nodes = torch.randn(2, 256, 5)
    gathered = nodes[:, token_neighbours(8)].mean(2)
    torch.testing.assert_close(neighbour_mean(8) @ nodes, gathered)


def test_token_graph_has_the_k_nearest_other_tokens():
    neighbours = token_neighbours(8)
    assert neighbours.shape == (256, 8)
    middle = set(neighbours[5 * 16 + 7].tolist())
    assert middle == {r * 16 + c for r in (4, 5, 6) for c in (6, 7, 8)} - {5 * 16 + 7}
    assert not (neighbours == torch.arange(256)[:, None]).any()


def test_published_size_of_hist2st():
    """Hidden 512, 8 heads, k = 8 on Virchow2's 1280 channels: every part is as wide as stated."""
    with torch.device("meta"):
        decoder = Hist2ST(1280, 50)
    assert decoder.project.weight.shape == (512, 1280, 1, 1)
    assert len(decoder.graph) == 4 and len(decoder.mixer) == 2
    assert decoder.around.shape == (256, 256)
    assert decoder.head.weight.shape[0] == 50


def parameters(name: str, channels: int, genes: int, **sizes) -> int:
    with torch.device("meta"):
        decoder = build_decoder(name, channels, genes, **sizes)
    return sum(p.numel() for p in decoder.parameters())


@pytest.mark.parametrize("decoder", [Hist2ST, Img2ST, Linear])
def test_docstrings_state_the_published_size(decoder):
    assert f"{parameters(decoder.__name__.lower(), 1280, 50):,}" in decoder.__doc__


def test_formulas_in_docstrings_count_parameters():
    channels, genes, d, layers = 24, 9, 128, 3
    hist2st = d * (channels + 1) + 2 * (d**2 + 31 * d) + 32 * d + layers * (8 * d**2 + 11 * d)
    hist2st += 4 * (2 * d**2 + d) + 16 * (d**2 + d) + 2 * d
    hist2st += sum(4 * a * b + 11 * b for a, b in ((128, 64), (64, 32), (32, 32)))
    img2st = sum(4 * a * b + 9 * b**2 + 3 * b for a, b in ((channels, 128), (128, 64), (64, 32)))
    expected = {
        "hist2st": hist2st + genes * (32 + 1),
        "img2st": img2st + genes * (32 + 1),
        "linear": 64 * genes * (channels + 1),
    }
    sizes = {"hidden": d, "heads": 4, "layers": layers}
    assert {n: parameters(n, channels, genes, **sizes) for n in DECODERS} == expected


def test_unknown_decoder_names_the_choices():
    with pytest.raises(ValueError, match="decoder 'unet' is unknown: .*hist2st, img2st, linear"):
        build_decoder("unet", 4, 2)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_learn_in_bf16_autocast(name):
    """Every parameter gets a finite gradient, and η comes in bf16."""
    decoder = build_decoder(name, 12, 5, bias=-3.0, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        eta = decoder(torch.randn(2, 12, 16, 16))
    assert eta.dtype == torch.bfloat16
    eta.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())


def test_doubling_equals_the_transposed_convolution_of_torch():
    torch.manual_seed(0)
    doubling = Doubling(6, 3).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, doubling.weight, doubling.bias]
    expected = F.conv_transpose2d(x, doubling.weight, doubling.bias, stride=2)
    upstream = torch.randn_like(expected)
    found = doubling(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
    )
