"""Predictions of an image alone: what is tissue, and what is no histology."""
# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image
from predicted import (  # noqa: F401 - fixtures
    FEW,
    cut,
    position_table,
    preset,
    root,
    run_dir,
    simulated,
    write_run,
)
from spaceranger import write_outs

from sparsity_trap import predict
from sparsity_trap.data.genes import PANEL
from sparsity_trap.data.geometry import GridFit
from sparsity_trap.predict import predict_image, predict_section
from sparsity_trap.settings import UserError


def nearest(adata, points: np.ndarray, number: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Distance and number of the bins nearest to some pixels."""
    from scipy.spatial import cKDTree

    return cKDTree(adata.obsm["spatial"]).query(points, number)


def test_image_alone_predicts_what_the_store_predicts(preset, simulated, tmp_path, monkeypatch):
    """A section whose grid lies as the tiles of the image do, upside down."""
    _, slide = simulated
    image = tifffile.imread(slide.image)[:600, :560]
    rows, cols = np.indices((128, 128))
    y, x = 4.0 * rows[::-1] + 1.5, 4.0 * cols + 1.5
    outs = write_outs(tmp_path / "outs", np.ones((3, 128, 128), int), FEW, y=y, x=x, image=image)
    store, own = cut(outs, tmp_path / "P1.zarr", FEW, "P1")
    folder = write_run(preset.model_copy(update={"name": "tiles"}), store.images[:], FEW)
    Image.fromarray(np.full((60, 56), 1, np.uint8)).save(tmp_path / "mask.png")
    monkeypatch.setattr(predict, "tissue_mask", lambda small, um: np.ones(small.shape[:2], bool))
    for um in (2, 8):
        section = predict_section(folder, store, own, bin_um=um)
        alone = predict_image(
            folder, outs / "tissue_image.tif", 0.5, bin_um=um, mask=tmp_path / "mask.png"
        )
        distance, index = nearest(alone, section.obsm["spatial"])
        assert distance.max() < 0.01
        assert np.allclose(alone.X[index], section.X, rtol=0.02, atol=1e-4)
    assert "counts" not in alone.layers and alone.n_obs > section.n_obs
    origin = alone.uns["sparsity_trap"]
    assert origin["source"] == "image" and "TRAINED ON SIMULATED DATA" in origin["mark"]
    assert list(alone.uns["spatial"]) == ["tissue_image"]
    # Bins beyond the image have no tissue, whatever the mask says.
    assert alone.obsm["spatial"].max(0)[0] < 560 and alone.obsm["spatial"].max(0)[1] < 600


def test_image_alone_agrees_on_a_turned_section(preset, simulated):
    """Here tiles and patches do not coincide: means over 40 µm agree, and only at their places."""
    store, slide = simulated
    folder = write_run(preset.model_copy(update={"name": "coarse"}), store.images[:], coarse=True)
    section = predict_section(folder, store, slide)
    alone = predict_image(folder, slide.image, 0.5)
    distance, _ = nearest(alone, section.obsm["spatial"])
    assert distance.max() < 12  # pixels; bins of both are 16 apart

    def around(adata, points: np.ndarray) -> np.ndarray:
        _, index = nearest(adata, points, 25)
        return adata.X[index].mean(1)

    here = section.obsm["spatial"]
    flipped = here.max(0) + here.min(0) - here
    expected = around(section, here)
    agreement = {}
    for name, points in {
        "right": here,
        "upside down": np.stack([here[:, 0], flipped[:, 1]], 1),
        "mirrored": np.stack([flipped[:, 0], here[:, 1]], 1),
    }.items():
        found = around(alone, points)
        agreement[name] = np.median(
            [np.corrcoef(found[:, g], expected[:, g])[0, 1] for g in range(len(PANEL))]
        )
    assert agreement.pop("right") > max(0.6, *(value + 0.3 for value in agreement.values()))


def test_only_histology_is_predicted(run_dir, simulated, tmp_path):
    """Neither fluorescence nor what was not scanned."""
    image = tifffile.imread(simulated[1].image)
    options = {"photometric": "rgb", "tile": (64, 64), "compression": "zlib"}
    tifffile.imwrite(tmp_path / "dark.tif", 255 - image, **options)
    with pytest.raises(UserError, match="dark.tif is not pink on white glass"):
        predict_image(run_dir, tmp_path / "dark.tif", 0.5)
    path = tmp_path / "half.tif"
    tifffile.imwrite(path, image, **options)
    with tifffile.TiffFile(path, mode="r+") as file:
        tag, across = file.pages[0].tags["TileByteCounts"], -(-image.shape[1] // 64)
        sizes = np.array(tag.value).reshape(-1, across)
        sizes[:, across // 2 :] = 0
        tag.overwrite(sizes.ravel().tolist())
    found = predict_image(run_dir, path, 0.5, genes=["DES"])
    assert found.n_obs > 100 and found.obsm["spatial"][:, 0].max() < across // 2 * 64 + 8


def test_mask_leaves_out_tissue_and_adds_no_glass(tmp_path):
    """As for a cohort, where it adds no bin to those in tissue."""
    image = np.full((1100, 1100, 3), 243, np.uint8)
    image[30:1070, 30:560] = 200, 120, 170
    drawn = np.ones((110, 110), np.uint8)
    for name, top in (("white.png", 0), ("half.png", 55)):
        drawn[:top] = 0
        Image.fromarray(drawn).save(tmp_path / name)
    fit = GridFit(np.array([[4, 0, 1.5], [0, 4, 1.5]]), 0, 0)
    masks = None, tmp_path / "white.png", tmp_path / "half.png"
    plain, white, half = (predict._tissue_of(image, image, 0.5, fit, mask) for mask in masks)
    assert np.array_equal(plain, white) and 0.2 < plain[:275, :275].mean() < 0.6
    below = np.arange(len(plain))[:, None] * 4 + 2 >= 550
    assert np.array_equal(half, plain & below)


def test_tissue_mask_follows_the_simulated_tissue(simulated):
    _, slide = simulated
    image = tifffile.imread(slide.image)
    table = position_table(slide)
    y, x = (np.rint(table[f"pxl_{axis}_in_fullres"]).astype(int) for axis in ("row", "col"))
    found = predict.tissue_mask(image, 0.5)[y, x]
    true = table["in_tissue"] == 1
    assert (found & true).sum() / (found | true).sum() > 0.9
    assert not predict.tissue_mask(np.full((300, 300, 3), 243, np.uint8), 2.0).any()


def test_tissue_mask_drops_specks_and_fills_enclosed_holes_only():
    tissue = np.zeros((240, 240), bool)
    tissue[40:200, :200] = True
    lumen, notch, wide = np.s_[60:80, 60:80], np.s_[120:140, :20], np.s_[100:190, 80:170]
    for hole in (lumen, notch, wide):
        tissue[hole] = False
    tissue[215:225, 215:225] = True  # a speck of 40 µm
    image = np.where(tissue, 140, 243).astype(np.uint8)[..., None].repeat(3, 2)
    found = predict.tissue_mask(image, 4.0)
    assert found[70, 70] and found[50, 100]
    assert not found[130, 5] and not found[145, 125] and not found[220, 220]
