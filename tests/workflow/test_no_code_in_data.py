"""Data never become code, paths never become shell text, secrets never reach a result."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT, SECRET

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


@pytest.mark.slow
def test_a_token_is_not_in_what_is_recorded_of_a_run(monkeypatch):
    from sparsity_trap.files import record
    from sparsity_trap.presets import load_preset

    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert SECRET not in str(record(load_preset("smoke"), 0.0))
