"""The table of checks: sound sections pass, each fault gets its row, none stops the others."""

from __future__ import annotations

import io
import os
import sys
from functools import partial

import h5py
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from spaceranger import write_outs

from sparsity_trap import encoders, progress
from sparsity_trap.data.genes import PANEL
from sparsity_trap.data.sections import Section
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Genes, UserError

sys.path.append(str(ROOT / "workflow"))
import doctor  # noqa: E402 - a script beside the module
import doctor_sections  # noqa: E402


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two sound sections of the panel's genes and a cohort file that names them.

    This machine passes whatever it is.
    """
    for check in ("python", "packages", "gpu"):
        monkeypatch.setattr(doctor, check, lambda: [doctor.Row("", "ok", "sound")])
    for seed, name in enumerate(["P1", "P2"]):
        write_section(tmp_path / name / "outs", seed)
    (tmp_path / "cohort.yaml").write_text("patients: {P1: {outs: P1/outs}, P2: {outs: P2/outs}}")
    return tmp_path


def write_section(outs, seed, genes=PANEL, **options):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    write_outs(outs, rng.poisson(0.3, (len(genes), 12, 16)), genes, image=image, **options)


def matrix(outs):
    return outs / "binned_outputs" / "square_002um" / "filtered_feature_bc_matrix.h5"


def smoke():
    return load_preset("smoke")


def examine(folder, preset=smoke):
    return list(doctor.examine(preset, folder / "cohort.yaml"))


def of(rows, check):
    return [row for row in rows if row.check == check]


def test_sound_sections(folder):
    rows = examine(folder)
    assert [row for row in rows if row.state == "FAIL"] == []
    (files,) = of(rows, "P1 files")
    assert "versions not recorded" in files.found and "GRCh38" in files.found
    (image,) = of(rows, "P2 image")
    assert "64 x 64 pixels of 0.5 µm" in image.found
    for check in ("counts", "genes", "bins", "positions", "placement", "left out"):
        assert len(of(rows, f"P1 {check}")) == len(of(rows, f"P2 {check}")) == 1
    assert of(rows, "duplicates")[0].state == "ok"


def test_versions_are_shown(folder):
    with h5py.File(matrix(folder / "P1" / "outs"), "r+") as file:
        file.attrs["software_version"] = "spaceranger-4.0.1"
    (files,) = of(examine(folder), "P1 files")
    assert "written by spaceranger-4.0.1" in files.found


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ("spaceranger-3.0.0", True), ("spaceranger-3.1.1", True), (b"spaceranger-3.1", True),
        ("spaceranger-3.1.2", False), ("spaceranger-3.10.0", False), ("spaceranger-4.0.1", False),
        ("sparsity-trap 0.1.0", False), ("", False),
    ],
)  # fmt: skip
def test_versions_that_misplace_counts_are_named(folder, version, warned):
    with h5py.File(matrix(folder / "P1" / "outs"), "r+") as file:
        file.attrs["software_version"] = version
    rows = of(examine(folder), "P1 alignment")
    assert [row.state for row in rows] == ["warn"] * warned
    if warned:
        assert "16 µm" in rows[0].found and "software 2.1" in rows[0].found
        assert "3.1.2 or later" in rows[0].mend and "web_summary.html" in rows[0].mend
    assert not of(examine(folder), "P2 alignment")


def test_every_fault_has_its_row(folder):
    write_section(folder / "P3" / "outs", 3, genes=[*PANEL[1:], "TP53"])
    with h5py.File(matrix(folder / "P3" / "outs"), "r+") as file:
        values = file["matrix/data"][:] + 0.5
        del file["matrix/data"]
        file["matrix/data"] = values
    write_section(folder / "P4" / "outs", 0)
    write_section(folder / "P5" / "outs", 5)
    matrix(folder / "P5" / "outs").write_bytes(b"")
    names = ["P1", "P2", "P3", "P4", "P5", "P6"]
    sections = ", ".join(f"{name}: {{outs: {name}/outs}}" for name in names)
    (folder / "cohort.yaml").write_text(f"patients: {{{sections}}}")
    failed = {row.check: row for row in examine(folder) if row.state == "FAIL"}
    assert set(failed) == {"P3 counts", "P3 genes", "P5 files", "P6 files", "duplicates"}
    assert "is not a count" in failed["P3 counts"].found
    assert "raw UMI" in failed["P3 counts"].mend
    assert PANEL[0] in failed["P3 genes"].found
    assert "whole Space Ranger matrix" in failed["P5 files"].found
    assert failed["P5 files"].mend == "copy it again"
    assert "patients.P6.outs" in failed["P6 files"].found
    assert "sections P1 and P4 are the same section" in failed["duplicates"].found


def rows_of(folder, mask=None, **options):
    """Rows of a section of 12 x 16 bins of one gene."""
    write_section(folder / "outs", 3, genes=["ACTB"], **options)
    return list(doctor_sections.section("P3", Section(outs=folder / "outs", mask=mask)))


def test_an_image_too_coarse_for_the_bins(tmp_path):
    rows, cols = np.indices((12, 16))
    place = {"y": 20 + rows / 3, "x": 20 + cols / 3, "microns_per_pixel": 6.0}
    (image,) = of(rows_of(tmp_path, **place), "P3 image")
    assert image.state == "FAIL" and "microns_per_pixel is 6 " in image.found


def test_bins_that_are_left_out_are_counted(tmp_path):
    measured = np.ones((12, 16), bool)
    (lost,) = of(rows_of(tmp_path / "all", measured=measured), "P3 left out")
    assert lost[1:3] == ("ok", "no bin in tissue")
    measured[:2] = False
    (lost,) = of(rows_of(tmp_path / "some", measured=measured), "P3 left out")
    assert lost.state == "warn" and lost.found == "32 bins not in the matrix"


@pytest.mark.parametrize(
    ("mask", "state", "found"),
    [
        (np.ones((32, 32)), "warn", "leaves out 0 of 192 bins in tissue"),
        (np.repeat([[0], [1]], 16, 0) * np.ones((1, 32)), "ok", "leaves out 128 of 192"),
        (np.zeros((32, 32)), "FAIL", "dark at every bin"),
        (np.arange(32) % 4 * np.ones((32, 1)), "FAIL", "more than dark and bright"),
    ],
)
def test_mask_of_a_section(tmp_path, mask, state, found):
    path = tmp_path / "mask.png"
    Image.fromarray(mask.astype(np.uint8)).save(path)
    said = [row for row in rows_of(tmp_path, path) if "mask.png" in row.found]
    assert len(said) == 1 and said[0].state == state and found in said[0].found


def test_counts_that_do_not_follow_the_image(tmp_path):
    """Of another section, say; nothing shows that the image lies otherwise."""
    rng = np.random.default_rng(0)
    image = rng.integers(60, 240, (140, 140, 3), dtype=np.uint8)
    rows, cols = np.indices((130, 130))
    outs = write_outs(
        tmp_path / "outs", rng.poisson(0.3, (1, 130, 130)), ["ACTB"], y=1.0 * rows, x=1.0 * cols,
        image=image, microns_per_pixel=1.0,
    )  # fmt: skip
    (row,) = of(doctor_sections.section("P1", Section(outs=outs)), "P1 placement")
    assert row.state == "warn" and "hardly follow the image" in row.found


def test_a_bad_preset_or_cohort_file_stops_nothing(folder):
    (folder / "cohort.yaml").write_text("patients: {P1: {out: x}}")
    rows = examine(folder, partial(load_preset, "none"))
    failed = [row.check for row in rows if row.state == "FAIL"]
    assert failed == ["preset", "cohort"]
    assert of(rows, "packages")


def test_surprises_become_rows(folder, monkeypatch):
    def broken():
        raise ZeroDivisionError("by surprise")
        yield

    monkeypatch.setattr(doctor, "python", broken)
    rows = examine(folder)
    assert rows[0] == doctor.Row(
        "Python", "FAIL", "ZeroDivisionError: by surprise", "make env, or report this"
    )
    assert of(rows, "duplicates")


def test_preset_of_real_sections_that_are_not_there(tmp_path, monkeypatch):
    preset = smoke().model_copy(update={"source": "spaceranger"})
    monkeypatch.setattr(type(preset), "outs", lambda _, patient: tmp_path / patient / "outs")
    rows = list(doctor.examine(lambda: preset))
    missing = of(rows, f"{preset.patients[0]} files")
    assert missing[0].state == "FAIL" and "make download" in missing[0].mend


def test_this_machine():
    for check in (doctor.python, doctor.packages, doctor.gpu):
        rows = list(check())
        assert rows and all(row.state == "ok" or row.mend for row in rows)


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ((3, 10, 9), "FAIL"),
        ((3, 11, 0), "ok"),
        ((3, 12, 0), "ok"),
        ((3, 13, 0), "FAIL"),
    ],
)
def test_versions_of_python(monkeypatch, version, state):
    monkeypatch.setattr(doctor.sys, "version_info", version)
    (row,) = doctor.python()
    assert row.state == state


@pytest.mark.parametrize(
    ("hidden", "lists", "cuda", "state", "said"),
    [
        ("", "GPU 0: H100", "13.0", "warn", "CUDA_VISIBLE_DEVICES is ''"),
        ("7", "GPU 0: H100", "13.0", "warn", "CUDA_VISIBLE_DEVICES is '7'"),
        (None, "", "13.0", "warn", "nvidia-smi is present (it lists none)"),
        (None, "Failed to initialize NVML", "13.0", "warn", "(Failed to initialize NVML)"),
        (None, "GPU 0: H100", None, "FAIL", "built without CUDA"),
        (None, "GPU 0: H100", "13.0", "FAIL", "sees no GPU, though nvidia-smi does"),
    ],
)
def test_reasons_why_there_is_no_gpu(monkeypatch, tmp_path, hidden, lists, cuda, state, said):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{lists}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = doctor._no_gpu("2.13.0", cuda)
    assert found[0] == state and said in found[1]
    assert ("remove .venv" in found[2]) == (cuda is None)


@pytest.mark.parametrize("coding", ["ascii", "latin-1", "utf-8"])
def test_table_on_a_terminal_that_does_not_know_its_signs(monkeypatch, coding):
    terminal = io.TextIOWrapper(io.BytesIO(), coding)
    monkeypatch.setattr(sys, "stdout", terminal)
    progress.say("2 µm × − Ж")
    said = terminal.buffer.getvalue().decode(coding).strip()
    assert said == ("2 µm × − Ж" if coding == "utf-8" else r"2 um x - \u0416")


def test_packages(tmp_path):
    lock = tmp_path / "requirements.lock.txt"
    installed = doctor.metadata.version("numpy")
    lock.write_text(f"numpy=={installed}\nscipy==0.0.1\n")
    (row,) = doctor.packages(lock)
    assert row.state == "warn" and "scipy" in row.found and "numpy" not in row.found
    with pytest.raises(UserError, match="does not exist"):
        list(doctor.packages(tmp_path / "none"))


def test_missing_package(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-package"))
    (row,) = doctor.packages()
    assert row.state == "FAIL" and "no-such-package" in row.found


def test_disk(tmp_path):
    (row,) = doctor.disk(tmp_path / "not" / "yet", 0)
    assert row.state == "ok" and str(tmp_path) in row.found
    (row,) = doctor.disk(tmp_path, 10**9)
    assert row.state == "warn"
    # More runs take more; those of other worlds count too.
    smoke, study = (doctor._needed_gb(load_preset(name)) for name in ("smoke", "study"))
    assert smoke < 2 < 15 < study < doctor._needed_gb(load_preset("paper"))
    alone = load_preset("study").model_copy(update={"worlds": {}})
    assert 1 < doctor._needed_gb(load_preset("study")) - doctor._needed_gb(alone) < 10


def test_weights(monkeypatch):
    answer: list[Exception | bool | None] = []

    def check_access(name, online):
        if isinstance(answer[0], Exception) and online:
            raise answer[0]
        return answer[0] is True

    monkeypatch.setattr(encoders, "check_access", check_access)

    def row(name, error=None, **options):
        answer[:] = [error]
        (row,) = doctor.guarded("encoder", partial(doctor.encoder, name, **options))
        return row

    assert row("filterbank").state == "ok"
    assert row("timm:vit_tiny_patch16_224").state == "ok"
    assert "CC-BY-NC-ND" in row("virchow2").found and row("virchow2").state == "ok"
    refused = row("virchow2", UserError("no token is present: accept the licence, set HF_TOKEN"))
    assert refused == doctor.Row(
        "encoder", "FAIL", "no token is present", "accept the licence, set HF_TOKEN"
    )
    unknown = row("virchow2", encoders.Unreachable("no network: connect"))
    assert unknown == doctor.Row("encoder", "warn", "access unknown; no network", "connect")
    wrong = row("virchow3")
    assert wrong.state == "FAIL" and "'virchow3'" in wrong.found and "virchow2" in wrong.mend
    quiet = row("virchow2", AssertionError("asked"), online=False)
    assert quiet.state == "warn" and "--offline" in quiet.mend
    assert "on this computer" in row("virchow2", True, online=False).found


def with_panel(**genes):
    return smoke().model_copy(update={"genes": Genes(**genes)})


def test_panel_of_a_list(folder):
    """Each symbol of the preset's list is looked for in each section."""
    listed = folder / "genes.csv"
    listed.write_text("gene\nPIGR\nMS4A1\n")
    write_section(folder / "P3" / "outs", 3, genes=[*PANEL, "MS4A1"])
    (folder / "cohort.yaml").write_text("patients: {P1: {outs: P1/outs}, P3: {outs: P3/outs}}")
    rows = examine(folder, lambda: with_panel(panel=str(listed)))
    assert "2 genes" in of(rows, "gene panel")[0].found
    (one,), (two,) = of(rows, "P1 genes"), of(rows, "P3 genes")
    assert one.state == "FAIL" and "1 of the 2" in one.found and "MS4A1" in one.found
    assert "genes.panel" in one.mend
    assert two.state == "ok"
    listed.unlink()
    rows = examine(folder, lambda: with_panel(panel=str(listed)))
    assert of(rows, "gene panel")[0].state == "FAIL"


def test_panel_of_variable_genes(folder, monkeypatch):
    preset = with_panel(panel="variable", count=7)
    monkeypatch.setattr(type(preset), "panel_file", folder / "panel.csv")
    rows = examine(folder, lambda: preset)
    assert "7 most variable genes" in of(rows, "gene panel")[0].found
    for name in ("P1", "P2"):
        (row,) = of(rows, f"{name} genes")
        assert row.state == "ok" and f"at the data step among {len(PANEL)}" in row.found
    (folder / "panel.csv").write_text("gene\nMS4A1\n")  # chosen, and then P1 was exchanged
    rows = examine(folder, lambda: preset)
    assert of(rows, "P1 genes")[0].state == "FAIL"


def test_gpu_memory(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    free = [70e9, 3e9]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (free[i], 80e9))
    idle, busy = doctor.gpu()
    assert idle.state == "ok" and "card 0, 70 of 80 GB free" in idle.found
    assert busy.state == "warn" and "3 of 80" in busy.found and busy.mend


def test_label_maps(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSITY_TRAP_LABELS", str(tmp_path))
    (row,) = doctor.label_maps(smoke())
    assert row.state == "ok"
    preset = load_preset("smoke", "tissue-map")
    (row,) = doctor.label_maps(preset)
    assert row.state == "warn" and "P5" in row.mend
    (tmp_path / "DeconvolutionResults_P5CRC.csv.gz").write_bytes(b"")
    with pytest.raises(UserError, match="SHA-256"):
        list(doctor.label_maps(preset))


def test_command_line(folder, capsys):
    arguments = ["--preset", "smoke", "--cohort", str(folder / "cohort.yaml")]
    assert doctor.main(arguments) == 0
    text = capsys.readouterr().out
    header, *lines = text.splitlines()
    assert header.split() == ["check", "state", "found", "how", "to", "mend"]
    assert "checks: 0 failed" in lines[-1]
    matrix(folder / "P1" / "outs").unlink()
    assert doctor.main(arguments) == 1
    assert "1 failed" in capsys.readouterr().out


def test_columns_are_aligned():
    path = "/a/path/" + "long-" * 30
    text = doctor.table([doctor.Row("a", "ok", "x " * 60, "y"), doctor.Row("bb", "FAIL", path)])
    lines = text.splitlines()
    state = lines[0].index("state")
    assert lines[1][state:].startswith("ok") and lines[-1][state:].startswith("FAIL")
    assert path in text
