"""Decoders: encoder tokens [B, C, 16, 16] to a linear output η [B, G, 128, 128].

`losses.rate` turns η into counts. One token covers 8 × 8 bins of 2 µm. `parameter_table` lists the
stages of each decoder with their shapes and parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap.encoders import TOKEN_GRID
from sparsity_trap.settings import Decoder as DecoderSettings

if TYPE_CHECKING:
    import pandas as pd

BINS_PER_TOKEN = 8

#: Doublings of the side from tokens to 2 µm bins.
_DOUBLINGS = BINS_PER_TOKEN.bit_length() - 1

#: Narrowest feature map of an up-sampling stage.
_LEAST_WIDTH = 32


def token_neighbours(k: int, self_loop: bool) -> Tensor:
    """Indices of the k nearest tokens on the 16 × 16 grid, int64 [256, k] (k + 1 with self-loop).

    Ties are broken by token index, so corner and edge tokens too have exactly k neighbours.
    """
    index = torch.arange(TOKEN_GRID)
    grid = torch.cartesian_prod(index, index)
    distance = (grid[:, None] - grid[None]).square().sum(-1)
    order = distance.argsort(dim=1, stable=True)
    return order[:, : k + 1] if self_loop else order[:, 1 : k + 1]


def neighbour_mean(k: int, self_loop: bool) -> Tensor:
    """Matrix float32 [256, 256] that takes the mean over each token's neighbours.

    On a graph this small and fixed, one dense product costs less than to gather k neighbours of
    each token and to scatter their gradients back.
    """
    neighbours = token_neighbours(k, self_loop)
    matrix = torch.zeros(TOKEN_GRID**2, TOKEN_GRID**2, device=neighbours.device)
    return matrix.scatter(1, neighbours, 1 / neighbours.shape[1])


def _fast_layout(x: Tensor) -> Tensor:
    """Channels last on a CPU, where depthwise convolutions are several times as fast that way."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class Head(nn.Conv2d):
    """1 × 1 convolution to genes, as one matrix product.

    Its output is contiguous gene by gene whatever the layout of its input: losses work through η
    in pieces of whole genes.
    """

    bias: nn.Parameter

    def __init__(self, width: int, genes: int):
        super().__init__(width, genes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
            # Left in the layout of η, the gradient would slow every layer below.
            x.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        weight = self.weight.flatten(1).expand(len(x), -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


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

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        around = torch.matmul(mean, x)
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
    Input [B, C, 16, 16]; [B, d, 16, 16] through the mixer; [B, 256, d] through attention and graph;
    [4, 256 B, d] in the LSTM; [B, d/2, 32, 32], [B, d/4, 64, 64], [B, d/8, 128, 128] (at least 32
    channels) up-sampling; output η [B, G, 128, 128].

    Parameters, with width d and L attention layers: projection d(C + 1), mixer 2(d² + 31d),
    embeddings 32d, attention L(8d² + 11d), graph 4(2d² + d), LSTM 16(d² + d), its norm 2d, a stage
    from a to b channels 4ab + 11b, head G(b + 1). At the published d = 512, L = 8, C = 1280 and
    G = 50 that is 25,049,586.
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
        around = neighbour_mean(settings.neighbours, settings.self_loop)
        self.register_buffer("around", around, persistent=False)
        self.graph = nn.ModuleList(GraphSAGE(width) for _ in range(4))
        self.jump = nn.LSTM(width, width, num_layers=2)
        # GraphSAGE outputs have unit norm over all channels, so the LSTM sees and returns values
        # near zero. The norm here and the skip around the graph, which the original lacks, let
        # the decoder learn within a few hundred steps.
        self.norm = nn.LayerNorm(width)
        stages: list[nn.Module] = []
        for _ in range(_DOUBLINGS):
            narrower = max(width // 2, _LEAST_WIDTH)
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
        self.head = Head(width, genes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mixer(self.project(_fast_layout(tokens)))
        x = x.permute(0, 2, 3, 1) + self.row + self.column
        x = node = self.attention(x.flatten(1, 2))  # [b, 256, d]
        layers = []
        for layer in self.graph:
            node = layer(node, self.around)
            layers.append(node)
        sequence = torch.stack(layers).flatten(1, 2)  # [4, b * 256, d]: layers are the time axis
        readout = self.norm(self.jump(sequence)[0].mean(dim=0))
        x = x + readout.view_as(x)
        x = x.unflatten(1, (TOKEN_GRID, TOKEN_GRID)).permute(0, 3, 1, 2)
        return self.head(self.upsample(x))


class Img2ST(nn.Module):
    """Img2ST's MiniUNet on the token grid: convolutions only, no exchange over long distances.

    Three stages double the side, 16 → 32 → 64 → 128 bins: a transposed 2 × 2 convolution, then
    3 × 3 convolution, batch norm and ReLU. Widths are ``hidden``, ½ and ¼ of it, at least 32. A
    1 × 1 head follows.

    Parameters
    ----------
    channels
        Token channels C of the encoder.
    genes
        Number of genes G.
    settings
        Width (``hidden``) of the first stage; the rest is not used.

    Notes
    -----
    Input [B, C, 16, 16], output η [B, G, 128, 128]. A stage from a to b channels has
    4ab + 9b² + 3b parameters, the head G(b + 1): with C = 1280, hidden 512 and G = 50 that is
    6,382,514.
    """

    def __init__(self, channels: int, genes: int, settings: DecoderSettings):
        super().__init__()
        stages: list[nn.Module] = []
        width = settings.hidden
        for _ in range(_DOUBLINGS):
            stages += [
                nn.ConvTranspose2d(channels, width, 2, stride=2),
                nn.Conv2d(width, width, 3, padding=1, bias=False),  # batch norm has the bias
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels, width = width, max(width // 2, _LEAST_WIDTH)
        self.upsample = nn.Sequential(*stages)
        self.head = Head(channels, genes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.upsample(_fast_layout(tokens)))


class Linear(nn.Module):
    """One linear map from each token to its 8 × 8 bins: the baseline every deep model must beat.

    Parameters
    ----------
    channels
        Token channels C of the encoder.
    genes
        Number of genes G.

    Notes
    -----
    Input [B, C, 16, 16], output η [B, G, 128, 128]. Parameters: 64 G (C + 1), with C = 1280 and
    G = 50 that is 4,099,200.
    """

    def __init__(self, channels: int, genes: int):
        super().__init__()
        self.head = nn.Conv2d(channels, genes * BINS_PER_TOKEN**2, 1)
        self.shuffle = nn.PixelShuffle(BINS_PER_TOKEN)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.shuffle(self.head(tokens))


DECODERS: dict[str, Callable[[int, int, DecoderSettings], nn.Module]] = {
    "hist2st": Hist2ST,
    "img2st": Img2ST,
    "linear": lambda channels, genes, _: Linear(channels, genes),
}


def build_decoder(
    name: str, channels: int, genes: int, bias: float | Tensor, settings: DecoderSettings
) -> nn.Module:
    """Build a decoder with its head bias set.

    Parameters
    ----------
    name
        Key of `DECODERS`: ``hist2st``, ``img2st`` or ``linear``.
    channels, genes
        Token channels and number of genes.
    bias
        Initial η: one number, or one per gene, float [G] (`losses.initial_eta`).
    settings
        Size of the decoder.

    Raises
    ------
    KeyError
        For an unknown name; presets are checked before they get here.
    """
    decoder: Any = DECODERS[name](channels, genes, settings)
    head = decoder.head.bias
    # The linear decoder's head has 64 channels per gene, the others' one.
    per_gene = torch.as_tensor(bias, dtype=head.dtype, device=head.device).expand(genes)
    with torch.no_grad():
        head.copy_(per_gene.repeat_interleave(len(head) // genes))
    return decoder


def parameter_table(channels: int, genes: int, settings: DecoderSettings) -> pd.DataFrame:
    """Stages of every decoder with their output shapes and parameters, read from the modules.

    Parameters
    ----------
    channels, genes
        Token channels and number of genes.
    settings
        Size of the decoders.

    Returns
    -------
    One row per stage, in the order in which a patch passes them after the embeddings, and a row
    ``total`` per decoder: ``decoder``; ``stage``, the module's name and class; ``layers``, how many
    equal ones follow each other; ``shape``, output shape of a batch of one; ``parameters``, of all
    layers of the row. Layers without parameters are left out unless they change the shape.
    """
    import pandas as pd

    rows = []
    for name in DECODERS:
        # On the meta device only shapes are computed: the published size costs no memory or time.
        with torch.device("meta"):
            decoder = build_decoder(name, channels, genes, 0.0, settings).eval()
            stages = list(_stages(decoder, torch.empty(1, channels, TOKEN_GRID, TOKEN_GRID)))
        for (stage, kind, shape, size), equal in groupby(stages):
            layers = sum(1 for _ in equal)
            label = f"{stage} ({kind})" if kind else stage
            rows.append((name, label, layers, shape, layers * size))
        total = sum(p.numel() for p in decoder.parameters())
        rows.append((name, "total", 1, rows[-1][3], total))
    return pd.DataFrame(rows, columns=["decoder", "stage", "layers", "shape", "parameters"])


def _stages(decoder: nn.Module, tokens: Tensor) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, kind, output shape and parameters of each layer, in the order in which they run."""
    ran: list[tuple[str, str, tuple[int, ...], int]] = []

    def note(stage: str, kind: str):
        def hook(layer: nn.Module, _, output) -> None:
            output = output[0] if isinstance(output, tuple) else output
            shape = tuple(output.shape)
            size = sum(p.numel() for p in layer.parameters())
            if size or not ran or shape != ran[-1][2]:
                ran.append((stage, kind, shape, size))

        return hook

    for stage, module in decoder.named_children():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for layer in module:
                layer.register_forward_hook(note(stage, type(layer).__name__))
        else:
            module.register_forward_hook(note(stage, ""))
    decoder(tokens)
    for stage, own in decoder.named_parameters(recurse=False):
        yield stage, "embedding", tuple(own.shape), own.numel()
    yield from ran
