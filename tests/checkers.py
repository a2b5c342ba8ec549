"""Programs of .venv-check, which `make checkers` installs, for tests that ask them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

PYTHON = ROOT / ".venv-check" / "bin" / "python"


def ask(code: str, *arguments: str | Path, given: object = None):
    """Run Python in that environment; return the JSON it prints last, given JSON at stdin."""
    if not PYTHON.exists():
        pytest.skip("what checks archives and PDFs is not installed: run make checkers")
    done = subprocess.run(
        [PYTHON, "-c", code, *arguments], input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
