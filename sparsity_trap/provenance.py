"""What ran, on what, with what."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from sparsity_trap.settings import ROOT, Preset

#: Packages whose versions can change a result.
_PACKAGES = (
    "torch",
    "timm",
    "numpy",
    "scipy",
    "pandas",
    "scanpy",
    "squidpy",
    "statsmodels",
    "zarr",
)


def commit() -> str:
    """Short commit of the checkout, with ``-dirty`` when files were changed; "unknown" outside git.

    New measurements among the benchmarks' results change nothing.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":(exclude)results/bench")
        return git("describe", "--always", "--abbrev=10") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """Processor, cores and accelerator in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{name}, {cores} cores"

    import torch

    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


def record(preset: Preset, seconds: float, **details: object) -> dict[str, object]:
    """Provenance of one result.

    Parameters
    ----------
    preset
        The preset it was computed with; stored whole.
    seconds
        Wall time.
    details
        Further entries, such as seed or arm.
    """
    return {
        "commit": commit(),
        "preset": preset.model_dump(mode="json"),
        "seconds": round(seconds, 2),
        "hardware": hardware(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        **details,
    }
