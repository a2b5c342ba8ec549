"""Training: what it may see, that it learns, and that it repeats."""
# ruff: noqa: F811 - the fixture `preset` is imported

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from safetensors.torch import load_file
from small_runs import GENES, RUN, preset, write_patient  # noqa: F401 - a fixture

from sparsity_trap import metrics, training, training_data
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.settings import UserError


def test_no_patch_of_the_test_patient_reaches_training_selection_normalisation_or_genes(preset):
    """Whatever the test patient's section holds, the same model comes out."""
    first = training.train(preset, RUN)
    checkpoint = load_file(first / "checkpoint.safetensors")
    scores = pd.read_parquet(first / "genes.parquet")
    log = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    write_patient(preset, "P5", seed=99)
    second = training.train(preset, RUN)
    again = load_file(second / "checkpoint.safetensors")
    assert checkpoint.keys() == again.keys() and {"mean", "std"} <= checkpoint.keys()
    assert all(torch.equal(checkpoint[key], again[key]) for key in checkpoint)
    for before, after in zip(
        log, map(json.loads, (second / "log.jsonl").read_text().splitlines()), strict=True
    ):
        assert {**before, "seconds": 0} == {**after, "seconds": 0}
    # The scores are of the new section, so it was read; only later.
    assert not scores.equals(pd.read_parquet(second / "genes.parquet"))
    assert json.loads((second / "provenance.json").read_text())["training_patients"] == ["P1", "P2"]


def test_training_opens_only_the_training_patients(preset, monkeypatch):
    opened = []
    original = training_data.PatchStore
    monkeypatch.setattr(
        training_data, "PatchStore", lambda path: opened.append(str(path)) or original(path)
    )
    data = training.load_training_set(preset, RUN)
    training.fit(data, preset.arm("E"), preset, 0)
    assert sorted(opened) == sorted(str(preset.store(p)) for p in ("P1", "P2"))


def test_model_learns_and_is_the_one_of_its_best_epoch(preset):
    data = training.load_training_set(preset, RUN)
    model, history, objective = training.fit(data, preset.arm("E"), preset, 0)
    assert history[-1]["validation_pcc_8um"] > 0.8
    held_out = data.held_out
    eta = model(data.tokens.read(held_out, torch.zeros_like(held_out))).detach()
    weight = [
        objective(eta[part], data.counts[held_out[part]], data.mask[held_out[part]]) * len(part)
        for part in torch.arange(len(held_out)).split(preset.training.batch_size)
    ]
    best = min(history, key=lambda row: row["validation_loss"])
    assert sum(weight) / len(held_out) == pytest.approx(best["validation_loss"], rel=1e-5)


def test_validation_pcc_is_that_of_the_metrics(preset):
    data = training.load_training_set(preset, RUN)
    model, history, _ = training.fit(data, preset.arm("E"), preset, 0)
    best = min(history, key=lambda row: row["validation_loss"])
    held_out = data.held_out
    rate = model.rate(data.tokens.read(held_out, torch.zeros_like(held_out))).detach()
    mask = data.mask[held_out]
    truth, pred = (bin_sum(x * mask[:, None], 4) for x in (data.counts[held_out], rate))
    expected = metrics.pcc(truth, pred, bin_mask(mask, 4)).mean()
    assert best["validation_pcc_8um"] == pytest.approx(expected, rel=1e-5)


def test_same_seed_same_numbers_other_seed_other_numbers(preset):
    data = training.load_training_set(preset, RUN)
    runs = [training.fit(data, preset.arm("E"), preset, seed).history for seed in (3, 3, 4)]
    losses = [[row["validation_loss"] for row in history] for history in runs]
    assert losses[0] == losses[1] != losses[2]


def test_divergence_ends_in_a_sentence(preset):
    settings = preset.training.model_copy(update={"lr": 1e30, "clip": 1e30})
    preset = preset.model_copy(update={"training": settings})
    data = training.load_training_set(preset, RUN)
    with pytest.raises(UserError, match="diverged in epoch 1: lower training.lr"):
        training.fit(data, preset.arm("E"), preset, 0)


def test_early_stopping_waits_for_patience(preset):
    settings = preset.training.model_copy(update={"epochs": 50, "lr": 1e-12, "patience": 2})
    preset = preset.model_copy(update={"training": settings})
    data = training.load_training_set(preset, RUN)
    history = training.fit(data, preset.arm("E"), preset, 0).history
    assert len(history) < 50


def test_run_folder_is_complete_and_scores_agree_with_the_predictions(preset):
    folder = training.train(preset, RUN)
    rate = zarr.open_group(folder / "predictions.zarr", mode="r")["rate"][:].astype(np.float32)
    store = training.PatchStore(preset.store("P5"))
    table = pd.read_parquet(folder / "genes.parquet")
    assert list(table["gene"]) == GENES and list(table["category"])[1] == "stromal"
    expected = metrics.pcc(store.counts[:], rate, store.mask[:])
    np.testing.assert_allclose(table["pcc_2um"], expected, atol=1e-3)  # stored as float16
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_training_flushes_denormals_on_its_thread_and_gives_the_setting_back():
    tiny = torch.full((1,), 1e-39)
    with training._without_denormals():
        assert (tiny * 1).item() == 0
        with training._without_denormals():
            pass
        assert (tiny * 1).item() == 0
    assert (tiny * 1).item() > 0
