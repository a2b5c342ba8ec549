"""Train one arm with one patient left out, and predict that patient.

Only the training patients' stores and tokens are opened before the checkpoint is chosen; the test
patient is read afterwards, by `predict`.

Every epoch leaves a checkpoint, from which a killed run goes on to the same result.

Several processes share one run when they are launched together::

    torchrun --nproc-per-node 4 -m sparsity_trap.training paper E P5

Each takes its share of every batch, and Lightning Fabric's strategy (distributed data parallel)
averages their gradients. That is not quite one process: a loss is averaged over a process's own
tissue bins, patches that cannot be dealt out evenly are left out of an epoch, and dropout and batch
normalisation are each process's own. ``training.batch_size`` is that of all processes together.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import zarr
from safetensors.torch import save_file
from torch import Tensor

from sparsity_trap import checkpoints, losses
from sparsity_trap.data.genes import panel
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.devices import launch
from sparsity_trap.encoders import open_tokens
from sparsity_trap.files import building, record
from sparsity_trap.model import Model
from sparsity_trap.progress import track
from sparsity_trap.scores import GeneScores
from sparsity_trap.settings import Arm, Preset, Run, UserError, as_json
from sparsity_trap.trainer import Trainer, best_epoch, initial_step
from sparsity_trap.training_data import TrainingSet, load_training_set, read_maps

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Fitted(NamedTuple):
    """What `fit` returns."""

    model: Model
    """The model of the best validation epoch, in evaluation mode."""
    history: list[dict[str, float]]
    """One record per epoch."""
    objective: losses.Objective
    """The loss with its own parameters, if it has any, as they were in that epoch."""


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
        Device, precision and processes, from `devices.launch`; None is one process on a CPU in
        single precision.
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
    with _deterministic(), _without_denormals(), ThreadPoolExecutor(1) as writer:
        trainer = Trainer(data, arm, preset, seed, fabric)
        key = _fingerprint(trainer, arm, preset) if checkpoint else ""
        if checkpoint:
            _resume(trainer, checkpoint, key)
        history = trainer.history
        start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
        first = trainer.rank == 0
        progress: Any = range(len(history), trainer.settings.epochs)
        if first:
            progress = track(progress, f"training {arm.title}", "epoch")
        writing: Future | None = None
        for epoch in progress:
            if epoch - trainer.best_epoch() >= trainer.settings.patience:
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
    return step.model.eval()


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


@contextmanager
def _without_denormals() -> Iterator[None]:
    """Take numbers below 1e-38 for 0 on the CPU, where each costs a hundred times its operation.

    A model that predicts next to nothing has many: rates, and gradients that vanish with them. No
    loss feels the difference. Accelerators have no such cost, and are not touched.
    """
    already = (torch.full((1,), 1e-39) * 1).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)


# --- checkpoints ----------------------------------------------------------------------------------


def _fingerprint(trainer: Trainer, arm: Arm, preset: Preset) -> str:
    """Digest of what determines a run: settings, device, counts, masks, moments of the tokens."""
    settings = [as_json(part) for part in (arm, preset.encoder, preset.training, preset.decoder)]
    around = (trainer.seed, trainer.ranks, trainer.device.type, torch.__version__)
    digest = hashlib.sha256("\n".join([*settings, *map(str, around)]).encode())
    data, model = trainer.data, trainer.step.model
    for values in (data.validation, model.mean, model.std):
        digest.update(values.cpu().numpy().data)
    pieces = torch.arange(len(data.validation)).split(8)
    for counts, mask in read_maps(data, pieces, trainer.device):
        for part in (counts.int(), mask):
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()


def _resume(trainer: Trainer, checkpoint: Path, key: str) -> None:
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
    ``predictions.zarr`` (``rate`` float16 [N, G, 128, 128]), ``genes.parquet``, ``patches.npy``
    (each patch's sums at 8 µm, `scores.GeneScores.patches`), ``scores.json`` (pooled PCC, counts of
    undefined values) and ``provenance.json``; for losses with parameters of their own also
    ``objective.safetensors``. Among several processes the first writes, and the others wait for it.
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
            best_epoch=best_epoch(history),
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
    np.save(folder / "patches.npy", scores.patches())
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
