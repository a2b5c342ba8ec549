"""The chain from one command, in a copy of the repository: the smoke book, twice, and mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import SECRET
from test_kill import content, differences

from sparsity_trap import runs
from sparsity_trap import settings as config
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Run

pytestmark = pytest.mark.slow

#: Largest change of a gene's PCC or SSIM by the number of threads; stated in book/limits.md.
THREADS_TOLERANCE = 0.05


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("SPARSITY", "PYTEST", "OMP"))
    }
    return subprocess.run(
        ["make", *arguments], cwd=folder, capture_output=True, text=True, env=environment
    )


def plan(folder: Path) -> dict[str, int]:
    """How many steps of each kind `make book PRESET=smoke` would run."""
    done = make(folder, "plan", "PRESET=smoke")
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE)
    return {name: int(count) for name, count in steps}


def quoted(folder: Path) -> dict[str, object]:
    return json.loads((folder / "book" / "executed" / "numbers.json").read_text())


def test_book_and_results_exist(smoke_book):
    results = smoke_book / "results" / "smoke"
    assert (smoke_book / "_build" / "html" / "index.html").is_file()
    numbers = quoted(smoke_book)
    assert numbers["arm.D.loss"] == "mse" and numbers["published.p_value"] > 0.08
    seeds = [pd.read_parquet(p) for p in sorted((results / "runs").glob("E-P5-s*/genes.parquet"))]
    genes, alive = seeds[0], [table for table in seeds if not runs.collapsed(table)]
    means = [table["pcc_8um"].mean() for table in alive]
    assert numbers["arm.E.runs"] == len(seeds) == 2
    assert numbers["arm.E.pcc_8um"] == pytest.approx(np.mean(means))
    assert numbers["cohort.sparsity.P5"] == pytest.approx(genes["sparsity"].mean(), abs=0.02)
    assert not list(results.rglob("*.partial"))
    for table, rows in (("S1_genes", 50), ("S2_categories", 8), ("S3_quartiles", 4)):
        assert len(pd.read_csv(results / "tables" / f"{table}.csv")) == rows


def test_numbers_in_prose_are_those_of_the_run(smoke_book):
    numbers = quoted(smoke_book)
    page = (smoke_book / "_build" / "html" / "book" / "index.html").read_text()
    assert f"{numbers['delta.pcc_8um']:+.3f}".replace("-", "−") in page
    assert f"{numbers['ssim.zeros']:.2f}" in page


def test_every_page_and_figure_says_that_the_data_are_simulated(smoke_book):
    html = smoke_book / "_build" / "html"
    pages = [p for p in html.rglob("*.html") if (html / "book") in p.parents]
    assert len(pages) >= 15
    assert all("Simulated sections" in page.read_text() for page in pages)


def test_a_token_reaches_no_result(smoke_book):
    """Neither what was said nor any file holds the token that the environment had."""
    files = [p for p in smoke_book.rglob("*") if p.is_file() and ".venv" not in p.parts]
    assert len(files) > 1000
    assert "done in" in (smoke_book / "said").read_text()
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_sections_to_scores_once_more_are_the_same_bytes(
    smoke_book, tmp_path, monkeypatch, threads
):
    """Another process, in another folder, with as many threads as a step of the workflow."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    threads(1)
    preset = load_preset("smoke")
    runs.run(preset, Run(arm="E", test_patient="P5", seed=0))
    made, book = content(preset.folder), content(smoke_book / "results" / "smoke")
    assert len(made) > 100
    # Other runs were not made here.
    other = re.compile(r"(runs/)?(D|D-matched|E)-P5-s[01]/(?<!E-P5-s0/)")
    book = {name: held for name, held in book.items() if not other.match(name)}
    assert differences(made, book) == []


def test_figures_once_more_have_the_same_data(smoke_book, tmp_path):
    again = execute(smoke_book, tmp_path, "04_sparsity.py", "preset=smoke")
    shown = [
        [
            {kind: output["data"][kind] for kind in ("image/png", "text/csv")}
            for cell in nbformat.read(path, as_version=4).cells
            for output in cell.get("outputs", [])
            if "text/csv" in output.get("data", {})
        ]
        for path in (again, smoke_book / "results" / "smoke" / "notebooks" / "04_sparsity.ipynb")
    ]
    assert len(shown[0]) >= 3 and shown[0] == shown[1]


def test_threads_change_scores_within_the_stated_tolerance(
    smoke_book, tmp_path, monkeypatch, threads
):
    """The book trains with one thread; torch splits sums over its threads."""
    preset, book = load_preset("smoke"), smoke_book / "results" / "smoke"
    short = preset.training.model_copy(update={"epochs": 8})
    # Of an arm that learns: arm D may collapse, and leaves nothing to compare.
    run = Run(arm="E", test_patient="P5", seed=0)

    def trained(number: int) -> pd.DataFrame:
        monkeypatch.setattr(config, "ROOT", tmp_path / str(number))
        here = load_preset("smoke").model_copy(update={"training": short})
        shutil.copytree(book / "recipes", here.folder / "recipes")
        for name in ("sections", "stores", "tokens"):
            (here.folder / name).symlink_to(book / name)
        threads(number)
        return pd.read_parquet(runs.run(here, run) / "genes.parquet")

    one, two = trained(1), trained(2)
    for score in ("pcc_2um", "pcc_8um", "spearman_8um", "ssim_2um", "ssim_8um"):
        np.testing.assert_allclose(one[score], two[score], atol=THREADS_TOLERANCE, err_msg=score)
    assert one["pcc_8um"].abs().gt(4 * THREADS_TOLERANCE).any()  # there is something to change


def test_second_make_book_finds_nothing_to_do(smoke_book):
    index = smoke_book / "_build" / "html" / "index.html"
    before = index.stat().st_mtime_ns
    done = make(smoke_book, "book", "PRESET=smoke")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    assert index.stat().st_mtime_ns == before


def test_a_sentence_of_a_chapter_changes_the_book_alone(smoke_book):
    path = smoke_book / "book" / "limits.md"
    text = path.read_text()
    path.write_text(text + "One more sentence.\n")
    try:
        assert plan(smoke_book) == {"html": 1, "book": 1, "total": 2}
    finally:
        path.write_text(text)
        os.utime(path, (0, 0))


# Without the pages of real counts and of printed numbers, which show no run.
ANALYSES = {"analysis": 13, "predict": 1}


@pytest.mark.parametrize(
    ("edited", "old", "new", "steps"),
    [
        ("notebooks/01_data.py", "## Section", "## The section", {"data_page": 3}),
        ("notebooks/02_train.py", "## All runs", "## Runs", {"train": 3} | ANALYSES),
        ("notebooks/04_sparsity.py", "## By category", "## Per category", {"analysis": 1}),
        # What shows results is no reason to compute them; a setting is, and for all behind it.
        (
            "sparsity_trap/show/style.py",
            "palette",
            "colours",
            {"data_page": 3} | ANALYSES | {"analysis": 15},
        ),
        (
            "published/hest_losses.csv",
            "0.393",
            "0.394",
            {"data_page": 3} | ANALYSES | {"analysis": 15},
        ),
        ("presets/smoke.yaml", "epochs: 10", "epochs: 11", {"train": 3} | ANALYSES),
        (
            "presets/smoke.yaml",
            "jitter_views: 0",
            "jitter_views: 1",
            {"data": 3, "data_page": 3, "train": 3} | ANALYSES,
        ),
        (
            "sparsity_trap/losses.py",
            "mean of a loss",
            "mean of the loss",
            {"data": 3, "data_page": 3, "train": 3} | ANALYSES,
        ),
    ],
)
def test_what_is_edited_is_executed_again_with_all_behind_it(smoke_book, edited, old, new, steps):
    path = smoke_book / edited
    text = path.read_text()
    try:
        assert old in text
        path.write_text(text.replace(old, new))
        planned = plan(smoke_book)
    finally:
        path.write_text(text)
        # Leave the tree as up to date as it was.
        os.utime(path, (0, 0))
    book = {"stage": 1, "html": 1, "book": 1}
    assert planned == steps | book | {"total": 3 + sum(steps.values())}


@pytest.mark.parametrize(
    ("deleted", "step"),
    [
        ("runs/D-matched-P5-s0", {"train": 1}),
        ("viewer", {"analysis": 1}),
        ("score", {"analysis": 1}),
        ("predictions", {"predict": 1}),
        ("tables/claims_build.csv", {"analysis": 1}),
        ("tables/claims_printed.csv", {"analysis": 2}),
        ("tables/claims_real.csv", {"analysis": 2}),
        ("tables/claims_worlds.csv", {"analysis": 2}),
        ("numbers/04_sparsity.json", {"analysis": 1}),
        ("stores", {"data": 3}),
    ],
)
def test_deleted_results_are_computed_again(smoke_book, tmp_path, deleted, step):
    """Also where the book that was made from them is still there."""
    results = smoke_book / "results" / "smoke"
    kept = ("notebooks", "progress")
    for name in kept:
        shutil.copytree(results / name, tmp_path / name)  # with their times
    (results / deleted).rename(tmp_path / "aside")
    try:
        planned = plan(smoke_book)
    finally:
        (tmp_path / "aside").rename(results / deleted)
        for name in kept:
            shutil.rmtree(results / name)
            shutil.copytree(tmp_path / name, results / name)
    assert {"html": 1}.items() <= planned.items() and step.items() <= planned.items()


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


def test_executed_notebooks_hold_no_error_and_their_parameters(smoke_book):
    folder = smoke_book / "results" / "smoke" / "notebooks"
    notebooks = sorted(folder.glob("*.ipynb"))
    assert len(notebooks) == 3 + 3 + 15 + 1  # patients, arms, analyses, predictions
    for path in notebooks:
        cells = nbformat.read(path, as_version=4).cells
        assert any("injected-parameters" in c.metadata.get("tags", []) for c in cells)
        for cell in cells:
            if "figure" in cell.metadata.get("mystnb", {}):
                (output,) = cell.outputs
                assert len({"image/png", "image/jpeg"} & output["data"].keys()) == 1, path
        kinds = [output.output_type for c in cells for output in c.get("outputs", [])]
        assert "error" not in kinds


def execute(smoke_book: Path, folder: Path, script: str, *parameters: str) -> Path:
    """Execute a notebook of the book's copy of the program; return it, executed."""
    output = folder / Path(script).with_suffix(".ipynb")
    command = [sys.executable, "workflow/execute_notebook.py", f"notebooks/{script}", str(output)]
    done = subprocess.run(
        [*command, *parameters],
        cwd=smoke_book,
        env=os.environ | {"PYTHONPATH": str(smoke_book)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return output


def test_notebook_of_predictions_writes_both_bin_sizes_and_cells(smoke_book, tmp_path):
    import scanpy as sc

    execute(smoke_book, tmp_path, "09_predict.py", f"output={tmp_path}")
    large = sc.read_h5ad(tmp_path / "E-P5-s0_P5_008um.h5ad")
    small = sc.read_h5ad(tmp_path / "E-P5-s0_P5_002um.h5ad")
    assert large.n_vars == 50 and "counts" in large.layers and small.n_obs > 15 * large.n_obs
    assert (tmp_path / "E-P5-s0_P5_008um.zarr" / "tables" / "predictions").is_dir()
    cells = sc.read_h5ad(tmp_path / "E-P5-s0_P5_cells.h5ad")
    assert (
        cells.n_vars == 50 and "counts" in cells.layers and "goblet" in set(cells.obs["cell_type"])
    )
