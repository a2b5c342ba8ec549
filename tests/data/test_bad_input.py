"""Malformed input of every kind a user can bring ends in one sentence with file and remedy.

Tests beside this one hold the faults of their own subject; here are those that come from a damaged
disk, an interrupted copy, or a wrong file under a right name. Never another exception or a result.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from spaceranger import turned_grid, write_outs

from sparsity_trap import presets
from sparsity_trap.data.genes import load_panel
from sparsity_trap.data.patches import write_store
from sparsity_trap.data.sections import Section, check_section, read_cohort
from sparsity_trap.data.spaceranger import MATRIX, POSITIONS, SCALES
from sparsity_trap.decoders import build_decoder
from sparsity_trap.files import record
from sparsity_trap.predict import load_model
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Patches, Run, UserError
from sparsity_trap.training import Model

sys.path.insert(0, str(ROOT / "workflow"))
import execute_notebook  # noqa: E402 - lies beside the Snakefile

GENES = ["ACTB", "CD74", "DES"]
IMAGE = Path("tissue_image.tif")

JUNK = np.random.default_rng(0).bytes(3000)
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in, please</body></html>\n"
#: Contents that are wrong whatever the file should be: an empty one, noise, a login page saved
#: under the file's name, an archive, text in UTF-16, only zeros (a file never written out).
WRONG = {
    "empty": b"",
    "junk": JUNK,
    "page": PAGE,
    "archive": b"PK\x03\x04" + JUNK,
    "utf-16": "genes: [ä]".encode("utf-16"),
    "zeros": bytes(5000),
}
# Tests repeat what they did: hypothesis draws the same examples in every run.
FUZZ = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def refuse(read: Callable[[], object], *named: str) -> str:
    """``read`` must end in one sentence that names what is wrong and, after a colon, the remedy."""
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    for name in named:
        assert name in message
    assert re.search(r"[:;,] \w", message), message
    return message


def refuse_or_read(read: Callable[[], object]) -> None:
    """What carries no checksum may be read; anything but a `UserError` is a fault."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Content with some bytes overwritten, cut out or put in."""

    def change(places: list[tuple[float, int, str]]) -> bytes:
        changed = bytearray(content)
        for share, byte, how in places:
            at = int(share * max(len(changed) - 1, 0))
            if how == "set" and changed:
                changed[at] = byte
            elif how == "cut":
                del changed[at : at + 1 + byte]
            else:
                changed[at:at] = bytes([byte])
        return bytes(changed)

    place = st.tuples(
        st.floats(0, 1), st.integers(0, 255), st.sampled_from(["set", "set", "cut", "put"])
    )
    return st.lists(place, min_size=1, max_size=8).map(change)


# --- preset and cohort: YAML ----------------------------------------------------------------------

YAML_FAULTS = {
    **WRONG,
    "latin-1": "patients: [Zürich, P5]".encode("latin-1"),
    "alias of nothing": b"patients: *nobody",
    "python object": b"patients: !!python/object/apply:os.system [true]",
    "date that cannot be": b"patients: 2024-13-45",
    "two documents": b"a: 1\n---\nb: 2\n",
    "tab": b"patients:\n\t- P1\n",
    "key twice": b"patients: [P1, P5]\npatients: [P1, P2]\n",
    "list": b"[1, 2]",
    "null": b"~",
}


@pytest.fixture
def preset_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(presets, "PRESETS", tmp_path)
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("content", YAML_FAULTS.values(), ids=YAML_FAULTS)
def test_preset_that_is_no_yaml_of_a_preset(preset_file, content):
    preset_file.write_bytes(content)
    refuse(lambda: load_preset("mine"), "mine.yaml")


@pytest.mark.parametrize("content", YAML_FAULTS.values(), ids=YAML_FAULTS)
def test_cohort_that_is_no_yaml_of_a_cohort(tmp_path, content):
    path = tmp_path / "cohort.yaml"
    path.write_bytes(content)
    refuse(lambda: read_cohort(path), "cohort.yaml")


def test_folder_in_place_of_a_file(preset_file, tmp_path):
    preset_file.mkdir()
    refuse(lambda: load_preset("mine"), "mine")
    refuse(lambda: read_cohort(tmp_path), str(tmp_path))
    refuse(lambda: load_panel(tmp_path), str(tmp_path))


SMOKE = (presets.PRESETS / "smoke.yaml").read_text()
NUMBERS = [
    ("simulation", "side_um", value)
    for value in (float("nan"), float("inf"), -1, 0, 1e12, "wide", None, [], {})
]
NUMBERS += [("training", "epochs", value) for value in (0, 1.5, "ten")]
NUMBERS += [("decoder", "hidden", value) for value in (0, [32], "32 or so")]


@pytest.mark.parametrize(("part", "key", "value"), NUMBERS)
def test_preset_with_a_number_that_cannot_be(preset_file, part, key, value):
    content = yaml.safe_load(SMOKE)
    content[part][key] = value
    preset_file.write_text(yaml.safe_dump(content))
    refuse(lambda: load_preset("mine"), "mine.yaml", f"{part}.{key}")


@pytest.mark.parametrize("key", yaml.safe_load(SMOKE))
@pytest.mark.parametrize("value", [None, 3, "text", [[]], {"a": {}}], ids=str)
def test_preset_with_a_section_of_another_type(preset_file, key, value):
    content = yaml.safe_load(SMOKE) | {key: value}
    preset_file.write_text(yaml.safe_dump(content))
    refuse(lambda: load_preset("mine"), "mine.yaml")


@FUZZ
@given(content=damaged(SMOKE.encode()))
def test_any_damage_to_a_preset(preset_file, content):
    preset_file.write_bytes(content)
    refuse_or_read(lambda: load_preset("mine"))


# --- parameters of a notebook ---------------------------------------------------------------------

DECLARED = {"preset": {"default": '"smoke"'}, "seed": {"default": "0"}, "ratio": {"default": "0.0"}}
PARAMETERS = [
    "", "=", "seed", "seed=", "seed=1.5", "seed=yes", "seed=[1]", "seed=2024-13-45", "seed={",
    "seeds=1", "ratio=a", "ratio=", "ratio=nan", "ratio=!!python/name:os.system",
    "seed=" + "9" * 9999,
]  # fmt: skip


@pytest.mark.parametrize("pair", PARAMETERS, ids=lambda p: p[:30])
def test_parameter_that_cannot_be(pair):
    refuse(lambda: execute_notebook.parse([pair], DECLARED), "parameter")


@FUZZ
@given(pair=st.text(max_size=30) | st.text(max_size=30).map("seed=".__add__))
def test_any_parameter(pair):
    refuse_or_read(lambda: execute_notebook.parse([pair], DECLARED))


# --- gene panel -----------------------------------------------------------------------------------

PANEL_FAULTS = {
    **WRONG,
    "quote left open": b'gene,category\n"DES,stromal\nVIM,stromal\n',
    "sentence": b"These are my favourite genes\n",
    "json": b'{"gene": ["DES"]}',
}


@pytest.mark.parametrize("content", PANEL_FAULTS.values(), ids=PANEL_FAULTS)
def test_panel_that_is_no_list_of_genes(tmp_path, content):
    path = tmp_path / "panel.csv"
    path.write_bytes(content)
    refuse(lambda: load_panel(path), "panel.csv")


@FUZZ
@given(content=damaged(b"gene,category\nDES,stromal\nMUC12,secretory\n") | st.binary(max_size=80))
def test_any_damage_to_a_panel(tmp_path, content):
    path = tmp_path / "panel.csv"
    path.write_bytes(content)
    refuse_or_read(lambda: load_panel(path))


# --- folder of a run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run of a linear decoder of three genes."""
    folder = tmp_path_factory.mktemp("run")
    preset = load_preset("smoke")
    linear = {
        name: arm.model_copy(update={"decoder": "linear"}) for name, arm in preset.arms.items()
    }
    preset = preset.model_copy(update={"arms": linear})
    decoder = build_decoder("linear", 4, len(GENES), bias=-3.0)
    model = Model(decoder, torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1), "exp")
    save_file(model.state_dict(), folder / "checkpoint.safetensors")
    table = pd.DataFrame({"gene": GENES, "category": "other"})
    table.to_parquet(folder / "genes.parquet")
    details = Run(arm="E", test_patient="P5", seed=0).model_dump()
    provenance = record(preset, 0.0, **details, training_patients=["P1", "P2"])
    (folder / "provenance.json").write_text(json.dumps(provenance))
    load_model(folder)
    return folder


@pytest.fixture
def run_copy(run_folder, tmp_path) -> Path:
    return shutil.copytree(run_folder, tmp_path / "run")


def with_record(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "provenance.json").read_text())
        change(content)
        (folder / "provenance.json").write_text(json.dumps(content))

    return spoil


def with_weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "checkpoint.safetensors")
        change(state)
        save_file(state, folder / "checkpoint.safetensors")

    return spoil


def with_genes(**columns: object) -> Callable[[Path], None]:
    return lambda folder: pd.DataFrame(columns).to_parquet(folder / "genes.parquet")


def with_text(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


RUN_FAULTS = {
    f"{name}: {what}": with_text(name, content)
    for name in ("provenance.json", "genes.parquet", "checkpoint.safetensors")
    for what, content in WRONG.items()
}
RUN_FAULTS |= {
    "record is a list": with_text("provenance.json", b"[]"),
    "record without preset": with_record(lambda r: r.pop("preset")),
    "preset is text": with_record(lambda r: r.update(preset="smoke")),
    "unknown arm": with_record(lambda r: r.update(arm="Q")),
    "arm is a list": with_record(lambda r: r.update(arm=["E"])),
    "seed is text": with_record(lambda r: r.update(seed="first")),
    "no training patients": with_record(lambda r: r.pop("training_patients")),
    "mean of one axis": with_weights(lambda s: s.update(mean=torch.zeros(4))),
    "no mean": with_weights(lambda s: s.pop("mean")),
    "one weight too many": with_weights(lambda s: s.update(extra=torch.ones(2))),
    "another number of genes": with_genes(gene=["A"], category=["other"]),
    "no gene column": with_genes(symbol=GENES, category=["other"] * 3),
}


@pytest.mark.parametrize("spoil", RUN_FAULTS.values(), ids=RUN_FAULTS)
def test_run_that_cannot_predict(run_copy, spoil):
    spoil(run_copy)
    refuse(lambda: load_model(run_copy), str(run_copy))


@pytest.mark.parametrize("name", ["provenance.json", "genes.parquet", "checkpoint.safetensors"])
@FUZZ
@given(data=st.data())
def test_any_damage_to_a_run(run_folder, tmp_path, name, data):
    folder = tmp_path / "damaged"
    shutil.copytree(run_folder, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data.draw(damaged((run_folder / name).read_bytes())))
    refuse_or_read(lambda: load_model(folder))


# --- section --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A sound section of one patch."""
    rng = np.random.default_rng(0)
    shape = 130, 132
    y, x, size = turned_grid(shape, (False, True, False), degrees=1.0)
    image = rng.integers(120, 240, (*size, 3)).astype(np.uint8)
    counts = rng.poisson(0.2, (3, *shape))
    outs = write_outs(
        tmp_path_factory.mktemp("sound") / "outs", counts, GENES, y=y, x=x, image=image
    )
    read_section(outs)
    return outs


@pytest.fixture
def outs(sound, tmp_path) -> Path:
    return shutil.copytree(sound, tmp_path / "outs")


def read_section(outs: Path) -> None:
    """What the data step does with a section."""
    section = Section(outs=outs)
    check_section("P1", section)
    store = outs.parent / "store.zarr"
    shutil.rmtree(store, ignore_errors=True)
    write_store(
        section.open(), GENES, store, patient="P1", source="spaceranger", settings=Patches()
    )


def with_table(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def spoil(outs: Path) -> None:
        change(pd.read_parquet(outs / POSITIONS)).to_parquet(outs / POSITIONS)

    return spoil


def with_matrix(change: Callable[[h5py.Group], object]) -> Callable[[Path], None]:
    def spoil(outs: Path) -> None:
        with h5py.File(outs / MATRIX, "r+") as file:
            change(file["matrix"])

    return spoil


def replaced(name: str, values: object, **options: object) -> Callable[[h5py.Group], None]:
    def change(matrix: h5py.Group) -> None:
        old = matrix[name][:]
        del matrix[name]
        matrix.create_dataset(name, data=values(old) if callable(values) else values, **options)

    return change


def with_image(*args: object, **options: object) -> Callable[[Path], None]:
    return lambda outs: tifffile.imwrite(outs / IMAGE, *args, **options)


def with_scales(**changes: object) -> Callable[[Path], None]:
    def spoil(outs: Path) -> None:
        scales = json.loads((outs / SCALES).read_text()) | changes
        (outs / SCALES).write_text(json.dumps(scales))

    return spoil


SECTION_FAULTS = {
    f"{path.name}: {what}": (with_text(path, content), path.name)
    for path in (MATRIX, POSITIONS, SCALES, IMAGE)
    for what, content in WRONG.items()
}
SECTION_FAULTS |= {
    f"h5 {what}": (with_matrix(change), "matrix.h5")
    for what, change in {
        "without indices": lambda m: m.pop("indices"),
        "fewer types than names": replaced("features/feature_type", lambda v: v[:2]),
        "data as text": replaced("data", lambda v: v.astype("S")),
        "data not numbers": replaced("data", lambda v: np.full(len(v), np.nan)),
        "data logged": replaced("data", lambda v: np.log1p(v)),
        "indices between genes": replaced("indices", lambda v: v + 0.5),
        "indices of more genes": replaced("indices", lambda v: v + 3),
        "pointers too few": replaced("indptr", lambda v: v[:-1]),
        "pointers that go back": replaced(
            "indptr", lambda v: np.r_[v[:2], v[1], v[3:-2], v[3], v[-1]]
        ),
        "barcodes as numbers": replaced("barcodes", lambda v: np.arange(len(v))),
        "barcodes empty": replaced("barcodes", lambda v: v[:0]),
    }.items()
}
SECTION_FAULTS |= {
    f"parquet {what}": (with_table(change), "tissue_positions.parquet")
    for what, change in {
        "no rows": lambda t: t[:0],
        "rows as words": lambda t: t.assign(array_row="first"),
        "rows missing": lambda t: t.assign(array_row=t.array_row.where(t.array_row > 3)),
        "pixels as words": lambda t: t.assign(pxl_row_in_fullres="left"),
        "pixels not numbers": lambda t: t.assign(pxl_row_in_fullres=np.nan),
        "one place": lambda t: t.assign(pxl_row_in_fullres=5.0, pxl_col_in_fullres=5.0),
    }.items()
}
SECTION_FAULTS |= {
    f"scale {value!r}": (with_scales(microns_per_pixel=value), "scalefactors_json.json")
    for value in ("fine", [], 0, -0.5, float("nan"))
}
SECTION_FAULTS |= {
    "tiff of real numbers": (with_image(np.zeros((600, 600, 3), np.float32)), IMAGE.name),
    "tiff of one channel": (with_image(np.zeros((600, 600), np.uint8)), IMAGE.name),
    "tiff of 16 bits": (
        with_image(np.zeros((600, 600, 3), np.uint16), photometric="rgb"),
        IMAGE.name,
    ),
    "tiff of one pixel": (with_image(np.zeros((1, 1, 3), np.uint8), photometric="rgb"), IMAGE.name),
}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [pytest.param(*fault, id=name) for name, fault in SECTION_FAULTS.items()],
)
def test_section_that_cannot_be_read(outs, spoil, named):
    spoil(outs)
    refuse(lambda: read_section(outs), named)


def test_damage_that_claims_more_than_the_file_can_hold_takes_no_memory(outs):
    with h5py.File(outs / MATRIX, "r+") as file:
        del file["matrix/barcodes"]
        file.create_dataset("matrix/barcodes", 10**10, "S19", chunks=(1000,), compression="gzip")
    refuse(lambda: read_section(outs), "matrix.h5", "barcodes claims 10000000000 entries")


@pytest.mark.parametrize(
    "path",
    [MATRIX, POSITIONS, SCALES, IMAGE],
    ids=lambda p: p.name,
)
@FUZZ
@given(data=st.data())
def test_any_damage_to_a_section(sound, tmp_path, path, data):
    outs = tmp_path / "damaged"
    shutil.copytree(sound, outs, dirs_exist_ok=True)
    (outs / path).write_bytes(data.draw(damaged((sound / path).read_bytes())))
    refuse_or_read(lambda: read_section(outs))
