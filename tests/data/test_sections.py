"""Cohort files and the guards against sections that mislead."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from spaceranger import write_outs

from sparsity_trap.data import guards, tissue
from sparsity_trap.data import sections as cohorts
from sparsity_trap.data.sections import content_hash, load_cohort, read_cohort
from sparsity_trap.data.spaceranger import MATRIX, SCALES, SPATIAL, open_slide
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import ROOT, Genes, UserError

GENES = ("EPCAM", "VIM", "ACTB")


def write_section(outs, seed, **options):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (len(GENES), 16, 12))
    options.setdefault("image", rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    return write_outs(outs, counts, GENES, **options)


@pytest.fixture
def folder(tmp_path):
    """Two sound sections and the cohort file that names them."""
    for seed, name in enumerate(["P1", "P2"]):
        write_section(tmp_path / name / "outs", seed)
    write(tmp_path, "patients: {P1: {outs: P1/outs}, P2: {outs: P2/outs}}")
    return tmp_path


def write(folder, text):
    (folder / "cohort.yaml").write_text(text)
    return folder / "cohort.yaml"


def check_cohort(cohort):
    """Everything that is asked of each section before it is cut."""
    for name, section in cohort.patients.items():
        cohorts.check_section(name, section)
        cohorts.check_distinct(name, cohort.patients)


def check(folder):
    check_cohort(load_cohort(folder / "cohort.yaml"))


def test_sound_cohort(folder):
    cohort = load_cohort(folder / "cohort.yaml")
    assert list(cohort.patients) == ["P1", "P2"]
    check_cohort(cohort)
    assert cohort.patients["P1"].open().outs == folder / "P1" / "outs"


def test_example_is_a_cohort_file():
    cohort = read_cohort(ROOT / "cohort.example.yaml")
    assert list(cohort.patients) == ["P1", "P2", "P5"]
    assert cohort.patients["P2"].mask == ROOT / "P2" / "mask.png"


@pytest.mark.parametrize(
    "text, message",
    [
        ("patients: [", "not valid YAML"),
        ("just text", "must be a mapping"),
        ("sections: {}", "unknown key|patients"),
        ("patients: {}", "patients"),
        ("patients: {P1: {out: x}}", "patients.P1"),
        ("patients: {P1: {outs: P1/outs, dpi: 3}, P2: {outs: P2/outs}}", "unknown key .*dpi"),
        ("patients: {1: {outs: P1/outs}, P2: {outs: P2/outs}}", "1 as int; put quotes"),
        ("patients: {a/b: {outs: P1/outs}, P2: {outs: P2/outs}}", "'a/b' cannot name a folder"),
        ("patients: {P1: {outs: P1/outs}, P1: {outs: P2/outs}}", "'P1' is given twice"),
        ("patients: {P1: {outs: P1/outs}}", "1 given, 2 needed"),
        ("patients: {P1: {outs: P1/outs}, P2: {outs: nowhere}}", r"patients\.P2\.outs.*nowhere"),
        (
            "patients: {P1: {outs: P1/outs, image: no.tif}, P2: {outs: P2/outs}}",
            r"patients\.P1\.image.*no\.tif",
        ),
        (
            "patients: {P1: {outs: P1/outs, mask: no.png}, P2: {outs: P2/outs}}",
            r"patients\.P1\.mask.*no\.png",
        ),
    ],
)
def test_faults_of_the_file_are_named(folder, text, message):
    with pytest.raises(UserError, match=message):
        load_cohort(write(folder, text))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cohort\.example\.yaml"):
        load_cohort(tmp_path / "cohort.yaml")


def test_one_patient_is_enough_to_predict(folder):
    path = write(folder, "patients: {P1: {outs: P1/outs}}")
    check_cohort(load_cohort(path, at_least=1))


def test_hash_knows_a_copy_under_another_name_and_storage(folder, tmp_path):
    first = folder / "P1" / "outs"
    copy = write_section(tmp_path / "renamed", 0, index_dtype="uint32", data_dtype="int64")
    assert content_hash(copy) == content_hash(first) != content_hash(folder / "P2" / "outs")


@pytest.mark.parametrize("storage", [{"compression": "gzip", "compression_opts": 9}, {}])
def test_hash_is_of_values_not_of_bytes(folder, tmp_path, storage):
    """The public section P2 has a second address: the same counts in a file of other bytes."""
    shutil.copytree(folder / "P1", tmp_path / "again")
    first, again = folder / "P1" / "outs" / MATRIX, tmp_path / "again" / "outs" / MATRIX
    with h5py.File(again, "r+") as file:
        for name in ("data", "indices", "indptr", "barcodes"):
            values = file[f"matrix/{name}"][:]
            del file[f"matrix/{name}"]
            file["matrix"].create_dataset(name, data=values, chunks=(77,), **storage)
    assert again.read_bytes() != first.read_bytes()
    assert content_hash(tmp_path / "again" / "outs") == content_hash(folder / "P1" / "outs")
    path = write(
        folder, f"patients: {{P2: {{outs: P1/outs}}, P9: {{outs: {tmp_path}/again/outs}}}}"
    )
    Image.new("RGB", (64, 64)).save(tmp_path / "again" / "outs" / "tissue_image.tif")
    with pytest.raises(UserError, match="sections P2 and P9 are the same section.*P2 again"):
        check_cohort(load_cohort(path))


def test_hash_samples_long_arrays(folder, monkeypatch):
    monkeypatch.setattr(cohorts, "_BLOCK", 2)
    outs = folder / "P1" / "outs"
    before = content_hash(outs)
    with h5py.File(outs / MATRIX, "r+") as file:
        file["matrix/data"][0] += 1
    assert content_hash(outs) != before


def test_same_section_under_two_names(folder):
    shutil.rmtree(folder / "P2")
    write_section(folder / "P2" / "outs", 0, image=np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="sections P1 and P2 are the same section.*remove one"):
        check(folder)


def test_only_files_of_one_size_are_hashed(folder, monkeypatch):
    """Sections of different sizes are told apart by a glance, however many there are."""
    patients = load_cohort(folder / "cohort.yaml").patients
    monkeypatch.setattr(cohorts, "content_hash", lambda _: pytest.fail("hashed"))
    cohorts.check_distinct("P1", patients)


def test_a_broken_section_does_not_stop_another(folder):
    (folder / "P2" / "outs" / MATRIX).write_bytes(b"not an h5 file")
    patients = load_cohort(folder / "cohort.yaml").patients
    cohorts.check_section("P1", patients["P1"])
    cohorts.check_distinct("P1", patients)
    with pytest.raises(UserError, match="section P2: .*copy it again"):
        cohorts.check_section("P2", patients["P2"])


def test_same_image_for_two_patients(folder):
    write(
        folder,
        "patients: {P1: {outs: P1/outs}, P2: {outs: P2/outs, image: P1/outs/tissue_image.tif}}",
    )
    with pytest.raises(UserError, match="sections P1 and P2 are the same image"):
        check(folder)


@pytest.mark.parametrize(
    "change, found",
    [
        (np.log1p, r"0\.693147"),
        (lambda counts: counts - 1.0 - (counts == 1), "-1"),
        (lambda counts: np.where(counts > 1, np.inf, counts), "inf"),
        (lambda counts: np.where(counts > 1, np.nan, counts), "nan"),
    ],
)
def test_normalised_values(folder, change, found):
    with h5py.File(folder / "P2" / "outs" / MATRIX, "r+") as file:
        values = change(file["matrix/data"][:])
        del file["matrix/data"]
        file["matrix/data"] = values.astype("float32")
    with pytest.raises(UserError, match=f"section P2.* {found}, which is not a count.*raw UMI"):
        check(folder)


@pytest.mark.parametrize("options", [{"bin_um": 8.0}, {"prefix": "s_008um"}])
def test_wrong_bin_size(folder, options):
    shutil.rmtree(folder / "P2")
    write_section(folder / "P2" / "outs", 1, **options)
    with pytest.raises(UserError, match="section P2.*square_002um"):
        check(folder)


def test_scale_of_another_scan(folder):
    path = folder / "P2" / "outs" / SCALES
    path.write_text(json.dumps({"bin_size_um": 2.0, "microns_per_pixel": 0.25}))
    with pytest.raises(UserError, match=r"section P2: bins in .* are 1 x 1 µm apart.*of one run"):
        check(folder)


def test_image_too_small_for_the_positions(folder):
    shutil.rmtree(folder / "P2")
    write_section(folder / "P2" / "outs", 1, image=np.zeros((32, 64, 3), np.uint8))
    with pytest.raises(UserError, match="section P2: 50% of tissue bins lie outside .*32 x 64"):
        check(folder)


def test_bins_off_tissue_may_lie_outside_the_image(folder):
    shutil.rmtree(folder / "P2")
    in_tissue = np.zeros((16, 12), bool)
    in_tissue[:7] = True
    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (32, 64, 3), dtype=np.uint8)
    write_section(folder / "P2" / "outs", 1, image=image, in_tissue=in_tissue)
    check(folder)


def test_image_of_another_size_than_space_ranger_saw(folder):
    outs = folder / "P2" / "outs"
    path = outs / SCALES
    scales = json.loads(path.read_text())
    path.write_text(json.dumps(scales | {"tissue_hires_scalef": 0.25}))
    Image.new("RGB", (16, 16)).save(outs / SPATIAL / "tissue_hires_image.png")
    check(folder)
    Image.new("RGB", (24, 16)).save(outs / SPATIAL / "tissue_hires_image.png")
    with pytest.raises(UserError, match="section P2.*64 x 64 pixels.*made from 64 x 96"):
        check(folder)


def test_mask_has_the_shape_of_the_image(folder):
    write(folder, "patients: {P1: {outs: P1/outs, mask: mask.png}, P2: {outs: P2/outs}}")
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    check(folder)
    Image.new("L", (32, 20), 255).save(folder / "mask.png")
    with pytest.raises(UserError, match="section P1: mask .* 20 x 32 .*whole image"):
        check(folder)


def test_section_without_tissue(folder):
    path = folder / "P2" / "outs" / SPATIAL / "tissue_positions.parquet"
    pd.read_parquet(path).assign(in_tissue=np.uint8(0)).to_parquet(path)
    with pytest.raises(UserError, match="no bin in tissue"):
        check(folder)


def test_broken_section_is_named(folder):
    (folder / "P2" / "outs" / MATRIX).write_bytes(b"not an h5 file")
    with pytest.raises(UserError, match="section P2.*copy it again"):
        check(folder)


def test_real_positions_fit_their_image(shared_data, tmp_path, monkeypatch):
    """At 16 µm, the real section P2: its scale, and its tissue within the published image."""
    outs = write_section(tmp_path / "outs", 0)
    source = next((shared_data / "crc_p2_016um_positions").rglob("*.parquet"))
    scales = json.loads(next(source.parent.rglob("scalefactors*.json")).read_text())
    shutil.copy(source, outs / SPATIAL / "tissue_positions.parquet")
    (outs / SCALES).write_text(json.dumps(scales | {"bin_size_um": 2.0}))
    # Of the matrix, no bin is there; of the image, only the published size is needed.
    monkeypatch.setattr(tissue, "read_depth", lambda path, shape: np.zeros(shape, np.int32))

    @contextmanager
    def image(_):
        yield np.broadcast_to(np.uint8(255), (*size, 3))

    monkeypatch.setattr(tissue, "open_image", image)
    monkeypatch.setattr(guards, "open_image", image)
    size = 48_740, 75_250
    slide = open_slide(outs)
    geometry = guards.read_geometry(slide)
    np.testing.assert_allclose(geometry.step * slide.microns_per_pixel, 16, rtol=2e-3)
    guards.check_image(slide, geometry)
    size = 12_185, 18_812
    with pytest.raises(UserError, match="of tissue bins lie outside"):
        guards.check_image(slide, guards.read_geometry(slide))


def test_preset_takes_the_patients_of_a_cohort(folder):
    path = write(folder, "patients: {a: {outs: P1/outs}, b: {outs: P2/outs}}")
    preset = cohorts.open_preset("paper", "", str(path))
    assert preset.patients == ["a", "b"] and preset.main_patient == "b"
    assert preset.name == "paper-cohort" and preset.source == "spaceranger"
    assert {run.test_patient for run in preset.all_runs()} == {"a", "b"}
    only_main = cohorts.open_preset("smoke", "", str(path))
    assert {run.test_patient for run in only_main.all_runs()} == {"b"}
    assert cohorts.real_section(preset, "a").outs == folder / "P1" / "outs"


def test_preset_with_a_cohort_is_checked_again(folder):
    """Variable genes are chosen without one patient, so no other can be tested."""
    path = write(folder, "patients: {a: {outs: P1/outs}, b: {outs: P2/outs}}")
    variable = Genes(panel="variable", count=5)
    preset = load_preset("laptop").model_copy(update={"genes": variable})
    with pytest.raises(UserError, match="cohort.yaml with preset 'laptop': .*take test patient"):
        cohorts.with_cohort(preset, path)


def test_simulated_source_with_a_cohort_is_refused(folder):
    with pytest.raises(UserError, match="COHORT names real sections, but SOURCE is 'simulated'"):
        cohorts.open_preset("smoke", "simulated", str(folder / "cohort.yaml"))


@pytest.mark.parametrize("trace", ["truth", "version"])
def test_simulated_section_is_not_taken_for_a_real_one(folder, trace):
    if trace == "truth":
        (folder / "P2" / "outs" / "truth.zarr").mkdir()
    else:
        with h5py.File(folder / "P2" / "outs" / MATRIX, "r+") as file:
            file.attrs["software_version"] = "sparsity-trap simulation"
    preset = cohorts.open_preset("smoke", "", str(folder / "cohort.yaml"))
    assert cohorts.real_section(preset, "P1").outs.is_dir()
    with pytest.raises(UserError, match="section P2: .* is simulated: choose SOURCE=simulated"):
        cohorts.real_section(preset, "P2")
