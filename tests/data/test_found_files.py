"""Files as users have them: changed by other programs, packed, locked, not theirs, of old versions.

What is still sound is read; for the rest, the sentence names the cause and a remedy that helps.
"""

from __future__ import annotations

import bz2
import errno
import fcntl
import gzip
import json
import lzma
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spaceranger import write_outs

from sparsity_trap import inputs
from sparsity_trap.data import matrix
from sparsity_trap.data.sections import Section, check_files, load_cohort
from sparsity_trap.data.spaceranger import (
    MATRIX,
    POSITIONS,
    SCALES,
    open_slide,
    read_counts,
    read_positions,
    read_scale,
)
from sparsity_trap.settings import UserError

GENES = ["ACTB", "CD74", "DES"]
COUNTS = np.random.default_rng(0).poisson(0.5, (3, 6, 7))


@pytest.fixture
def outs(tmp_path) -> Path:
    in_tissue = np.ones((6, 7), bool)
    in_tissue[0, :3] = False
    return write_outs(tmp_path / "outs", COUNTS, GENES, in_tissue=in_tissue)


def remedy(read: Callable[[], object]) -> tuple[str, str]:
    """What is wrong and what helps, as a user is told."""
    with pytest.raises(UserError) as caught:
        read()
    said, colon, helps = str(caught.value).rpartition(": ")
    assert colon and "\n" not in said + helps
    return said, helps


def read_all(outs: Path) -> None:
    slide = open_slide(outs)
    read_positions(slide.outs)
    read_counts(slide.outs, slide.genes)


# --- positions ------------------------------------------------------------------------------------

PLACES = ["in_tissue", "array_row", "array_col"]
WRITTEN = {
    "index": lambda t: t.set_index("barcode"),
    "other order": lambda t: t[t.columns[::-1]].sample(frac=1, random_state=0),
    "int64": lambda t: t.astype(dict.fromkeys(PLACES, "int64")),
    "nullable": lambda t: t.convert_dtypes(),
    "real numbers": lambda t: t.astype(dict.fromkeys(PLACES, float)),
    "float32": lambda t: t.astype(dict.fromkeys(PLACES, "float32")),
    "true and false": lambda t: t.assign(in_tissue=t["in_tissue"] == 1),
    "words of R": lambda t: t.assign(in_tissue=np.where(t["in_tissue"] == 1, "TRUE", "FALSE")),
    "text": lambda t: t.astype(str),
    "categories": lambda t: t.astype(dict.fromkeys(PLACES, "category")),
    "pixels as whole numbers": lambda t: t.astype({"pxl_row_in_fullres": "int32"}),
}


@pytest.mark.parametrize("change", WRITTEN.values(), ids=WRITTEN)
def test_positions_in_other_types_are_the_same(outs, change):
    before = read_positions(outs)
    change(pd.read_parquet(outs / POSITIONS)).to_parquet(outs / POSITIONS)
    for found, expected in zip(read_positions(outs), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_positions_without_statistics_and_in_any_codec_are_the_same(outs):
    before, table = read_positions(outs), pd.read_parquet(outs / POSITIONS)
    for codec in ("NONE", "GZIP", "BROTLI", "LZ4", "ZSTD"):
        written = pa.Table.from_pandas(table)
        pq.write_table(written, outs / POSITIONS, compression=codec, write_statistics=False)
        for found, expected in zip(read_positions(outs), before, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("array_row", 2.5, "array_row does not hold whole numbers"),
        ("array_row", -1, "array_row is -1"),
        ("array_col", None, "array_col is missing in 1 of 42 lines"),
        ("in_tissue", None, "in_tissue is missing in 1"),
        ("in_tissue", 2, "in_tissue is 2"),
        ("pxl_row_in_fullres", "1,5", "pxl_row_in_fullres does not hold numbers"),
    ],
)
def test_positions_that_mean_nothing_are_named(outs, column, value, said):
    table = pd.read_parquet(outs / POSITIONS)
    values = table[column].astype(object)
    values.iloc[4] = value
    if isinstance(value, str):
        values = values.astype(str)
    table[column] = values
    table.to_parquet(outs / POSITIONS)
    wrong, helps = remedy(lambda: read_positions(outs))
    assert said in wrong and "own table" in helps


# --- what lies in a file, or beside it ------------------------------------------------------------


def tar(content: bytes) -> bytes:
    with tempfile.NamedTemporaryFile() as file, tarfile.open(file.name, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
        archive.close()
        return Path(file.name).read_bytes()


PACKED = {
    "gzip": (gzip.compress, "gunzip"),
    "bzip2": (bz2.compress, "bunzip2"),
    "xz": (lzma.compress, "unxz"),
    "tar": (tar, "tar xf"),
    "page": (lambda _: b"\n<!DOCTYPE html>\n<html>", "download it again, signed in"),
    "pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "nothing": (lambda _: b"", "copy it again"),
    "zeros": (lambda content: bytes(len(content)), "copy it again"),
}


IMAGE = Path("tissue_image.tif")
FILES = pytest.mark.parametrize("name", [MATRIX, POSITIONS, SCALES, IMAGE], ids=lambda p: p.name)


@FILES
@pytest.mark.parametrize(("pack", "helps"), PACKED.values(), ids=PACKED)
def test_remedy_fits_what_lies_in_the_file(outs, name, pack, helps):
    (outs / name).write_bytes(pack((outs / name).read_bytes()))
    said, found = remedy(lambda: read_all(outs))
    assert str(outs / name) in said and helps in found


@pytest.mark.parametrize("name", [MATRIX, POSITIONS, SCALES], ids=lambda p: p.name)
def test_half_a_file_is_to_be_copied_again(outs, name):
    content = (outs / name).read_bytes()
    (outs / name).write_bytes(content[: len(content) // 2])
    said, helps = remedy(lambda: read_all(outs))
    assert str(outs / name) in said and helps == "copy it again"


@pytest.mark.parametrize(
    ("beside", "helps"),
    [
        ("{}.gz", "unpack that and name it"),
        ("GSM123_P1_{}", "rename that to"),
        ("GSM123_P1_{}.gz", "unpack that and name it"),
    ],
)
@FILES
def test_missing_file_is_looked_for_under_other_names(outs, name, beside, helps):
    other = (outs / name).with_name(beside.format(name.name))
    (outs / name).rename(other)
    said, found = remedy(lambda: read_all(outs))
    assert f"but {other.name} does" in said and found == f"{helps} {name.name}"


def test_positions_as_csv_are_to_be_written_as_parquet(outs):
    table, path = pd.read_parquet(outs / POSITIONS), outs / POSITIONS
    table.to_csv(path.with_suffix(".csv"), index=False)
    path.unlink()
    said, helps = remedy(lambda: read_all(outs))
    assert "but tissue_positions.csv does" in said and "write that as parquet" in helps
    path.with_suffix(".csv").rename(path)
    said, helps = remedy(lambda: read_all(outs))
    assert "is text, not a whole parquet table" in said and "write its table" in helps


def test_link_to_nothing_is_named(outs):
    (outs / MATRIX).unlink()
    (outs / MATRIX).symlink_to("/mnt/gone/matrix.h5")
    said, helps = remedy(lambda: read_all(outs))
    assert "link to /mnt/gone/matrix.h5" in said and "connect its disk" in helps


# --- count matrix ---------------------------------------------------------------------------------


def test_matrix_of_any_filter_that_is_here(outs):
    before = read_counts(outs, GENES).toarray()
    with h5py.File(outs / MATRIX, "r+") as file:
        for name, how in (("data", {"compression": "lzf"}), ("indices", {"compression": "szip"})):
            values = file["matrix"][name][:]
            del file["matrix"][name]
            file["matrix"].create_dataset(name, data=values, chunks=(30,), **how)
    np.testing.assert_array_equal(read_counts(outs, GENES).toarray(), before)


def test_matrix_with_indices_as_real_numbers_and_text_of_any_length(outs):
    before = read_counts(outs, GENES).toarray()
    with h5py.File(outs / MATRIX, "r+") as file:
        for name in ("indices", "indptr", "barcodes", "features/name", "features/feature_type"):
            values = file["matrix"][name][:]
            del file["matrix"][name]
            text = values.dtype.kind == "S"
            options = {"dtype": h5py.string_dtype()} if text else {}
            file["matrix"].create_dataset(name, data=values if text else values * 1.0, **options)
    np.testing.assert_array_equal(read_counts(outs, GENES).toarray(), before)


def test_matrix_of_a_filter_without_plugin(outs):
    with h5py.File(outs / MATRIX, "r+") as file:
        group, values = file["matrix"], file["matrix"]["data"][:].astype("<i4")
        del group["data"]
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((len(values),))
        plan.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple((len(values),))
        stored = h5py.h5d.create(group.id, b"data", h5py.h5t.STD_I32LE, space, plan)
        stored.write_direct_chunk((0,), b"packed otherwise", 0)
    said, helps = remedy(lambda: read_all(outs))
    assert "filter 32015" in said and "h5repack" in helps and "HDF5_PLUGIN_PATH" in helps


@pytest.mark.parametrize(
    ("groups", "said"),
    [(["GRCh38"], "holds GRCh38"), (["X", "obs", "var"], "is an AnnData table")],
)
def test_matrix_of_another_layout(outs, groups, said):
    with h5py.File(outs / MATRIX, "w") as file:
        for name in groups:
            file.create_group(name)["data"] = [1]
    found, helps = remedy(lambda: read_all(outs))
    assert said in found and "Space Ranger 3 or later" in helps


def test_matrix_that_is_being_written_is_named(outs):
    with (outs / MATRIX).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does
        said, helps = remedy(lambda: read_all(outs))
    assert "open for writing" in said and "close the other program" in helps


def test_disk_without_locks_is_read(outs, monkeypatch):
    whole = h5py.File

    def without_locks(path, *args, locking=True, **options):
        if locking:
            raise OSError(errno.ENOLCK, "Unable to open file (unable to lock file)")
        return whole(path, *args, locking=locking, **options)

    monkeypatch.setattr(h5py, "File", without_locks)
    assert matrix.read_features(outs / MATRIX) == GENES


# --- scale factors --------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
def test_mark_of_an_editor_is_no_fault(outs, coding):
    text = (outs / SCALES).read_text()
    (outs / SCALES).write_text(text, encoding=coding)
    assert read_scale(outs) == 0.5


def with_scales(outs: Path, **scales: object) -> float:
    (outs / SCALES).write_text(json.dumps(scales))
    return read_scale(outs)


def test_scale_of_early_versions_is_read_or_asked_for(outs):
    assert with_scales(outs, bin_size_um=2.0, spot_diameter_fullres=8.0) == 0.25
    said, helps = remedy(lambda: with_scales(outs, bin_size_um=2.0))
    assert "no number microns_per_pixel" in said and "add it" in helps
    for value in ("0,5", None, True):
        said, _ = remedy(lambda v=value: with_scales(outs, bin_size_um=2.0, microns_per_pixel=v))
        assert "no number microns_per_pixel" in said
    said, helps = remedy(lambda: with_scales(outs, microns_per_pixel=0.5))
    assert "no number bin_size_um" in said and "square_002um" in helps


# --- permission -----------------------------------------------------------------------------------


@contextmanager
def as_another_user() -> Iterator[None]:
    """Not the owner of what a test has written, where that owner may do all."""
    if os.getuid() == 0:
        os.seteuid(12345)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Folder that others may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", [MATRIX, POSITIONS, SCALES, Path("tissue_image.tif")], ids=str)
def test_file_of_another_user(open_folder, name):
    outs = write_outs(open_folder / "outs", COUNTS, GENES)
    read_all(outs)  # what is imported now need not be found by the other user
    (outs / name).chmod(0)
    with as_another_user():
        said, helps = remedy(lambda: read_all(outs))
    assert f"{outs / name} may not be read" in said and "make it readable" in helps


def test_folder_of_another_user(open_folder):
    locked = open_folder / "locked"
    outs = write_outs(locked / "P1" / "outs", COUNTS, GENES)
    cohort = open_folder / "cohort.yaml"
    cohort.write_text("patients: {P1: {outs: locked/P1/outs}}")
    locked.chmod(0)
    try:
        with as_another_user():
            for read in (lambda: read_all(outs), lambda: load_cohort(cohort, at_least=1)):
                said, helps = remedy(read)
                assert f"{locked} may not be read" in said and "make it readable" in helps
    finally:
        locked.chmod(0o755)


def test_mask_of_another_user(open_folder):
    outs = write_outs(open_folder / "outs", COUNTS, GENES)
    mask = open_folder / "mask.png"
    mask.write_bytes(b"")
    mask.chmod(0)
    with as_another_user():
        said, _ = remedy(lambda: check_files("c.yaml", "P1", Section(outs=outs, mask=mask)))
    assert f"{mask} may not be read" in said


@pytest.mark.parametrize(
    ("number", "said", "helps"),
    [
        (errno.EIO, "cannot be read from its disk", "connected and sound"),
        (errno.ESTALE, "cannot be read from its disk", "connected and sound"),
        (errno.EMFILE, "one file too many", "ulimit -n"),
        (errno.ENOMEM, "needs more memory", "give this process more"),
    ],
)
def test_errors_of_the_system_have_their_own_remedies(outs, number, said, helps):
    error = inputs.unreadable(outs / MATRIX, "a matrix", OSError(number, os.strerror(number)))
    found = str(error).rpartition(": ")
    assert said in found[0] and helps in found[2]
