"""The profile for Slurm, as far as it can be tried without a cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from sparsity_trap.presets import load_preset

pytestmark = pytest.mark.slow


def test_paper_can_be_planned_for_a_cluster():
    done = subprocess.run(
        ["make", "plan", "PRESET=paper", "SOURCE=simulated", "PROFILE=slurm"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = re.findall(r"^train +(\d+)$", done.stdout + done.stderr, re.MULTILINE)
    arms = {run.arm for run in load_preset("paper").all_runs()}
    assert set(jobs) == {str(len(arms))}  # Snakemake prints the table before and after the dry run


def test_a_cluster_is_asked_for_memory_and_a_gpu(tmp_path):
    """A stand-in for sbatch writes down what it is asked, and refuses."""
    asked = tmp_path / "asked"
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {asked}\nexit 1\n')
    for name in ("sacct", "sinfo", "squeue", "scancel", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    (tmp_path / "Snakefile").write_text(
        "rule data:\n    output: 'x'\n    resources: gpu=1\n    shell: 'true'\n"
    )  # noqa: E501
    subprocess.run(
        [sys.executable, "-m", "snakemake", "--workflow-profile",
         ROOT / "workflow" / "profiles" / "slurm", "--retries", "0",
         "--slurm-init-seconds-before-status-checks", "1"],
        cwd=tmp_path, capture_output=True, timeout=120,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    words = asked.read_text()
    assert "--mem 32000" in words and "-t 120" in words and re.search(r"--gpus[= ]1", words)
