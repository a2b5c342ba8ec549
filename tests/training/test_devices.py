"""Where training runs: precision, and processes that share a run."""
# ruff: noqa: F811 - the fixture `preset` is imported

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import (  # noqa: F401 - a fixture
    LINEAR,
    RUN,
    E,
    changed,
    column,
    history,
    preset,
    start,
)

from sparsity_trap import devices, training
from sparsity_trap import settings as config
from sparsity_trap.settings import Run, UserError


def test_a_batch_must_divide_by_the_processes(preset):
    data, three = training.load_training_set(preset, RUN), changed(preset, batch_size=3)
    two = SimpleNamespace(device=torch.device("cpu"), global_rank=0, world_size=2)
    with pytest.raises(UserError, match="batch_size 3 cannot be dealt out to 2 processes"):
        training.fit(data, preset.arm("E"), three, 0, two)


def test_processes_are_those_of_the_launcher(monkeypatch):
    for key in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(key, raising=False)
    assert devices._processes() == (1, 1)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # an allocation, without srun
    assert devices._processes() == (1, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert devices._processes() == (4, 2)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
@pytest.mark.slow
def test_two_processes_learn_nearly_as_one(preset):
    """Each mean is over a process's own tissue; batches of 6 and of 3 patches per process."""
    preset = changed(preset, {"linear": LINEAR, "deep": E}, batch_size=6, accumulate=1, epochs=3)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(
        preset, config.ROOT, "linear", "deep", launcher=launcher,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    # Processes that exchange no gradients, or train on the same patches, are 2e-4 off: on a CPU,
    # which does not round as TF32. Dropout and batch normalisation are each process's own.
    linear = 0.01 if torch.cuda.is_available() else 1e-4
    for arm, tolerance in (("linear", linear), ("deep", 0.02)):
        run = Run(arm=arm, test_patient="P5", seed=0)
        folder = preset.run_dir(run)
        assert json.loads((folder / "provenance.json").read_text())["processes"] == 2
        data = training.load_training_set(preset, run)
        alone = column(training.fit(data, preset.arm(arm), preset, 0), "validation_loss")
        np.testing.assert_allclose(column(folder, "validation_loss"), alone, rtol=tolerance)
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_mixed_precision_learns_the_same(preset):
    data = training.load_training_set(preset, RUN)
    full = training.fit(data, preset.arm("E"), preset, 0)
    fabric = devices.launch("bfloat16")
    mixed = training.fit(data, preset.arm("E"), preset, 0, fabric)
    assert history(full) != history(mixed)
    np.testing.assert_allclose(
        column(mixed, "validation_loss"), column(full, "validation_loss"), rtol=0.02
    )
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())


def test_single_precision_products_use_tf32_on_a_gpu(monkeypatch):
    """As far as it can be tried without one: what is set before Fabric looks for the card."""
    import lightning_fabric

    def no_card(**options):
        raise RuntimeError(options["precision"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lightning_fabric, "Fabric", no_card)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, asked in (("float32", "32-true"), ("bfloat16", "bf16-mixed")):
            torch.set_float32_matmul_precision("highest")
            with pytest.raises(RuntimeError, match=asked):
                devices.launch(precision)
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
