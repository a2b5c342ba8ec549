"""Lock, requirements, pyproject, environment.yml and the imports agree with each other."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

#: Packages by the module they are imported as, where that is not their name.
PACKAGE_OF = {
    "yaml": "pyyaml",
    "bs4": "beautifulsoup4",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "IPython": "ipykernel",
    "lightning_fabric": "lightning-fabric",
    "sphinx": "jupyter-book",
    "docutils": "jupyter-book",
    "snakemake_interface_logger_plugins": "snakemake",
}
#: Imported, and brought by a package that is required for its own sake.
BROUGHT_BY = {
    "anndata": "scanpy",
    "beautifulsoup4": "sphinx-book-theme",
    "geopandas": "squidpy",
    "shapely": "squidpy",
    "spatialdata": "squidpy",
    "huggingface-hub": "timm",
    "numpy": "scipy",
    "pillow": "matplotlib",
    "markupsafe": "jinja2",
    "nbformat": "papermill",
    "nbclient": "papermill",
    "traitlets": "ipykernel",
}


def requirements(name: str) -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


WANTED, LOCKED = requirements("requirements.in"), requirements("requirements.lock.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def version(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    assert pin.operator == "=="
    return pin.version


def test_lock_holds_what_is_required_in_a_version_that_is_allowed():
    assert set(WANTED) <= set(LOCKED)
    for name, requirement in WANTED.items():
        assert requirement.specifier.contains(version(LOCKED[name])), name


def test_lock_serves_machines_with_and_without_a_gpu():
    text = (ROOT / "requirements.lock.txt").read_text()
    assert "+cpu" not in text and "nvidia-" not in text and "--hash" not in text
    assert not [name for name in LOCKED if name == "triton"]


def test_jupyterlab_fits_the_environment_that_it_is_added_to():
    added = requirements("requirements-lab.lock.txt")
    (wanted,) = requirements("requirements-lab.in").values()
    assert wanted.specifier.contains(version(added[wanted.name]))
    shared = set(added) & set(LOCKED)
    assert {n: version(added[n]) for n in shared} == {n: version(LOCKED[n]) for n in shared}
    assert len(shared) > 20 and "jupytext" in LOCKED


def test_checkers_are_locked_in_an_environment_of_their_own():
    locked = requirements("requirements-check.lock.txt")
    for name, requirement in requirements("requirements-check.in").items():
        assert requirement.specifier.contains(version(locked[name])), name


def imported() -> dict[str, str]:
    """Modules of other packages that the program imports, and a file that does."""
    own = {path.stem for path in (ROOT / "workflow").glob("*.py")} | {
        "sparsity_trap",
        "benchmarks",
        "workflow",
    }
    found: dict[str, str] = {}
    for folder in ("sparsity_trap", "workflow", "notebooks", "benchmarks", "book"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                for name in names:
                    found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    beside = {path.stem for path in (ROOT / "book").rglob("*.py")}
    return {n: f for n, f in found.items() if n not in sys.stdlib_module_names | own | beside}


@pytest.mark.parametrize(("module", "file"), sorted(imported().items()))
def test_every_import_is_required(module, file):
    package = canonicalize_name(PACKAGE_OF.get(module, module))
    if package not in WANTED:
        by = BROUGHT_BY.get(package)
        assert by in WANTED, f"{file} imports {module}: add it to requirements.in"
    assert package in LOCKED or BROUGHT_BY.get(package) in LOCKED


def test_one_python_everywhere():
    allowed = SpecifierSet(PROJECT["requires-python"])
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (conda,) = [d.split("=")[1] for d in environment if str(d).startswith("python=")]
    (make,) = re.findall(r"^PYTHON \?= python(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (docker,) = re.findall(
        r"^FROM python:([\d.]+)-", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    binder = (ROOT / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    assert {conda, make, docker, binder} == {"3.11"} and allowed.contains("3.11.0")
    assert allowed.contains(".".join(map(str, sys.version_info[:3])))


def test_environments_are_made_from_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [d["pip"] for d in environment if isinstance(d, dict)]
    assert pip == ["-r requirements.lock.txt", "-e ."]
    assert {"make", "git", "pip"} <= {d for d in environment if isinstance(d, str)}
    assert "-r ../requirements.lock.txt" in (ROOT / "binder" / "requirements.txt").read_text()
    assert "make env" in (ROOT / "Dockerfile").read_text()


def test_what_is_installed_is_what_is_locked():
    here = [
        name for name, locked in LOCKED.items() if not locked.marker or locked.marker.evaluate()
    ]
    installed = {name: metadata.version(name) for name in here}
    differing = {
        name: (found, version(LOCKED[name]))
        for name, found in installed.items()
        if found.split("+")[0] != version(LOCKED[name])
    }
    assert differing == {}


MACOS = {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"}


@pytest.mark.parametrize("machine", [{}, MACOS], ids=["this", "macOS"])
def test_lock_is_whole_and_fits_together(machine):
    """As `pip check`, for the packages of the lock that are installed here."""
    for name, locked in LOCKED.items():
        if locked.marker and not locked.marker.evaluate():
            continue
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            other = canonicalize_name(needed.name)
            if needed.marker and not needed.marker.evaluate({"extra": ""} | machine):
                continue
            # Left out of the lock on purpose: what torch needs to use a GPU.
            if other.startswith(("nvidia-", "cuda-")) or other == "triton":
                continue
            assert other in LOCKED, (name, line)
            found = version(LOCKED[other])
            assert needed.specifier.contains(found, prereleases=True), (name, line)


def test_version_is_said_once():
    import sparsity_trap

    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert sparsity_trap.__version__ == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in changelog
