"""State of a run after an epoch, from which a killed one goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def on_host(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU: those of the device change with the next step."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and counts of steps, as ``number of the parameter.name``."""
    state = optimiser.state_dict()["state"]
    return on_host({f"{i}.{k}": v for i, values in state.items() for k, v in values.items()})


def restore(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser what `optimiser_state` took from one."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def save(
    path: Path, key: str, history: list[dict[str, float]], state: dict[str, dict[str, Tensor]]
) -> None:
    """Write the history, and states by their part's name; the file appears when it is complete.

    ``key`` tells `load` which run it is of.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}/{name}": v for part, values in state.items() for name, v in values.items()}
    # A name of its own for every attempt would leave a file behind whenever a run is killed here.
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {"key": key, "history": json.dumps(history)})
    os.replace(partial, path)


def load(path: Path, key: str) -> tuple[list[dict[str, float]], dict[str, Tensor]] | None:
    """History and tensors of a checkpoint; None without one of this very run."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["key"] != key:
                return None
            names = file.keys()
            return json.loads(metadata["history"]), {k: file.get_tensor(k) for k in names}
    except (FileNotFoundError, SafetensorError):
        return None


def part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """State of one part of a checkpoint; empty where it has none."""
    prefix = part + "/"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
