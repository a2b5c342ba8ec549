"""Files that agree with each other, but not with what the science needs: refused, or counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from scipy import ndimage
from spaceranger import turned_grid, write_outs

from sparsity_trap.data import guards
from sparsity_trap.data.patches import PatchStore, write_store
from sparsity_trap.data.sections import Section, check_section
from sparsity_trap.data.spaceranger import POSITIONS, SCALES, open_slide
from sparsity_trap.settings import Patches, UserError

GENES = ["ACTB", "CD74"]
SHAPE = 140, 156
IMAGE = "tissue_image.tif"
Y, X, SIZE = turned_grid(SHAPE, (False, True, False), degrees=1.0)


def cells() -> np.ndarray:
    """Density of cells in the image, 0 to 1, without any symmetry."""
    rng = np.random.default_rng(3)
    centres = np.zeros(SIZE)
    centres[tuple((rng.random((2, 60)) * np.array(SIZE)[:, None]).astype(int))] = 1
    density = ndimage.gaussian_filter(centres, 18, mode="constant")
    return np.minimum(density / density.max() * 2, 1)


CELLS = cells()
HE = np.stack([235 - 80 * CELLS, 225 - 150 * CELLS, 235 - 50 * CELLS], -1).astype(np.uint8)
COUNTS = np.random.default_rng(0).poisson(
    0.05 + CELLS[Y.round().astype(int), X.round().astype(int)], (len(GENES), *SHAPE)
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A sound section of one patch and a rest."""
    return write_outs(tmp_path_factory.mktemp("sound") / "outs", COUNTS, GENES, y=Y, x=X, image=HE)


@pytest.fixture
def outs(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "outs")


def store_of(outs: Path, mask: Path | None = None) -> PatchStore:
    path = outs.parent / "P1.zarr"
    slide = open_slide(outs)
    settings = Patches()
    write_store(
        slide, GENES, path, patient="P1", source="spaceranger", settings=settings, mask=mask
    )
    return PatchStore(path)


def edit(outs: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_parquet(outs / POSITIONS)).to_parquet(outs / POSITIONS)


def write_image(outs: Path, image: np.ndarray) -> None:
    tifffile.imwrite(outs / IMAGE, image, photometric="rgb", tile=(64, 64), compression="zlib")


def test_a_sound_section(sound, outs):
    check_section("P1", Section(outs=sound))
    slide = open_slide(sound)
    assert guards.check_placement(slide, guards.read_geometry(slide)) > 0.7
    store = store_of(outs)
    assert store.mask[:].all() and not any(store.left_out.values())


def swapped(table: pd.DataFrame) -> pd.DataFrame:
    row, col = "pxl_row_in_fullres", "pxl_col_in_fullres"
    return table.rename(columns={row: col, col: row})


def reversed_(*columns: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    return lambda t: t.assign(**{c: t[c].max() + t[c].min() - t[c] for c in columns})


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (swapped, "with rows and columns swapped"),
        (reversed_("pxl_row_in_fullres"), "upside down"),
        (reversed_("pxl_col_in_fullres"), "mirrored"),
        (reversed_("pxl_row_in_fullres", "pxl_col_in_fullres"), "upside down and mirrored"),
    ],
)
def test_positions_of_another_frame(outs, change, how):
    side = max(SIZE)  # a square image holds them however they are turned
    square = np.full((side, side, 3), 235, np.uint8)
    square[: SIZE[0], : SIZE[1]] = HE
    write_image(outs, square)
    edit(outs, change)
    with pytest.raises(UserError, match=f"section P1: counts follow .* than {how} "):
        check_section("P1", Section(outs=outs))


@pytest.mark.parametrize("change", ["reversed", "swapped"])
def test_bins_that_are_not_where_their_barcodes_say(outs, change):
    names = {"array_row": "array_col", "array_col": "array_row"}
    edit(
        outs, reversed_("array_row") if change == "reversed" else lambda t: t.rename(columns=names)
    )
    with pytest.raises(
        UserError, match=r"positions.parquet lists s_002um_\d+_\d+-1 at array row|grid"
    ):
        check_section("P1", Section(outs=outs))


@pytest.mark.parametrize(
    ("image", "how"),
    [
        (HE[::-1], "upside down"),
        (HE[:, ::-1], "mirrored"),
        (np.rot90(HE), "with rows and columns swapped"),
        (HE.repeat(2, 0).repeat(2, 1), "with the image enlarged 2 times"),
    ],
    ids=["upside down", "mirrored", "quarter turn", "doubled"],
)
def test_image_of_another_frame(outs, image, how):
    write_image(outs, image)
    with pytest.raises(
        UserError, match=f"section P1: (counts follow .* than {how}|.* lie outside)"
    ):
        check_section("P1", Section(outs=outs))


def test_what_does_not_follow_the_image_is_not_refused(outs):
    """Nothing lies better otherwise; `make doctor` warns."""
    write_image(outs, np.random.default_rng(0).integers(60, 240, HE.shape, np.uint8))
    check_section("P1", Section(outs=outs))
    slide = open_slide(outs)
    assert abs(guards.check_placement(slide, guards.read_geometry(slide))) < 0.1


@pytest.mark.parametrize("um", [6.3, 1.3])
def test_scale_at_which_bins_cannot_be_seen(tmp_path, um):
    """All files agree, and the image is too coarse for bins of 2 µm."""
    y, x, size = turned_grid(SHAPE, (False, True, False), pixels_per_bin=2 / um)
    image = np.full((*size, 3), 220, np.uint8)
    outs = write_outs(tmp_path / "outs", COUNTS, GENES, y=y, x=x, image=image, microns_per_pixel=um)
    with pytest.raises(UserError, match=f"section P1: microns_per_pixel is {um:g} for .*{IMAGE}"):
        check_section("P1", Section(outs=outs))


def test_bins_that_were_never_measured(tmp_path):
    measured = np.ones(SHAPE, bool)
    measured[40:80] = False
    outs = write_outs(
        tmp_path / "outs", COUNTS, GENES, y=Y, x=X, image=HE, measured=measured
    )  # fmt: skip
    check_section("P1", Section(outs=outs))
    store = store_of(outs)
    assert store.left_out["not in the matrix"] == 40 * SHAPE[1]
    # Array rows run against those of the grid.
    assert np.array_equal(store.mask[0].all(1), measured[::-1][:128].all(1))


def test_matrix_without_most_of_the_tissue(tmp_path):
    measured = np.zeros(SHAPE, bool)
    measured[:60] = True
    outs = write_outs(tmp_path / "outs", COUNTS, GENES, y=Y, x=X, image=HE, measured=measured)
    with pytest.raises(UserError, match=r"matrix.h5 lacks 57% of the bins in tissue.*of one run"):
        check_section("P1", Section(outs=outs))


@pytest.mark.parametrize("column", ["pxl_row_in_fullres", "pxl_col_in_fullres"])
def test_bins_in_tissue_without_pixels(outs, column):
    edit(outs, lambda t: t.assign(**{column: t[column].where(t.array_row > 2)}))
    with pytest.raises(UserError, match=f"has no pixel position for {3 * SHAPE[1]} bins in tissue"):
        check_section("P1", Section(outs=outs))


def test_bins_that_the_table_does_not_list(outs):
    edit(outs, lambda t: t[t.array_row > 4])
    check_section("P1", Section(outs=outs))
    store = store_of(outs)
    assert store.left_out["without a position"] == 5 * SHAPE[1]
    assert not store.mask[0, SHAPE[0] - 5 :].any()


def test_bins_where_nothing_was_scanned(outs):
    """Few of them are left out of the tissue, many are refused."""
    write_image(outs, HE)
    with tifffile.TiffFile(outs / IMAGE, mode="r+") as file:
        tag = file.pages[0].tags["TileByteCounts"]
        tag.overwrite([0, *tag.value[1:]])
    store = store_of(outs)
    inside = (Y < 64) & (X < 64)
    assert store.left_out["outside what was scanned"] == inside.sum() > 50
    assert (~store.mask[0]).sum() == inside.sum()
    write_image(outs, HE[:-60])
    with pytest.raises(UserError, match=r"\d+% of tissue bins lie outside .*, or where it was not"):
        check_section("P1", Section(outs=outs))


@pytest.mark.parametrize("fault", ["sheared", "shuffled"])
def test_bins_that_lie_on_no_grid(outs, fault):
    def spoil(table: pd.DataFrame) -> pd.DataFrame:
        row, col = "pxl_row_in_fullres", "pxl_col_in_fullres"
        if fault == "sheared":
            return table.assign(**{row: table[row] + 0.1 * table[col]})
        some = np.random.default_rng(0).random(len(table)) < 0.05
        mixed = table.loc[some, [row, col]].sample(frac=1, random_state=0).to_numpy()
        table.loc[some, [row, col]] = mixed
        return table

    edit(outs, spoil)
    with pytest.raises(UserError, match="tissue_positions.parquet (are|lie) .*give"):
        check_section("P1", Section(outs=outs))


def test_image_that_is_no_histology(outs):
    write_image(outs, 255 - HE)
    with pytest.raises(UserError, match=f"section P1: .*{IMAGE} is not pink on white glass"):
        check_section("P1", Section(outs=outs))


@pytest.mark.parametrize("copy", ["cut", "text", "of words"])
def test_damaged_copy_of_the_image(outs, copy):
    """It is read for nothing else."""
    small = outs / POSITIONS.parent / "tissue_hires_image.png"
    Image.fromarray(HE[::10, ::10]).save(small)
    scales = json.loads((outs / SCALES).read_text())
    scale = "small" if copy == "of words" else 0.1
    (outs / SCALES).write_text(json.dumps(scales | {"tissue_hires_scalef": scale}))
    if copy == "cut":
        small.write_bytes(small.read_bytes()[:20])
    elif copy == "text":
        small.write_text("../../../spatial/tissue_hires_image.png")
    check_section("P1", Section(outs=outs))


def test_mask_leaves_out_and_is_counted(outs):
    mask = outs.parent / "mask.png"
    kept = np.zeros(SIZE, np.uint8)
    kept[: SIZE[0] // 2] = 3
    Image.fromarray(kept).save(mask)
    store = store_of(outs, mask)
    out = SIZE[0] // 2 < Y + 0.5
    assert abs(store.left_out["dark in the mask"] - out.sum()) < SHAPE[1]
    assert np.abs(store.mask[0].sum() - (~out[::-1][:128, :128]).sum()) < SHAPE[1]
    Image.fromarray(0 * kept).save(mask)
    with pytest.raises(UserError, match=r"mask .*mask.png is dark at every bin in tissue"):
        check_section("P1", Section(outs=outs, mask=mask))
