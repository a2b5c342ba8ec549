"""The core as somebody else installs it: the wheel, with its declared dependencies and no more."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

#: Runs every example in the docstrings of the public names, and says what was imported for them.
EXAMPLES = """
import doctest, json, sys
import sparsity_trap as st
homes = [sys.modules[x.__module__] for x in (st.GeneScores, st.evaluate)]
places = [st.decoders, st.losses, st.metrics, *homes]
failed = tried = 0
for place in places:
    result = doctest.testmod(place)
    failed, tried = failed + result.failed, tried + result.attempted
named = [getattr(st, name) for name in st.__all__]
without = [x.__name__ for x in named if callable(x) and ">>>" not in (x.__doc__ or "")]
imported = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps([failed, tried, without, imported]))
"""


def declared(name: str) -> dict[str, metadata.Distribution]:
    """Distributions that one needs, directly or not, as installed here."""
    found: dict[str, metadata.Distribution] = {}
    open_ends = [name]
    while open_ends:
        here = canonicalize_name(open_ends.pop())
        if here in found:
            continue
        try:
            found[here] = metadata.distribution(here)
        except metadata.PackageNotFoundError:
            continue  # what torch names for other machines, such as CUDA's libraries
        for line in found[here].requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                open_ends.append(needed.name)
    return found


def link(distribution: metadata.Distribution, folder: Path) -> None:
    """Put an installed package into another environment, without copying it."""
    places = {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}
    for place in places - {"__pycache__"}:
        target = folder / place
        if not target.exists():
            target.symlink_to(Path(distribution.locate_file(place)).resolve())


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """An empty environment outside the checkout with the wheel and its dependencies only."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.in"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sparsity_trap", source / "sparsity_trap", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = tmp_path_factory.mktemp("wheel")
    build = [*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", built]
    subprocess.run(build, check=True)
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (wheel,) = built.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", packages, wheel]
    subprocess.run(install, check=True)
    (record,) = packages.glob("sparsity_trap-*.dist-info")
    for line in metadata.Distribution.at(record).requires or []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            for distribution in declared(needed.name).values():
                link(distribution, packages)
    return folder


def run(folder: Path, code: str) -> str:
    done = subprocess.run(
        [folder / "bin" / "python", "-c", code], cwd=folder, capture_output=True, text=True,
        env={"OMP_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1", "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_examples_run_with_the_declared_dependencies_alone(elsewhere):
    said = run(elsewhere, EXAMPLES)
    failed, tried, without, imported = json.loads(said.splitlines()[-1])
    assert failed == 0, said
    assert tried >= 15 and without == []
    assert {"torch", "numpy", "numba"} <= set(imported)
    assert not {"pandas", "scipy", "pydantic", "zarr", "yaml", "h5py"} & set(imported)


def test_tables_and_assets_are_in_the_wheel(elsewhere):
    (module,) = elsewhere.glob("lib/python*/site-packages/sparsity_trap")
    here = {p.relative_to(ROOT / "sparsity_trap") for p in (ROOT / "sparsity_trap").rglob("*.*")}
    here = {p for p in here if "__pycache__" not in p.parts and p.suffix != ".pyc"}
    assert {p for p in here if not (module / p).is_file()} == set()
