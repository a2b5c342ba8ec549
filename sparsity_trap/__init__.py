"""The Sparsity Trap: predicting gene counts at 2 µm from H&E, and what the loss has to do with it.

    import sparsity_trap as st

gives the decoders, losses and scores, which need torch, NumPy and numba and nothing else. What the
book is made with lies in the modules and folders beside them.
"""

from sparsity_trap import decoders, losses, metrics
from sparsity_trap.decoders import Hist2ST, Img2ST, Linear
from sparsity_trap.losses import Objective, rate
from sparsity_trap.metrics import d2, pcc, ssim
from sparsity_trap.scores import GeneScores

__version__ = "0.1.0"

__all__ = [
    "GeneScores", "Hist2ST", "Img2ST", "Linear", "Objective", "d2", "decoders", "losses", "metrics",
    "pcc", "rate", "ssim",
]  # fmt: skip
