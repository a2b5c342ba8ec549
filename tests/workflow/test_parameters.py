"""Parameters of notebooks: a mistake ends in one sentence, and nothing is written."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
import execute_notebook  # noqa: E402 - lies beside the Snakefile

pytestmark = pytest.mark.slow


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
def test_notebook_parameters_are_checked(monkeypatch, capsys, tmp_path, parameters, sentence):
    """In this process: each would take seconds to import papermill."""
    output = tmp_path / "out.ipynb"
    command = ["execute_notebook.py", "notebooks/02_train.py", str(output), *parameters]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    assert execute_notebook.main() == 1
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1].startswith("error: ")
    assert sentence in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())
