"""Scripts opened as notebooks: saving changes nothing but what was edited; serving and watching."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import jupytext
import jupytext.cell_metadata
import nbformat
import pytest
from conftest import ROOT
from jupytext.config import load_jupytext_config
from nbformat.v4 import new_output

SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The scripts, and what jupytext is told about them."""
    monkeypatch.setattr(jupytext.cell_metadata, "dumps", jupytext.cell_metadata.dumps)
    runpy.run_path(str(ROOT / "workflow" / "jupyter" / "jupyter_server_config.py"))
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as JupyterLab holds it after its cells ran and some were folded."""
    kernel = json.loads((ROOT / "workflow/jupyter/kernels/python3/kernel.json").read_text())
    notebook.metadata["kernelspec"] = {
        "display_name": kernel["display_name"], "language": kernel["language"], "name": "python3",
    }  # fmt: skip
    notebook.metadata["language_info"] = {
        "codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py",
        "mimetype": "text/x-python", "name": "python", "version": "3.11.0",
    }  # fmt: skip
    notebook.metadata["toc-showtags"] = True
    for number, cell in enumerate(notebook.cells):
        cell.metadata["trusted"] = True
        cell.metadata["editable"] = True
        if cell.cell_type == "code":
            cell.execution_count = number
            cell.metadata["jupyter"] = {"source_hidden": True, "outputs_hidden": False}
            cell.metadata["execution"] = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
            cell.metadata["collapsed"] = False
            cell.outputs = [
                new_output("stream", text="read\n"),
                new_output("execute_result", {"text/plain": "1"}, execution_count=number),
            ]
    return notebook


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_saving_leaves_a_script_as_it_was(checkout, script):
    path = checkout / "notebooks" / script.name
    config = load_jupytext_config(str(path))
    for after in (lambda notebook: notebook, executed):
        # Through JSON and back, as between server and browser.
        shown = json.dumps(after(jupytext.read(path, config=config)))
        jupytext.write(nbformat.from_dict(json.loads(shown)), path, config=config)
        assert path.read_bytes() == script.read_bytes()


def test_an_edited_cell_is_all_that_changes(checkout):
    path = checkout / "notebooks" / "03_results.py"
    config = load_jupytext_config(str(path))
    notebook = executed(jupytext.read(path, config=config))
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source = cell.source.replace('preset = "smoke"', 'preset = "laptop"')
    jupytext.write(notebook, path, config=config)
    before = (ROOT / "notebooks" / "03_results.py").read_text()
    assert path.read_text() == before.replace('preset = "smoke"', 'preset = "laptop"')


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_jupyterlab_saves_a_script_as_it_was(checkout, script):
    """Through the contents manager that JupyterLab talks to."""
    manager = pytest.importorskip(
        "jupyter_server.services.contents.largefilemanager", reason="`make lab` installs JupyterLab"
    )
    from jupytext.sync_contentsmanager import build_sync_jupytext_contents_manager_class

    contents = build_sync_jupytext_contents_manager_class(manager.LargeFileManager)()
    contents.root_dir = str(checkout)
    name = f"notebooks/{script.name}"
    model = contents.get(name, type="notebook")
    model["content"] = json.loads(json.dumps(executed(nbformat.from_dict(model["content"]))))
    contents.save(model, name)
    assert (checkout / name).read_bytes() == script.read_bytes()


def make(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    """`make` in a folder that has this environment and nothing else of the checkout."""
    for name in ("Makefile", "requirements.lock.txt", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
        os.utime(folder / name, (0, 0))  # older than the environment, which is there already
    (folder / ".venv").symlink_to(ROOT / ".venv")
    # As from a user's shell: a make inside `make test` would say which folder it enters.
    shell = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.Popen(
        ["make", *arguments], cwd=folder, text=True, stderr=subprocess.STDOUT,
        start_new_session=True, env=shell | {"PYTHONUNBUFFERED": "1"},
        **{"stdout": subprocess.PIPE} | options,
    )  # fmt: skip


def test_changes_are_built_but_not_what_builds_and_editors_leave(tmp_path):
    for name in ("book/executed", "notebooks", "presets", "published", "sparsity_trap/__pycache__"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml", "book/a.md"):
        (tmp_path / name).write_text("")
    # In place of the book: what watchfiles is to run is make's own word for itself.
    program = tmp_path / "build"
    program.write_text("#!/bin/sh\necho built\ntest $(wc -c < book/a.md) != 3\n")
    program.chmod(0o755)
    log = tmp_path / "log"
    with log.open("w") as stdout:
        watching = make(tmp_path, "watch", f"MAKE={program}", stdout=stdout)

    def builds() -> int:
        return log.read_text().count("built\n")

    def wait_for_build(number: int, text: str | None = None) -> None:
        """Until so many builds began; a text is written again, for who did not yet watch."""
        for second in range(120):
            if builds() >= number:
                return
            if text is not None and second % 5 == 0:
                (tmp_path / "book/a.md").write_text(text)
            time.sleep(1)
        pytest.fail(f"build {number} did not begin: {log.read_text()}")

    try:
        wait_for_build(1)
        wait_for_build(2, "watched")
        time.sleep(5)
        before = builds()
        for name in ("executed/a.ipynb", ".executed.1.partial", "a.md~", ".a.md.swp"):
            (tmp_path / "book" / name).write_text("")
        (tmp_path / "sparsity_trap/__pycache__/a.nbc").write_text("")
        time.sleep(5)
        assert builds() == before
        wait_for_build(before + 1, "bad")  # a build that fails does not end it
        wait_for_build(builds() + 1, "good")
    finally:
        os.killpg(watching.pid, signal.SIGKILL)


def test_book_is_served_to_this_machine(tmp_path):
    missing = make(tmp_path, "serve")
    assert "run make book" in missing.communicate()[0] and missing.returncode == 2
    (tmp_path / ".venv").unlink()
    (tmp_path / "_build/html").mkdir(parents=True)
    (tmp_path / "_build/html/index.html").write_text("the book")
    serving = make(tmp_path, "serve", "PORT=0")
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+/", serving.stdout.readline())[0]
        with urllib.request.urlopen(address) as answer:
            assert answer.read() == b"the book"
    finally:
        os.killpg(serving.pid, signal.SIGKILL)
