"""The core imports what its contract in pyproject.toml allows, also inside functions."""

from __future__ import annotations

import ast
import sys
import tomllib

import pytest
from conftest import ROOT

import sparsity_trap

CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
(CORE,) = (c["source_modules"] for c in CONTRACTS if c["name"] == "the core stands alone")
ALLOWED = {"torch", "numpy", "numba", "sparsity_trap"} | sys.stdlib_module_names


def imports(module: str) -> set[str]:
    """Full names of what a module imports, at its top or anywhere below."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module
            whole = node.module == "sparsity_trap"
            found |= {f"{node.module}.{a.name}" for a in node.names} if whole else {node.module}
    return found


@pytest.mark.parametrize("module", [*CORE, "sparsity_trap.__init__"])
def test_core_imports_torch_numpy_numba_and_itself(module):
    found = imports(module)
    assert {name.split(".")[0] for name in found} <= ALLOWED
    assert {name for name in found if name.startswith("sparsity_trap")} <= set(CORE)


def test_every_public_name_is_there_and_listed():
    assert all(hasattr(sparsity_trap, name) for name in sparsity_trap.__all__)
    assert set(sparsity_trap.__all__) <= set(dir(sparsity_trap))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sparsity_trap.nothing  # noqa: B018
