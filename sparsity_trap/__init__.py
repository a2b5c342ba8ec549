"""The Sparsity Trap: predicting gene counts at 2 µm from H&E, and what the loss has to do with it."""

__version__ = "0.1.0"
