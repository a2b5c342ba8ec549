"""Patches of the training patients: read, held out, thinned, turned and batched.

Only the training patients' stores and tokens are opened here. Tokens, counts and masks that fit
live on the device; what does not streams from the disk, read ahead by threads, so that memory does
not grow with the cohort.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsity_trap.data.patches import PatchStore
from sparsity_trap.encoders import dihedral, open_tokens
from sparsity_trap.settings import Preset, Run, UserError

#: Tokens, or counts, larger than this stream on a CPU: several runs then share one copy in the page
#: cache.
CPU_BYTES = 2**30
#: Share of a GPU's free memory that maps, and then tokens, may fill; the rest is for activations.
GPU_SHARE = 0.5
#: Batches read ahead, and threads that read them.
_AHEAD, _READERS = 6, 3


class PatchFiles:
    """Maps or tokens of the patches of several sections, read a patch at a time.

    Parameters
    ----------
    sizes
        Patches of each section.
    read_patch
        Gives a patch's array from the number of its section, its row there and, of tokens, a view
        (all of them by default).

    Attributes
    ----------
    shape
        [N of all sections, ...].
    nbytes
        Size of all arrays, as the first one is stored.
    """

    def __init__(self, sizes: Sequence[int], read_patch: Callable[..., np.ndarray]):
        self.ends, self.read_patch = list(accumulate(sizes)), read_patch
        first = read_patch(0, 0)
        self.shape = (self.ends[-1], *first.shape)
        self.nbytes = self.ends[-1] * first.nbytes

    def read(self, patches: Tensor, *views: Tensor) -> Tensor:
        """Arrays [B, ...] of B patches, of tokens each in one of its views."""
        index = zip(patches.tolist(), *(v.tolist() for v in views), strict=True)
        arrays = [self.read_patch(*self._place(patch), *view) for patch, *view in index]
        return torch.from_numpy(np.stack(arrays))

    def load(self, device: torch.device) -> Tensor:
        """All arrays, on a device, in a type that holds them all."""
        whole = torch.empty(0)
        for patches in torch.arange(self.shape[0]).split(8):
            part = self.read(patches)
            if not len(whole):
                whole = torch.empty(self.shape, dtype=part.dtype, device=device)
            whole = whole.to(torch.promote_types(whole.dtype, part.dtype))
            whole[patches[0] : patches[-1] + 1] = part.to(device)
        return whole

    def _place(self, patch: int) -> tuple[int, int]:
        """Section of a patch, and its row there."""
        section = bisect_right(self.ends, patch)
        return section, patch - (self.ends[section - 1] if section else 0)


@dataclass(frozen=True)
class TrainingSet:
    """Patches of the training patients; each field a tensor, or files to load or to stream from.

    Attributes
    ----------
    tokens
        float16 [N, views, C, 16, 16].
    views
        (jitter, dihedral element) of each view.
    counts
        uint8, or int32 where a count exceeds 255, [N, G, 128, 128].
    mask
        bool [N, 128, 128], true in tissue.
    validation
        bool [N], patches of the spatial blocks held out for selection.
    """

    tokens: Tensor | PatchFiles
    views: list[tuple[int, int]]
    counts: Tensor | PatchFiles
    mask: Tensor | PatchFiles
    validation: Tensor

    @property
    def train(self) -> Tensor:
        """Numbers of the patches that are trained on."""
        return torch.nonzero(~self.validation)[:, 0]

    @property
    def held_out(self) -> Tensor:
        """Numbers of the patches that select the epoch."""
        return torch.nonzero(self.validation)[:, 0]

    def on(self, device: torch.device) -> TrainingSet:
        """Move all that fits to the device, maps before tokens."""

        def fitting(values: Any) -> Any:
            if isinstance(values, Tensor):
                return values.to(device)
            room: float = CPU_BYTES
            if device.type == "cuda":
                room = GPU_SHARE * torch.cuda.mem_get_info(device)[0]
            return values.load(device) if values.nbytes <= room else values

        return replace(self, **{k: fitting(getattr(self, k)) for k in ("mask", "counts", "tokens")})


def load_training_set(preset: Preset, run: Run) -> TrainingSet:
    """Read counts and masks of the patients that ``run`` trains on, and no other's.

    Tokens, and maps of more than `CPU_BYTES`, are opened, not read. Where the arm keeps a share
    of the UMIs, the counts are thinned, validation blocks included, with draws that follow from the
    run's seed alone.
    """
    keep = preset.arm(run.arm).keep
    stores, tokens, blocks = [], [], []
    for index, patient in enumerate(preset.training_patients(run.test_patient)):
        store = PatchStore(preset.store(patient))
        array, views = open_tokens(preset, patient)
        stores.append(store)
        tokens.append(array)
        blocks.append(
            validation_block(store.origin[:], preset.training.validation, (run.seed + index) % 4)
        )
    if len({store.genes for store in stores}) > 1:
        raise UserError("the training patients' stores hold different genes: rebuild them")
    sizes = [len(store) for store in stores]

    def counts(section: int, row: int) -> np.ndarray:
        draw = np.random.default_rng([run.seed, section, row])
        return _small(_thin(stores[section].counts[row], keep, draw))

    def maps(read_patch: Callable[[int, int], np.ndarray]) -> Tensor | PatchFiles:
        files = PatchFiles(sizes, read_patch)
        return files.load(torch.device("cpu")) if files.nbytes <= CPU_BYTES else files

    return TrainingSet(
        tokens=PatchFiles(
            sizes, lambda section, row, view=slice(None): np.array(tokens[section][row, view])
        ),
        views=views,
        counts=maps(counts),
        mask=maps(lambda section, row: stores[section].mask[row]),
        validation=torch.from_numpy(np.concatenate(blocks)),
    )


def validation_block(origin: np.ndarray, share: float, side: int) -> np.ndarray:
    """Patches held out for selection: a contiguous strip along one side of a section.

    Parameters
    ----------
    origin
        [N, 2] row and column of each patch.
    share
        Share of patches wanted; whole rows or columns of patches are taken until it is reached.
    side
        0 right, 1 bottom, 2 left, 3 top.

    Returns
    -------
    bool [N]. At least one patch is held out and at least one is kept.

    Raises
    ------
    UserError
        All patches lie in one row or column.
    """
    along = origin[:, 1 - side % 2] * (1 if side < 2 else -1)
    lines = np.unique(along)[::-1]
    held_out = np.zeros(len(origin), bool)
    for line in lines[:-1]:
        held_out |= along == line
        if held_out.mean() >= share:
            break
    if not held_out.any():
        raise UserError(
            "a section has a single row or column of patches, too few to hold out a block for "
            "early stopping: enlarge the section (simulation.side_um) or lower patches.min_tissue"
        )
    return held_out


def _thin(counts: np.ndarray, keep: float, draw: np.random.Generator) -> np.ndarray:
    """Keep each UMI with probability ``keep``, the same ones for the same draws."""
    if keep == 1:
        return counts
    thinned = counts.copy()
    present = counts > 0
    thinned[present] = draw.binomial(counts[present], keep)
    return thinned


def _small(counts: np.ndarray) -> np.ndarray:
    """Counts in the smallest type that holds them: training moves them every step."""
    return counts.astype(np.uint8 if counts.max() < 256 else np.int32)


def read_ahead(
    values: Tensor | PatchFiles, pieces: Sequence[tuple[Tensor, ...]], device: torch.device
) -> Iterator[Tensor]:
    """Tokens or maps of each piece, on the device.

    A piece has the patches [B] and, of tokens, the views [B], on the CPU.
    """
    if isinstance(values, Tensor):
        for piece in pieces:
            yield values[tuple(_to(index, device) for index in piece)]
        return

    def read(*piece: Tensor) -> Tensor:
        batch = values.read(*piece)
        return batch.pin_memory() if device.type == "cuda" else batch

    with ThreadPoolExecutor(_READERS) as pool:
        ahead = deque(pool.submit(read, *piece) for piece in pieces[:_AHEAD])
        for number in range(len(pieces)):
            batch = ahead.popleft().result()
            if number + _AHEAD < len(pieces):
                ahead.append(pool.submit(read, *pieces[number + _AHEAD]))
            yield batch.to(device, non_blocking=True)


def read_maps(
    data: TrainingSet, pieces: Sequence[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts and mask of the patches [B] of each piece, on the device."""
    index = [(patches,) for patches in pieces]
    counts, mask = (read_ahead(values, index, device) for values in (data.counts, data.mask))
    return zip(counts, mask, strict=True)


def _to(index: Tensor, device: torch.device) -> Tensor:
    """Copy an index to the device without waiting for it."""
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)


class Batch(NamedTuple):
    """Tokens [B, C, 16, 16]; counts [B, G, 128, 128] and mask [B, 128, 128], turned like them."""

    tokens: Tensor
    counts: Tensor
    mask: Tensor


def batches(
    data: TrainingSet, patches: Tensor, views: Tensor, size: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of patches in the order given; counts and mask turned as the view was."""
    pieces = patches.split(size)
    side = data.counts.shape[-1]
    turns = _turns(side).to(device)
    element = _to(torch.tensor([turn for _, turn in data.views])[views], device).split(size)
    chosen = list(zip(pieces, views.split(size), strict=True))
    tokens = read_ahead(data.tokens, chosen, device)
    maps = read_maps(data, pieces, device)
    for own_tokens, (counts, mask), turn in zip(tokens, maps, element, strict=True):
        index = turns[turn]

        # Gathering by index turns each patch of a batch its own way, without a loop or a wait.
        def turned(maps: Tensor, index: Tensor = index) -> Tensor:
            flat = maps.flatten(-2)
            source = index if flat.dim() == 2 else index[:, None].expand_as(flat)
            return flat.gather(-1, source).unflatten(-1, (side, side))

        yield Batch(own_tokens, turned(counts), turned(mask))


def _turns(side: int) -> Tensor:
    """Where each bin of a turned map comes from, int64 [8, side²]; row e is `dihedral` e."""
    index = torch.arange(side * side).view(side, side)
    return torch.stack([dihedral(index, element, (0, 1)).flatten() for element in range(8)])


def gene_rate(data: TrainingSet) -> Tensor:
    """Mean count of a 2 µm tissue bin, float32 [G], over training patches."""
    device = data.counts.device if isinstance(data.counts, Tensor) else torch.device("cpu")
    count = torch.zeros(data.counts.shape[1], dtype=torch.float64, device=device)
    bins = torch.zeros((), dtype=torch.float64, device=device)
    for counts, mask in read_maps(data, data.train.split(8), device):
        count += (counts * mask[:, None]).sum((0, 2, 3))
        bins += mask.sum()
    # A gene never seen keeps a finite logarithm, that of half a count.
    return (count.clamp(min=0.5) / bins).float().cpu()


def gene_variance(data: TrainingSet) -> Tensor:
    """Variance of the counts of 2 µm tissue bins, float32 [G], over training patches."""
    device = data.counts.device if isinstance(data.counts, Tensor) else torch.device("cpu")
    sums = torch.zeros(2, data.counts.shape[1], dtype=torch.float64, device=device)
    bins = torch.zeros((), dtype=torch.float64, device=device)
    for counts, mask in read_maps(data, data.train.split(1), device):
        wide = (counts * mask[:, None]).double()
        sums += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
        bins += mask.sum()
    mean, square = sums / bins
    return (square - mean.square()).float().cpu()


def gene_weight(data: TrainingSet, kind: str) -> Tensor | None:
    """Weight of each gene's loss, [G], for `settings.Arm.gene_weight`; None for ``none``.

    A gene without a count in training, which has no scale, gets the mean of the others.
    """
    if kind == "none":
        return None
    variance, rate = gene_variance(data), gene_rate(data)
    weight = {"mean": rate, "1/mean": 1 / rate, "1/variance": 1 / variance}[kind]
    seen = variance > 0
    return torch.where(seen, weight, weight[seen].mean()) if seen.any() else torch.ones_like(rate)


def channel_moments(data: TrainingSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and s.d. per channel, [1, C, 1, 1], over training patches only."""
    channels, train = data.tokens.shape[2], data.train
    sums = torch.zeros(2, channels, dtype=torch.float64, device=device)
    pieces = [(patches, torch.zeros_like(patches)) for patches in train.split(8)]
    for tokens in read_ahead(data.tokens, pieces, device):
        wide = tokens.double()
        sums += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
    n = len(train) * math.prod(data.tokens.shape[3:])
    mean = sums[0] / n
    std = ((sums[1] - n * mean.square()) / (n - 1)).clamp(min=0).sqrt().clamp(min=1e-6)
    mean, std = (x.float().view(1, channels, 1, 1).cpu() for x in (mean, std))
    return mean, std
