"""The chain from one command, in a copy of the repository: the smoke book, twice, and mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT

from sparsity_trap.config import load_preset

pytestmark = pytest.mark.slow


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("SPARSITY", "PYTEST", "OMP"))
    }
    return subprocess.run(
        ["make", *arguments], cwd=folder, capture_output=True, text=True, env=environment
    )


def test_book_and_results_exist(smoke_book):
    results = smoke_book / "results" / "smoke"
    assert (smoke_book / "_build" / "html" / "index.html").is_file()
    numbers = json.loads((results / "numbers.json").read_text())
    assert numbers["arm.D.loss"] == "mse" and numbers["published.p_value"] > 0.08
    genes = pd.read_parquet(results / "runs" / "E-P5-s0" / "genes.parquet")
    assert numbers["arm.E.pcc_8um"] == pytest.approx(genes["pcc_8um"].mean())
    assert numbers["cohort.sparsity.P5"] == pytest.approx(genes["sparsity"].mean(), abs=0.02)
    for table, rows in (("S1_genes", 50), ("S2_categories", 8), ("S3_quartiles", 4)):
        assert len(pd.read_csv(results / "tables" / f"{table}.csv")) == rows


def test_numbers_in_prose_are_those_of_the_run(smoke_book):
    numbers = json.loads((smoke_book / "results" / "smoke" / "numbers.json").read_text())
    page = (smoke_book / "_build" / "html" / "book" / "index.html").read_text()
    assert f"{numbers['arm.D.pcc_8um']:.3f}".replace("-", "−") in page
    assert f"{numbers['ssim.zeros']:.3f}" in page


def test_every_page_and_figure_says_that_the_data_are_simulated(smoke_book):
    html = smoke_book / "_build" / "html"
    pages = [p for p in html.rglob("*.html") if (html / "book") in p.parents]
    assert len(pages) >= 15
    assert all("Simulated sections" in page.read_text() for page in pages)


def test_second_make_book_finds_nothing_to_do(smoke_book):
    index = smoke_book / "_build" / "html" / "index.html"
    before = index.stat().st_mtime_ns
    done = make(smoke_book, "book", "PRESET=smoke")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    assert index.stat().st_mtime_ns == before


def test_edited_analysis_notebook_does_not_train_again(smoke_book):
    script = smoke_book / "notebooks" / "04_sparsity.py"
    text = script.read_text()
    try:
        script.write_text(text.replace("## By category", "## Per category"))
        done = make(smoke_book, "plan", "PRESET=smoke")
    finally:
        script.write_text(text)
        # Leave the tree as up to date as it was.
        os.utime(script, (0, 0))
    assert done.returncode == 0, done.stderr
    steps = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE))
    assert steps == {"analysis": "1", "html": "1", "book": "1", "total": "3"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["book", "PRESET=huge"], "error: preset 'huge' does not exist"),
        (["book", "PRESET=smoke", "SOURCE=moon"], "key 'source'"),
        (["book", "PRESET=smoke", "SOURCE=spaceranger"], "outs does not exist: put the Space"),
    ],
)
def test_mistakes_on_the_command_line_end_in_a_sentence(smoke_book, arguments, sentence):
    done = make(smoke_book, *arguments)
    assert done.returncode != 0
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        (["preset=smoke", "arms=E"], "parameter 'arms' does not exist: choose from preset, source"),
        (["preset"], "parameter 'preset' has no value"),
        (["preset=smoke", "arm=Q"], "arm 'Q' does not exist in preset 'smoke': choose one of D, E"),
        (["preset=smoke", "test_patient=P9"], "patient 'P9' is not in preset 'smoke'"),
        (["preset=smoke", "seed=abc"], "parameter 'seed' must be like its default 0"),
        (["preset=["], "parameter 'preset' has the malformed value '['"),
        (["preset=huge"], "preset 'huge' does not exist"),
    ],
)
def test_notebook_parameters_are_checked(tmp_path, parameters, sentence):
    output = tmp_path / "out.ipynb"
    command = [sys.executable, "workflow/execute_notebook.py", "notebooks/02_train.py", str(output)]
    done = subprocess.run([*command, *parameters], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_executed_notebooks_hold_no_error_and_their_parameters(smoke_book):
    folder = smoke_book / "results" / "smoke" / "notebooks"
    notebooks = sorted(folder.glob("*.ipynb"))
    assert len(notebooks) == 3 + 2 + 6 + 1 + 1
    for path in notebooks:
        cells = nbformat.read(path, as_version=4).cells
        assert any("injected-parameters" in c.metadata.get("tags", []) for c in cells)
        for cell in cells:
            if "figure" in cell.metadata.get("mystnb", {}):
                (output,) = cell.outputs
                assert len({"image/png", "image/jpeg"} & output["data"].keys()) == 1, path
        kinds = [output.output_type for c in cells for output in c.get("outputs", [])]
        assert "error" not in kinds


def test_paper_can_be_planned_for_a_cluster():
    done = subprocess.run(
        ["make", "plan", "PRESET=paper", "SOURCE=simulated", "PROFILE=slurm"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = re.findall(r"^train\w* +(\d+)$", (done.stdout + done.stderr).split("Reasons")[0], re.M)
    # Snakemake prints the table before and after the dry run.
    assert sum(map(int, jobs[: len(jobs) // 2])) == len(load_preset("paper").all_runs())


def test_a_cluster_is_asked_for_memory_and_a_gpu(tmp_path):
    """A stand-in for sbatch writes down what it is asked, and refuses."""
    asked = tmp_path / "asked"
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit 1\n')
    for name in ("sacct", "sinfo", "squeue", "scancel", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    (tmp_path / "Snakefile").write_text(
        "rule data:\n    output: 'x'\n    resources: gpu=1\n    shell: 'true'\n"
    )  # noqa: E501
    subprocess.run(
        [sys.executable, "-m", "snakemake", "--workflow-profile",
         ROOT / "workflow" / "profiles" / "slurm", "--retries", "0",
         "--slurm-init-seconds-before-status-checks", "1"],
        cwd=tmp_path, capture_output=True, timeout=120,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    words = asked.read_text()
    assert "--mem 32000" in words and "-t 120" in words and re.search(r"--gpus[= ]1", words)
