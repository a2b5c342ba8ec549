"""Shared fixtures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Tests share the cores among processes, not among the threads of each. Numba's threads are those of
# torch: a parallel loop of a library sets their number for torch too, until the process ends.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


#: Test files that read the smoke book: one process builds it for them all, and begins with them.
BOOK_FILES = ("test_book.py", "test_pages.py", "test_workflow.py")


#: Test files whose tests share something that takes long to make.
SHARING_FILES = (
    "test_controls.py", "test_evaluate.py", "test_pairing.py", "test_predict.py", "test_report.py",
    "test_segments.py",
)  # fmt: skip

#: A user's token, in the environment while the book is made.
SECRET = "hf_" + "ThisMustNeverBeWritten0123456789"  # not in this file, which is copied too

#: Scores a patch as it is stored.
COMPILE = """
import numpy as np
from sparsity_trap.scores import GeneScores
scores = GeneScores()
counts, rate = np.ones((1, 1, 16, 16), "u2"), np.ones((1, 1, 16, 16), "f2")
scores.update(counts, rate, np.ones((1, 16, 16), bool))
"""

#: Takes every loss that has a kernel, with its gradient, as in training.
COMPILE_LOSSES = """
import torch
from sparsity_trap import _fused, losses
eta, mask = torch.zeros(1, 2, 8, 8, requires_grad=True), torch.ones(1, 8, 8, dtype=torch.bool)
for loss in _fused.FUSED:
    for link in ("exp", "softplus"):
        losses.Objective(loss, link, 2)(eta, torch.ones(1, 2, 8, 8, dtype=torch.uint8), mask)
"""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give way to the process with the book, which takes longest."""
    worker = hasattr(item.config, "workerinput")
    if worker and item.path.name not in BOOK_FILES and os.nice(0) == 0:
        os.nice(5)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Give what shares a book or a fixture to one process; every other test is work of its own.

    The kernels are compiled once, before each of several processes would, while these collect
    tests.
    """
    from xdist.scheduler import LoadScopeScheduling

    compiling = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        for code in (COMPILE, COMPILE_LOSSES)
    ]

    class OneBook(LoadScopeScheduling):
        def schedule(self) -> None:
            if any([process.wait() for process in compiling]):
                pytest.exit("the kernels of sparsity_trap/_*loops.py cannot be compiled", 1)
            super().schedule()

        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.split("::")[0]).name
            if file in BOOK_FILES:
                return "book"
            return file if file in SHARING_FILES else nodeid

    return OneBook(config, log)


def copy_program(folder: Path, *names: str) -> None:
    """Copy folders of the checkout, with its kernels, since compiling them takes half a minute."""
    for name in names:
        skip = shutil.ignore_patterns("executed", ".executed*", "*.tmp.*")
        shutil.copytree(ROOT / name, folder / name, ignore=skip)


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
    """A copy of the checkout in a folder of an odd name, after `make book PRESET=smoke`."""
    folder = tmp_path_factory.mktemp("checkout") / "a b'ü"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    # The compiled kernels too, where tests have run before: it saves compiling them again.
    for kernel in ROOT.glob("sparsity_trap/__pycache__/_*.nb*"):
        target = folder / kernel.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy2(kernel, target)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    # As users have it: Python may write bytecode.
    others = "SPARSITY", "PYTEST", "OMP", "PYTHONDONTWRITEBYTECODE"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(others)}
    done = subprocess.run(
        ["make", "book", "PRESET=smoke"], cwd=folder, capture_output=True, text=True,
        env=environment | {"HF_TOKEN": SECRET},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """Chromium without a network."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium is not installed")
    from browser import Chromium  # here: it needs the scripts beside the module

    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def driven(chromium):
    """Chromium; the test fails when a page logs an error."""
    chromium.problems.clear()
    yield chromium
    assert not chromium.problems


@pytest.fixture
def threads():
    """Set the number of torch's threads, which sums depend on, until the end of the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
