"""Training on tiles of which each has maps of some genes only."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from sparsity_trap import tiles as real
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.encoders import dihedral
from sparsity_trap.losses import Objective
from sparsity_trap.metrics import ssim
from sparsity_trap.scores import GeneScores
from sparsity_trap.settings import UserError


@pytest.fixture(scope="module")
def folder(request) -> Path:
    """Folder of the real tiles: where `make tiles` looks for them."""
    named = Path(os.environ.get("SPARSITY_TRAP_TILES", ROOT / "data" / "p5_crc_2um_tiles"))
    if (named / real.FILE).is_file():
        return named
    return request.getfixturevalue("shared_data") / "p5_crc_2um_tiles"


def planted(tiles: int = 6, genes: int = 3, seed: int = 0) -> real.Tiles:
    """Tiles in a row, of which the first has maps of all genes and each other one map."""
    draw = np.random.default_rng(seed)
    tile = np.array([*[0] * genes, *range(1, tiles)])
    mask = np.ones((tiles, 128, 128), bool)
    mask[1, :, :40] = False
    return real.Tiles(
        ids=np.arange(tiles).astype(str),
        he=draw.integers(0, 256, (tiles, 128, 128, 3), dtype=np.uint8),
        mask=mask,
        place=np.stack([np.zeros(tiles, int), 2 * np.arange(tiles)], 1),
        genes=tuple("ABC"[:genes]),
        tile=tile,
        gene=np.array([*range(genes), *([0, 1] * tiles)[: tiles - 1]]),
        counts=draw.poisson(0.3, (len(tile), 128, 128)).astype(np.uint8),
        printed={},
    )


@pytest.fixture(scope="module")
def tiles() -> real.Tiles:
    return planted()


@pytest.fixture(scope="module")
def views(tiles) -> real.Views:
    return real.encode(tiles)


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "workflow"))
        import tiles as program

        yield program


# --- folds ----------------------------------------------------------------------------------------


def test_no_tile_is_trained_on_that_touches_a_held_out_one():
    draw = np.random.default_rng(0)
    place = np.argwhere(draw.random((20, 20)) < 0.4)
    strip = real.strips(place)
    assert np.bincount(strip).min() > len(place) / real.STRIPS / 2
    for column in range(20):
        assert len(set(strip[place[:, 1] == column])) == 1
    for held_out in ([0], [2], [4], [1, 3]):
        test = np.isin(strip, held_out)
        train = real.trained_on(place, test)
        assert train.any()
        apart = np.abs(place[train][:, None] - place[test][None]).max(-1)
        assert apart.min() == 2  # which also says that no more than neighbours are left out


def test_real_tiles_that_are_trained_on_lie_apart_from_those_held_out(folder):
    tiles = real.read_tiles(folder)
    with np.load(folder / real.FILE) as arrays:
        if "array_row8" not in arrays:
            pytest.skip("these tiles come without rows and columns of their bins")
        sides = [np.sort(arrays[f"array_{axis}8"], axis=1) for axis in ("row", "col")]
    for held_out in [(s,) for s in range(real.STRIPS)] + [(0, 2), (1, 4)]:
        test = np.isin(tiles.strip, held_out)
        train = real.trained_on(tiles.place, test)
        gap = np.maximum(*(
            np.maximum(
                s[train, 0][:, None] - s[test, -1][None], s[test, 0][None] - s[train, -1][:, None]
            )
            for s in sides
        ))  # fmt: skip
        assert gap.min() > 16  # bins of 8 µm between them: half a tile


# --- loss -----------------------------------------------------------------------------------------


def loss_of(tiles, views, loss, batch, decoder="linear"):
    fit = real.Fit(decoder, loss, 1e-3, 0, (0,), 1)
    rate = torch.tensor([0.2, 0.4, 0.3])
    model, objective = real.initial(fit, views.tokens.shape[2], rate)
    tile = torch.tensor(batch)
    value = real.map_loss(
        model.eval(), objective, views.tokens, views, tiles, tile, torch.zeros_like(tile)
    )
    return value, model, objective


@pytest.mark.parametrize("loss", real.LOSSES)
def test_the_loss_of_a_tile_with_all_genes_is_that_of_the_objective(tiles, views, loss):
    value, model, objective = loss_of(tiles, views, loss, [0])
    eta = model(views.tokens[:1, 0])
    counts, mask = torch.from_numpy(tiles.counts[None, :3]), torch.from_numpy(tiles.mask[:1])
    torch.testing.assert_close(value, objective(eta, counts, mask))


@pytest.mark.parametrize("loss", ["mse", "mse-per-mean", "nb"])
def test_a_batch_averages_over_bins_then_maps_then_tiles(tiles, views, loss):
    each = [loss_of(tiles, views, loss, [tile])[0] for tile in (0, 1, 2)]
    together, model, objective = loss_of(tiles, views, loss, [0, 1, 2])
    torch.testing.assert_close(together, sum(each) / 3)
    # Tile 1 has a map of gene A, and no tissue in a part.
    eta, counts = model(views.tokens[1:2, 0])[:, :1], torch.from_numpy(tiles.counts[None, 3:4])
    alone = Objective(real.LOSSES[loss][0], real.LINK, 1)
    value = alone(eta, counts, torch.from_numpy(tiles.mask[1:2]))
    weight = 1 if objective.gene_weight is None else objective.gene_weight[0]
    torch.testing.assert_close(each[1], value * weight)


@pytest.mark.parametrize("loss", real.LOSSES)
def test_a_gene_without_a_map_in_the_batch_has_no_gradient(tiles, views, loss):
    value, model, objective = loss_of(tiles, views, loss, [1, 3])  # gene A twice
    value.backward()
    per_gene = model.head.weight.grad.view(3, -1).abs().sum(1)
    assert per_gene[0] > 0
    assert per_gene[1:].tolist() == [0, 0]
    for parameter in objective.parameters():
        assert parameter.grad[0] != 0
        assert parameter.grad[1:].tolist() == [0, 0]


@pytest.mark.parametrize("decoder", ["linear", "img2st"])
def test_single_maps_are_decoded_as_all_are(views, decoder):
    model, _ = real.initial(
        real.Fit(decoder, "mse", 1, 0, (), 1), views.tokens.shape[2], torch.ones(3)
    )
    tokens, tile, gene = views.tokens[:2, 0], torch.tensor([1, 0, 1]), torch.tensor([2, 0, 0])
    model.eval()
    torch.testing.assert_close(
        real.decode(model, tokens, tile, gene), model(tokens)[tile, gene], atol=1e-5, rtol=1e-5
    )


# --- tokens and training --------------------------------------------------------------------------


def test_maps_turn_as_their_tokens_do(tiles, views):
    for view in range(real.VIEWS):
        assert torch.equal(
            views.counts[:, view], dihedral(torch.from_numpy(tiles.counts), view, (1, 2))
        )
    assert torch.equal(views.mask[:, 0], torch.from_numpy(tiles.map_mask))


def test_the_mean_of_a_gene_is_that_of_its_maps_in_training(tiles):
    train = np.array([False, True, True, False, False, False])
    inside = tiles.mask[1]
    expected = [tiles.counts[3][inside].mean(), tiles.counts[4].mean(), np.nan]
    np.testing.assert_allclose(real.gene_rate(tiles, train), expected)


def test_training_learns_what_the_image_shows_and_the_same_twice():
    tiles = planted(6, 1)
    dark = np.random.default_rng(1).random((6, 16, 16)).repeat(8, 1).repeat(8, 2)
    he = (255 * (1 - 0.8 * dark[..., None].repeat(3, -1))).astype(np.uint8)
    counts = np.random.default_rng(2).poisson(2 * dark**2).astype(np.uint8)
    seen = real.Tiles(
        **vars(tiles) | {"he": he, "counts": counts[tiles.tile], "gene": tiles.gene * 0}
    )
    views = real.encode(seen)
    fit = real.Fit("linear", "poisson", 1e-2, 0, (4,), 30)
    first, second = (real.train(seen, views, fit) for _ in range(2))
    held_out = np.flatnonzero(fit.test(seen))
    rates = first.rates(views, held_out)
    np.testing.assert_array_equal(rates, second.rates(views, held_out))
    maps = np.isin(seen.tile, held_out)
    scores = real.score(seen.counts[maps], rates[:, 0], seen.map_mask[maps], first.gene_rate[[0]])
    assert scores["pcc_8um"].min() > 0.8
    assert scores["d2"].min() > 0.1


# --- scores ---------------------------------------------------------------------------------------


def test_scores_of_maps_are_those_of_metrics(tiles):
    draw = np.random.default_rng(3)
    rates = draw.gamma(1.0, size=(2, 128, 128)).astype(np.float32)
    counts, mask = tiles.counts[3:5], tiles.map_mask[3:5]
    found = real.score(counts, rates, mask, np.array([0.2, 0.4]))
    for i, mean in enumerate((0.2, 0.4)):
        scores = GeneScores(train_mean=np.array([mean]))
        part = slice(i, i + 1)
        scores.update(counts[part][:, None], rates[part][:, None], mask[part])
        expected = {name: column[0] for name, column in scores.compute().items()}
        for name in found:
            np.testing.assert_allclose(found.loc[i, name], expected[name], rtol=1e-5, err_msg=name)


def test_undefined_scores_are_nan_and_zeros_have_an_ssim(tiles):
    nothing = np.zeros((1, 128, 128), np.float32)
    found = real.score(tiles.counts[:1], nothing, tiles.map_mask[:1], np.array([0.2])).iloc[0]
    assert np.isnan(found["pcc_2um"])
    assert np.isnan(found["pcc_8um"])
    assert found["calibration"] == 0
    counts = tiles.counts[:1, None].astype(np.float32)
    assert found["ssim_2um"] == pytest.approx(ssim(counts, 0 * counts)[0, 0])
    coarse = bin_sum(counts, 4)
    tissue = bin_mask(tiles.map_mask[:1], 4)
    assert found["ssim_8um"] == pytest.approx(ssim(coarse, 0 * coarse, tissue)[0, 0])


def test_a_rate_is_chosen_without_the_strip_that_it_is_tested_on(script):
    plan = {"linear": script.Plan(("mse",), (0.1, 0.2), (0,), 1)}
    fits = script.searched(plan)
    strip = np.arange(real.STRIPS)  # a map in each
    wanted = {s: 0.1 if s in (0, 3) else 0.2 for s in strip}  # the rate that suits a strip

    def found(fit):
        pcc = [0.5 if fit.lr == wanted[s] else 0.1 for s in fit.held_out]
        return {"scores": {"map": list(fit.held_out), "pcc_8um": pcc, "control": ["model"] * 2}}

    rates = script.chosen_rates(fits, map(found, fits), strip)
    best = rates[rates["chosen"]].set_index("strip")["lr"]
    for s in strip:
        others = [wanted[(s + 2) % 5], wanted[(s - 2) % 5]]
        assert best[s] in others
        if others[0] == others[1]:
            assert best[s] == others[0]
    tested = script.tested(plan, rates)
    assert {fit.held_out for fit in tested} == {(s,) for s in strip}
    assert all(fit.lr == best[fit.held_out[0]] for fit in tested)


def in_this_process(cores, _, initializer, arguments) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores, initializer=initializer, initargs=arguments)


@pytest.mark.slow
def test_finished_fits_are_kept_and_results_written(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "real_tiles")
    losses = ("mse", "poisson")
    plan = script.Plan(losses, (1e-3, 4e-3), (0,), 1)
    monkeypatch.setattr(script, "PLANS", {"linear": plan})
    tiles = planted(10)
    arrays = {"tile_id": tiles.ids, "he": tiles.he, "mask": tiles.mask, "patch_rc": tiles.place}
    arrays |= {"pair_tile": tiles.tile, "pair_gene": np.array(tiles.genes)[tiles.gene]}
    arrays |= {"pair_counts": tiles.counts}
    arrays |= {f"pair_pred_{m}": tiles.counts.astype(np.float16) for m in ("mse", "poisson")}
    np.savez(tmp_path / real.FILE, **arrays)

    script.main([str(tmp_path), "--cores", "1"])
    kept = sorted((tmp_path / "kept").rglob("*.json"))
    # Losses and rates on five pairs of strips; losses on five strips.
    assert len(kept) == 2 * 2 * 5 + 2 * 5
    made = json.loads((tmp_path / "real_tiles" / "provenance.json").read_text())
    assert made["fits"] == len(kept)
    tables = {p.stem: pd.read_csv(p) for p in (tmp_path / "real_tiles").glob("*.csv")}
    assert set(tables) == {"maps", "scores", "controls", "rates"}
    assert len(tables["maps"]) == len(tiles.tile)
    runs = tables["scores"].groupby(["loss", "seed"])["map"]
    assert runs.size().to_list() == [runs.nunique().iloc[0]] * 2
    others = tables["controls"].groupby("control").size()
    assert set(others.index) == {*script.CONTROLS, "published mse", "published poisson"}
    published = tables["controls"].query("control == 'published mse'")
    np.testing.assert_allclose(published[["pcc_2um", "ssim_2um"]], 1)  # planted: the counts

    before = {path: path.stat().st_mtime_ns for path in kept}
    kept[0].unlink()
    # In this process, which has imported what another would import anew.
    monkeypatch.setattr(script, "ProcessPoolExecutor", in_this_process)
    script.main([str(tmp_path), "--cores", "1"])
    changed = [path for path in kept if path.stat().st_mtime_ns != before[path]]
    assert changed == [kept[0]]
    again = pd.read_csv(tmp_path / "real_tiles" / "scores.csv")
    pd.testing.assert_frame_equal(again, tables["scores"])


def test_missing_tiles_are_named(tmp_path):
    with pytest.raises(UserError, match=rf"{real.FILE} is missing: .*make download TILES=1"):
        real.read_tiles(tmp_path)


def test_a_part_computed_again_equals_the_committed_results(script, folder):
    if not (script.RESULTS / "provenance.json").is_file():
        pytest.skip("no results/real_tiles: run make tiles")
    tiles = real.read_tiles(folder)
    made = json.loads((script.RESULTS / "provenance.json").read_text())
    assert made["tiles"] == script.digests(tiles)[0]
    rates, scores = (pd.read_csv(script.RESULTS / f"{name}.csv") for name in ("rates", "scores"))
    strip, views = 1, real.encode(tiles)
    best = rates.query("decoder == 'linear' and loss == 'poisson' and strip == @strip and chosen")
    fit = real.Fit(
        "linear", "poisson", best["lr"].item(), 0, (strip,), script.PLANS["linear"].epochs
    )
    found = script.table(script.fitted(tiles, views, fit)).set_index("map")
    kept = scores.query("decoder == 'linear' and loss == 'poisson' and seed == 0")
    kept = kept.set_index("map").loc[found.index, list(found)]
    # Processors round differently, which 400 steps carry on.
    np.testing.assert_allclose(found, kept, atol=0.01)
    assert abs((found - kept)["pcc_8um"].mean()) < 0.002
