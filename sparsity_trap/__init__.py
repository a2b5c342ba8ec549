"""The Sparsity Trap: predicting gene counts at 2 µm from H&E, and what the loss has to do with it.

    import sparsity_trap as st

gives the decoders, losses and scores, which need torch, NumPy and numba and nothing else. What the
book is made with lies in the modules and folders beside them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsity_trap import decoders, losses, metrics
    from sparsity_trap.decoders import Hist2ST, Img2ST, Linear
    from sparsity_trap.evaluation.evaluate import evaluate
    from sparsity_trap.losses import Objective, rate
    from sparsity_trap.metrics import d2, pcc, ssim
    from sparsity_trap.scores import GeneScores

__version__ = "0.1.0"

__all__ = [
    "GeneScores", "Hist2ST", "Img2ST", "Linear", "Objective", "d2", "decoders", "evaluate",
    "losses", "metrics", "pcc", "rate", "ssim",
]  # fmt: skip

_HOME = {
    "decoders": ("Hist2ST", "Img2ST", "Linear"),
    "evaluation.evaluate": ("evaluate",),
    "losses": ("Objective", "rate"),
    "metrics": ("d2", "pcc", "ssim"),
    "scores": ("GeneScores",),
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: steps that read sections do without the 150 MB of torch.
    for home, names in _HOME.items():
        if name == home or name in names:
            module = import_module(f"sparsity_trap.{home}")
            return module if name == home else getattr(module, name)
    raise AttributeError(f"module 'sparsity_trap' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
