"""Encoders: token layout, equivariance of the filter bank, the cache and its views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zarr

from sparsity_trap import encoders
from sparsity_trap.config import Encoder, UserError


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Two smooth random images, uint8 [2, 224, 224, 3]."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 28, 28, generator=draw)
    fine = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic")
    return (fine.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1)


def test_dihedral_gives_all_eight_elements_once():
    square = torch.arange(9).view(3, 3)
    seen = {tuple(encoders.dihedral(square, e, (0, 1)).flatten().tolist()) for e in range(8)}
    assert len(seen) == 8
    assert encoders.dihedral(square, 0, (0, 1)).equal(square)


def test_filterbank_tokens_turn_with_the_image(images):
    encoder = encoders.load_encoder("filterbank")
    tokens = encoder(images)
    assert tokens.shape == (2, encoder.channels, 16, 16)
    assert torch.isfinite(tokens).all()
    # Channels after the 4 × quarter channels describe whole tokens; they turn with the grid.
    whole = slice(encoder.channels - 65, None)
    for element in range(1, 8):
        turned = encoder(encoders.dihedral(images, element, (1, 2)))
        expected = encoders.dihedral(tokens, element, (2, 3))
        torch.testing.assert_close(turned[:, whole], expected[:, whole], atol=2e-4, rtol=1e-3)


def test_filterbank_separates_the_stains():
    """A pure haematoxylin patch shows in the first stain channel and not in eosin, and vice versa."""
    encoder = encoders.load_encoder("filterbank")
    for stain, other, vector in ((0, 1, encoders._HAEMATOXYLIN), (1, 0, encoders._EOSIN)):
        colour = 256 * torch.exp(-torch.tensor(vector)) - 1
        tokens = encoder(colour.round().byte().expand(1, 224, 224, 3))
        quarters = tokens[0, : 4 * 31].view(31, 4, 16, 16).mean((1, 2, 3))
        assert quarters[stain] > 0.9 and abs(quarters[other]) < 0.05


@pytest.mark.parametrize(
    ("name", "prefix", "width"),
    [("vit_small_patch14_reg4_dinov2", 5, 384), ("vit_tiny_patch16_224", 1, 192)],
)
def test_timm_tokens_leave_prefix_tokens_out(images, name, prefix, width):
    encoder = encoders.TimmTokens(name, pretrained=False)
    assert encoder.model.num_prefix_tokens == prefix
    with torch.inference_mode():
        tokens = encoder(images)
        normalised = (images.permute(0, 3, 1, 2) / 255 - encoder.mean) / encoder.std
        grid = encoder.model.forward_intermediates(
            normalised, indices=1, norm=True, intermediates_only=True
        )[0]
    assert tokens.shape == (2, width, 16, 16)
    if grid.shape[-1] != 16:
        grid = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(tokens, grid, atol=1e-4, rtol=1e-4)


def test_unknown_encoder_names_the_remedy():
    with pytest.raises(UserError, match="'no_such_vit'.*filterbank"):
        encoders.load_encoder("no_such_vit")


def test_cached_views_are_encodings_of_the_turned_image(images, tmp_path, monkeypatch):
    class Store:
        patient = "P1"
        images = np.zeros((2, 224, 224, 3), np.uint8)

        def __len__(self):
            return len(self.images)

    Store.images = images.numpy()
    monkeypatch.setattr(encoders, "PatchStore", lambda path: Store())
    settings = Encoder(name="filterbank", jitter_views=1)
    encoders.cache_tokens(tmp_path / "store", tmp_path / "tokens.zarr", settings)
    group = zarr.open_group(tmp_path / "tokens.zarr", mode="r")
    tokens, views = group["tokens"][:], [tuple(v) for v in group.attrs["views"]]
    assert tokens.shape[:2] == (2, 16) and views == encoders.views(settings)
    encoder = encoders.load_encoder("filterbank")
    for element in (0, 3, 6):
        expected = encoder(encoders.dihedral(images, element, (1, 2))).half()
        cached = torch.from_numpy(tokens[:, views.index((0, element))])
        torch.testing.assert_close(cached, expected)
    assert not np.array_equal(tokens[:, views.index((0, 0))], tokens[:, views.index((1, 0))])
    assert not list(tmp_path.glob(".*"))
