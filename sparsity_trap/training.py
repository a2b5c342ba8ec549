"""Train one arm with one patient left out, and predict that patient.

Only the training patients' stores and tokens are opened before the checkpoint is chosen; the test
patient is read afterwards, by `predict`.

A step launches work and never waits for it: draws are made on the CPU for a whole epoch, turned
counts are gathered by index, and losses are read once per epoch. Every epoch leaves a checkpoint,
from which a killed run goes on to the same result.

Several processes share one run when they are launched together::

    torchrun --nproc-per-node 4 -m sparsity_trap.training paper E P5

Lightning Fabric then splits the work: each process takes its patches of every batch, and gradients
are averaged. That is not quite one process: each mean is over a process's own tissue bins, patches
that cannot be dealt out evenly are left out, and batch normalisation sees one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import zarr
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsity_trap import checkpoints, losses
from sparsity_trap.bins import bin_mask
from sparsity_trap.data.genes import panel
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.decoders import build_decoder
from sparsity_trap.devices import launch
from sparsity_trap.encoders import open_tokens
from sparsity_trap.files import building, record
from sparsity_trap.metrics import Moments
from sparsity_trap.model import Model
from sparsity_trap.progress import track
from sparsity_trap.scores import GeneScores
from sparsity_trap.settings import Arm, Preset, Run, UserError, as_json
from sparsity_trap.training_data import (
    Batch,
    TrainingSet,
    batches,
    channel_moments,
    gene_rate,
    load_training_set,
    read_maps,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Learning rate of the likelihood's own parameters (dispersion): a decoder's would leave them where
#: they start.
LIKELIHOOD_LR = 1e-2


class Fitted(NamedTuple):
    """What `fit` returns."""

    model: Model
    """The model of the best validation epoch, in evaluation mode."""
    history: list[dict[str, float]]
    """One record per epoch."""
    objective: losses.Objective
    """The loss with its own parameters, if it has any, as they were in that epoch."""


class Step(nn.Module):
    """Model and objective as one module, as a strategy of several processes needs them."""

    def __init__(self, model: Model, objective: losses.Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and η in single precision."""
        eta = self.model(batch.tokens).float()
        return self.objective(eta, batch.counts, batch.mask), eta


class _Trainer:
    """One run under way: modules, optimiser and history, on the device.

    Parameters
    ----------
    data, arm, preset, seed, fabric
        As for `fit`.
    """

    def __init__(
        self, data: TrainingSet, arm: Arm, preset: Preset, seed: int, fabric: Fabric | None
    ):
        self.device = fabric.device if fabric else torch.device("cpu")
        self.data, self.settings, self.seed, self.fabric = (
            data.on(self.device), preset.training, seed, fabric,
        )  # fmt: skip
        self.rank = fabric.global_rank if fabric else 0
        self.ranks = fabric.world_size if fabric else 1
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.step = initial_step(self.data, arm, preset, seed, self.device).to(self.device)
        groups = [
            {
                "params": list(self.step.model.parameters()),
                "weight_decay": self.settings.weight_decay,
            },
            {
                "params": list(self.step.objective.parameters()),
                "faster": LIKELIHOOD_LR / self.settings.lr,
            },
        ]
        self.optimiser = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            self.settings.lr, weight_decay=0, fused=True,
        )  # fmt: skip
        patches = len(self.data.train) // self.ranks * self.ranks
        self.steps = math.ceil(
            math.ceil(patches / self.settings.batch_size) / self.settings.accumulate
        )
        self.run: nn.Module = self.step
        if fabric:
            self.run, self.optimiser = fabric.setup(self.step, self.optimiser)

    def lr(self, step: int) -> float:
        """Learning rate after some steps: a warm-up, then half a cosine."""
        warmup = self.settings.warmup_epochs * self.steps
        total = self.settings.epochs * self.steps
        return self.settings.lr * _cosine(step, warmup, total)

    def epoch(self) -> None:
        """Train on every patch once, validate, and add to the history."""
        number, settings = len(self.history), self.settings
        # Seeding every epoch anew makes a resumed run draw what an uninterrupted one does.
        torch.manual_seed(_derived(self.seed, number, self.rank))
        order, views = _draw(self.data.train, len(self.data.views), _derived(self.seed, number))
        deal = slice(self.rank, len(order) // self.ranks * self.ranks, self.ranks)
        size = settings.batch_size // self.ranks or 1
        queue = batches(self.data, order[deal], views[deal], size, self.device)
        rates = [self.lr(step) for step in range(number * self.steps, (number + 1) * self.steps)]
        total = self._train(queue, rates, size)
        validation_loss, pcc = self.validate()
        self.history.append(
            {
                "epoch": number + 1,
                # The epoch's only wait for the device, with that of `validate`.
                "train_loss": total.item() / len(order[deal]),
                "validation_loss": validation_loss,
                "validation_pcc_8um": pcc,
                "lr": self.lr((number + 1) * self.steps),
            }
        )

    def _train(self, queue: Iterator[Batch], rates: Sequence[float], size: int) -> Tensor:
        """Take one step per learning rate; return the sum of losses over this process's patches."""
        self.run.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for rate in rates:
            group = list(islice(queue, self.settings.accumulate))
            for i, batch in enumerate(group):
                # Gradients of several processes are exchanged once, with the last batch of a step.
                apart = self.fabric and i < len(group) - 1
                with self.fabric.no_backward_sync(self.run) if apart else nullcontext():
                    loss, _ = self.run(batch)
                    # A smaller last batch or group of batches weighs as its patches do.
                    part = loss * (len(batch.tokens) / (size * self.settings.accumulate))
                    self.fabric.backward(part) if self.fabric else part.backward()
                total += loss.detach() * len(batch.tokens)
            nn.utils.clip_grad_norm_(self.step.parameters(), self.settings.clip)
            for parameters in self.optimiser.param_groups:
                parameters["lr"] = rate * parameters.get("faster", 1)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return total

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Loss and mean PCC at 8 µm of the held-out blocks, without augmentation.

        Every process does it on its own: they agree without a word.
        """
        self.step.eval()
        held_out = self.data.held_out
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        moments = []
        size = self.settings.batch_size
        for batch in batches(self.data, held_out, torch.zeros_like(held_out), size, self.device):
            with self.fabric.autocast() if self.fabric else nullcontext():
                loss, eta = self.step(batch)
            total += loss * len(batch.tokens)
            tissue = batch.mask[:, None]
            truth, rate = (
                F.avg_pool2d((maps * tissue).float(), 4, divisor_override=1)
                for maps in (batch.counts, losses.rate(eta, self.step.model.link))
            )
            inside = bin_mask(batch.mask, 4)
            moments += [Moments.of(*maps) for maps in zip(truth, rate, inside, strict=True)]
        pcc = reduce(Moments.__add__, moments).pcc()
        mean = float(np.nanmean(pcc)) if np.isfinite(pcc).any() else math.nan
        return total.item() / len(held_out), mean

    def best_epoch(self) -> int:
        """First epoch with the lowest validation loss, counted from 1; 0 before the first."""
        rows = self.history
        return int(min(rows, key=lambda row: row["validation_loss"])["epoch"]) if rows else 0


def fit(
    data: TrainingSet,
    arm: Arm,
    preset: Preset,
    seed: int,
    fabric: Fabric | None = None,
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
        Device, precision and processes, from `launch`.
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
    with _deterministic(), ThreadPoolExecutor(1) as writer:
        trainer = _Trainer(data, arm, preset, seed, fabric)
        key = _fingerprint(trainer, arm, preset) if checkpoint else ""
        if checkpoint:
            _resume(trainer, checkpoint, key)
        history = trainer.history
        start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
        first = trainer.rank == 0
        progress: Any = range(len(history), preset.training.epochs)
        if first:
            progress = track(progress, f"training {arm.title}", "epoch")
        writing: Future | None = None
        for epoch in progress:
            if epoch - trainer.best_epoch() >= preset.training.patience:
                break
            trainer.epoch()
            history[-1]["seconds"] = time.perf_counter() - start
            if not math.isfinite(history[-1]["validation_loss"]):
                where = f"training of arm '{arm.title}' diverged in epoch {epoch + 1}"
                raise UserError(f"{where}: lower training.lr")
            now = checkpoints.on_host(trainer.step.state_dict())
            if trainer.best_epoch() == epoch + 1:
                trainer.best = now
            if first:
                progress.set_postfix(pcc=f"{history[-1]['validation_pcc_8um']:.3f}")
            if checkpoint and first:
                state = {"now": now, "optimiser": checkpoints.optimiser_state(trainer.optimiser)}
                if trainer.best is not now:
                    state["best"] = trainer.best
                if writing:
                    writing.result()
                # Written while the next epoch runs.
                writing = writer.submit(checkpoints.save, checkpoint, key, list(history), state)
        if writing:
            writing.result()
    trainer.step.load_state_dict(trainer.best)
    trainer.step.eval()
    return Fitted(trainer.step.model, history, trainer.step.objective)


def initial_model(preset: Preset, run: Run) -> Model:
    """Model of a run before its first step."""
    data = load_training_set(preset, run)
    step = initial_step(data, preset.arm(run.arm), preset, run.seed, torch.device("cpu"))
    return cast(Model, step.model.eval())


def initial_step(
    data: TrainingSet, arm: Arm, preset: Preset, seed: int, device: torch.device
) -> Step:
    """Model and objective in their initial state, which data and seed alone determine."""
    channels, genes = data.tokens.shape[2], data.counts.shape[1]
    mean, std = channel_moments(data, device)
    means = arm.bias == "gene-mean"
    bias: float | Tensor = losses.initial_eta(gene_rate(data), arm.link) if means else arm.bias
    torch.manual_seed(seed)
    decoder = build_decoder(arm.decoder, channels, genes, bias=bias, **preset.decoder.model_dump())
    model = Model(decoder, mean, std, arm.link, arm.bicubic_from_um)
    return Step(model, losses.Objective(arm.loss, arm.link, genes, arm.resolutions_um, arm.masked))


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


# --- checkpoints ----------------------------------------------------------------------------------


def _fingerprint(trainer: _Trainer, arm: Arm, preset: Preset) -> str:
    """Digest of all that determines a run: settings, counts, masks, and moments of the tokens."""
    settings = [as_json(part) for part in (arm, preset.training, preset.decoder)]
    digest = hashlib.sha256("\n".join([*settings, str(trainer.seed), torch.__version__]).encode())
    data, model = trainer.data, trainer.step.model
    for values in (data.validation, model.mean, model.std):
        digest.update(values.cpu().numpy().data)
    pieces = torch.arange(len(data.validation)).split(8)
    for counts, mask in read_maps(data, pieces, trainer.device):
        for part in (counts.int(), mask):
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()


def _resume(trainer: _Trainer, checkpoint: Path, key: str) -> None:
    """Take up the state of a checkpoint, where there is one of this very run."""
    saved = checkpoints.load(checkpoint, key) if trainer.rank == 0 else None
    if trainer.fabric:
        saved = trainer.fabric.broadcast(saved)
    if saved:
        history, tensors = saved
        trainer.history.extend(history)
        trainer.step.load_state_dict(checkpoints.part(tensors, "now"))
        trainer.best = checkpoints.part(tensors, "best") or checkpoints.part(tensors, "now")
        checkpoints.restore(trainer.optimiser, checkpoints.part(tensors, "optimiser"))


# --- a whole run ----------------------------------------------------------------------------------


@torch.inference_mode()
def predict(
    model: Model, tokens: np.ndarray, mask: zarr.Array, device: torch.device, batch: int = 8
) -> Iterator[tuple[slice, Tensor]]:
    """Predicted rates of a section, batch by batch.

    Parameters
    ----------
    model
        In evaluation mode, on the device.
    tokens
        [N, views, C, 16, 16]; the first view is taken.
    mask
        Tissue, bool [N, 128, 128].
    device
        Where to compute.
    batch
        Patches at a time.

    Yields
    ------
    Slice of patches, and rates float32 [B, G, 128, 128] on the CPU.
    """
    for start in range(0, len(tokens), batch):
        part = slice(start, min(start + batch, len(tokens)))
        values = torch.from_numpy(np.array(tokens[part, 0])).to(device)
        inside = torch.from_numpy(mask[part]).to(device)
        yield part, model.rate(values, inside).cpu()


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
    if fabric is None or fabric.global_rank == 0:
        _write(preset, run, data, fitted, fabric, folder)
        checkpoint.unlink()
    if fabric:
        fabric.barrier()
    return folder


def _write(
    preset: Preset,
    run: Run,
    data: TrainingSet,
    fitted: Fitted,
    fabric: Fabric | None,
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
        device = fabric.device if fabric else torch.device("cpu")
        _score(preset, run, model, device, partial)
        provenance = record(
            preset,
            history[-1]["seconds"] + time.perf_counter() - start,
            **run.model_dump(),
            training_patients=preset.training_patients(run.test_patient),
            parameters=sum(p.numel() for p in model.decoder.parameters()),
            epochs=len(history),
            best_epoch=int(min(history, key=lambda row: row["validation_loss"])["epoch"]),
            training_patches=int((~data.validation).sum()),
            validation_patches=int(data.validation.sum()),
            processes=fabric.world_size if fabric else 1,
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
    for piece, rate in predict(model, tokens, store.mask, device):
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
