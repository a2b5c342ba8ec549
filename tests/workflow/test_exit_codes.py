"""Whatever fails says so with its exit code: scripts, programs of the module, make."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from logging import ERROR, LogRecord
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from sparsity_trap import training

CHOICE = ("preset=huge", "source=", "cohort=")
#: Scripts of the workflow, given a preset that does not exist.
SCRIPTS = {
    "compute": ("section", "P5", *CHOICE),
    "stage_book": (*CHOICE, "--"),
}


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'workflow'}"} | options.pop("env", {})
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=options.pop("cwd", ROOT), env=env, text=True,
        capture_output=True, check=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_given_a_preset_that_does_not_exist(monkeypatch, name):
    """In this process: each would take seconds to import the module."""
    monkeypatch.setattr(sys, "argv", [name, *SCRIPTS[name]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "workflow" / f"{name}.py"), run_name="__main__")
    assert str(ended.value).startswith("error: preset 'huge' does not exist")  # exit code 1


def test_program_ends_with_one_line_and_no_traceback():
    done = run("-m", "sparsity_trap.training", "huge", "E", "P5")
    assert done.returncode == 1
    assert done.stderr.startswith("error: preset 'huge' does not exist")
    assert len(done.stderr.splitlines()) == 1


def called(monkeypatch, *arguments: str) -> str:
    """What the training program says when it ends with an error."""
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as ended:
        training.main()
    assert str(ended.value).startswith("error: ")  # a text is exit code 1
    return str(ended.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["smoke", "Q", "P5"], "arm 'Q' does not exist"),
        # Nobody is left out, so all would be trained before the section is missed.
        (["smoke", "E", "P9"], "patient 'P9' is not in preset 'smoke'"),
        (["smoke", "E", "P5"], "is not a patch store: run the data step"),
        (["smoke", "E", "P5", "--source", "simulated", "--cohort", "none.yaml"], "COHORT names"),
    ],
)
def test_training_program_ends_in_a_sentence(monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.setattr("sparsity_trap.settings.ROOT", tmp_path)
    assert sentence in called(monkeypatch, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def surroundings(tmp_path_factory) -> dict[str, str]:
    """Of a user with another kernel called python3, and programs that IPython is to run first."""
    folder = tmp_path_factory.mktemp("home")
    kernel = folder / "kernels" / "python3"
    startup = folder / "profile_default" / "startup"
    for place in (kernel, startup):
        place.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["foreign"], "display_name": "Python 3"}')
    (startup / "00.py").write_text("import builtins\ndel builtins.__import__\n")
    (folder / "startup.py").write_text("import builtins\ndel builtins.__import__\n")
    return {
        "JUPYTER_PATH": str(folder), "IPYTHONDIR": str(folder), "MPLBACKEND": "TkAgg",
        "PYTHONSTARTUP": str(folder / "startup.py"),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        (
            "from sparsity_trap.settings import UserError\nraise UserError('lost: find it')",
            "error: lost: find it\n",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "error: the kernel of"),
    ],
    ids=["fault", "mistake", "killed"],
)  # fmt: skip
def test_notebook_that_fails(tmp_path, surroundings, cell, said):
    script = tmp_path / "broken.py"
    script.write_text(f'# %% tags=["parameters"]\npreset = "smoke"\n\n# %%\n{cell}\n')
    done = run("workflow/execute_notebook.py", script, tmp_path / "out.ipynb", env=surroundings)
    assert done.returncode == 1 and said in done.stderr
    assert list(tmp_path.iterdir()) == [script]


def test_notebook_that_does_not_exist(tmp_path):
    done = run("workflow/execute_notebook.py", tmp_path / "none.py", tmp_path / "out.ipynb")
    assert done.returncode == 1
    assert done.stderr == f"error: notebook {tmp_path / 'none.py'} does not exist\n"


@pytest.mark.parametrize("code", [0, 7])
def test_exit_code_passes_through_the_lock(tmp_path, code):
    done = run("workflow/alone.py", tmp_path / "lock" / "running", "sh", "-c", f"exit {code}")
    assert done.returncode == code and done.stderr == ""


def test_lock_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("workflow/alone.py", tmp_path / "file" / "running", "true")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "make it writable for you" in done.stderr


@pytest.fixture
def build(monkeypatch, tmp_path):
    """Build the book in another folder with a stand-in for jupyter-book, given as shell text."""
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    import build_book

    def run(commands: str) -> int:
        program = tmp_path / "jupyter-book"
        program.write_text(f"#!/bin/sh\n{commands}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setattr(build_book, "BUILT", tmp_path / "html")
        monkeypatch.setattr(build_book, "ABOUT", tmp_path / "run.json")
        build_book.ABOUT.write_text("{}")
        return build_book.main()

    return run


@pytest.mark.parametrize("code", [0, 3])
def test_failed_build_of_the_book_fails_and_shows_its_log(build, capsys, code):
    assert build(f"echo 'reading sources... [ 50%] a'; echo broken; exit {code}") == code
    assert ("broken" in capsys.readouterr().err) == bool(code)


def test_book_on_a_full_disk_ends_in_a_sentence(build, tmp_path, capsys):
    said = "OSError: [Errno 28] No space left on device"
    assert build(f"echo Traceback; echo '{said}'; echo RuntimeError; exit 1") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: {tmp_path}/html cannot be written (No space left on")
    assert not {"Traceback", "RuntimeError"} & set(lines)


@pytest.fixture
def logged(monkeypatch, capsys):
    """What `make` shows of an error of Snakemake's."""
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    from snakemake_logger_plugin_sparsity_trap import LogHandler

    handler = LogHandler.__new__(LogHandler)
    handler.__post_init__()

    def show(said: str) -> str:
        handler.emit(LogRecord("snakemake", ERROR, "", 0, said, (), None))
        return capsys.readouterr().err

    return show


def test_result_that_may_not_be_replaced_is_named(logged):
    """In the words of this version of Snakemake."""
    from snakemake.exceptions import ProtectedOutputException

    rule = SimpleNamespace(lineno=1, snakefile="Snakefile")
    job = SimpleNamespace(rule=rule, output=["results/a.ipynb"], wildcards=None)
    said = str(ProtectedOutputException(job, ["results/a.ipynb"]))
    assert logged(said) == "error: results/a.ipynb cannot be written: make it writable for you\n"


def test_step_that_was_killed_says_what_may_be_done(logged):
    """A step that ended by itself has said on stderr what was wrong."""
    found = {}
    for how in ("kill -KILL $$", "exit 1"):
        with pytest.raises(subprocess.CalledProcessError) as error:
            subprocess.run(how, shell=True, check=True)
        found[how] = logged(f"CalledProcessError in file Snakefile:\n{error.value}")
    assert found["exit 1"] == ""
    assert "ended from outside (SIGKILL)" in found["kill -KILL $$"]
    assert "CORES=1" in found["kill -KILL $$"]


@pytest.mark.slow
def test_make_fails_with_its_step_and_goes_on_to_the_next_when_told(tmp_path):
    for name in ("Makefile", "requirements.lock.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
        os.utime(tmp_path / name, (0, 0))  # older than the environment, which is there already
    for name in ("sparsity_trap", "workflow", "presets", "book", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["make", "-k", "plan", "results", "PRESET=huge"], cwd=tmp_path, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("error: preset 'huge' does not exist") == 2


def test_clean_removes_what_the_project_made_and_nothing_else(tmp_path):
    made = [
        "results/smoke/numbers.json", "results/smoke-cohort/numbers.json", "_build/html/index.html",
        "results/tiles/0123/fit.json",
        "book/executed/run.json", "book/.executed.vm.1.partial/run.json", ".venv/bin/python",
        ".snakemake/log/one", "sparsity_trap/__pycache__/_loops.nbc", ".hypothesis/a",
    ]  # fmt: skip
    own = [
        "results/bench/ingest.json", "results/notes.txt", "results/smoke 2/numbers.json",
        "results/real_tiles/scores.csv",
        "data/sections/P1/outs/image.tif", "presets/smoke.yaml", "book/index.md", "cohort.yaml",
        "large disk/numbers.json",
    ]  # fmt: skip
    for name in made + own:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    # Results may lie on a larger disk, behind a link.
    (tmp_path / "results" / "smoke-tissue-map").symlink_to(tmp_path / "large disk")
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*own, "Makefile"}
