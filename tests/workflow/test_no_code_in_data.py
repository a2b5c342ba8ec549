"""Data never become code, paths never become shell text, secrets never reach a result."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, copy_program

FOLDERS = ("sparsity_trap", "workflow", "notebooks", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "torch.jit.load", "np.fromregex", "pd.read_pickle", "pandas.read_pickle",
}  # fmt: skip


def problems(source: str, name: str = "code") -> list[str]:
    """Calls and imports in Python text through which data could become code."""
    tree, found = ast.parse(source), []
    # Classes of the module itself that derive from a safe loader.
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        bad = [m for m in modules if m.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            arguments = [ast.unparse(argument) for argument in node.args] + [*given.values()]
            if called in FORBIDDEN_CALLS:
                bad.append(called)
            if given.get("shell", "False") != "False":
                bad.append(f"{called}(shell=…)")
            if given.get("allow_pickle", "False") != "False":
                bad.append("allow_pickle")
            if called == "torch.load" and given.get("weights_only") != "True":
                bad.append("torch.load without weights_only=True")
            if called == "yaml.load" and not safe & set(arguments[1:]):
                bad.append("yaml.load without a safe loader")
            if called.endswith("extractall") and given.get("filter") != "'data'":
                bad.append("an archive that may write anywhere")
        found += [f"{name}:{node.lineno}: {what}" for what in bad]
    return found


def test_nothing_executes_data():
    assert len(SOURCES) > 40
    assert [line for path in SOURCES for line in problems(path.read_text(), path.name)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "np.load(f, allow_pickle=True)",
        "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f)",
        "yaml.load(f, yaml.Loader)", "yaml.unsafe_load(f)", "eval(x)", "exec(x)",
        "os.system('ls ' + path)", "subprocess.run(text, shell=True)", "archive.extractall(to)",
        "pd.read_pickle(f)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
    assert problems(code)


def test_the_search_lets_sound_code_pass():
    sound = "class L(yaml.SafeLoader): pass\nyaml.load(f, L)\nmodel.eval()\nre.compile('a')\n"
    assert problems(sound + "torch.load(f, weights_only=True)\nsubprocess.run(['ls', path])") == []


def test_shell_text_of_the_workflow_quotes_what_the_user_gives():
    """Preset, source and cohort reach a shell only as parameters with ``:q``.

    `test_typed.py` types them; here is that none is formatted otherwise.
    """
    snakefile = (ROOT / "workflow" / "Snakefile").read_text()
    assert "shlex.quote" in snakefile and not re.search(r"\bconfig\b(?!`)", snakefile)
    assert not re.search(r"params\.(given|files)(?!:q)", snakefile)
    # In plain texts Snakemake takes braces for wildcards.
    assert not re.search(r"^\s+(given|files|settings)=(?!lambda)", snakefile, re.MULTILINE)


SECRET = "hf_ThisMustNeverBeWritten0123456789"
TINY = """
patients: [P1, P5]
main_patient: P5
simulation: {side_um: 300, seed: 3}
encoder: {name: filterbank, dihedral: false, jitter_views: 0}
decoder: {hidden: 16, heads: 2, layers: 1, neighbours: 4}
training: {epochs: 1, batch_size: 1, accumulate: 1, warmup_epochs: 0}
runs: [{arms: [D, E], test_patients: [P5]}]
"""


@pytest.fixture(scope="module")
def odd_checkout(tmp_path_factory) -> tuple[Path, list[str]]:
    """Section and data notebook, run in a folder of an odd name with a token in the environment."""
    folder = tmp_path_factory.mktemp("odd") / "a b'ü"
    copy_program(folder, "sparsity_trap", "workflow", "notebooks", "presets", "published")
    (folder / "presets" / "tiny.yaml").write_text(TINY)
    notebook = folder / "results" / "tiny" / "notebooks" / "01_data_P5.ipynb"
    choice = ["preset=tiny", "source=", "cohort="]
    commands = [
        ["workflow/compute.py", "section", "P5", *choice],
        ["workflow/execute_notebook.py", "notebooks/01_data.py", str(notebook), *choice],
    ]
    said = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=os.environ
            | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET}
            | {"SPARSITY_TRAP_PROGRESS": str(folder / "results" / "tiny" / "progress" / "step")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said += [done.stdout, done.stderr]
    return folder, said


@pytest.mark.slow
def test_chain_runs_in_a_folder_of_an_odd_name(odd_checkout):
    folder, _ = odd_checkout
    results = folder / "results" / "tiny"
    assert (results / "stores" / "P5.zarr" / "zarr.json").is_file()
    assert (results / "tokens" / "P5" / "tokens.npy").is_file()
    executed = nbformat.read(results / "notebooks" / "01_data_P5.ipynb", as_version=4)
    kinds = {out.output_type for cell in executed.cells for out in cell.get("outputs", [])}
    assert "error" not in kinds and kinds
    assert not list(results.rglob("*.partial"))


@pytest.mark.slow
def test_a_token_reaches_no_result(odd_checkout):
    folder, said = odd_checkout
    assert not any(SECRET in text for text in said)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_a_token_is_not_in_what_is_recorded_of_a_run(monkeypatch):
    from sparsity_trap.files import record
    from sparsity_trap.presets import load_preset

    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert SECRET not in str(record(load_preset("smoke"), 0.0))
