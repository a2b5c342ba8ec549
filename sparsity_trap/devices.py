"""Where training runs: device, precision, and the processes that share a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def launch(precision: str = "float32") -> Fabric | None:
    """Device, precision and, under ``torchrun`` or ``srun``, the group of processes.

    Parameters
    ----------
    precision
        ``float32``, or ``bfloat16`` for mixed precision.

    Returns
    -------
    None for one process in single precision on a CPU, which needs nothing of Fabric: importing it
    takes seconds.
    """
    per_node, nodes = _processes()
    alone = per_node * nodes == 1
    cuda = torch.cuda.is_available()
    if alone and not cuda and precision == "float32":
        return None
    # Without it cuBLAS is not deterministic; it is read when CUDA is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if cuda:
        # Products of single-precision matrices by TF32: factors keep 10 bits of mantissa, sums are
        # in single precision. Losses are elementwise and keep all their digits.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    fabric = Fabric(
        accelerator="cuda" if cuda else "cpu",
        devices=per_node,
        num_nodes=nodes,
        strategy="auto" if alone else "ddp",
        precision="bf16-mixed" if precision == "bfloat16" else "32-true",
        # A single process in a larger SLURM allocation is not one of several.
        plugins=[LightningEnvironment()] if alone else [],
    )
    fabric.launch()
    return fabric


def _processes() -> tuple[int, int]:
    """Processes per node and nodes that this process was launched with."""
    if torch.distributed.is_torchelastic_launched():
        per_node, total = (int(os.environ[key]) for key in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        return per_node, total // per_node
    # Set by srun for its step, unlike SLURM_NTASKS, which describes the allocation.
    total = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) if total > 1 else 1
    return total // nodes, nodes
