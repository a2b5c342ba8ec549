"""Parameters of notebooks: a mistake ends in one sentence, and nothing is written."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
import execute_notebook  # noqa: E402 - lies beside the Snakefile

from sparsity_trap.settings import UserError  # noqa: E402


def test_values_have_the_type_of_the_default():
    declared = {"text": {"default": '""'}, "seed": {"default": "0"}, "width": {"default": "0.0"}}
    texts = ["0,1", "3", "001", "NO", "1e5", "a: [", "slide #3.tif", "{x}", "=", ""]
    for text in texts:
        assert execute_notebook.parse([f"text={text}"], declared) == {"text": text}
    assert execute_notebook.parse(["seed=-3", "width=2"], declared) == {"seed": -3, "width": 2.0}
    assert execute_notebook.parse(["seed=010"], declared) == {"seed": 10}
    declared = {"quick": {"default": "False"}}
    for text, value in (("false", False), ("True", True)):
        assert execute_notebook.parse([f"quick={text}"], declared) == {"quick": value}
    with pytest.raises(UserError, match="must be true or false"):
        execute_notebook.parse(["quick=0"], declared)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "parameters", "sentence"),
    [
        ("02_train", ["preset=smoke", "arms=E"], "parameter 'arms' does not exist: choose from"),
        ("02_train", ["preset"], "parameter 'preset' has no value"),
        ("02_train", ["arm=Q"], "arm 'Q' does not exist in preset 'smoke': choose one of D, E"),
        ("02_train", ["seeds=a"], "seeds must be whole numbers, such as 0,1"),
        ("09_predict", ["seed=abc"], "parameter 'seed' must be a number like its default 0"),
    ],
)
def test_notebook_parameters_are_checked(
    monkeypatch, capsys, tmp_path, script, parameters, sentence
):
    """In this process: each would take seconds to import papermill."""
    output = tmp_path / "out.ipynb"
    command = ["execute_notebook.py", f"notebooks/{script}.py", str(output), *parameters]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    assert execute_notebook.main() == 1
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert sentence in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())
