"""Clocks that are wrong or set back: no work lost at every start, no step repeated for nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from sparsity_trap.files import building, to_present
from sparsity_trap.settings import UserError

#: Two steps in a row, as in the workflow; the first can set its input's time ahead while it runs.
SNAKEFILE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from sparsity_trap.files import to_present
to_present(p for p in Path(".").glob("*"))

rule last:
    input: "made"
    output: "done"
    shell: "cp made/file done"

rule first:
    input: "source", "set_back"
    output: directory("made")
    shell: "cat set_back >> ran; mkdir made; cp source made/file; . ./set_back"
"""
DAY = 86_400


def snakemake(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", "done"]
    triggers = ["--rerun-triggers", "mtime", "params", "input", "--rerun-incomplete"]
    return subprocess.run(
        [*command, *triggers], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def workflow(tmp_path) -> Path:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "source").write_text("1")
    (tmp_path / "set_back").write_text("true\n")
    return tmp_path


def ran(workflow: Path) -> int:
    """How often the first step ran."""
    return len((workflow / "ran").read_text().splitlines())


@pytest.mark.slow
def test_source_from_the_future(workflow):
    then = time.time() + DAY
    os.utime(workflow / "source", (then, then))
    first, second = snakemake(workflow), snakemake(workflow)
    assert first.returncode == second.returncode == 0, first.stderr
    assert "Nothing to be done" in second.stderr and ran(workflow) == 1
    assert (workflow / "done").read_text() == "1"


@pytest.mark.slow
def test_clock_set_back_while_a_step_runs_costs_that_step_once(workflow):
    (workflow / "set_back").write_text("touch -d '+1 day' source\n")
    first = snakemake(workflow)
    assert first.returncode == 1 and "older modification time" in first.stderr
    (workflow / "set_back").write_text("true\n")
    second, third = snakemake(workflow), snakemake(workflow)
    assert second.returncode == third.returncode == 0, second.stderr
    assert ran(workflow) == 2 and (workflow / "done").read_text() == "1"


def test_only_what_is_from_the_future_changes(tmp_path):
    now = time.time()
    store = tmp_path / "P5.zarr"
    times = {"past": 0, "present": now, "future": now + DAY, store.name + "/future": now + DAY,
             store.name + "/counts/chunk": now + DAY}  # fmt: skip
    (store / "counts").mkdir(parents=True)
    for name, then in times.items():
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (then, then))
    (tmp_path / "lost").symlink_to(tmp_path / "nothing")
    assert to_present([tmp_path / "past", tmp_path / "missing"]) == []
    assert set(to_present([tmp_path])) == {tmp_path / "future", store / "future"}
    assert (tmp_path / "past").stat().st_mtime == 0
    assert now <= (tmp_path / "future").stat().st_mtime <= time.time()
    assert to_present([tmp_path]) == []


def test_a_file_of_somebody_else_is_named(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "image.tif").write_text("")
    os.utime(tmp_path / "image.tif", (4e9, 4e9))
    monkeypatch.setattr(os, "utime", refuse)
    with pytest.raises(UserError, match=r"image\.tif was last changed on .* 2096, .*: mend"):
        to_present([tmp_path / "image.tif"])


@pytest.mark.parametrize("then", [0, 4e9])
def test_a_result_replaces_another_of_any_time(tmp_path, then):
    path = tmp_path / "result"
    path.write_text("old")
    os.utime(path, (then, then))
    with building(path) as partial:
        partial.write_text("new")
        os.utime(partial, (then, then))
    assert path.read_text() == "new"
