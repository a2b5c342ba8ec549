"""Patch stores against analytic images and known counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from scipy import ndimage
from spaceranger import DIHEDRAL, paint, turned_grid, write_outs

from sparsity_trap.data.patches import PatchStore, assemble, write_store
from sparsity_trap.data.spaceranger import open_slide
from sparsity_trap.settings import ROOT, Patches, UserError

GENES = ["ACTB", "KRT8", "JCHAIN"]
SHAPE = (150, 270)  # two whole patches and a rest in both directions
WAVE_PX = 90.0


def wave(y: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    """Slow pattern that tells position and direction apart."""
    return [
        127 + 100 * np.sin(2 * np.pi * y / WAVE_PX),
        127 + 100 * np.sin(2 * np.pi * x / WAVE_PX),
        127 + 100 * np.sin(2 * np.pi * (y + 2 * x) / (3 * WAVE_PX)),
    ]


def turned(array: np.ndarray, how: tuple[bool, bool, bool]) -> np.ndarray:
    """What the store should hold of an array-frame array."""
    transpose, reverse_y, reverse_x = how
    array = np.swapaxes(array, -1, -2) if transpose else array
    array = np.flip(array, -2) if reverse_y else array
    return np.flip(array, -1) if reverse_x else array


def write(outs: Path, path: Path, genes: list[str] = GENES, min_tissue: float = 0.05) -> PatchStore:
    slide = open_slide(outs)
    settings = Patches(min_tissue=min_tissue)
    write_store(slide, genes, path, patient="P1", source="simulated", settings=settings)
    return PatchStore(path)


@pytest.mark.parametrize("how", DIHEDRAL)
def test_counts_mask_truth_and_pixels_of_every_orientation(tmp_path, how):
    rng = np.random.default_rng(0)
    shape = SHAPE[::-1] if how[0] else SHAPE
    counts = rng.poisson(0.2, (3, *shape))
    in_tissue = rng.random(shape) < 0.7
    counts = counts * in_tissue
    truth = rng.random((3, *shape))
    y, x, image_shape = turned_grid(shape, how, kink_px=8)
    outs = write_outs(
        tmp_path / "outs",
        counts,
        GENES,
        y=y,
        x=x,
        in_tissue=in_tissue,
        truth=truth,
        image=paint(image_shape, wave),
    )
    wanted = ["JCHAIN", "ACTB"]
    store = write(outs, tmp_path / "stores" / "P1.zarr", wanted)

    assert len(store) == 2 and store.grid_shape == SHAPE and store.genes == tuple(wanted)
    assert store.origin[:].tolist() == [[0, 0], [0, 128]]
    expected = turned(counts, how)[[2, 0]]
    for i, (row, col) in enumerate(store.origin[:]):
        window = np.s_[..., row : row + 128, col : col + 128]
        assert np.array_equal(store.counts[i], expected[window])
        assert np.array_equal(store.mask[i], turned(in_tissue, how)[window])
        assert np.array_equal(store.truth[i], turned(truth, how)[[2, 0]].astype(np.float16)[window])
    total = expected.sum(0)[:148, :268].reshape(37, 4, 67, 4).sum((1, 3))
    assert np.array_equal(store.total[:], total)

    # The centre of image pixel p lies at bin (p + 0.5) * 128 / 224 - 0.5: look up where the
    # (kinked) grid puts it in the image, and what was painted there.
    turned_y, turned_x = turned(y, how), turned(x, how)
    for i, (row, col) in enumerate(store.origin[:]):
        p = (np.arange(224) + 0.5) * 128 / 224 - 0.5
        place = np.meshgrid(row + p, col + p, indexing="ij")
        at = [ndimage.map_coordinates(g, place, order=1) for g in (turned_y, turned_x)]
        painted = np.stack(wave(*at), axis=-1)
        inner = np.s_[2:-2, 2:-2]  # linear look-up cannot go beyond the outermost bin centres
        error = np.abs(store.images[i][inner] - painted[inner])
        # The steepest slope is 28 grey levels per bin: 3 levels are a ninth of a bin.
        assert error.max() < 4 and error.mean() < 1.5
    p = (np.arange(37) + 0.5) * 4 - 0.5, (np.arange(67) + 0.5) * 4 - 0.5
    place = np.meshgrid(*p, indexing="ij")
    at = [ndimage.map_coordinates(g, place, order=1) for g in (turned_y, turned_x)]
    damping = np.sinc(16 / WAVE_PX)  # mean of a sine over an 8 µm pixel
    painted = 127 + damping * (np.stack(wave(*at), axis=-1)[..., :2] - 127)
    assert np.abs(store.overview[:][..., :2] - painted).max() < 8


@pytest.mark.parametrize("how", DIHEDRAL)
def test_dots_in_the_image_lie_on_their_counts(tmp_path, how):
    """Dark dots painted at the pixels of chosen bins, counts put in the same bins."""
    shape = (128, 128)
    bins = np.array([[20, 30], [90, 40], [60, 101], [110, 115]])  # no symmetry
    y, x, image_shape = turned_grid(shape, how, pixels_per_bin=7.3, degrees=-2)
    counts = np.zeros((3, *shape), int)
    counts[0, bins[:, 0], bins[:, 1]] = [1, 2, 3, 4]
    centres = [(y[r, c], x[r, c]) for r, c in bins]

    def dots(py: np.ndarray, px: np.ndarray) -> list[np.ndarray]:
        dark = sum(np.exp(-((py - a) ** 2 + (px - b) ** 2) / (2 * 12**2)) for a, b in centres)
        return [230 - 200 * dark] * 3

    outs = write_outs(
        tmp_path / "outs",
        counts,
        GENES,
        y=y,
        x=x,
        image=paint(image_shape, dots),
        microns_per_pixel=2 / 7.3,
    )
    store = write(outs, tmp_path / "P1.zarr")
    dark = 230.0 - store.images[0][..., 0]
    for value in (1, 2, 3, 4):
        ((row, col),) = np.argwhere(store.counts[0, 0] == value)
        expected = (np.array([row, col]) + 0.5) * 224 / 128 - 0.5
        window = np.indices(dark.shape) - expected[:, None, None]
        near = (np.abs(window) < 12).all(0)
        offset = (window * dark).sum((1, 2), where=near) / dark.sum(where=near)
        assert np.abs(offset).max() * 128 / 224 < 0.1  # bins


def test_fine_texture_is_averaged_not_sampled(tmp_path):
    """Pixel noise at 0.27 µm, four image pixels per patch pixel, must lose most of its spread."""
    y, x, image_shape = turned_grid((128, 128), (False, False, False), pixels_per_bin=7.3)
    noise = np.random.default_rng(1).choice([50, 200], (*image_shape, 1)).astype(np.uint8)
    outs = small_outs(
        tmp_path / "outs", y=y, x=x, image=noise.repeat(3, 2), microns_per_pixel=2 / 7.3
    )
    picture = write(outs, tmp_path / "P1.zarr").images[0].astype(float)
    assert picture.mean() == pytest.approx(125, abs=1)
    # The mean over 4.17 x 4.17 independent pixels has a spread of 75 / 4.17 = 18.
    assert 10 < picture.std() < 20


def test_patches_with_little_tissue_are_left_out_and_outside_is_white(tmp_path):
    shape = (256, 256)
    in_tissue = np.zeros(shape, bool)
    in_tissue[:128, :128] = True
    in_tissue[128:140, 128:140] = True  # 0.9 % of its patch
    y, x, image_shape = turned_grid(shape, (False, False, False), degrees=0)
    image = np.full((600, 600, 3), 100, np.uint8)  # the grid reaches beyond the image
    outs = write_outs(
        tmp_path / "outs",
        np.zeros((3, *shape), int),
        GENES,
        y=y,
        x=x,
        in_tissue=in_tissue,
        image=image,
    )
    store = write(outs, tmp_path / "P1.zarr")
    assert store.origin[:].tolist() == [[0, 0]] and store.truth is None
    assert (store.images[0] == 100).all()
    assert (store.overview[40:, 40:] == 255).all() and (store.overview[:30, :30] == 100).all()

    values = np.arange(32 * 32, dtype=float).reshape(1, 32, 32)
    section = assemble(store, values, 4)
    assert section.shape == (64, 64) and np.array_equal(section[:32, :32], values[0])
    assert np.isnan(section[32:]).all() and np.isnan(section[:, 32:]).all()
    assert assemble(store, store.images[:, :128, :128], 1).shape == (256, 256, 3)
    with pytest.raises(ValueError, match="patches of 64 x 64"):
        assemble(store, values, 2)

    with pytest.raises(UserError, match="lower patches.min_tissue"):
        write(write_outs(tmp_path / "none", np.zeros((3, 20, 20), int), GENES), tmp_path / "N.zarr")
    assert not (tmp_path / "N.zarr").exists()


def small_outs(outs: Path, **options) -> Path:
    y, x, image_shape = turned_grid((128, 128), (False, True, False))
    image = np.full((*image_shape, 3), 90, np.uint8)
    counts = np.ones((3, 128, 128), int)
    return write_outs(outs, counts, GENES, **({"y": y, "x": x, "image": image} | options))


def test_store_appears_only_when_complete(tmp_path, monkeypatch):
    outs = small_outs(tmp_path / "outs")
    path = tmp_path / "stores" / "P1.zarr"
    write(outs, path)
    (path / "left over").touch()
    write(outs, path)  # replaces
    assert not (path / "left over").exists()
    with pytest.raises(UserError, match="MUC12"):
        write(outs, path, ["MUC12"])

    def fail(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr("sparsity_trap.data.patches.resample", fail)
    with pytest.raises(RuntimeError):
        write(outs, path)
    assert len(PatchStore(path)) == 1
    assert [p.name for p in path.parent.iterdir()] == ["P1.zarr"]


def test_attributes_and_layout(tmp_path):
    store = write(small_outs(tmp_path / "outs"), tmp_path / "P1.zarr")
    assert (store.patient, store.source, store.bin_um) == ("P1", "simulated", 2.0)
    assert store.microns_per_pixel == 0.5 and store.registration["patch_max_px"] < 0.01
    assert store.counts.dtype == np.uint16 and store.mask.dtype == bool
    assert store.images.dtype == np.uint8 and store.origin.dtype == np.int32
    assert store.counts.chunks == (1, 3, 128, 128)
    assert zarr.open_group(tmp_path / "P1.zarr").metadata.zarr_format == 3
    with pytest.raises(UserError, match="run the data step"):
        PatchStore(tmp_path / "P9.zarr")


def test_truth_of_other_genes(tmp_path):
    outs = small_outs(tmp_path / "outs", truth=np.zeros((3, 128, 128)))
    zarr.open_group(outs / "truth.zarr").attrs["genes"] = ["ACTB", "KRT8", "VIM"]
    with pytest.raises(UserError, match="truth.zarr lacks gene JCHAIN"):
        write(outs, tmp_path / "P1.zarr")


def test_reading_patches_needs_no_file_format_libraries():
    """Training imports this module on machines that have no reader for sections."""
    code = (
        "import sys, sparsity_trap.data.patches;"
        "print({'h5py', 'pyarrow', 'scipy', 'tifffile', 'scanpy', 'pandas'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "set()", result.stderr


def test_mask_takes_dark_places_out_of_the_tissue(tmp_path):
    """A mask of another scale than the image, dark over the upper quarter of the field of view."""
    outs = small_outs(tmp_path / "outs")
    y, _, (height, width) = turned_grid((128, 128), (False, True, False))
    picture = np.full((height // 10, width // 10), 255, np.uint8)
    picture[: len(picture) // 4] = 0
    Image.fromarray(picture).save(tmp_path / "mask.png")
    write_store(
        open_slide(outs), GENES, tmp_path / "P1.zarr", patient="P1", source="spaceranger",
        settings=Patches(), mask=tmp_path / "mask.png",
    )  # fmt: skip
    kept = y[::-1] > height * (len(picture) // 4) / len(picture)
    differs = PatchStore(tmp_path / "P1.zarr").mask[0] != kept
    edge = np.abs(y[::-1] - height / 4) < 12  # of a pixel of the mask
    assert not differs[~edge].any() and 0.2 < (~kept).mean() < 0.3
