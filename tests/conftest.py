"""Shared fixtures."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Tests share the cores among processes, not among the threads of each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of the smoke book in one process, and begin with them: they take longest."""

    def reads_book(item: pytest.Item) -> bool:
        return "smoke_book" in getattr(item, "fixturenames", ())

    for item in filter(reads_book, items):
        item.add_marker(pytest.mark.xdist_group("book"))
    items.sort(key=lambda item: not reads_book(item))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real validation data; tests that need it are skipped where it is absent."""
    default = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("SPARSITY_TRAP_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real validation data not found at {folder}; set SPARSITY_TRAP_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def smoke_book(tmp_path_factory) -> Path:
    """A copy of the checkout, with this environment, after `make book PRESET=smoke`."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("SPARSITY", "PYTEST", "OMP"))
    }
    done = subprocess.run(
        ["make", "book", "PRESET=smoke"], cwd=folder, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
