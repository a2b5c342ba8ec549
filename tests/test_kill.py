"""Whatever is killed, and whenever: the next start ends with the results of an undisturbed run.

``SPARSITY_TRAP_KILLS`` sets how often the chain of steps is killed (default 10), and
``SPARSITY_TRAP_KILL_SEED`` at which moments.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

TINY = """
patients: [P1, P5]
main_patient: P5
simulation: {side_um: 576, seed: 3}
encoder: {name: filterbank, dihedral: false, jitter_views: 0}
decoder: {hidden: 16, heads: 2, attention_layers: 1, neighbours: 4}
training: {epochs: 2, batch_size: 1, accumulate: 1, lr: 3.0e-3, warmup_epochs: 1}
runs:
  - {arms: [D, E], test_patients: [P5]}
"""
FOLDER = Path("results/tiny")
#: What is being written while a phase goes on, beside the results of the step.
PHASES = {
    "simulation": "sections/*/.outs.*.partial",
    "store": "stores/.*.partial",
    "tokens": "tokens/.*.partial",
    "training": "checkpoints/*",
    "scoring": "runs/.*.partial",
}

#: The chain without workflow and notebooks. Libraries are loaded once; each line read from stdin
#: starts the chain anew in a child, whose process number is the answer.
CHAIN = """
import os, sys
import scipy.ndimage, scipy.sparse, pandas, tifffile, h5py, pyarrow.parquet, zarr
from sparsity_trap import steps, simulate, histology, anatomy
from sparsity_trap.config import load_preset
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        preset = load_preset("tiny")
        for run in preset.all_runs():
            steps.run(preset, run)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def copy_of_the_program(folder: Path) -> Path:
    """What the steps need of the checkout, and the tiny preset."""
    for name in ("sparsity_trap", "workflow", "notebooks", "presets", "book"):
        ignored = shutil.ignore_patterns("__pycache__", "executed")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("Makefile", "pyproject.toml", "requirements.lock.txt", "_config.yml", "_toc.yml"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "presets" / "tiny.yaml").write_text(TINY)
    return folder


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SPARSITY", "PYTEST", "MAKE"))}
    return kept | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class Chain:
    """The chain in a program's copy, to be started and killed again and again."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHAIN], cwd=folder, env=environment(folder), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> int:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline() or pytest.fail(self.process.stderr.read()))

    def status(self) -> int:
        return int(self.process.stdout.readline())


def content(folder: Path) -> dict[str, bytes]:
    """Bytes of everything that is promised to be the same: all but times and moments."""
    found = {}
    for part in ("sections", "stores", "tokens", "runs"):
        for path in sorted((folder / FOLDER / part).rglob("*")):
            if path.is_file() and path.name not in ("provenance.json", "log.jsonl"):
                found[str(path.relative_to(folder / FOLDER))] = path.read_bytes()
    for path in (folder / FOLDER / "runs").glob("*/log.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            del row["seconds"]
        found[f"{path.parent.name}/log"] = json.dumps(rows).encode()
    return found


def half_written(folder: Path) -> list[str]:
    results = folder / FOLDER
    return [str(p) for p in results.rglob(".*") if p.suffix in (".partial", ".old")] + [
        str(p) for p in results.glob("checkpoints/*")
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Iterator[Callable[[], dict[str, bytes]]]:
    """Results of a chain that nobody kills; it works while the other one is being killed."""
    folder = copy_of_the_program(tmp_path_factory.mktemp("undisturbed"))
    with Chain(folder) as chain:
        chain.start()

        @functools.cache
        def results() -> dict[str, bytes]:
            assert chain.status() == 0
            made = content(folder)
            assert {"runs/E-P5-s0/genes.parquet", "tokens/P5.zarr/zarr.json"} <= set(made)
            return made

        yield results


def differences(made: dict[str, bytes], reference: dict[str, bytes]) -> list[str]:
    return sorted(
        name for name in made.keys() | reference.keys() if made.get(name) != reference.get(name)
    )


def test_chain_killed_at_any_moment(tmp_path, undisturbed):
    kills = int(os.environ.get("SPARSITY_TRAP_KILLS", "10"))
    draw = random.Random(int(os.environ.get("SPARSITY_TRAP_KILL_SEED", "7")))
    # As many in each phase, in the order of phases: the next start gets beyond the one before.
    moments = [
        (phase, draw.expovariate(6))
        for i, phase in enumerate(PHASES)
        for _ in range(kills // len(PHASES) + (i < kills % len(PHASES)))
    ]
    folder = copy_of_the_program(tmp_path / "program")
    faults, hit = 0, []
    with Chain(folder) as chain:
        for phase, delay in moments:
            child = chain.start()
            # When the phase is over already, the last one is as good.
            while not any(
                any((folder / FOLDER).glob(glob)) for glob in (PHASES[phase], PHASES["scoring"])
            ):
                time.sleep(0.002)
            time.sleep(delay)
            under_way = [name for name, glob in PHASES.items() if any((folder / FOLDER).glob(glob))]
            os.kill(child, signal.SIGKILL)
            killed = chain.status() == signal.SIGKILL
            faults += killed
            hit += under_way * killed
        chain.start()
        assert chain.status() == 0
    lost = differences(content(folder), undisturbed())
    print(f"{faults} faults, {faults * (not lost)} recovered, {len(lost)} lost; hit: {hit}")
    assert lost == [] and half_written(folder) == []
    assert faults >= kills // 2 and len(set(hit)) >= min(3, kills)


# --- the same through make, Snakemake and notebooks -----------------------------------------------


def descendants(process: int) -> list[int]:
    """Numbers of a process and all that it started: kernels have sessions of their own."""
    found = [process]
    for number in found:
        for task in Path(f"/proc/{number}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue  # it has just ended
    return found


def make(folder: Path, *arguments: str, **options: object) -> subprocess.Popen:
    env = {k: v for k, v in environment(folder).items() if k != "PYTHONPATH"}
    targets = [str(FOLDER / "runs" / f"{arm}-P5-s0") for arm in "DE"]
    override = f"results: $(STAMP)\n\t@$(SNAKEMAKE) --logger sparsity-trap -- {' '.join(targets)}\n"
    text = (ROOT / "Makefile").read_text()
    if "alone.py" not in text:
        text = text.replace(
            "SNAKEMAKE = $(BIN)/snakemake",
            "SNAKEMAKE = $(BIN)/python workflow/alone.py .snakemake/running $(BIN)/snakemake --nolock",
        )
    (folder / "Makefile").write_text(text + override)
    return subprocess.Popen(
        ["make", "results", "PRESET=tiny", "CORES=2", "GPUS=2", *arguments],
        cwd=folder, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def test_make_killed_and_started_again_twice_at_once(tmp_path, undisturbed):
    """Killed in a data and in a training notebook; then two at once, of which one waits."""
    folder = copy_of_the_program(tmp_path / "program")
    draw = random.Random(5)
    for glob in ("stores/.*.partial", "checkpoints/*"):
        process = make(folder)
        while process.poll() is None and not any((folder / FOLDER).glob(glob)):
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        time.sleep(draw.random() / 4)
        for number in descendants(process.pid):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()
    both = [make(folder), make(folder)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("another make works in this checkout" in text for text in said) == 1
    lost = differences(content(folder), undisturbed())
    print(f"2 faults, {2 * (not lost)} recovered, {len(lost)} lost")
    assert lost == [] and half_written(folder) == []
