"""Parameters of notebooks: a mistake ends in one sentence, and nothing is written."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

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
def test_notebook_parameters_are_checked(tmp_path, parameters, sentence):
    output = tmp_path / "out.ipynb"
    command = [sys.executable, "workflow/execute_notebook.py", "notebooks/02_train.py", str(output)]
    done = subprocess.run([*command, *parameters], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
