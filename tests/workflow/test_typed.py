"""What is typed on a command line arrives as it was typed, and never as text of a shell."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupyter_client.kernelspec
import numpy as np
import pytest
from conftest import ROOT, copy_program
from spaceranger import write_outs

from sparsity_trap.data.genes import PANEL
from sparsity_trap.data.sections import folder_name, load_cohort, read_cohort
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import NAME, UserError

sys.path.insert(0, str(ROOT / "workflow"))
import execute_notebook  # noqa: E402 - lies beside the Snakefile
import pages  # noqa: E402

#: Signs that shells, make, YAML or Snakemake's format read as their own.
ODD = [
    "my cohort.yaml", "cohort (1).yaml", "c;touch RAN;.yaml", "$(touch RAN).yaml", "`touch RAN`",
    "$(shell touch RAN)", "O'Brien/c.yaml", 'say "c".yaml', "run #2/c.yaml", "#2.yaml",
    "a: b/c.yaml", "{x}/{{y}}.yaml", "$HOME$$.yaml", "a&b|c>RAN", "~/c.yaml", "*.yaml", "%d %s",
    "Zürich/µ.yaml", "back\\slash.yaml", "two  spaces.yaml", "é,ü.yaml", "-n", "NO", "001", "!x",
]  # fmt: skip

#: Stands for every program of the environment; writes down what it is called with.
RECORDER = """#!/bin/sh
for argument in "$@"; do printf '%s\\0' "$argument"; done >> calls
printf '\\n' >> calls
env -0 > environment
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The Makefile, in a folder of an odd name, with programs that do nothing."""
    folder = tmp_path / "it's {a} $(touch RAN) `b` #1"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock.txt", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
        os.utime(folder / name, (0, 0))
    for name in ("python", "snakemake", "jupyter-lab", "jupytext"):
        program = folder / ".venv" / "bin" / name
        program.write_text(RECORDER)
        program.chmod(0o755)
    made = ("requirements-lab.lock.txt", ".venv/.installed", ".venv/.installed-lab")
    for second, name in enumerate(made):  # each newer than what it is made from
        (folder / name).write_text("")
        os.utime(folder / name, (second, second))
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> list[list[str]]:
    """Arguments of each program that make calls."""
    (folder / "calls").unlink(missing_ok=True)
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "SPARSITY"))}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=folder, env=plain | environment,
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(folder.rglob("RAN")) and not list(folder.parent.glob("RAN"))
    return [line.split("\0")[:-1] for line in (folder / "calls").read_text().splitlines()]


def test_every_value_of_make_arrives_as_it_was_typed(checkout):
    for typed in ODD:
        other = typed.lstrip("#")  # with which no preset or source begins
        (call,) = make(checkout, "plan", f"COHORT={typed}", f"PRESET={other}", f"SOURCE={other}")
        given = dict(entry.split("=", 1) for entry in call if "=" in entry and "://" not in entry)
        cohort = f"./{typed}" if typed.startswith("#") else typed
        assert [given[key] for key in ("preset", "source", "cohort")] == [other, other, cohort]
        (call,) = make(checkout, "doctor", COHORT=typed, PRESET=other, SOURCE=other)
        assert call[1:] == [f"--preset={other}", f"--source={other}", f"--cohort={typed}"]


@pytest.mark.parametrize("name", ["PRESET", "SOURCE"])
def test_what_a_comment_would_swallow_is_refused(checkout, name):
    """Snakemake reads its configuration as YAML, where nothing is left of #1."""
    done = subprocess.run(
        ["make", "plan", f"{name}= #1"], cwd=checkout, text=True, capture_output=True, check=False
    )
    assert done.returncode == 2 and not (checkout / "calls").exists()
    assert f"{name} begins with a #, as no name of one does: choose among those" in done.stderr


def test_files_to_score_arrive_as_they_were_typed(checkout):
    for typed in [name for name in ODD if "/" not in name]:
        (checkout / typed).write_text("")
        given = {"SECTION": typed, "UNITS": typed, "OUT": typed, "CELLS": typed}
        (call,) = make(checkout, "score", f"PRED={typed}", *(f"{k}={v}" for k, v in given.items()))
        options = ["section", "units", "out", "cells"]
        assert call[2:] == [*(f"--{name}={typed}" for name in options), "--", typed]
    (call,) = make(checkout, "score", "PRED=a.h5ad *;b.h5ad", "SECTION=outs")
    assert call[2:] == ["--section=outs", "--", "a.h5ad", "*;b.h5ad"]


def test_other_values_of_make_reach_their_programs(checkout):
    odd = "a b;touch RAN;$(touch RAN)"
    (call,) = make(checkout, "book", f"PROFILE={odd}")
    assert f"workflow/profiles/{odd}" == call[call.index("--workflow-profile") + 1]
    (call,) = make(checkout, "stability", f"PRESET={odd}")
    assert call[-1] == odd
    (call,) = make(checkout, "tiles", f"TILES={odd}")
    assert call[-1] == odd
    (call,) = make(checkout, "download", "PATIENTS=P5 $(touch RAN) *")
    assert call[1:] == ["--", "P5", "$(touch", "RAN)", "*"]
    (call,) = make(checkout, "edit", "LAB=--no-browser ;touch RAN")
    assert call[-3:] == ["--no-browser", ";touch", "RAN"]
    make(checkout, "plan", f"LABELS={odd}", "TILES=/x y")
    found = dict(e.split("=", 1) for e in (checkout / "environment").read_text().split("\0") if e)
    assert found["SPARSITY_TRAP_LABELS"] == f"{checkout}/{odd}"
    assert found["SPARSITY_TRAP_TILES"] == "/x y"


@pytest.mark.parametrize("name", ["CORES", "GPUS", "PORT"])
@pytest.mark.parametrize("typed", ["two", "2;touch RAN", "$(shell touch RAN)", "", "1 2"])
def test_numbers_of_make_are_numbers(checkout, name, typed):
    done = subprocess.run(
        ["make", "plan", f"{name}={typed}"], cwd=checkout, text=True, capture_output=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2 and f"{name} must be a whole number" in done.stderr
    assert not (checkout / "calls").exists() and not list(checkout.rglob("RAN"))


def test_settings_of_another_workflow_stay_out(checkout):
    (call,) = make(checkout, "plan", SNAKEMAKE_PROFILE="mycluster")
    assert call[call.index("--workflow-profile") + 1] == "none"
    found = (checkout / "environment").read_text()
    assert "SNAKEMAKE_PROFILE" not in found and "PYTHONUTF8=1" in found


def test_home_that_may_not_be_written_is_not_needed(checkout):
    home = checkout / "home"
    home.write_text("no folder")
    make(checkout, "plan", HOME=str(home))
    assert f"XDG_CACHE_HOME={checkout}/.snakemake/cache" in (checkout / "environment").read_text()
    home.unlink()
    make(checkout, "plan", HOME=str(home), XDG_CACHE_HOME=str(checkout / "own"))
    assert f"XDG_CACHE_HOME={checkout}/own\0" in (checkout / "environment").read_text()


@pytest.mark.parametrize(("hidden", "jobs"), [("", 3), ("-1", 3), ("0,2", 2), ("GPU-ab", 1)])
def test_hidden_cards_are_not_counted(checkout, hidden, jobs):
    (call,) = make(checkout, "plan", "CORES=3", CUDA_VISIBLE_DEVICES=hidden)
    assert f"gpu={jobs}" in call


def test_presets_of_odd_names_are_not_cleaned_by_a_shell(checkout):
    (checkout / "presets").mkdir()
    for name in ("a b", "$(touch RAN)", "smoke"):
        (checkout / "presets" / f"{name}.yaml").write_text("")
    for name in ("a", "b", "a b", "smoke", "smoke-x y", "other"):
        (checkout / "results" / name).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=checkout, check=True, capture_output=True)
    assert not list(checkout.rglob("RAN"))
    assert sorted(path.name for path in (checkout / "results").iterdir()) == ["a", "b", "other"]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1", "001", "NO", "1.5", "1_0", "2024-01-01", "0x1f", "~"])
def test_names_that_yaml_reads_otherwise_need_quotes_and_then_arrive(tmp_path, name):
    path = tmp_path / "cohort.yaml"
    path.write_text(f"patients:\n  {name}: {{outs: P1/outs}}\n")
    with pytest.raises(UserError, match="quotes around a number") as caught:
        read_cohort(path)
    assert f"the name {name} " in str(caught.value)
    if name != "~":
        path.write_text(f'patients:\n  "{name}": {{outs: P1/outs}}\n')
        assert list(read_cohort(path).patients) == [name]


@pytest.mark.parametrize("typed", ["001", "2024", "NO", "2024-01-01", "1.5"])
def test_path_that_yaml_reads_otherwise_needs_quotes(tmp_path, typed):
    path = tmp_path / "cohort.yaml"
    path.write_text(f"patients: {{P1: {{outs: {typed}}}}}")
    with pytest.raises(UserError, match="patients.P1.outs.*put quotes around it"):
        read_cohort(path)


def test_path_that_yaml_cuts_is_said_to_need_quotes(tmp_path):
    path = tmp_path / "cohort.yaml"
    path.write_text("patients:\n  P1: \n    outs: run #2/outs\n")
    with pytest.raises(UserError, match="run is not a folder.*quotes around one that holds a #"):
        load_cohort(path, at_least=1)


def test_results_of_a_cohort_lie_in_a_folder_of_a_plain_name():
    names = [folder_name(Path(odd).stem) for odd in ODD if Path(odd).stem]
    assert all(re.fullmatch(NAME, f"smoke-{name}") for name in names)
    assert len(set(names)) == len({Path(odd).stem for odd in ODD})


def test_preset_of_an_odd_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsity_trap.presets.PRESETS", tmp_path)
    (tmp_path / "my preset.yaml").write_text("")
    with pytest.raises(UserError, match="'my preset' cannot name a folder.*rename its file"):
        load_preset("my preset")
    with pytest.raises(UserError, match=r"'\$\(x\)' does not exist"):
        load_preset("$(x)")


def test_page_shows_parameters_whatever_signs_they_have():
    assert pages._code("preset=smoke") == "`preset=smoke`"
    assert pages._code("cohort=a|b`c``d\n e") == "``` cohort=a\\|b`c``d e ```"


@pytest.mark.slow
def test_workflow_with_every_odd_sign_in_a_path(tmp_path):
    """A dry run reads the Snakefile with its user's paths; the data step is run by itself."""
    folder = tmp_path / 'O\'Brien #2 a: b {x} $HOME $(touch RAN) `touch RAN` "q" %s é'
    for seed, patient in enumerate(("P1", "001")):
        image = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        counts = np.random.default_rng(seed).poisson(0.3, (len(PANEL), 12, 16))
        write_outs(folder / patient / "outs", counts, PANEL, image=image)
    cohort = folder / "my {y} cohort (1);touch RAN;'\"#.yaml"
    cohort.write_text('patients: {P1: {outs: P1/outs}, "001": {outs: 001/outs}}')
    copy_program(tmp_path / "co", "sparsity_trap", "workflow", "notebooks", "presets", "published")
    for name in ("book", "results"):
        (tmp_path / "co" / name).symlink_to(ROOT / name)
    for name in ("_config.yml", "_toc.yml", "requirements.in", "CITATION.cff"):
        (tmp_path / "co" / name).symlink_to(ROOT / name)
    command = [
        str(Path(sys.executable).parent / "snakemake"), "--snakefile", "workflow/Snakefile",
        "--dry-run", "--printshellcmds", "--cores", "1", "--config", "preset=smoke", "source=",
        f"cohort={cohort}", "--", "results",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path / "co", text=True, capture_output=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "co")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line, *_) = [x for x in done.stdout.splitlines() if "compute.py tokens 001" in x]
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line.partition('compute.py')[2]}"],
        text=True, capture_output=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert shown.stdout.splitlines()[-1] == f"cohort={cohort}"
    assert not list(tmp_path.rglob("RAN"))


# --- the user's Jupyter ---------------------------------------------------------------------------


def test_notebooks_run_in_the_environment_that_runs_the_workflow(tmp_path, monkeypatch):
    """Whatever else is called python3, in whatever place Jupyter looks at first."""
    foreign = tmp_path / "kernels" / "python3"
    foreign.mkdir(parents=True)
    kernel = {"argv": ["/usr/bin/foreign"], "display_name": "Python 3", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    specs = jupyter_client.kernelspec.KernelSpecManager
    assert specs().get_kernel_spec("python3").argv[0] == "/usr/bin/foreign"
    with execute_notebook.own_kernel():
        spec = specs().get_kernel_spec("python3")
        command = jupyter_client.KernelManager(kernel_name="python3").format_kernel_cmd()
    assert Path(spec.resource_dir).is_relative_to(ROOT / "workflow")
    assert command[0] == sys.executable
    assert spec.env["PYTHONSTARTUP"] == "" and "inline" in spec.env["MPLBACKEND"]
    assert os.environ["JUPYTER_PATH"] == str(tmp_path)
