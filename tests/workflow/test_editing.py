"""Scripts opened as notebooks: saving changes nothing but what was edited; serving and watching."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from threading import Thread, Timer

import jupytext
import jupytext.cell_metadata
import nbformat
import pytest
from conftest import ROOT
from jupytext.config import load_jupytext_config
from nbformat.v4 import new_output

from sparsity_trap.settings import UserError

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


def test_what_builds_and_editors_leave_is_no_change(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "workflow")
    import watch

    book = tmp_path / "book"
    for name in ("executed", "__pycache__", ".ipynb_checkpoints", "_static"):
        (book / name).mkdir(parents=True)
    (book / "a.md").touch()
    before = watch.state([book])
    for name in (
        "executed/a.ipynb",
        "__pycache__/a.pyc",
        ".ipynb_checkpoints/a",
        ".a.swp",
        "a.md~",
    ):
        (book / name).touch()
    assert watch.state([book]) == before
    (book / "_static" / "b.css").touch()
    assert set(watch.state([book])) - set(before) == {book / "_static" / "b.css"}
    (book / "a.md").unlink()
    assert set(before) - set(watch.state([book])) == {book / "a.md"}


def test_every_change_is_built_and_a_failure_does_not_end_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("first")
    command = [sys.executable, "-c", f"x = open({str(page)!r}).read(); print(x); assert x != 'bad'"]
    watching = subprocess.Popen(
        [sys.executable, ROOT / "workflow" / "watch.py", page, "--", *command],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = Timer(60, watching.kill)
    end.start()
    try:
        for text, then in [
            ("first", "waiting for changes"),
            ("bad", "failed; waiting for the next change"),
            ("third", "waiting for changes"),
        ]:
            page.write_text(text)
            assert [watching.stdout.readline().strip() for _ in range(2)] == [text, then]
    finally:
        end.cancel()
        watching.kill()


def test_book_is_served_and_never_stale(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "workflow")
    import serve

    monkeypatch.setattr(serve, "BOOK", tmp_path)
    with pytest.raises(UserError, match="run make book"):
        serve.server(0)
    (tmp_path / "index.html").write_text("the book")
    with serve.server(0) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        with urllib.request.urlopen(f"http://127.0.0.1:{running.server_port}/") as answer:
            assert answer.read() == b"the book"
            assert answer.headers["Cache-Control"] == "no-cache"
        with pytest.raises(UserError, match=f"port {running.server_port} cannot be used"):
            serve.server(running.server_port)
        running.shutdown()
