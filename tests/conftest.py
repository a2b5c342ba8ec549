"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real validation data; tests that need it are skipped where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SPARSITY_TRAP_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real validation data not found at {folder}; set SPARSITY_TRAP_SHARED_DATA")
    return folder
