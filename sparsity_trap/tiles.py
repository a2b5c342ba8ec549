"""Real tiles: H&E and maps of real counts of 73 tiles of one section, folds, training and scores.

The tiles come from printed figures (see `read_tiles`), and each has maps of a few genes only, most
of them of one. So a decoder here is trained on *maps*: its loss is averaged over the tissue bins of
a map, over the maps that a tile has, and over tiles. A gene without a map in a batch takes no part.

Tiles are held out in whole strips of the section, and tiles that touch a held-out one are left out
of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap import losses, metrics
from sparsity_trap.bins import BINS_PER_TOKEN, bin_mask, bin_sum
from sparsity_trap.data.patches import PATCH_PIXELS
from sparsity_trap.decoders import Linear, build_decoder
from sparsity_trap.encoders import dihedral
from sparsity_trap.filterbank import FilterBank
from sparsity_trap.settings import Training, UserError
from sparsity_trap.trainer import EPS, LIKELIHOOD_LR, cosine, draw

#: The file of the tiles, in the folder that a user names.
FILE = "p5_crc_2um_tiles.npz"

#: Name of a loss -> that of `losses.Objective`, and the weight of genes.
LOSSES = {
    "mse": ("mse", "none"),
    "mse-per-mean": ("mse", "1/mean"),
    "power-0.5": ("power-0.5", "none"),
    "poisson": ("poisson", "none"),
    "power-1.5": ("power-1.5", "none"),
    "power-2": ("power-2", "none"),
    "nb": ("nb", "none"),
}
LINK = "exp"

#: Strips of the section that are held out in turn.
STRIPS = 5

#: Flips and quarter turns, all of which training sees.
VIEWS = 8

#: Sizes of the decoders: those of the preset laptop, for a few dozen tiles.
SIZES: dict[str, Any] = {"hidden": 48, "heads": 4, "layers": 1, "neighbours": 8, "dropout": 0.1}


@dataclass(frozen=True)
class Tiles:
    """Tiles of a section, and maps of some of their genes.

    Attributes
    ----------
    ids
        Name of each tile, [N].
    he
        H&E at one pixel a bin, uint8 [N, 128, 128, 3].
    mask
        bool [N, 128, 128], true in tissue.
    place
        Row and column of each tile in the section, in tiles, [N, 2].
    genes
        Names of the G genes.
    tile, gene
        Tile and gene of each of the M maps, [M].
    counts
        UMI counts, uint8 [M, 128, 128], clipped at the 99th percentile of the map.
    printed
        Model -> its published predictions for these maps, [M, 128, 128].
    """

    ids: np.ndarray
    he: np.ndarray
    mask: np.ndarray
    place: np.ndarray
    genes: tuple[str, ...]
    tile: np.ndarray
    gene: np.ndarray
    counts: np.ndarray
    printed: Mapping[str, np.ndarray]

    @property
    def map_mask(self) -> np.ndarray:
        """Tissue of each map, bool [M, 128, 128]."""
        return self.mask[self.tile]

    @cached_property
    def strip(self) -> np.ndarray:
        """Strip of each tile, [N]; see `strips`."""
        return strips(self.place)


def read_tiles(folder: Path) -> Tiles:
    """Read the tiles that `FILE` in a folder holds.

    They are tiles of patient P5, decoded from figures of the repository sparsity-trap-publication
    (MIT licence), whose author chose them for many counts and for large gains of the own model.

    Raises
    ------
    UserError
        There is no such file.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(
            f"{path} is missing: name the folder that holds it with TILES=folder, or fetch the "
            "tiles with make download TILES=1"
        )
    with np.load(path) as arrays:
        genes, gene = np.unique(arrays["pair_gene"], return_inverse=True)
        return Tiles(
            ids=arrays["tile_id"],
            he=arrays["he"],
            mask=arrays["mask"],
            place=arrays["patch_rc"],
            genes=tuple(map(str, genes)),
            tile=arrays["pair_tile"],
            gene=gene,
            counts=arrays["pair_counts"],
            printed={
                name: arrays[f"pair_pred_{name}"].astype(np.float32) for name in ("mse", "poisson")
            },
        )


# --- folds ----------------------------------------------------------------------------------------


def strips(place: np.ndarray, number: int = STRIPS) -> np.ndarray:
    """Number of the strip of each tile: runs of whole columns with about as many tiles in each.

    Examples
    --------
    >>> strips(np.array([[0, 0], [5, 1], [0, 2], [3, 2]]), number=2)
    array([0, 0, 1, 1])
    """
    column = place[:, 1]
    before = (column[None] < column[:, None]).sum(1)  # tiles in earlier columns
    through = (column[None] <= column[:, None]).sum(1)
    middle = (before + through) / 2
    return np.minimum((number * middle / len(column)).astype(int), number - 1)


def trained_on(place: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Tiles that may be trained on: neither held out nor neighbour of one that is, corners too.

    Parameters
    ----------
    place
        Row and column of each tile, [N, 2].
    held_out
        bool [N].

    Examples
    --------
    >>> trained_on(np.array([[0, 0], [1, 1], [2, 2]]), np.array([True, False, False]))
    array([False, False,  True])
    """
    apart = np.abs(place[:, None] - place[None, held_out]).max(-1) > 1
    return ~held_out & apart.all(1)


# --- training -------------------------------------------------------------------------------------


class Views(NamedTuple):
    """The tiles in all flips and turns.

    Attributes
    ----------
    tokens
        float32 [N, 8, C, 16, 16].
    counts, mask
        Of the maps, uint8 and bool [M, 8, 128, 128].
    """

    tokens: Tensor
    counts: Tensor
    mask: Tensor


@torch.no_grad()
def encode(tiles: Tiles) -> Views:
    """Filter-bank tokens of H&E, resampled to the pixels of a patch, and maps turned like them."""
    image = torch.from_numpy(tiles.he).permute(0, 3, 1, 2).float()
    size = (PATCH_PIXELS, PATCH_PIXELS)
    image = F.interpolate(image, size, mode="bicubic").round().clamp(0, 255).byte()
    bank = FilterBank().eval()
    tokens = torch.cat([bank(part.permute(0, 2, 3, 1)) for part in image.split(8)])
    counts, mask = (torch.from_numpy(maps) for maps in (tiles.counts, tiles.map_mask))
    turns = [partial(dihedral, element=view, dims=(-2, -1)) for view in range(VIEWS)]
    return Views(
        torch.stack([bank.turned(tokens, turn) for turn in turns], 1),
        *(torch.stack([turn(maps) for turn in turns], 1) for maps in (counts, mask)),
    )


@dataclass(frozen=True)
class Fit:
    """One decoder, trained on what is not held out.

    Attributes
    ----------
    decoder
        Key of `decoders.DECODERS`.
    loss
        Key of `LOSSES`.
    lr
        Learning rate.
    seed
        Of initial weights, order and views: fits of one seed differ in nothing else.
    held_out
        Strips.
    epochs
        How often every tile is seen.
    """

    decoder: str
    loss: str
    lr: float
    seed: int
    held_out: tuple[int, ...]
    epochs: int

    @property
    def name(self) -> str:
        """Of a file."""
        strips = "".join(map(str, self.held_out))
        how = f"lr{self.lr:g}-x{self.epochs}-s{self.seed}"
        return f"{self.decoder}-{self.loss}-{how}-without{strips}"

    def test(self, tiles: Tiles) -> np.ndarray:
        """Tiles that are held out, bool [N]."""
        return np.isin(tiles.strip, self.held_out)

    def settings(self) -> Training:
        """How it is optimised."""
        return Training(epochs=self.epochs, batch_size=2, lr=self.lr)


class Trained(NamedTuple):
    """A decoder, what standardises its tokens, and the mean count of each gene in training.

    ``gene_rate`` is NaN for a gene without a map among the training tiles.
    """

    decoder: nn.Module
    mean: Tensor
    std: Tensor
    gene_rate: np.ndarray

    @torch.inference_mode()
    def rates(self, views: Views, tiles: np.ndarray) -> np.ndarray:
        """Predicted counts of every gene in some tiles, float32 [n, G, 128, 128]."""
        tokens = (views.tokens[torch.from_numpy(tiles), 0] - self.mean) / self.std
        eta = torch.cat([self.decoder(part) for part in tokens.split(4)])
        return losses.rate(eta, LINK).numpy()


def gene_rate(tiles: Tiles, train: np.ndarray) -> np.ndarray:
    """Mean count of a tissue bin of each gene in the tiles ``train`` [N]; NaN without a map."""
    used = train[tiles.tile]
    inside = tiles.map_mask[used]
    totals = ((tiles.counts[used] * inside).sum((1, 2)), inside.sum((1, 2)))
    count, bins = (
        np.bincount(tiles.gene[used], total, minlength=len(tiles.genes)) for total in totals
    )
    return np.divide(count, bins, out=np.full(len(bins), np.nan), where=bins > 0)


def train(tiles: Tiles, views: Views, fit: Fit) -> Trained:
    """Train a decoder on the tiles that are neither held out nor touch one that is.

    The bias of each gene starts at its mean in training. The rate warms up and falls along half a
    cosine, and the last weights are kept.
    """
    settings = fit.settings()
    chosen = trained_on(tiles.place, fit.test(tiles))
    rate = gene_rate(tiles, chosen)
    own = views.tokens[torch.from_numpy(chosen), 0]
    mean, std = (x(own, (0, 2, 3)).view(-1, 1, 1) for x in (torch.mean, torch.std))
    decoder, objective = initial(fit, own.shape[1], torch.from_numpy(rate).float())
    optimiser = torch.optim.AdamW(
        [
            {"params": list(decoder.parameters()), "weight_decay": settings.weight_decay},
            {"params": list(objective.parameters()), "faster": LIKELIHOOD_LR / settings.lr},
        ],
        settings.lr,
        weight_decay=0,
        eps=EPS,
        fused=True,
    )
    standard = (views.tokens - mean) / std.clamp(min=1e-6)
    order = torch.from_numpy(np.flatnonzero(chosen))
    steps = math.ceil(len(order) / settings.batch_size)
    warmup, total = settings.warmup_epochs * steps, settings.epochs * steps
    decoder.train()
    for epoch in range(settings.epochs):
        tile, view = draw(order, VIEWS, 1000 * fit.seed + epoch)
        batches = zip(*(x.split(settings.batch_size) for x in (tile, view)), strict=True)
        for step, batch in enumerate(batches, epoch * steps):
            loss = map_loss(decoder, objective, standard, views, tiles, *batch)
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), settings.clip)
            now = settings.lr * cosine(step, warmup, total)
            for group in optimiser.param_groups:
                group["lr"] = now * group.get("faster", 1)
            optimiser.step()
            optimiser.zero_grad()
    return Trained(decoder.eval(), mean, std.clamp(min=1e-6), rate)


def initial(fit: Fit, channels: int, rate: Tensor) -> tuple[nn.Module, losses.Objective]:
    """Decoder and objective before training; ``rate`` [G] may be NaN, for any start."""
    known = torch.where(rate.isnan(), rate.nanmean(), rate)
    loss, weight = LOSSES[fit.loss]
    torch.manual_seed(fit.seed)
    bias = losses.initial_eta(known, LINK)
    decoder = build_decoder(fit.decoder, channels, len(rate), bias=bias, **SIZES)
    weights = 1 / known if weight == "1/mean" else None
    return decoder, losses.Objective(loss, LINK, len(rate), gene_weight=weights)


def map_loss(
    decoder: nn.Module,
    objective: losses.Objective,
    tokens: Tensor,
    views: Views,
    tiles: Tiles,
    tile: Tensor,
    view: Tensor,
) -> Tensor:
    """Mean loss over tiles, of each the mean over the maps that it has.

    Parameters
    ----------
    decoder, objective
        From `initial`.
    tokens
        Standardised, [N, 8, C, 16, 16].
    views, tiles
        Maps, and what they are of.
    tile, view
        Tiles of the batch, and the view of each, [B].
    """
    has = torch.from_numpy(tiles.tile)[None] == tile[:, None]  # [B, M]
    which, maps = has.nonzero(as_tuple=True)
    gene = torch.from_numpy(tiles.gene)[maps]
    eta = decode(decoder, tokens[tile, view], which, gene)
    counts, mask = (x[maps, view[which]].float() for x in (views.counts, views.mask))
    own = [parameter[gene, None, None] for parameter in objective.parameters()]
    seen = eta if objective.in_log else losses.rate(eta, LINK)
    value = (objective.compare(seen, counts, *own) * mask).sum((1, 2)) / mask.sum((1, 2))
    if objective.gene_weight is not None:
        value = value * objective.gene_weight[gene]
    return (value / has.sum(1)[which]).sum() / len(tile)


def decode(decoder: nn.Module, tokens: Tensor, tile: Tensor, gene: Tensor) -> Tensor:
    """η of some maps only, [M, 128, 128], as ``decoder(tokens)[tile, gene]``."""
    if not isinstance(decoder, Linear):
        return decoder(tokens)[tile, gene]
    # A linear decoder need not compute the maps of all genes, twenty times as many.
    bins = BINS_PER_TOKEN**2
    weight, bias = (
        parameter.view(-1, bins, parameter.numel() // decoder.head.out_channels).index_select(
            0, gene
        )
        for parameter in decoder.head.parameters()
    )
    eta = torch.baddbmm(bias, weight, tokens.flatten(2)[tile])
    return decoder.shuffle(eta.unflatten(2, tokens.shape[2:]))[:, 0]


# --- scores ---------------------------------------------------------------------------------------


def score(
    counts: np.ndarray, rates: np.ndarray, mask: np.ndarray, mean: np.ndarray
) -> pd.DataFrame:
    """Scores of single maps, one row each.

    Parameters
    ----------
    counts, rates, mask
        [M, 128, 128].
    mean
        Mean count of each map's gene in training, [M], for ``d2``.

    Returns
    -------
    DataFrame with ``pcc_2um``, ``pcc_8um``, ``d2``, ``ssim_2um``, ``ssim_8um`` and ``calibration``
    as in `metrics`; NaN where one is not defined.
    """
    counts, rates = (np.asarray(x, np.float32) for x in (counts, rates))
    rows = []
    for y, rate, inside, constant in zip(counts, rates, mask, mean, strict=True):
        pair = (y[None], rate[None], inside)
        at_2um = metrics.Moments.of(*pair)
        maps = y[None, None], rate[None, None], inside[None]
        coarse = *(bin_sum(np.where(inside, x, 0), 4) for x in maps[:2]), bin_mask(maps[2], 4)
        rows.append({
            "pcc_2um": at_2um.pcc()[0],
            "pcc_8um": metrics.Moments.of(*pair, 4).pcc()[0],
            "d2": metrics.PoissonSums.of(*pair).d2(np.array([constant]))[0],
            "ssim_2um": metrics.ssim(*maps)[0, 0],
            "ssim_8um": metrics.ssim(*coarse)[0, 0],
            "calibration": at_2um.calibration()[0],
        })  # fmt: skip
    return pd.DataFrame(rows)
