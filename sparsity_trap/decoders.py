"""Decoders: encoder tokens [B, C, 16, 16] to a linear output η [B, G, 128, 128].

`losses.rate` turns η into counts. One token covers 8 × 8 bins of 2 µm.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsity_trap.bins import BINS_PER_TOKEN, TOKEN_GRID

#: Doublings of the side from tokens to 2 µm bins.
_DOUBLINGS = BINS_PER_TOKEN.bit_length() - 1

#: Narrowest feature map of an up-sampling stage.
_LEAST_WIDTH = 32


def token_neighbours(k: int) -> Tensor:
    """Indices of the k nearest other tokens on the 16 × 16 grid, int64 [256, k].

    Ties are broken by token index, so corner and edge tokens too have exactly k neighbours.
    """
    index = torch.arange(TOKEN_GRID)
    grid = torch.cartesian_prod(index, index)
    distance = (grid[:, None] - grid[None]).square().sum(-1)
    order = distance.argsort(dim=1, stable=True)
    return order[:, 1 : k + 1]  # the first is the token itself


def neighbour_mean(k: int) -> Tensor:
    """Matrix float32 [256, 256] that takes the mean over each token's neighbours.

    On a graph this small and fixed, one dense product costs less than to gather k neighbours of
    each token and to scatter their gradients back.
    """
    neighbours = token_neighbours(k)
    matrix = torch.zeros(TOKEN_GRID**2, TOKEN_GRID**2, device=neighbours.device)
    return matrix.scatter(1, neighbours, 1 / neighbours.shape[1])


def _fast_layout(x: Tensor) -> Tensor:
    """Channels last on a CPU, where depthwise convolutions are several times as fast that way.

    A GPU picks its own layout; forcing one there would only add copies.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class Head(nn.Conv2d):
    """1 × 1 convolution to genes, as one matrix product.

    Its output is contiguous gene by gene whatever the layout of its input: losses work through η
    in pieces of whole genes, and a channels-last η would scatter each piece over all of memory.

    Parameters
    ----------
    width, genes
        Channels in and out.
    bias
        Initial η: one number, or one per gene, float [G].
    """

    bias: nn.Parameter

    def __init__(self, width: int, genes: int, bias: float | Tensor = 0.0):
        super().__init__(width, genes, 1)
        _set_bias(self, genes, bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            rows = x.permute(0, 2, 3, 1).flatten(1, 2)
            eta = _ByGene.apply(rows, self.weight.flatten(1), self.bias)
        else:
            weight = self.weight.flatten(1).expand(len(x), -1, -1)
            eta = torch.baddbmm(self.bias[:, None], weight, x.flatten(2))
        return eta.unflatten(2, x.shape[2:])


class _ByGene(torch.autograd.Function):
    """Rows [B, bins, C] times a weight [G, C], plus a bias: [B, G, bins].

    Autograd would give the rows' gradient channel by channel, in the layout of η, which slows every
    layer below or costs a copy. Here it comes in the layout of the rows.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.baddbmm(bias[:, None], weight.expand(len(rows), -1, -1), rows.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        below = None
        if ctx.needs_input_grad[0]:
            below = torch.bmm(gradient.transpose(1, 2), weight.expand(len(rows), -1, -1))
        return below, torch.bmm(gradient, rows).sum(0), gradient.sum((0, 2))


class Doubling(nn.ConvTranspose2d):
    """Transposed 2 × 2 convolution that doubles the side; on a CPU with a faster backward pass."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels, width, 2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return _Doubled.apply(x, self.weight, self.bias)
        return super().forward(x, output_size)


class _Doubled(torch.autograd.Function):
    """The convolution, with gradients of its inputs and weights found as what they are.

    Its blocks do not overlap: below, the gradient is a convolution, and that of the weights one
    matrix product. The library's backward pass takes four times as long as both.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, weight, bias, stride=2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        below = F.conv2d(gradient, weight, stride=2) if ctx.needs_input_grad[0] else None
        b, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, channels)
        blocks = gradient.permute(0, 2, 3, 1).reshape(b, height, 2, width, 2, -1)
        blocks = blocks.transpose(2, 3).reshape(len(rows), -1)  # [pixels, 2 × 2 × width]
        own = (rows.T @ blocks).view(channels, 2, 2, -1).permute(0, 3, 1, 2).contiguous()
        return below, own, blocks.sum(0).view(4, -1).sum(0)


def _set_bias(head: nn.Conv2d, genes: int, bias: float | Tensor) -> None:
    """Start a head of one or more channels per gene at the given η."""
    start = torch.as_tensor(bias, dtype=head.weight.dtype, device=head.weight.device)
    values = start.detach().expand(genes).repeat_interleave(head.out_channels // genes)
    head.bias = nn.Parameter(values)


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
    hidden
        Width d of all layers up to the first up-sampling stage; a multiple of ``heads``.
    heads, layers
        Attention heads, and attention layers L.
    neighbours
        Neighbours k of a token in the graph.
    dropout
        Share of activations dropped in attention, in training.
    bias
        Initial η: one number, or one per gene, float [G] (`losses.initial_eta`).

    Notes
    -----
    Input [B, C, 16, 16]; [B, d, 16, 16] through the mixer; [B, 256, d] through attention and graph;
    [4, 256 B, d] in the LSTM; [B, d/2, 32, 32], [B, d/4, 64, 64], [B, d/8, 128, 128] (at least 32
    channels) up-sampling; output η [B, G, 128, 128].

    Parameters, with width d and L attention layers: projection d(C + 1), mixer 2(d² + 31d),
    embeddings 32d, attention L(8d² + 11d), graph 4(2d² + d), LSTM 16(d² + d), its norm 2d, a stage
    from a to b channels 4ab + 11b, head G(b + 1). At the published d = 512, L = 8, C = 1280 and
    G = 50 that is 25,049,586.

    Examples
    --------
    >>> import torch, sparsity_trap as st
    >>> decoder = st.Hist2ST(channels=12, genes=5, hidden=16, heads=2, layers=1, bias=-3.0)
    >>> decoder(torch.zeros(2, 12, 16, 16)).shape
    torch.Size([2, 5, 128, 128])
    """

    def __init__(
        self,
        channels: int,
        genes: int,
        hidden: int = 512,
        heads: int = 8,
        layers: int = 8,
        neighbours: int = 8,
        dropout: float = 0.1,
        bias: float | Tensor = 0.0,
    ):
        super().__init__()
        width = hidden
        self.project = nn.Conv2d(channels, width, 1)
        self.mixer = nn.Sequential(ConvMixer(width), ConvMixer(width))
        self.row = nn.Parameter(0.02 * torch.randn(TOKEN_GRID, 1, width))
        self.column = nn.Parameter(0.02 * torch.randn(1, TOKEN_GRID, width))
        self.attention = nn.Sequential(*(Attention(width, heads, dropout) for _ in range(layers)))
        self.register_buffer("around", neighbour_mean(neighbours), persistent=False)
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
                Doubling(width, narrower),
                nn.GELU(),
                nn.Conv2d(narrower, narrower, 3, padding=1, groups=narrower),
                nn.GELU(),
            ]
            width = narrower
        self.upsample = nn.Sequential(*stages)
        self.head = Head(width, genes, bias)

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
    hidden
        Width of the first stage.
    bias
        Initial η: one number, or one per gene, float [G].

    Notes
    -----
    Input [B, C, 16, 16], output η [B, G, 128, 128]. A stage from a to b channels has
    4ab + 9b² + 3b parameters, the head G(b + 1): with C = 1280, hidden 512 and G = 50 that is
    6,382,514.

    Examples
    --------
    >>> import torch, sparsity_trap as st
    >>> st.Img2ST(channels=12, genes=5, hidden=32)(torch.zeros(1, 12, 16, 16)).shape
    torch.Size([1, 5, 128, 128])
    """

    def __init__(self, channels: int, genes: int, hidden: int = 512, bias: float | Tensor = 0.0):
        super().__init__()
        stages: list[nn.Module] = []
        width = hidden
        for _ in range(_DOUBLINGS):
            stages += [
                Doubling(channels, width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),  # batch norm has the bias
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels, width = width, max(width // 2, _LEAST_WIDTH)
        self.upsample = nn.Sequential(*stages)
        self.head = Head(channels, genes, bias)

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
    bias
        Initial η: one number, or one per gene, float [G].

    Notes
    -----
    Input [B, C, 16, 16], output η [B, G, 128, 128]. Parameters: 64 G (C + 1), with C = 1280 and
    G = 50 that is 4,099,200.

    Examples
    --------
    >>> import torch, sparsity_trap as st
    >>> st.Linear(channels=12, genes=5)(torch.zeros(1, 12, 16, 16)).shape
    torch.Size([1, 5, 128, 128])
    """

    def __init__(self, channels: int, genes: int, bias: float | Tensor = 0.0):
        super().__init__()
        self.head = nn.Conv2d(channels, genes * BINS_PER_TOKEN**2, 1)
        _set_bias(self.head, genes, bias)
        self.shuffle = nn.PixelShuffle(BINS_PER_TOKEN)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.shuffle(self.head(tokens))


#: Decoders by the names that presets use.
DECODERS: dict[str, type[nn.Module]] = {"hist2st": Hist2ST, "img2st": Img2ST, "linear": Linear}


def build_decoder(
    name: str,
    channels: int,
    genes: int,
    *,
    bias: float | Tensor = 0.0,
    hidden: int = 512,
    heads: int = 8,
    layers: int = 8,
    neighbours: int = 8,
    dropout: float = 0.1,
) -> nn.Module:
    """Build a decoder by name, with the sizes that it has and without those that it has not.

    Parameters
    ----------
    name
        Key of `DECODERS`: ``hist2st``, ``img2st`` or ``linear``.
    channels, genes
        Token channels and number of genes.
    bias
        Initial η: one number, or one per gene, float [G] (`losses.initial_eta`).
    hidden, heads, layers, neighbours, dropout
        As for `Hist2ST`; `Img2ST` has a ``hidden`` width only, `Linear` none of them.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if name not in DECODERS:
        raise ValueError(f"decoder '{name}' is unknown: choose one of {', '.join(DECODERS)}")
    sizes = dict(hidden=hidden, heads=heads, layers=layers, neighbours=neighbours, dropout=dropout)
    has = inspect.signature(DECODERS[name]).parameters
    own = {size: value for size, value in sizes.items() if size in has}
    return DECODERS[name](channels, genes, bias=bias, **own)
