"""Real sections from a cohort file to store and tokens: sound ones, and every fault of their files.

Whatever is wrong with a file must end in one sentence that names it and says what to do, leave
nothing half written, and be forgotten once the file is mended.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import nbformat
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from conftest import copy_program
from PIL import Image
from spaceranger import paint, turned_grid, write_outs

from sparsity_trap import runs
from sparsity_trap import settings as config
from sparsity_trap.data.genes import PANEL
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.data.sections import open_preset
from sparsity_trap.data.spaceranger import MATRIX, POSITIONS, SCALES, SPATIAL
from sparsity_trap.files import building
from sparsity_trap.settings import Encoder, UserError

SHAPE = 260, 134  # bins of the array: two patches, and a rest
HIRES = SPATIAL / "tissue_hires_image.png"
IMAGE = Path("tissue_image.tif")


def write_section(outs: Path, seed: int) -> None:
    """A section whose glands are dark in the image and rich in counts; columns run down."""
    rng = np.random.default_rng(seed)
    y, x, image_shape = turned_grid(SHAPE, (True, True, False), degrees=1.0)
    period = rng.uniform(90, 130)

    def gland(y, x):
        return 0.5 + 0.25 * (np.sin(2 * np.pi * y / period) + np.sin(2 * np.pi * x / period))

    image = paint(
        image_shape, lambda y, x: (230 - 90 * gland(y, x), 200 - 120 * gland(y, x), 220 + 0 * y)
    )
    counts = rng.poisson(0.1 * gland(y, x), (len(PANEL), *SHAPE))
    in_tissue = np.ones(SHAPE, bool)
    in_tissue[:, :6] = False
    write_outs(outs, counts, PANEL, y=y, x=x, in_tissue=in_tissue, image=image)
    # As Space Ranger does, keep a downsized copy of the image.
    small = Image.fromarray(image).resize((image_shape[1] // 10, image_shape[0] // 10))
    small.save(outs / HIRES)
    scales = json.loads((outs / SCALES).read_text())
    (outs / SCALES).write_text(json.dumps(scales | {"tissue_hires_scalef": 0.1}))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two sound sections, their cohort file, and what the first becomes."""
    folder = tmp_path_factory.mktemp("sound")
    for seed, patient in enumerate(["P1", "P2"]):
        write_section(folder / patient / "outs", seed)
    (folder / "cohort.yaml").write_text("patients: {P1: {outs: P1/outs}, P2: {outs: P2/outs}}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "ROOT", folder)
        runs.tokens(preset_of(folder), "P1")
    return folder


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    """A copy of the sound cohort whose first patient may be spoilt; results go beside it."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("results"))
    return tmp_path


def preset_of(folder):
    preset = open_preset("smoke", "", str(folder / "cohort.yaml"))
    encoder = Encoder(name="filterbank", dihedral=False, jitter_views=0)
    return preset.model_copy(update={"encoder": encoder})


def results(folder):
    """Every file under the results folder, with its bytes; recipes name folders and times."""
    files = (f for f in (folder / "results").rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.parent.name != "recipes"}


def refuse(folder, message):
    """The first patient ends in a sentence that says `message`, with nothing left behind."""
    with pytest.raises(UserError, match=message) as caught:
        runs.tokens(preset_of(folder), "P1")
    assert "\n" not in str(caught.value)
    assert results(folder) == {}
    assert not list(folder.rglob("*.partial"))
    return str(caught.value)


def mend(sound, folder):
    """With sound files again, the next run gives what an undisturbed one does."""
    shutil.copytree(sound / "P1", folder / "P1", dirs_exist_ok=True)
    runs.tokens(preset_of(folder), "P1")
    assert results(folder) == results(sound)


def truncate(path, share=0.5):
    os.truncate(path, int(path.stat().st_size * share))


def overwrite(path, offset, count):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)


def test_sound_sections(sound):
    preset = preset_of(sound)
    assert preset.patients == ["P1", "P2"] and preset.source == "spaceranger"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "ROOT", sound)
        store = runs.store(preset, "P1")
    assert (len(store), store.source, store.genes) == (2, "spaceranger", PANEL)


def damage_chunk(outs):
    with h5py.File(outs / MATRIX) as file:
        chunk = file["matrix/data"].id.get_chunk_info(1)
    overwrite(outs / MATRIX, chunk.byte_offset, chunk.size)


def damage_page(outs):
    table = pq.ParquetFile(outs / POSITIONS)
    column = table.schema_arrow.names.index("pxl_row_in_fullres")
    place = table.metadata.row_group(1).column(column)
    overwrite(outs / POSITIONS, place.data_page_offset, place.total_compressed_size // 2)


def without_indptr(outs):
    with h5py.File(outs / MATRIX, "r+") as file:
        del file["matrix/indptr"]


def without_column(outs):
    table = pd.read_parquet(outs / POSITIONS)
    table.drop(columns="pxl_col_in_fullres").to_parquet(outs / POSITIONS)


def without_tissue(outs):
    table = pd.read_parquet(outs / POSITIONS)
    table.assign(in_tissue=np.uint8(0)).to_parquet(outs / POSITIONS)


def scales(text):
    return lambda outs: (outs / SCALES).write_text(text)


def tiff(cut, **options):
    """Write the image in another layout and cut it short."""

    def spoil(outs):
        image = tifffile.imread(outs / IMAGE)
        tifffile.imwrite(outs / IMAGE, image, photometric="rgb", **options)
        truncate(outs / IMAGE, cut)

    return spoil


def cut_directory(outs):
    """Lose a TIFF's directory, which many programs write behind the pixels."""
    with tifffile.TiffFile(outs / IMAGE) as file:
        first, size = file.pages[0].offset, 2 + 12 * len(file.pages[0].tags) + 4
    content = (outs / IMAGE).read_bytes()
    moved = content[:4] + struct.pack("<I", len(content)) + content[8:]
    (outs / IMAGE).write_bytes(moved + content[first : first + size])
    assert tifffile.imread(outs / IMAGE).ndim == 3
    truncate(outs / IMAGE, 0.9)


FAULTS = {
    "h5": (lambda o: truncate(o / MATRIX), "matrix.h5 is not a whole .*copy it again"),
    "h5 empty": (
        lambda o: truncate(o / MATRIX, 0),
        "matrix.h5 is empty, not a whole .*copy it again",
    ),
    "h5 chunk": (damage_chunk, "matrix.h5 is not a whole .*copy it again"),
    "h5 without indptr": (
        without_indptr,
        "matrix.h5 has no indptr .*: give the file .*as Space Ranger wrote it",
    ),
    "parquet": (lambda o: truncate(o / POSITIONS), "parquet is not a whole .*copy it again"),
    "parquet page": (damage_page, "parquet is not a whole .*copy it again"),
    "parquet without column": (without_column, "parquet has no column pxl_col_.*give"),
    "no tissue": (without_tissue, "parquet has no bin in tissue: detect tissue again"),
    "scales": (lambda o: truncate(o / SCALES), "json.json is not a whole table .*copy it again"),
    "scales without key": (
        lambda o: (o / SCALES).write_text('{"bin_size_um": 2.0}'),
        "json.json has no number microns_per_pixel.*: add it",
    ),
    "scales null": (
        lambda o: (o / SCALES).write_text('{"bin_size_um": 2.0, "microns_per_pixel": null}'),
        "json.json has no number microns_per_pixel.*: add it",
    ),
    "scales list": (lambda o: (o / SCALES).write_text("[]"), "json.json .*copy it again"),
    "scales binary": (
        lambda o: (o / SCALES).write_bytes(b"\xff\xfe{"),
        "json.json is not a table .*save it as UTF-8",
    ),
    "tiff tiled": (tiff(0.6, tile=(64, 64)), "image.tif .*: copy it again"),
    "tiff tiled, deflated": (
        tiff(0.6, tile=(64, 64), compression="zlib"),
        "image.tif .*: copy it again",
    ),
    "tiff stripped": (tiff(0.6, rowsperstrip=8), "image.tif .*: copy it again"),
    "tiff stripped, deflated": (
        tiff(0.6, rowsperstrip=8, compression="zlib"),
        "image.tif .*: copy it again",
    ),
    "tiff directory": (cut_directory, "image.tif .*: copy it again"),
    "tiff header": (tiff(1e-5), "image.tif is not a readable TIFF image"),
}


@pytest.mark.parametrize(
    "spoil, message", [pytest.param(*f[:2], id=name, marks=f[2:]) for name, f in FAULTS.items()]
)
def test_spoilt_file(sound, folder, spoil, message):
    spoil(folder / "P1" / "outs")
    assert str(folder / "P1" / "outs") in refuse(folder, message)
    mend(sound, folder)


def test_mask_without_tissue(sound, folder):
    with Image.open(folder / "P1" / "outs" / HIRES) as hires:
        Image.new("L", hires.size).save(folder / "black.png")
    path = folder / "cohort.yaml"
    text = path.read_text()
    path.write_text(text.replace("P1/outs}", "P1/outs, mask: black.png}"))
    refuse(folder, "mask .*black.png is dark at every bin in tissue")
    path.write_text(text)
    mend(sound, folder)


def test_fault_of_another_section(sound, folder):
    """A fault of the second section is told when its own turn comes."""
    truncate(folder / "P2" / "outs" / MATRIX)
    runs.tokens(preset_of(folder), "P1")
    assert results(folder) == results(sound)
    with pytest.raises(UserError, match="P2/.*matrix.h5 is not a whole .*copy it again"):
        runs.tokens(preset_of(folder), "P2")


@pytest.mark.parametrize("chunk", [1, 5])
def test_disk_full(sound, folder, monkeypatch, chunk):
    """The disk is full when some chunk comes to be written."""
    put, written = zarr.storage.LocalStore.set, itertools.count(1)

    async def full(self, key, *args):
        if "c/" in key and next(written) >= chunk:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await put(self, key, *args)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.storage.LocalStore, "set", full)
        refuse(
            folder, r"stores/P1.zarr cannot be written \(No space left .*\): free some space, or"
        )
    mend(sound, folder)


@pytest.mark.parametrize(
    "code, remedy",
    [
        (errno.ENOSPC, "free some space, or make FOLDER a link to a folder on a larger disk"),
        (errno.EDQUOT, "free some space, or make FOLDER a link to a folder on a larger disk"),
        (errno.EROFS, "make FOLDER writable for you, or a link to a folder that is"),
        (errno.EACCES, "make FOLDER writable for you, or a link to a folder that is"),
    ],
)
def test_folder_that_cannot_be_written(tmp_path, code, remedy):
    path = tmp_path / "a" / "store"
    message = rf"{path} cannot be written \({os.strerror(code)}\): "
    message += remedy.replace("FOLDER", str(path.parent))
    with pytest.raises(UserError, match=message), building(path) as partial:
        partial.write_text("half")
        raise OSError(code, os.strerror(code), str(partial / "c" / "0"))
    assert list(path.parent.iterdir()) == []


def test_parent_that_cannot_be_made(tmp_path, monkeypatch):
    def refused(self, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        with pytest.raises(UserError, match="make .*/a/b writable"), building(tmp_path / "a/b/c"):
            pass


def test_other_errors_stay_what_they_are(tmp_path):
    """Not about the folder: a missing input, a bug, a sentence of the block's own."""
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "x")),
        ValueError("a bug"),
        UserError("input.h5 is damaged: copy it again"),
    ):
        with pytest.raises(type(error)) as caught, building(tmp_path / "a") as partial:
            partial.mkdir()
            try:
                raise OSError(errno.ENOENT, "first")
            except OSError:
                raise error  # noqa: B904 - the context is part of the case
        assert caught.value is error
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_data_notebook_from_the_command_line(sound, folder):
    """In a copy of the program, since results go beside it."""
    program = folder / "program"
    copy_program(program, "sparsity_trap", "workflow", "notebooks", "presets", "published")
    command = [sys.executable, "workflow/execute_notebook.py", "notebooks/01_data.py", "out.ipynb"]
    command += ["preset=smoke", f"cohort={folder / 'cohort.yaml'}", "patient=P1"]
    done = subprocess.run(
        command,
        cwd=program,
        env=os.environ | {"PYTHONPATH": str(program)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs = [
        output
        for cell in nbformat.read(program / "out.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
    ]
    assert "error" not in {output.output_type for output in outputs}
    assert any("| patches kept | 2 |" in str(output) for output in outputs)
    made = PatchStore(program / "results" / "smoke-cohort" / "stores" / "P1.zarr")
    reference = PatchStore(sound / "results" / "smoke-cohort" / "stores" / "P1.zarr")
    for name in ("images", "counts", "mask", "origin"):
        np.testing.assert_array_equal(getattr(made, name)[:], getattr(reference, name)[:])
    tokens = np.load(program / "results" / "smoke-cohort" / "tokens" / "P1" / "tokens.npy")
    assert tokens.shape[:2] == (2, 8)
