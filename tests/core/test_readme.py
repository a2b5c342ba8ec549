"""The Python of README runs as it stands, on maps of the shapes that it names."""

from __future__ import annotations

import re

import torch
from conftest import ROOT


def test_python_of_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    draw = torch.Generator().manual_seed(0)
    eta = torch.randn(2, 50, 32, 32, generator=draw, requires_grad=True)
    names = {
        "eta": eta,
        "counts": torch.poisson(torch.exp(eta.detach()), generator=draw),
        "mask": torch.ones(2, 32, 32, dtype=torch.bool),
    }
    exec(code, names)
    names["loss"].backward()
    assert eta.grad.isfinite().all()
    assert len(names["scores"]) == 50 and (names["scores"] > 0.5).all()
