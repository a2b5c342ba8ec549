"""What benchmarks share: one measured program in a process of its own, and its peak memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

#: Memory that is freed stays with the process, as in the workflow; for a peer as for ourselves.
_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}


def run_alone(module: str, *arguments: str, **environment: str) -> dict:
    """Run ``python -m module arguments`` and return the JSON in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True, text=True, env=os.environ | _ALLOCATOR | environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024 / 1e6
    # Elsewhere; on Linux this may be that of the process which started this one.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
