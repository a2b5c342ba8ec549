"""Patches of the training patients: read, streamed, held out, thinned and turned."""
# ruff: noqa: F811 - the fixture `preset` is imported

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from small_runs import LINEAR, RUN, changed, history, preset, same_state  # noqa: F401 - a fixture

from sparsity_trap import training, training_data
from sparsity_trap.encoders import dihedral
from sparsity_trap.settings import Run, UserError


def test_single_views_are_read_as_they_lie_on_the_disk(preset):
    files = training.load_training_set(preset, RUN).tokens
    every = np.concatenate([np.load(preset.tokens(p) / "tokens.npy") for p in ("P1", "P2")])
    assert files.shape == every.shape and files.nbytes == every.nbytes
    patches, views = torch.tensor([17, 0, 8, 9, 9]), torch.tensor([0, 7, 3, 3, 5])
    np.testing.assert_array_equal(files.read(patches, views), every[patches, views])
    np.testing.assert_array_equal(files.load(torch.device("cpu")), every)


def test_streamed_tokens_give_the_same_model_as_resident_ones(preset, monkeypatch):
    data = training.load_training_set(preset, RUN)
    resident = training.fit(data, preset.arm("E"), preset, 0)
    monkeypatch.setattr(training_data, "CPU_BYTES", data.tokens.nbytes - 1)
    monkeypatch.setattr(training_data.PatchFiles, "load", None)
    streamed = training.fit(data, preset.arm("E"), preset, 0)
    assert history(resident) == history(streamed)
    assert same_state(resident.model, streamed.model)


@pytest.mark.parametrize("keep", [1, 0.25])
def test_streamed_maps_give_the_same_model_as_resident_ones(preset, monkeypatch, keep):
    now = changed(preset, {"X": {**LINEAR, "keep": keep, "bias": "gene-mean"}})
    run = Run(arm="X", test_patient="P5", seed=0)
    data = training.load_training_set(now, run)
    assert all(isinstance(maps, torch.Tensor) for maps in (data.counts, data.mask))
    resident = training.fit(data, now.arm("X"), now, 0)
    monkeypatch.setattr(training_data, "CPU_BYTES", 0)
    monkeypatch.setattr(training_data.PatchFiles, "load", None)
    files = training.load_training_set(now, run)
    assert not any(isinstance(m, torch.Tensor) for m in (files.counts, files.mask))
    assert files.counts.nbytes == data.counts.nbytes
    streamed = training.fit(files, now.arm("X"), now, 0)
    assert history(resident) == history(streamed)
    assert same_state(resident.model, streamed.model)


def test_counts_above_255_are_read_whole(preset):
    zarr.open_group(preset.store("P1"), mode="a")["counts"][3, 1, 5, 5] = 300
    counts = training.load_training_set(preset, RUN).counts
    assert counts.dtype == torch.int32 and counts[3, 1, 5, 5] == 300
    stored = [training_data.PatchStore(preset.store(patient)).counts[:] for patient in ("P1", "P2")]
    np.testing.assert_array_equal(counts, np.concatenate(stored))


def test_a_gene_without_a_count_starts_low_but_finite(preset):
    data = training.load_training_set(preset, RUN)
    counts = data.counts.clone()
    counts[:, 1] = 0
    rate = training_data.gene_rate(replace(data, counts=counts))
    assert 0 < rate[1] < 1e-4


def test_weights_of_genes_follow_from_their_training_counts(preset):
    data = training.load_training_set(preset, RUN)
    counts = data.counts.clone()
    counts[:, 1] = 0
    now = replace(data, counts=counts)
    inside = counts[data.train].numpy().astype(float).swapaxes(0, 1)[:, data.mask[data.train]]
    mean, variance = inside.mean(axis=1), inside.var(axis=1)
    seen = mean > 0
    of = {"mean": mean[seen], "1/mean": 1 / mean[seen], "1/variance": 1 / variance[seen]}
    for kind, weight in of.items():
        found = training_data.gene_weight(now, kind).numpy()
        np.testing.assert_allclose(found[seen], weight, rtol=1e-5)
        # a gene without a count neither divides by 0 nor sets the scale of the others
        assert found[1] == pytest.approx(weight.mean(), rel=1e-5)
    assert training_data.gene_weight(now, "none") is None
    empty = replace(data, counts=torch.zeros_like(counts))
    assert training_data.gene_weight(empty, "1/variance").eq(1).all()


def test_thinning_is_binomial_and_repeats(preset):
    keep = 0.25  # at a half, keeping could not be told from dropping
    now = changed(preset, {"quarter": {**LINEAR, "keep": keep}})
    full = training.load_training_set(now, RUN)
    thin, again, other = (
        training.load_training_set(now, Run(arm="quarter", test_patient="P5", seed=seed))
        for seed in (0, 0, 1)
    )
    assert thin.counts.equal(again.counts) and not thin.counts.equal(other.counts)
    for part in (full.validation, ~full.validation):
        n, k = (x.counts[part].long().flatten() for x in (full, thin))
        assert (k <= n).all()
        assert abs(k.sum() - keep * n.sum()) < 4.5 * (n.sum() * keep * (1 - keep)).sqrt()
        # One of a pair is kept in ⅜ of all pairs; in half or none if counts were scaled.
        share, expected = (k[n == 2] == 1).double().mean(), 2 * keep * (1 - keep)
        assert abs(share - expected) < 4.5 * (expected * (1 - expected) / (n == 2).sum()).sqrt()
    for patches in ((0, 9), (9, 18)):  # patients are thinned independently
        assert thin.counts[slice(*patches)].any()


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
