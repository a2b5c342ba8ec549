"""The Python of README and of a page runs as it stands, on maps of the shapes that they name."""

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


def test_python_of_the_page_on_losses_runs():
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "book/which_loss.md").read_text(), re.DOTALL
    )
    draw = torch.Generator().manual_seed(0)
    mean = torch.linspace(0.02, 0.5, 50)
    names = {
        "mean_count": mean,
        "tokens": torch.randn(1, 1280, 16, 16, generator=draw),
        "counts": torch.poisson(mean[:, None, None].expand(50, 128, 128), generator=draw)[None],
        "mask": torch.ones(1, 128, 128, dtype=torch.bool),
    }
    exec(code, names)
    names["loss"].backward()
    assert all(p.grad.isfinite().all() for p in names["decoder"].parameters())
    worse = names["objective"](torch.zeros(1, 50, 128, 128), names["counts"], names["mask"])
    assert names["loss"] < worse
