"""Decoders: encoder tokens [B, C, 16, 16] to a linear output η [B, G, 128, 128].

`losses.rate` turns η into counts. One token covers 8 × 8 bins of 2 µm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap.config import Decoder as DecoderSettings
from sparsity_trap.encoders import TOKEN_GRID

BINS_PER_TOKEN = 8


def token_neighbours(k: int, self_loop: bool) -> Tensor:
    """Indices of the k nearest tokens on the 16 × 16 grid, int64 [256, k] (k + 1 with self-loop).

    Ties are broken by token index, so corner and edge tokens too have exactly k neighbours.
    """
    index = torch.arange(TOKEN_GRID)
    grid = torch.cartesian_prod(index, index)
    distance = (grid[:, None] - grid[None]).square().sum(-1)
    order = distance.argsort(dim=1, stable=True)
    return order[:, : k + 1] if self_loop else order[:, 1 : k + 1]


class ConvMixer(nn.Module):
    """Depthwise 5 × 5 convolution with a residual, then a pointwise convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GELU(), nn.BatchNorm2d(width)
        )
        self.pointwise = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(x + self.depthwise(x))


class Attention(nn.Module):
    """Pre-norm transformer block over the 256 tokens of a patch."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))  # [b, t, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GraphSAGE(nn.Module):
    """One GraphSAGE layer with mean aggregation on a fixed graph (Hamilton et al. 2017)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        around = x[:, neighbours].mean(dim=2)
        return F.normalize(F.relu(self.linear(torch.cat([x, around], dim=-1))), dim=-1)


class Hist2ST(nn.Module):
    """Hist2ST on the token grid (Zeng et al. 2022, doi:10.1093/bib/bbac297), up-sampled to 2 µm.

    Two ConvMixer blocks, pre-norm attention with learned row and column embeddings, four
    GraphSAGE-mean layers on the k nearest tokens, an LSTM over the four layers' outputs
    (jumping knowledge), three ×2 up-sampling stages and a 1 × 1 head.

    Parameters
    ----------
    channels
        Token channels C of the encoder.
    genes
        Number of genes G.
    settings
        Width (``hidden``), attention heads and layers, neighbours k, dropout, self-loop.

    Notes
    -----
    Input [B, C, 16, 16], output η [B, G, 128, 128].
    """

    def __init__(self, channels: int, genes: int, settings: DecoderSettings):
        super().__init__()
        width = settings.hidden
        self.project = nn.Conv2d(channels, width, 1)
        self.mixer = nn.Sequential(ConvMixer(width), ConvMixer(width))
        self.row = nn.Parameter(0.02 * torch.randn(TOKEN_GRID, 1, width))
        self.column = nn.Parameter(0.02 * torch.randn(1, TOKEN_GRID, width))
        self.attention = nn.Sequential(
            *(
                Attention(width, settings.heads, settings.dropout)
                for _ in range(settings.attention_layers)
            )
        )
        neighbours = token_neighbours(settings.neighbours, settings.self_loop)
        self.register_buffer("neighbours", neighbours, persistent=False)
        self.graph = nn.ModuleList(GraphSAGE(width) for _ in range(4))
        self.jump = nn.LSTM(width, width, num_layers=2)
        # GraphSAGE outputs have unit norm over all channels, so the LSTM sees and returns values
        # near zero. The norm here and the skip around the graph, which the original lacks, let
        # the decoder learn within a few hundred steps.
        self.norm = nn.LayerNorm(width)
        stages: list[nn.Module] = []
        for _ in range(int(math.log2(BINS_PER_TOKEN))):
            narrower = max(width // 2, 32)
            stages += [
                # Transposed 2 × 2 convolutions do not overlap: no chequerboard, and a fraction
                # of the cost of a 3 × 3 convolution at 2 µm.
                nn.ConvTranspose2d(width, narrower, 2, stride=2),
                nn.GELU(),
                nn.Conv2d(narrower, narrower, 3, padding=1, groups=narrower),
                nn.GELU(),
            ]
            width = narrower
        self.upsample = nn.Sequential(*stages)
        self.head = nn.Conv2d(width, genes, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mixer(self.project(tokens))
        x = x.permute(0, 2, 3, 1) + self.row + self.column
        x = node = self.attention(x.flatten(1, 2))  # [b, 256, d]
        layers = []
        for layer in self.graph:
            node = layer(node, self.neighbours)
            layers.append(node)
        sequence = torch.stack(layers).flatten(1, 2)  # [4, b * 256, d]: layers are the time axis
        readout = self.norm(self.jump(sequence)[0].mean(dim=0))
        x = x + readout.view_as(x)
        x = x.unflatten(1, (TOKEN_GRID, TOKEN_GRID)).permute(0, 3, 1, 2)
        return self.head(self.upsample(x))


class Linear(nn.Module):
    """One linear map from each token to its 8 × 8 bins: the baseline every deep model must beat.

    Input [B, C, 16, 16], output η [B, G, 128, 128].
    """

    def __init__(self, channels: int, genes: int):
        super().__init__()
        self.head = nn.Conv2d(channels, genes * BINS_PER_TOKEN**2, 1)
        self.shuffle = nn.PixelShuffle(BINS_PER_TOKEN)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.shuffle(self.head(tokens))


def build_decoder(
    name: str, channels: int, genes: int, bias: float, settings: DecoderSettings
) -> nn.Module:
    """Build a decoder with its head bias set.

    Parameters
    ----------
    name
        ``hist2st`` or ``linear``.
    channels, genes
        Token channels and number of genes.
    bias
        Initial η of every gene and bin.
    settings
        Size of Hist2ST.

    Raises
    ------
    KeyError
        For an unknown name; presets are checked before they get here.
    """
    decoder = {
        "hist2st": lambda: Hist2ST(channels, genes, settings),
        "linear": lambda: Linear(channels, genes),
    }[name]()
    nn.init.constant_(decoder.head.bias, bias)
    return decoder
