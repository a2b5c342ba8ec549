"""Train one arm with one patient left out, and predict that patient.

Only the training patients' stores and tokens are opened before the checkpoint is chosen; the test
patient is read afterwards, by `predict`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import zarr
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsity_trap import losses, metrics
from sparsity_trap.binning import bin_mask, bin_sum
from sparsity_trap.config import Arm, Preset, Run, Training, UserError
from sparsity_trap.decoders import build_decoder
from sparsity_trap.encoders import dihedral
from sparsity_trap.files import building
from sparsity_trap.genes import panel_table
from sparsity_trap.patches import PatchStore
from sparsity_trap.progress import track
from sparsity_trap.provenance import record


@dataclass(frozen=True)
class TrainingSet:
    """Patches of the training patients, in memory.

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
    offset
        float32 [N, 128, 128], log exposure of each bin, or None where stripes are not modelled.
    validation
        bool [N], patches of the spatial blocks held out for selection.
    """

    tokens: Tensor
    views: list[tuple[int, int]]
    counts: Tensor
    mask: Tensor
    offset: Tensor | None
    validation: Tensor


class Model(nn.Module):
    """Standardised tokens, decoder and link: tokens [B, C, 16, 16] to η and rates [B, G, 128, 128]."""

    def __init__(self, decoder: nn.Module, mean: Tensor, std: Tensor, link: str):
        super().__init__()
        self.decoder = decoder
        self.link = link
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Linear output η."""
        return self.decoder((tokens.float() - self.mean) / self.std)

    def rate(self, tokens: Tensor) -> Tensor:
        """Predicted counts per 2 µm bin."""
        return losses.rate(self(tokens), self.link)


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
    """Read tokens, counts and masks of the patients that ``run`` trains on, and no other's."""
    parts = []
    for index, patient in enumerate(preset.training_patients(run.test_patient)):
        store = PatchStore(preset.store(patient))
        tokens, views = open_tokens(preset, patient)
        block = validation_block(
            store.origin[:], preset.training.validation, (run.seed + index) % 4
        )
        parts.append((store, tokens, views, block))
    genes = {store.genes for store, *_ in parts}
    if len(genes) > 1:
        raise UserError("the training patients' stores hold different genes: rebuild them")
    return TrainingSet(
        tokens=torch.cat([torch.from_numpy(tokens[:]) for _, tokens, *_ in parts]),
        views=parts[0][2],
        counts=torch.cat([_small(store.counts[:]) for store, *_ in parts]),
        mask=torch.cat([torch.from_numpy(store.mask[:]) for store, *_ in parts]),
        offset=torch.cat([torch.from_numpy(store.stripe_offset()) for store, *_ in parts])
        if preset.training.stripe_offset
        else None,
        validation=torch.from_numpy(np.concatenate([block for *_, block in parts])),
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


def _small(counts: np.ndarray) -> Tensor:
    """Counts in the smallest type that holds them: training streams them every step."""
    dtype = np.uint8 if counts.max(initial=0) < 256 else np.int32
    return torch.from_numpy(counts.astype(dtype))


def fit(
    data: TrainingSet, arm: Arm, preset: Preset, seed: int, device: torch.device
) -> tuple[Model, list[dict[str, float]]]:
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
    device
        Where to train.

    Returns
    -------
    The model, and one record per epoch: ``epoch``, ``train_loss``, ``validation_loss`` (both the
    arm's own loss), ``validation_pcc_8um`` (mean over genes), ``lr``, ``seconds``.
    """
    settings = preset.training
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    train = torch.nonzero(~data.validation)[:, 0]
    held_out = torch.nonzero(data.validation)[:, 0]
    mean, std = _channel_moments(data.tokens[train, 0])
    channels, genes = data.tokens.shape[2], data.counts.shape[1]
    decoder = build_decoder(arm.decoder, channels, genes, arm.bias, preset.decoder)
    model = Model(decoder, mean, std, arm.link).to(device)
    optimiser = torch.optim.AdamW(
        decoder.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    batches = math.ceil(len(train) / settings.batch_size)
    steps = math.ceil(batches / settings.accumulate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: _cosine(step, settings.warmup_epochs * steps, settings.epochs * steps),
    )
    history: list[dict[str, float]] = []
    best, best_state, start = math.inf, None, time.perf_counter()
    progress = track(range(settings.epochs), f"training {arm.title}", "epoch")
    for epoch in progress:
        model.train()
        total = torch.zeros((), device=device)
        pending = 0
        for batch in _batches(train, settings.batch_size, draw):
            tokens, counts, mask, offset = _augmented(data, batch, draw, device)
            loss = losses.masked_mean(arm.loss, model(tokens), counts, mask, arm.link, offset)
            # A smaller last batch or group of batches weighs as its patches do.
            (loss * len(batch) / (settings.batch_size * settings.accumulate)).backward()
            total += loss.detach() * len(batch)
            pending += 1
            if pending == settings.accumulate:
                _step(model, optimiser, schedule, settings.clip)
                pending = 0
        if pending:
            _step(model, optimiser, schedule, settings.clip)
        validation_loss, validation_pcc = _validate(model, data, held_out, arm, settings, device)
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": total.item() / len(train),
                "validation_loss": validation_loss,
                "validation_pcc_8um": validation_pcc,
                "lr": schedule.get_last_lr()[0],
                "seconds": time.perf_counter() - start,
            }
        )
        if not math.isfinite(validation_loss):
            raise UserError(
                f"training of arm '{arm.title}' diverged in epoch {epoch + 1}: lower training.lr"
            )
        progress.set_postfix(pcc=f"{validation_pcc:.3f}")
        if validation_loss < best:
            best, best_epoch = validation_loss, epoch
            best_state = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        elif epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    return model.eval(), history


def _channel_moments(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and s.d. per channel, [1, C, 1, 1], over training patches only."""
    flat = tokens.float()
    mean = flat.mean((0, 2, 3), keepdim=True)
    std = flat.std((0, 2, 3), keepdim=True)
    return mean, std.clamp(min=1e-6)


def _cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _batches(patches: Tensor, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    yield from patches[torch.randperm(len(patches), generator=draw)].split(size)


def _augmented(
    data: TrainingSet, batch: Tensor, draw: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Draw a view per patch and turn counts, mask and offset the way its image was turned."""
    chosen = torch.randint(len(data.views), (len(batch),), generator=draw)
    tokens = data.tokens[batch, chosen]
    turns = [data.views[v][1] for v in chosen.tolist()]

    def turned(maps: Tensor) -> Tensor:
        pairs = zip(batch, turns, strict=True)
        return torch.stack([dihedral(maps[i], turn, (-2, -1)) for i, turn in pairs]).to(device)

    offset = None if data.offset is None else turned(data.offset)
    return tokens.to(device), turned(data.counts), turned(data.mask), offset


def _step(model: nn.Module, optimiser, schedule, clip: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    optimiser.zero_grad()
    schedule.step()


@torch.no_grad()
def _validate(
    model: Model,
    data: TrainingSet,
    held_out: Tensor,
    arm: Arm,
    settings: Training,
    device: torch.device,
) -> tuple[float, float]:
    """Loss and mean per-gene PCC at 8 µm on the held-out blocks, without augmentation."""
    model.eval()
    total, truth, pred, masks = 0.0, [], [], []
    for batch in held_out.split(settings.batch_size):
        counts, mask = data.counts[batch].to(device), data.mask[batch].to(device)
        eta = model(data.tokens[batch, 0].to(device))
        offset = None if data.offset is None else data.offset[batch].to(device)
        loss = losses.masked_mean(arm.loss, eta, counts, mask, arm.link, offset)
        total += loss.item() * len(batch)
        tissue = mask[:, None]
        truth.append(bin_sum(counts * tissue, 4))
        pred.append(bin_sum(losses.rate(eta, arm.link) * tissue, 4))
        masks.append(bin_mask(mask, 4))
    per_gene = metrics.pcc(torch.cat(truth), torch.cat(pred), torch.cat(masks))
    defined = per_gene[np.isfinite(per_gene)]
    return total / len(held_out), float(defined.mean()) if len(defined) else math.nan


@torch.no_grad()
def predict(
    model: Model, tokens: zarr.Array, device: torch.device, batch: int = 8
) -> Iterator[tuple[slice, Tensor]]:
    """Predicted rates of a section, batch by batch.

    Yields
    ------
    Slice of patches, and rates float32 [B, G, 128, 128] on the CPU.
    """
    for start in range(0, tokens.shape[0], batch):
        piece = slice(start, min(start + batch, tokens.shape[0]))
        yield piece, model.rate(torch.from_numpy(tokens[piece, 0]).to(device)).cpu()


def train(preset: Preset, run: Run) -> Path:
    """Carry out one run and write its folder.

    Returns
    -------
    The run's folder: ``checkpoint.safetensors``, ``log.jsonl`` (one line per epoch),
    ``predictions.zarr`` (``rate`` float16 [N, G, 128, 128]), ``genes.parquet``,
    ``scores.json`` (pooled PCC, counts of undefined values) and ``provenance.json``.
    """
    arm = preset.arm(run.arm)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    data = load_training_set(preset, run)
    model, history = fit(data, arm, preset, run.seed, device)
    folder = preset.run_dir(run)
    with building(folder) as partial:
        partial.mkdir()
        save_file(model.state_dict(), partial / "checkpoint.safetensors")
        (partial / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        _score(preset, run, model, device, partial)
        parameters = sum(p.numel() for p in model.decoder.parameters())
        best = min(history, key=lambda row: row["validation_loss"])
        provenance = record(
            preset,
            time.perf_counter() - start,
            **run.model_dump(),
            training_patients=preset.training_patients(run.test_patient),
            parameters=parameters,
            epochs=len(history),
            best_epoch=best["epoch"],
            training_patches=int((~data.validation).sum()),
            validation_patches=int(data.validation.sum()),
        )
        (partial / "provenance.json").write_text(json.dumps(provenance, indent=1))
    return folder


def _score(preset: Preset, run: Run, model: Model, device: torch.device, folder: Path) -> None:
    """Predict the test patient, and write predictions and per-gene scores."""
    store = PatchStore(preset.store(run.test_patient))
    tokens, _ = open_tokens(preset, run.test_patient)
    rates = zarr.open_group(folder / "predictions.zarr", mode="w").create_array(
        "rate", shape=store.counts.shape, chunks=(1, *store.counts.shape[1:]), dtype="float16"
    )
    scores = metrics.GeneScores()
    for piece, rate in predict(model, tokens, device):
        rates[piece] = rate.numpy()
        truth = None if store.truth is None else store.truth[piece].astype(np.float32)
        scores.update(store.counts[piece], rate, store.mask[piece], truth)
    table = pd.DataFrame({"gene": store.genes}).merge(
        panel_table()[["gene", "category"]], how="left"
    )
    table["category"] = table["category"].fillna("other")
    table.assign(**scores.compute()).to_parquet(folder / "genes.parquet")
    pooled = {"pooled": scores.pooled(), "undefined": scores.undefined()}
    (folder / "scores.json").write_text(json.dumps(pooled, indent=1))
