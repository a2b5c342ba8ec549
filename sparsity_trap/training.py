"""Train one arm with one patient left out, and predict that patient.

Only the training patients' stores and tokens are opened before the checkpoint is chosen; the test
patient is read afterwards, by `predict`.

Tokens, counts and masks live on the device; tokens and counts that do not fit there stream from the
disk. A step launches work and never waits for it: draws are made on the CPU for a whole epoch,
turned counts are gathered by index, and losses are read once per epoch. Every epoch leaves a
checkpoint from which a killed run goes on to the same result.

Several processes share one run when they are launched together::

    torchrun --nproc-per-node 4 -m sparsity_trap.training paper E P5

Each batch is split over the processes and their gradients are added up, so the loss curve is that
of one process within rounding, but for dropout, which every process draws for its own patches. On
GPUs batch normalisation takes its statistics over the whole batch. On CPUs, where torch has no
such operation, it takes them over each process's share.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import zarr
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsity_trap import losses
from sparsity_trap.bins import BIN_UM, bin_mask, bin_sum
from sparsity_trap.data.genes import panel
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.decoders import build_decoder
from sparsity_trap.encoders import dihedral
from sparsity_trap.files import building, record
from sparsity_trap.progress import track
from sparsity_trap.scores import GeneScores
from sparsity_trap.settings import Arm, Preset, Run, Training, UserError, as_json

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Tokens, or counts, larger than this stream on a CPU: several runs then share one copy in the page
#: cache.
CPU_BYTES = 2**30
#: Share of a GPU's free memory that maps, and then tokens, may fill; the rest is for activations.
GPU_SHARE = 0.5
#: Learning rate of the likelihood's own parameters (dispersion, zero inflation): a decoder's would
#: leave them where they start.
LIKELIHOOD_LR = 1e-2
#: Batches read ahead, and threads that read them.
_AHEAD, _READERS = 6, 3


class TokenFiles:
    """Tokens of several sections in their caches, read one view at a time.

    Parameters
    ----------
    arrays
        Token arrays [N, views, C, 16, 16], one per section, as `open_tokens` gives them.

    Attributes
    ----------
    shape
        [N of all sections, views, C, 16, 16].
    nbytes
        Size of all views.
    """

    def __init__(self, arrays: Sequence[zarr.Array]):
        self.arrays = list(arrays)
        self.ends = list(accumulate(array.shape[0] for array in arrays))
        self.shape = (self.ends[-1], *arrays[0].shape[1:])
        self.nbytes = sum(array.nbytes for array in arrays)

    def read(self, patches: Tensor, views: Tensor) -> Tensor:
        """Tokens [B, C, 16, 16] of B patches, each in one of its views."""
        pairs = zip(patches.tolist(), views.tolist(), strict=True)
        return torch.from_numpy(np.stack([self._view(patch, view) for patch, view in pairs]))

    def load(self, device: torch.device) -> Tensor:
        """All tokens, on a device."""
        dtype = torch.from_numpy(np.empty(0, self.arrays[0].dtype)).dtype
        tokens = torch.empty(self.shape, dtype=dtype, device=device)
        for array, end in zip(self.arrays, self.ends, strict=True):
            tokens[end - array.shape[0] : end] = torch.from_numpy(array[:]).to(device)
        return tokens

    def _view(self, patch: int, view: int) -> np.ndarray:
        section, row = _place(self.ends, patch)
        array = self.arrays[section]
        shape = array.shape[2:]
        if not array.compressors and array.chunks == (1, *array.shape[1:]):
            # zarr would read all views of the patch for this one.
            chunk = array.metadata.encode_chunk_key((row, 0, 0, 0, 0))
            path = Path(array.store.root, array.path, chunk)
            if path.is_file():
                count = math.prod(shape)
                offset = view * count * array.dtype.itemsize
                return np.fromfile(path, array.dtype, count, offset=offset).reshape(shape)
        return array[row, view]


class PatchFiles:
    """Maps of the patches of several sections, read a patch at a time.

    Parameters
    ----------
    sizes
        Patches of each section.
    read_patch
        Gives a patch's map from the number of its section and its row there.

    Attributes
    ----------
    shape
        [N of all sections, ...].
    nbytes
        Size of all maps, as the first one is stored.
    """

    def __init__(self, sizes: Sequence[int], read_patch: Callable[[int, int], np.ndarray]):
        self.ends, self.read_patch = list(accumulate(sizes)), read_patch
        first = read_patch(0, 0)
        self.shape = (self.ends[-1], *first.shape)
        self.nbytes = self.ends[-1] * first.nbytes

    def read(self, patches: Tensor) -> Tensor:
        """Maps [B, ...] of B patches, in a type that holds them all."""
        places = (_place(self.ends, patch) for patch in patches.tolist())
        return torch.from_numpy(np.stack([self.read_patch(*place) for place in places]))

    def load(self, device: torch.device) -> Tensor:
        """All maps, on a device."""
        maps = torch.empty(0)
        for patches in torch.arange(self.shape[0]).split(8):
            part = self.read(patches)
            if not len(maps):
                maps = torch.empty(self.shape, dtype=part.dtype, device=device)
            maps = maps.to(torch.promote_types(maps.dtype, part.dtype))
            maps[patches[0] : patches[-1] + 1] = part.to(device)
        return maps


def _place(ends: Sequence[int], patch: int) -> tuple[int, int]:
    """Section of a patch and its row there, given where the patches of each section end."""
    section = bisect_right(ends, patch)
    return section, patch - (ends[section - 1] if section else 0)


@dataclass(frozen=True)
class TrainingSet:
    """Patches of the training patients.

    Attributes
    ----------
    tokens
        float16 [N, views, C, 16, 16]: a tensor, or files to load or to stream from.
    views
        (jitter, dihedral element) of each view.
    counts
        uint8, or int32 where a count exceeds 255, [N, G, 128, 128].
    mask
        bool [N, 128, 128], true in tissue.
    validation
        bool [N], patches of the spatial blocks held out for selection.
    """

    tokens: Tensor | TokenFiles
    views: list[tuple[int, int]]
    counts: Tensor | PatchFiles
    mask: Tensor | PatchFiles
    validation: Tensor


class Fitted(NamedTuple):
    """What `fit` returns."""

    model: Model
    """The model of the best validation epoch, in evaluation mode."""
    history: list[dict[str, float]]
    """One record per epoch."""
    objective: losses.Objective
    """The loss with its own parameters, if it has any, as they were in that epoch."""


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

    def rate(self, tokens: Tensor) -> Tensor:
        """Predicted counts per 2 µm bin."""
        rate = losses.rate(self(tokens).float(), self.link)
        if self.bicubic_from_um is None:
            return rate
        factor = round(self.bicubic_from_um / BIN_UM)
        # Cubic weights may be negative, counts may not.
        fine = F.interpolate(bin_sum(rate, factor), scale_factor=factor, mode="bicubic")
        return (fine / factor**2).clamp(min=0)


class _OneProcess:
    """What the engine uses of Fabric, for one process on a CPU: importing Fabric takes seconds."""

    device = torch.device("cpu")
    world_size = 1
    global_rank = 0

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def all_reduce(self, data: Tensor, reduce_op: str) -> Tensor:
        return data

    def broadcast(self, obj: Any) -> Any:
        return obj

    def barrier(self) -> None:
        pass


def launch(precision: str = "float32") -> Fabric | _OneProcess:
    """Device, precision and, under ``torchrun`` or ``srun``, the group of processes.

    Parameters
    ----------
    precision
        ``float32``, or ``bfloat16`` for mixed precision.

    Returns
    -------
    Fabric; for one process on a CPU in float32 an object with the same members as far as used.
    """
    per_node, nodes = _processes()
    alone = per_node * nodes == 1
    cuda = torch.cuda.is_available()
    if alone and not cuda and precision == "float32":
        return _OneProcess()
    # Without it cuBLAS is not deterministic; it is read when CUDA is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=per_node,
        num_nodes=nodes,
        strategy="auto" if alone else "ddp",
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
        # A single process in a larger SLURM allocation is not one of several.
        plugins=[LightningEnvironment()] if alone else [],
    )
    fabric.launch()
    return fabric


def _processes() -> tuple[int, int]:
    """Processes per node and nodes that this process was launched with."""
    if torch.distributed.is_torchelastic_launched():
        per_node, total = (int(os.environ[key]) for key in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        return per_node, total // per_node
    # Set by srun for its step, unlike SLURM_NTASKS, which describes the allocation.
    total = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) if total > 1 else 1
    return total // nodes, nodes


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

    def counts(section: int, row: int) -> np.ndarray:
        draw = np.random.default_rng([run.seed, section, row])
        return _small(_thin(stores[section].counts[row], keep, draw))

    def maps(read_patch: Callable[[int, int], np.ndarray]) -> Tensor | PatchFiles:
        files = PatchFiles([len(store) for store in stores], read_patch)
        return files.load(torch.device("cpu")) if files.nbytes <= CPU_BYTES else files

    return TrainingSet(
        tokens=TokenFiles(tokens),
        views=views,
        counts=maps(counts),
        mask=maps(lambda section, row: stores[section].mask[row]),
        validation=torch.from_numpy(np.concatenate(blocks)),
    )


def open_tokens(preset: Preset, patient: str) -> tuple[zarr.Array, list[tuple[int, int]]]:
    """Open the token cache of a patient.

    Returns
    -------
    Tokens float16 [N, views, C, 16, 16] and the list of views.

    Raises
    ------
    UserError
        The cache is missing or was written by another encoder.
    """
    path = preset.tokens(patient)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: run notebooks/01_data.py for patient {patient}")
    group = zarr.open_group(path, mode="r")
    if group.attrs["encoder"] != preset.encoder.name:
        raise UserError(
            f"{path} holds tokens of encoder '{group.attrs['encoder']}', the preset asks for "
            f"'{preset.encoder.name}': delete the folder and run notebooks/01_data.py again"
        )
    return group["tokens"], [tuple(view) for view in group.attrs["views"]]


def _thin(counts: np.ndarray, keep: float, draw: np.random.Generator) -> np.ndarray:
    """Keep each UMI with probability ``keep``."""
    if keep == 1:
        return counts
    thinned = counts.reshape(-1).copy()
    positive = np.flatnonzero(thinned)
    thinned[positive] = draw.binomial(thinned[positive], keep)
    return thinned.reshape(counts.shape)


def _small(counts: np.ndarray) -> np.ndarray:
    """Counts in the smallest type that holds them: training moves them every step."""
    return counts.astype(np.uint8 if counts.max() < 256 else np.int32)


def fit(
    data: TrainingSet,
    arm: Arm,
    preset: Preset,
    seed: int,
    fabric: Fabric | _OneProcess | None = None,
    checkpoint: Path | None = None,
) -> Fitted:
    """Train one arm and return the model of its best validation epoch.

    Parameters
    ----------
    data
        Patches of the training patients.
    arm
        Decoder, loss, link and head bias.
    preset
        Optimisation and decoder size.
    seed
        Seeds initialisation, order, augmentation and dropout.
    fabric
        Device, precision and processes, from `launch`, which is called where none is given.
    checkpoint
        File that holds the state after each epoch, and from which a run of the same settings and
        data goes on. It stays when training ends.

    Returns
    -------
    Model, history and objective. The history has one record per epoch: ``epoch``, ``train_loss``,
    ``validation_loss`` (both the arm's own loss), ``validation_pcc_8um`` (mean over genes), ``lr``,
    ``seconds``.

    Raises
    ------
    UserError
        The validation loss is not finite.
    """
    settings = preset.training
    fabric = fabric or launch(settings.precision)
    first = fabric.global_rank == 0
    with _deterministic(), ThreadPoolExecutor(1) as writer:
        data = _on_device(data, fabric.device)
        train = torch.nonzero(~data.validation)[:, 0]
        held_out = torch.nonzero(data.validation)[:, 0]
        mean, std = _channel_moments(data, train, fabric.device)
        nets = _build(data, train, mean, std, arm, preset, seed).to(fabric.device)
        if fabric.world_size > 1 and fabric.device.type == "cuda":
            nets = nn.SyncBatchNorm.convert_sync_batchnorm(nets)
        groups = [
            {"params": list(nets["model"].parameters()), "weight_decay": settings.weight_decay},
            {"params": list(nets["objective"].parameters()), "faster": LIKELIHOOD_LR / settings.lr},
        ]
        optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]], settings.lr, weight_decay=0, fused=True
        )
        steps = math.ceil(math.ceil(len(train) / settings.batch_size) / settings.accumulate)

        def lr(step: int) -> float:
            warmup, total = settings.warmup_epochs * steps, settings.epochs * steps
            return settings.lr * _cosine(step, warmup, total)

        history: list[dict[str, float]] = []
        best: dict[str, Tensor] = {}
        key = _fingerprint(data, mean, std, arm, preset, seed, fabric.device) if checkpoint else ""
        saved = fabric.broadcast(_load(checkpoint, key) if checkpoint and first else None)
        if saved:
            history, tensors = saved
            nets.load_state_dict(_part(tensors, "now"))
            best = _part(tensors, "best") or _part(tensors, "now")
            _restore(optimiser, _part(tensors, "optimiser"))

        start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
        progress: Any = range(len(history), settings.epochs)
        if first:
            progress = track(progress, f"training {arm.title}", "epoch")
        writing: Future | None = None
        for epoch in progress:
            if epoch - _best_epoch(history) >= settings.patience:
                break
            # Seeding every epoch anew makes a resumed run draw what an uninterrupted one does.
            torch.manual_seed(_derived(seed, epoch, fabric.global_rank))
            order, chosen = _draw(train, len(data.views), _derived(seed, epoch))
            batches = _batches(data, order, chosen, arm, settings.batch_size, fabric)
            rates = [lr(step) for step in range(epoch * steps, (epoch + 1) * steps)]
            total = _epoch(nets, optimiser, batches, rates, settings, fabric)
            train_loss, validation_loss, pcc = _summary(
                total, *_validate(nets, data, held_out, arm, settings.batch_size, fabric), fabric
            )
            history.append(
                {
                    "epoch": epoch + 1,
                    "train_loss": train_loss / len(train),
                    "validation_loss": validation_loss / len(held_out),
                    "validation_pcc_8um": pcc,
                    "lr": lr((epoch + 1) * steps),
                    "seconds": time.perf_counter() - start,
                }
            )
            if not math.isfinite(validation_loss):
                raise UserError(
                    f"training of arm '{arm.title}' diverged in epoch {epoch + 1}: lower training.lr"
                )
            if first:
                progress.set_postfix(pcc=f"{pcc:.3f}")
            now = _on_host(nets.state_dict())
            if _best_epoch(history) == epoch + 1:
                best = now
            if checkpoint and first:
                state = {"now": now, "optimiser": _optimiser_state(optimiser)}
                if best is not now:
                    state["best"] = best
                if writing:
                    writing.result()
                # Written while the next epoch runs.
                writing = writer.submit(_save, checkpoint, key, list(history), state)
        if writing:
            writing.result()
    nets.load_state_dict(best)
    nets.eval()
    return Fitted(cast(Model, nets["model"]), history, cast(losses.Objective, nets["objective"]))


def initial_model(preset: Preset, run: Run) -> Model:
    """Model of a run before its first step."""
    data = load_training_set(preset, run)
    train = torch.nonzero(~data.validation)[:, 0]
    moments = _channel_moments(data, train, torch.device("cpu"))
    nets = _build(data, train, *moments, preset.arm(run.arm), preset, run.seed)
    return cast(Model, nets["model"].eval())


def _build(
    data: TrainingSet, train: Tensor, mean: Tensor, std: Tensor, arm: Arm, preset: Preset, seed: int
) -> nn.ModuleDict:
    """Model and objective in their initial state, which the seed alone determines."""
    channels, genes = data.tokens.shape[2], data.counts.shape[1]
    bias: float | Tensor
    if arm.bias == "gene-mean":
        bias = losses.initial_eta(_gene_rate(data, train), arm.link)
    else:
        bias = arm.bias
    torch.manual_seed(seed)
    decoder = build_decoder(arm.decoder, channels, genes, bias=bias, **preset.decoder.model_dump())
    model = Model(decoder, mean, std, arm.link, arm.bicubic_from_um)
    objective = losses.Objective(arm.loss, arm.link, genes, arm.resolutions_um, arm.masked)
    return nn.ModuleDict({"model": model, "objective": objective})


def _gene_rate(data: TrainingSet, train: Tensor) -> Tensor:
    """Mean count of a 2 µm tissue bin, float32 [G], over training patches."""
    device = data.counts.device if isinstance(data.counts, Tensor) else torch.device("cpu")
    count = torch.zeros(data.counts.shape[1], dtype=torch.float64, device=device)
    bins = torch.zeros((), dtype=torch.float64, device=device)
    for counts, mask in _maps(data, train.split(8), device):
        count += (counts * mask[:, None]).sum((0, 2, 3))
        bins += mask.sum()
    # A gene never seen keeps a finite logarithm, that of half a count.
    return (count.clamp(min=0.5) / bins).float().cpu()


def _on_device(data: TrainingSet, device: torch.device) -> TrainingSet:
    """Move all that fits to the device, maps before tokens."""

    def fitting(values: Any) -> Any:
        if isinstance(values, Tensor):
            return values.to(device)
        return values.load(device) if values.nbytes <= _room(device) else values

    names = ("mask", "counts", "tokens")
    return replace(data, **{name: fitting(getattr(data, name)) for name in names})


def _room(device: torch.device) -> float:
    """Bytes that tokens, or maps of a kind, may take."""
    if device.type == "cuda":
        return GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    return CPU_BYTES


def _channel_moments(
    data: TrainingSet, train: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and s.d. per channel, [1, C, 1, 1], over training patches only."""
    channels = data.tokens.shape[2]
    sums = torch.zeros(2, channels, dtype=torch.float64, device=device)
    pieces = [(patches, torch.zeros_like(patches)) for patches in train.split(8)]
    for tokens in _read(data.tokens, pieces, device):
        wide = tokens.double()
        sums += torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])
    n = len(train) * math.prod(data.tokens.shape[3:])
    mean = sums[0] / n
    std = ((sums[1] - n * mean.square()) / (n - 1)).clamp(min=0).sqrt().clamp(min=1e-6)
    mean, std = (x.float().view(1, channels, 1, 1).cpu() for x in (mean, std))
    return mean, std


def _read(
    values: Tensor | TokenFiles | PatchFiles,
    pieces: Sequence[tuple[Tensor, ...]],
    device: torch.device,
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


def _maps(
    data: TrainingSet, pieces: Sequence[Tensor], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts and mask of the patches [B] of each piece, on the device."""
    index = [(patches,) for patches in pieces]
    counts, mask = (_read(values, index, device) for values in (data.counts, data.mask))
    return zip(counts, mask, strict=True)


def _to(index: Tensor, device: torch.device) -> Tensor:
    """Copy an index to the device without waiting for it."""
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)


class _Batch(NamedTuple):
    """This process's share of a batch."""

    tokens: Tensor
    counts: Tensor
    mask: Tensor
    shares: Tensor | None
    """This share's part of the batch's bins at each width of the loss; None where it is all."""
    patches: int
    """Patches in the whole batch."""


def _batches(
    data: TrainingSet,
    patches: Tensor,
    views: Tensor,
    arm: Arm,
    size: int,
    fabric: Fabric | _OneProcess,
) -> Iterator[_Batch]:
    """Batches of patches in the order given; counts and mask turned as the view was."""
    device, ranks = fabric.device, fabric.world_size
    whole = [slice(i, min(i + size, len(patches))) for i in range(0, len(patches), size)]
    # A process without a patch of its own takes the first with share 0, because the collective
    # operations of batch normalisation need every process.
    empty = [batch.stop - batch.start <= fabric.global_rank for batch in whole]
    own = [
        slice(batch.start, batch.start + 1)
        if idle
        else slice(batch.start + fabric.global_rank, batch.stop, ranks)
        for batch, idle in zip(whole, empty, strict=True)
    ]
    side = data.counts.shape[-1]
    turns = _turns(side).to(device)
    element = _to(torch.tensor([turn for _, turn in data.views])[views], device)
    tokens = _read(data.tokens, [(patches[part], views[part]) for part in own], device)
    maps = _maps(data, [patches[part] for part in own], device)
    # Of a batch that several processes share, each needs the number of bins.
    masks = _read(data.mask, [(patches[batch],) for batch in whole if ranks > 1], device)
    for batch, part, idle, own_tokens, (counts, mask) in zip(
        whole, own, empty, tokens, maps, strict=True
    ):
        index = turns[element[part]]

        def turned(maps: Tensor, index: Tensor = index) -> Tensor:
            flat = maps.flatten(-2)
            source = index if flat.dim() == 2 else index[:, None].expand_as(flat)
            return flat.gather(-1, source).unflatten(-1, (side, side))

        shares = None
        if ranks > 1:
            shares = _shares(arm, mask, next(masks)) * (not idle)
        yield _Batch(
            own_tokens,
            turned(counts),
            turned(mask),
            shares,
            batch.stop - batch.start,
        )


def _turns(side: int) -> Tensor:
    """Where each bin of a turned map comes from, int64 [8, side²]; row e is `dihedral` e."""
    index = torch.arange(side * side).view(side, side)
    return torch.stack([dihedral(index, element, (0, 1)).flatten() for element in range(8)])


def _shares(arm: Arm, part: Tensor, whole: Tensor) -> Tensor:
    """Share of a batch's bins that lie in some of its patches, from masks [B, H, W], per width.

    Widths are in the order of `losses.bin_factors`.
    """
    shares = []
    for factor in losses.bin_factors(arm.resolutions_um):
        if arm.masked:
            bins, of = (bin_mask(mask, factor).sum() for mask in (part, whole))
            shares.append(bins / of.clamp(min=1))
        else:
            shares.append(part.new_tensor(len(part) / len(whole), dtype=torch.float32))
    return torch.stack(shares)


def _epoch(
    nets: nn.ModuleDict,
    optimiser: torch.optim.Optimizer,
    batches: Iterator[_Batch],
    rates: Sequence[float],
    settings: Training,
    fabric: Fabric | _OneProcess,
) -> Tensor:
    """Train on all batches, one learning rate per step; returns this process's sum of losses."""
    nets.train()
    parameters = list(nets.parameters())
    total = torch.zeros((), dtype=torch.float64, device=fabric.device)
    for rate in rates:
        for batch in islice(batches, settings.accumulate):
            with fabric.autocast():
                eta = nets["model"](batch.tokens)
            loss = nets["objective"](eta.float(), batch.counts, batch.mask)
            loss = loss if batch.shares is None else loss * batch.shares.mean()
            # A smaller last batch or group of batches weighs as its patches do.
            (loss * (batch.patches / (settings.batch_size * settings.accumulate))).backward()
            total += loss.detach() * batch.patches
        if fabric.world_size > 1:
            _add_gradients(parameters, fabric)
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        for group in optimiser.param_groups:
            group["lr"] = rate * group.get("faster", 1)
        optimiser.step()
        optimiser.zero_grad()
    return total


def _add_gradients(parameters: Sequence[nn.Parameter], fabric: Fabric | _OneProcess) -> None:
    """Sum the gradients of all processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    flat = _sum(flat, fabric)
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def _sum(data: Tensor, fabric: Fabric | _OneProcess) -> Tensor:
    """Sum over all processes."""
    return cast(Tensor, fabric.all_reduce(data, reduce_op="sum"))


def _cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _derived(*numbers: int) -> int:
    """Seed of one purpose, from the run's seed and, say, the epoch."""
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1)[0])


def _draw(train: Tensor, views: int, seed: int) -> tuple[Tensor, Tensor]:
    """Order of the patches in one epoch, and the view of each."""
    draw = torch.Generator().manual_seed(seed)
    order = train[torch.randperm(len(train), generator=draw)]
    return order, torch.randint(views, (len(train),), generator=draw)


@torch.no_grad()
def _validate(
    nets: nn.ModuleDict,
    data: TrainingSet,
    held_out: Tensor,
    arm: Arm,
    size: int,
    fabric: Fabric | _OneProcess,
) -> tuple[Tensor, Tensor]:
    """Loss and pair sums at 8 µm of the held-out blocks, without augmentation, of this process."""
    nets.eval()
    if fabric.world_size > 1:
        # Running statistics of batch normalisation, where the processes keep their own.
        for buffer in nets.buffers():
            torch.distributed.broadcast(buffer, 0)
    total = torch.zeros((), dtype=torch.float64, device=fabric.device)
    sums = torch.zeros(6, data.counts.shape[1], dtype=torch.float64, device=fabric.device)
    for batch in _batches(data, held_out, torch.zeros_like(held_out), arm, size, fabric):
        with fabric.autocast():
            eta = nets["model"](batch.tokens)
        eta = eta.float()
        loss = nets["objective"](eta, batch.counts, batch.mask)
        loss = loss if batch.shares is None else loss * batch.shares.mean()
        total += loss * batch.patches
        tissue = batch.mask[:, None]
        truth, rate = (
            F.avg_pool2d((maps * tissue).float(), 4, divisor_override=1)
            for maps in (batch.counts, losses.rate(eta, arm.link))
        )
        inside = bin_mask(batch.mask, 4)
        if batch.shares is not None:
            inside &= batch.shares.any()
        sums += _pair_sums(truth, rate, inside)
    return total, sums


def _pair_sums(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """n, Σx, Σy, Σx², Σy², Σxy per gene of maps [B, G, H, W] within masks [B, H, W]: [6, G].

    Unlike `metrics.Moments` they add up over processes in one message and need no host.
    """
    inside = mask[:, None].double().expand_as(x)
    x, y = x * inside, y * inside
    terms = (inside, x, y, x * x, y * y, x * y)
    return torch.stack([term.sum((0, 2, 3)) for term in terms])


def _pcc(sums: Tensor) -> Tensor:
    """Pearson correlation per gene from `_pair_sums`; NaN where one side is constant."""
    n, x, y, xx, yy, xy = sums
    varx, vary = xx - x * x / n, yy - y * y / n
    # What rounding leaves of the variance of a constant.
    defined = (varx > 1e-12 * xx) & (vary > 1e-12 * yy)
    return torch.where(defined, (xy - x * y / n) / (varx * vary).sqrt(), torch.nan)


def _summary(
    train_loss: Tensor, validation_loss: Tensor, sums: Tensor, fabric: Fabric | _OneProcess
) -> list[float]:
    """Losses of all processes and mean PCC, read in the epoch's only wait for the device."""
    flat = torch.cat([train_loss[None], validation_loss[None], sums.flatten()])
    flat = _sum(flat, fabric)
    pcc = _pcc(flat[2:].view_as(sums)).nanmean()
    return torch.cat([flat[:2], pcc[None]]).tolist()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms where torch has them."""
    settings: Any = torch.utils.deterministic  # its hints lack the setting
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # costs a pass over every result
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def _best_epoch(history: list[dict[str, float]]) -> int:
    """First epoch with the lowest validation loss, counted from 1; 0 before the first."""
    return int(min(history, key=lambda row: row["validation_loss"])["epoch"]) if history else 0


def _on_host(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return _on_host({f"{i}.{k}": v for i, values in state.items() for k, v in values.items()})


def _restore(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _fingerprint(
    data: TrainingSet,
    mean: Tensor,
    std: Tensor,
    arm: Arm,
    preset: Preset,
    seed: int,
    device: torch.device,
) -> str:
    """Digest of all that determines a run: settings, counts, masks, and moments of the tokens."""
    settings = [as_json(part) for part in (arm, preset.training, preset.decoder)]
    digest = hashlib.sha256("\n".join([*settings, str(seed), torch.__version__]).encode())
    for values in (data.validation, mean, std):
        digest.update(values.numpy().data)
    for counts, *maps in _maps(data, torch.arange(len(data.validation)).split(8), device):
        for part in (counts.int(), *maps):
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()


def _save(
    path: Path, key: str, history: list[dict[str, float]], state: dict[str, dict[str, Tensor]]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}/{name}": v for part, values in state.items() for name, v in values.items()}
    # A name of its own for every attempt would leave a file behind whenever a run is killed here.
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {"key": key, "history": json.dumps(history)})
    os.replace(partial, path)


def _load(path: Path, key: str) -> tuple[list[dict[str, float]], dict[str, Tensor]] | None:
    """History and tensors of a checkpoint; None without one of this very run."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["key"] != key:
                return None
            return json.loads(metadata["history"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = part + "/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@torch.inference_mode()
def predict(
    model: Model, tokens: zarr.Array, device: torch.device, batch: int = 8
) -> Iterator[tuple[slice, Tensor]]:
    """Predicted rates of a section, batch by batch.

    Yields
    ------
    Slice of patches, and rates float32 [B, G, 128, 128] on the CPU.
    """
    patches = torch.arange(tokens.shape[0]).split(batch)
    pieces = [(piece, torch.zeros_like(piece)) for piece in patches]
    for (piece, _), values in zip(pieces, _read(TokenFiles([tokens]), pieces, device), strict=True):
        yield slice(int(piece[0]), int(piece[-1]) + 1), model.rate(values).cpu()


def train(preset: Preset, run: Run) -> Path:
    """Carry out one run and write its folder; go on where the same run was killed.

    Returns
    -------
    The run's folder: ``checkpoint.safetensors``, ``log.jsonl`` (one line per epoch),
    ``predictions.zarr`` (``rate`` float16 [N, G, 128, 128]), ``genes.parquet``,
    ``scores.json`` (pooled PCC, counts of undefined values) and ``provenance.json``; for losses
    with parameters of their own also ``objective.safetensors``. Among several processes the first
    writes, and the others wait for it.
    """
    fabric = launch(preset.training.precision)
    folder = preset.run_dir(run)
    checkpoint = preset.folder / "checkpoints" / f"{run.name}.safetensors"
    data = load_training_set(preset, run)
    fitted = fit(data, preset.arm(run.arm), preset, run.seed, fabric, checkpoint)
    if fabric.global_rank == 0:
        _write(preset, run, data, fitted, fabric, folder)
        checkpoint.unlink()
    fabric.barrier()
    return folder


def _write(
    preset: Preset,
    run: Run,
    data: TrainingSet,
    fitted: Fitted,
    fabric: Fabric | _OneProcess,
    folder: Path,
) -> None:
    """Write a run's folder."""
    start = time.perf_counter()
    model, history, objective = fitted
    with building(folder) as partial:
        partial.mkdir()
        save_file(model.state_dict(), partial / "checkpoint.safetensors")
        if own := objective.state_dict():
            save_file(own, partial / "objective.safetensors")
        (partial / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        _score(preset, run, model, fabric.device, partial)
        provenance = record(
            preset,
            history[-1]["seconds"] + time.perf_counter() - start,
            **run.model_dump(),
            training_patients=preset.training_patients(run.test_patient),
            parameters=sum(p.numel() for p in model.decoder.parameters()),
            epochs=len(history),
            best_epoch=_best_epoch(history),
            training_patches=int((~data.validation).sum()),
            validation_patches=int(data.validation.sum()),
            processes=fabric.world_size,
        )
        (partial / "provenance.json").write_text(json.dumps(provenance, indent=1))


def _score(preset: Preset, run: Run, model: Model, device: torch.device, folder: Path) -> None:
    """Predict the test patient, and write predictions and per-gene scores."""
    store = PatchStore(preset.store(run.test_patient))
    tokens, _ = open_tokens(preset, run.test_patient)
    rates = zarr.open_group(folder / "predictions.zarr", mode="w").create_array(
        "rate", shape=store.counts.shape, chunks=(1, *store.counts.shape[1:]), dtype="float16"
    )
    scores = GeneScores(store.genes, train_mean=training_mean(preset, run), name=f"run {run.name}")
    for piece, rate in predict(model, tokens, device):
        rates[piece] = rate.numpy()
        truth = None if store.truth is None else store.truth[piece].astype(np.float32)
        try:
            scores.update(store.counts[piece], rate, store.mask[piece], truth)
        except ValueError as error:  # a model that diverged predicts what is no rate
            raise UserError(str(error)) from None
    category = panel(preset).set_index("gene")["category"].reindex(store.genes).fillna("other")
    table = pd.DataFrame({"gene": store.genes, "category": category.to_numpy()})
    table.assign(**scores.compute()).to_parquet(folder / "genes.parquet")
    pooled = {"pooled": scores.pooled(), "undefined": scores.undefined()}
    (folder / "scores.json").write_text(json.dumps(pooled, indent=1))


def training_mean(preset: Preset, run: Run) -> np.ndarray:
    """Mean count per 2 µm tissue bin of each gene in the training sections, float64 [G]."""
    total, bins = np.zeros(()), 0
    for patient in preset.training_patients(run.test_patient):
        store = PatchStore(preset.store(patient))
        for counts, mask in zip(store.counts, store.mask, strict=True):
            total = total + counts[:, mask].sum(1, dtype=np.float64)
            bins += int(mask.sum())
    return total / bins


def main() -> None:
    """Train one run from the command line, for launchers of several processes."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_trap.training")
    parser.add_argument("preset")
    parser.add_argument("arm")
    parser.add_argument("test_patient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", default="", help="replaces the preset's source")
    parser.add_argument("--cohort", default="", help="YAML file that says where real sections lie")
    options = parser.parse_args()
    from sparsity_trap.data.sections import open_preset

    try:
        preset = open_preset(options.preset, options.source, options.cohort)
        run = Run(arm=options.arm, test_patient=options.test_patient, seed=options.seed)
        train(preset, run)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
