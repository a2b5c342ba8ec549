"""Runs that are interrupted, or killed, and go on."""
# ruff: noqa: F811 - the fixture `preset` is imported

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import (  # noqa: F401 - a fixture
    RUN,
    E,
    changed,
    history,
    preset,
    same_state,
    start,
)

from sparsity_trap import checkpoints, devices, trainer, training
from sparsity_trap import settings as config
from sparsity_trap.settings import Preset, Run


def narrow(preset: Preset) -> Preset:
    """With a decoder of the same parts that is quicker."""
    return preset.model_copy(update={"decoder": preset.decoder.model_copy(update={"hidden": 8})})


def interrupted(monkeypatch, after: int, *arguments, **options) -> None:
    """Call `fit` and let it fail in the epoch that follows ``after`` whole ones."""
    original, epochs = trainer.Trainer.epoch, iter(range(after))

    def fail(this):
        if next(epochs, None) is None:
            raise KeyboardInterrupt
        return original(this)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "epoch", fail)
        with pytest.raises(KeyboardInterrupt):
            training.fit(*arguments, **options)


@pytest.mark.parametrize(
    "arm", [E, {**E, "loss": "nb", "decoder": "linear"}], ids=["hist2st", "nb"]
)
def test_interrupted_training_goes_on_to_the_same_result(preset, arm, monkeypatch, tmp_path):
    """With dropout, batch normalisation, and parameters of the loss; twice interrupted."""
    preset = changed(narrow(preset), {"X": arm}, epochs=5, accumulate=2)
    data = training.load_training_set(preset, RUN)
    arguments = (data, preset.arm("X"), preset, 3)
    whole = training.fit(*arguments)
    file = tmp_path / "checkpoints" / "run.safetensors"
    interrupted(monkeypatch, 2, *arguments, checkpoint=file)
    interrupted(monkeypatch, 1, *arguments, checkpoint=file)
    resumed = training.fit(*arguments, checkpoint=file)
    assert history(resumed) == history(whole)
    assert same_state(resumed.model, whole.model)
    assert same_state(resumed.objective, whole.objective)
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    # Once at its end, a run trains no further epoch.
    monkeypatch.setattr(trainer.Trainer, "epoch", None)
    again = training.fit(*arguments, checkpoint=file)
    assert history(again) == history(whole) and same_state(again.model, whole.model)


@pytest.mark.slow
def test_interrupted_training_goes_on_under_fabric_too(preset, monkeypatch, tmp_path):
    """As on every GPU; here in mixed precision."""
    preset = changed(narrow(preset), {"X": E}, epochs=4, precision="bfloat16")
    fabric = devices.launch("bfloat16")
    arguments = (training.load_training_set(preset, RUN), preset.arm("X"), preset, 3, fabric)
    whole = training.fit(*arguments)
    interrupted(monkeypatch, 2, *arguments, checkpoint=tmp_path / "run")
    resumed = training.fit(*arguments, checkpoint=tmp_path / "run")
    assert history(resumed) == history(whole)
    assert same_state(resumed.model, whole.model)


def test_early_stopping_is_remembered(preset, monkeypatch, tmp_path):
    preset = changed(preset, epochs=50, lr=1e-12, patience=2)
    data = training.load_training_set(preset, RUN)
    arguments = (data, preset.arm("E"), preset, 0)
    whole = training.fit(*arguments, checkpoint=tmp_path / "run")
    assert len(whole.history) < 50
    monkeypatch.setattr(trainer.Trainer, "epoch", None)
    assert history(training.fit(*arguments, checkpoint=tmp_path / "run")) == history(whole)


def test_checkpoint_of_something_else_is_left_aside(preset, monkeypatch, tmp_path):
    preset = changed(preset, epochs=3)
    data = training.load_training_set(preset, RUN)
    file = tmp_path / "run"
    arm = preset.arm("E")
    interrupted(monkeypatch, 1, data, arm, preset, 0, checkpoint=file)
    saved = file.read_bytes()

    def goes_on(*arguments) -> bool:
        file.write_bytes(saved)
        original, key = checkpoints.load, []
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "load", lambda *a: key.append(original(*a)) or key[-1])
            training.fit(*arguments, checkpoint=file)
        return key[0] is not None

    assert goes_on(data, arm, preset, 0)
    assert goes_on(data, arm.model_copy(update={"title": "renamed"}), preset, 0)
    assert not goes_on(data, arm, preset, 1)
    assert not goes_on(data, arm.model_copy(update={"link": "softplus"}), preset, 0)
    assert not goes_on(data, arm, changed(preset, lr=0.5), 0)
    counts = data.counts.clone()
    counts[0, 0, 0, 0] += 1
    assert not goes_on(replace(data, counts=counts), arm, preset, 0)
    tokens = data.tokens.load(torch.device("cpu"))
    tokens[data.train[0]] += 0.5
    assert not goes_on(replace(data, tokens=tokens), arm, preset, 0)
    saved = saved[: len(saved) // 2]
    assert not goes_on(data, arm, preset, 0)


@pytest.mark.slow
def test_killed_run_ends_as_an_uninterrupted_one(preset, threads):
    """Killed by the system, where nothing can tidy up."""
    threads(1)  # as in the process of `start`
    preset = changed(narrow(preset), {"X": E}, epochs=8, patience=8)
    run = Run(arm="X", test_patient="P5", seed=0)
    file = preset.folder / "checkpoints" / f"{run.name}.safetensors"
    process = start(preset, config.ROOT, "X")
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not preset.run_dir(run).exists()
    with safe_open(file, "pt") as saved:
        assert 0 < len(json.loads(saved.metadata()["history"])) < 8
    resumed = training.train(preset, run)
    assert not file.exists()
    whole = training.fit(training.load_training_set(preset, run), preset.arm("X"), preset, 0)
    assert history(resumed) == history(whole)
    weights = load_file(resumed / "checkpoint.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in whole.model.state_dict().items())
