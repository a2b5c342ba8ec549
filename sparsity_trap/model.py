"""The trained model: standardised tokens, decoder and link, and the interpolation of arm B."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap import losses
from sparsity_trap.bins import BIN_UM, bin_sum


class Model(nn.Module):
    """Standardised tokens, decoder and link: tokens [B, C, 16, 16] to η and rates [B, G, 128, 128].

    Parameters
    ----------
    decoder
        Maps tokens to η.
    mean, std
        Moments of the token channels, [1, C, 1, 1].
    link
        ``exp`` or ``softplus``.
    bicubic_from_um
        Predict bins of this width and interpolate them to 2 µm.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        mean: Tensor,
        std: Tensor,
        link: str,
        bicubic_from_um: int | None = None,
    ):
        super().__init__()
        self.decoder = decoder
        self.link = link
        self.bicubic_from_um = bicubic_from_um
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Linear output η."""
        return self.decoder((tokens.float() - self.mean) / self.std)

    def rate(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predicted counts per 2 µm bin.

        Parameters
        ----------
        tokens
            [B, C, 16, 16].
        mask
            True in tissue, [B, 128, 128]; by default all is. Interpolated arms take rates from
            tissue bins only: elsewhere no loss was taken, and what stands there would leak in.
        """
        rate = losses.rate(self(tokens).float(), self.link)
        if self.bicubic_from_um is None:
            return rate
        if mask is None:
            mask = torch.ones_like(rate[:, 0], dtype=torch.bool)
        factor = round(self.bicubic_from_um / BIN_UM)
        covered = bin_sum(mask[:, None].float(), factor)
        density = bin_sum(rate * mask[:, None], factor) / covered.clamp(min=1)
        fine = F.interpolate(_spread(density, covered > 0), scale_factor=factor, mode="bicubic")
        return fine.clamp(min=0)  # cubic weights may be negative, counts may not


def _spread(density: Tensor, known: Tensor, reach: int = 2) -> Tensor:
    """Continue maps [B, G, h, w] from the bins that are known [B, 1, h, w] to those around them.

    A cubic kernel reaches two bins; beyond, nothing in tissue depends on the values.
    """
    for _ in range(reach):
        near = F.avg_pool2d(known.float(), 3, stride=1, padding=1)
        around = F.avg_pool2d(density * known, 3, stride=1, padding=1) / near.clamp(min=1e-6)
        density = torch.where(known, density, around)
        known = known | (near > 0)
    return torch.where(known, density, 0.0)
