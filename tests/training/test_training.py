"""Training: what it may see, that it learns, and that it repeats."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from safetensors.torch import load_file

from sparsity_trap import metrics, training, training_data
from sparsity_trap import settings as config
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.encoders import dihedral, views
from sparsity_trap.settings import Run, UserError, load_preset

GENES = ["PIGR", "DES", "VIM"]
RUN = Run(arm="E", test_patient="P5", seed=0)


def write_patient(
    preset, patient: str, seed: int, source: str = "simulated", scale: tuple[float, ...] = (1.0,)
) -> None:
    """A patient of 3 × 3 patches whose tokens tell the rate of each token's bins.

    ``scale`` multiplies the rates of each gene.
    """
    draw = np.random.default_rng(seed)
    n = 9
    signal = draw.gamma(1.0, 1.0, (n, len(GENES), 16, 16)).astype(np.float32)
    rate = np.repeat(np.repeat(0.2 * signal, 8, 2), 8, 3) * np.reshape(scale, (-1, 1, 1))
    origin = 128 * np.stack(np.meshgrid(range(3), range(3), indexing="ij"), -1).reshape(-1, 2)
    arrays = {
        "images": np.zeros((n, 224, 224, 3), np.uint8),
        "counts": draw.poisson(rate).astype(np.uint16),
        "mask": draw.random((n, 128, 128)) > 0.1,
        "origin": origin.astype(np.int32),
        "truth": rate.astype(np.float16),
        "overview": np.zeros((96, 96, 3), np.uint8),
        "total": np.zeros((96, 96), np.uint32),
        "row_factor": np.where(np.arange(384) % 2, 1.2, 0.8).astype(np.float32),
        "col_factor": np.ones(384, np.float32),
    }
    store = zarr.open_group(preset.store(patient), mode="w")
    for name, values in arrays.items():
        store.create_array(name, data=values)
    store.attrs.update(
        genes=GENES, patient=patient, source=source, bin_um=2.0, grid_shape=[384, 384],
        microns_per_pixel=0.5, registration={},
    )  # fmt: skip
    tokens = np.log(np.maximum(signal, 1e-3))
    turned = [
        np.ascontiguousarray(dihedral(torch.from_numpy(tokens), element, (2, 3)))
        for _, element in views(preset.encoder)
    ]
    preset.tokens(patient).mkdir(parents=True, exist_ok=True)
    np.save(preset.tokens(patient) / "tokens.npy", np.stack(turned, 1).astype(np.float16))
    about = {"encoder": preset.encoder.name, "views": views(preset.encoder)}
    (preset.tokens(patient) / "about.json").write_text(json.dumps(about))


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    preset = load_preset("smoke")
    update = {"epochs": 10, "batch_size": 3, "lr": 0.02}
    preset = preset.model_copy(
        update={
            "training": preset.training.model_copy(update=update),
            "arms": {name: arm.model_copy(update={"decoder": "linear"})
                     for name, arm in preset.arms.items()},
        }
    )  # fmt: skip
    for seed, patient in enumerate(preset.patients):
        write_patient(preset, patient, seed)
    return preset


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


def test_image_counts_and_mask_are_turned_alike(preset):
    cpu = torch.device("cpu")
    data = training.load_training_set(preset, RUN).on(cpu)
    patches = torch.arange(len(data.counts))
    chosen = torch.arange(len(patches)) % len(data.views)
    assert {data.views[v][1] for v in chosen} == set(range(8))
    (batch,) = training_data.batches(data, patches, chosen, len(patches), cpu)
    truth = torch.nn.functional.avg_pool2d(batch.counts.float(), 8)
    plain = torch.nn.functional.avg_pool2d(data.counts.float(), 8)

    def agreement(a, b):
        return torch.corrcoef(torch.stack([a.float().flatten(), b.flatten()]))[0, 1]

    assert agreement(batch.tokens.exp(), truth) > 0.9  # tokens hold the log rate of their bins
    assert agreement(batch.tokens.exp(), plain) < 0.5
    for i, view in enumerate(chosen):
        element = data.views[view][1]
        assert dihedral(data.counts[i], element, (1, 2)).equal(batch.counts[i])
        assert dihedral(data.mask[i], element, (0, 1)).equal(batch.mask[i])


@pytest.mark.parametrize("side", range(4))
def test_validation_block_is_one_strip_at_one_side(side):
    grid = np.stack(np.meshgrid(range(6), range(6), indexing="ij"), -1).reshape(-1, 2) * 128
    held_out = training_data.validation_block(grid, 0.16, side)
    assert held_out.sum() == 6
    along = grid[held_out][:, 1 - side % 2]
    assert set(along) == {(5 if side < 2 else 0) * 128}


def test_one_row_of_patches_cannot_be_split():
    with pytest.raises(UserError, match="single row or column"):
        training_data.validation_block(np.array([[0, 0], [0, 128]]), 0.2, 1)
