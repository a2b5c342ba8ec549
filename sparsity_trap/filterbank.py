"""An encoder without weights: fixed filters of separated stains, as tokens [B, C, 16, 16]."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap.bins import TOKEN_GRID

# Optical density of haematoxylin, eosin and a residual, one stain per row (Ruifrok & Johnston
# 2001, Anal Quant Cytol Histol 23:291-299); the residual is the cross product of the first two.
_HAEMATOXYLIN = (0.650, 0.704, 0.286)
_EOSIN = (0.072, 0.990, 0.105)


class FilterBank(nn.Module):
    """Fixed stain-separated multi-scale filters, pooled to the 16 × 16 token grid.

    Optical density is separated into haematoxylin, eosin and a residual. Each stain is filtered at
    s.d. of 1, 2 and 4 pixels (1.1 to 4.6 µm: chromatin, nuclei, cells) for edges (gradient
    magnitude) and for dark and pale blobs (the two signs of the Laplacian); the structure tensor
    gives the coherence of fibres. Responses are averaged over quarters of a token, 8 × 8 µm, which
    stay apart as channels; their mean over 3 × 3 and 7 × 7 tokens adds context, and the stains'
    standard deviation adds texture.

    Attributes
    ----------
    channels : int
        Token channels C.
    """

    scales = (1.0, 2.0, 4.0)

    def __init__(self) -> None:
        super().__init__()
        h, e = (F.normalize(torch.tensor(v), dim=0) for v in (_HAEMATOXYLIN, _EOSIN))
        stains = torch.stack([h, e, F.normalize(torch.linalg.cross(h, e), dim=0)])
        self.register_buffer("unmix", torch.linalg.inv(stains).T.contiguous())
        self.responses = 3 * (1 + 3 * len(self.scales)) + 1
        self.channels = self.responses * (4 + 2) + 3

    def forward(self, images: Tensor) -> Tensor:
        """Encode uint8 images [B, 224, 224, 3] to tokens [B, C, 16, 16]."""
        density = -torch.log((images.float() + 1) / 256).permute(0, 3, 1, 2)
        stains = torch.einsum("sc,bchw->bshw", self.unmix, density)
        maps = [stains]
        for scale in self.scales:
            smooth = _gaussian(stains, scale)
            dy, dx = _gradient(smooth)
            if scale == 2.0:
                maps.append(_coherence(dy.sum(1, keepdim=True), dx.sum(1, keepdim=True)))
            laplacian = scale**2 * (_gradient(dy)[0] + _gradient(dx)[1])
            edges = scale * torch.sqrt(dy.square() + dx.square())
            maps += [edges, F.relu(laplacian), F.relu(-laplacian)]
        side = images.shape[1] // TOKEN_GRID
        quarters = F.avg_pool2d(torch.cat(maps, dim=1), side // 2)
        token = F.avg_pool2d(quarters, 2)
        context = [
            F.avg_pool2d(token, k, stride=1, padding=k // 2, count_include_pad=False)
            for k in (3, 7)
        ]
        variance = F.avg_pool2d(stains.square(), side) - F.avg_pool2d(stains, side).square()
        texture = variance.clamp(min=0).sqrt()
        return torch.cat([F.pixel_unshuffle(quarters, 2), *context, texture], dim=1)

    def turned(self, tokens: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens of turned images from those of the images, up to rounding.

        Every response turns with its image; quarters change their place within a token.

        Parameters
        ----------
        tokens
            [B, C, 16, 16].
        turn
            Flips and turns the last two axes.
        """
        quarters = F.pixel_shuffle(tokens[:, : 4 * self.responses], 2)
        whole = tokens[:, 4 * self.responses :]
        return torch.cat([F.pixel_unshuffle(turn(quarters), 2), turn(whole)], dim=1)


@lru_cache
def _blur_matrix(size: int, sigma: float, device: torch.device) -> Tensor:
    """Gaussian smoothing of a line of pixels as a [size, size] matrix, edges renormalised."""
    t = torch.arange(size, dtype=torch.float32, device=device)
    kernel = torch.exp(-0.5 * ((t[:, None] - t[None]) / sigma) ** 2)
    return kernel / kernel.sum(1, keepdim=True)


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    # On a 224 px patch two dense products are several times faster than separable convolutions.
    blur = _blur_matrix(x.shape[-1], sigma, x.device)
    return blur @ x @ blur.T


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    return dy, dx


def _coherence(dy: Tensor, dx: Tensor) -> Tensor:
    """Coherence of the structure tensor over 4 px: 0 isotropic, 1 parallel fibres."""
    yy, xx, xy = (_gaussian(p, 4.0) for p in (dy * dy, dx * dx, dy * dx))
    return torch.sqrt((yy - xx).square() + 4 * xy.square()) / (yy + xx + 1e-6)
