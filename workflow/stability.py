"""Repeat the runs of a preset with other seeds, threads and processor; judge the claims on each.

    python workflow/stability.py laptop

Sets of runs: those of the book; the same arms with seeds that the book does not use; the same
seeds with two threads, which add up numbers in another order; the same seeds on a GPU. All others
are trained on the CPU. Without a GPU, its set is judged where ``results/<preset>/worlds/gpu`` of a
machine with one has been brought, and otherwise left out. What is finished stays, so a stopped run
goes on. Writes ``results/bench/stability.json`` and prints the verdicts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from sparsity_trap.analysis.claims import read_ledgers
from sparsity_trap.data.sections import open_preset
from sparsity_trap.files import building, commit, hardware
from sparsity_trap.progress import say
from sparsity_trap.runs import read
from sparsity_trap.settings import ROOT, Preset, UserError

GPU = "GPU"
#: Set of runs -> repeat of the preset, and threads of a run.
SETS = {
    "book": ("", 1),
    "other seeds": ("seeds1000", 1),
    "two threads": ("threads2", 2),
    GPU: ("gpu", 1),
}
FILE = ROOT / "results" / "bench" / "stability.json"
WORKFLOW = Path(__file__).resolve().parent


def sets(name: str) -> dict[str, tuple[Preset, int]]:
    """Set -> preset of its runs, and their threads; without a GPU, its set only if it is there."""
    found = {
        key: (open_preset(f"{name}/{repeat}".rstrip("/")), n) for key, (repeat, n) in SETS.items()
    }
    if not torch.cuda.is_available() and not found[GPU][0].folder.exists():
        del found[GPU]
    return found


def run_set(preset: Preset, threads: int, cores: int, gpu: bool = False) -> pd.DataFrame:
    """Train what is missing of a set, judge the claims on it, and return the ledger."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "NUMBA_NUM_THREADS": str(threads),
        # A run has a core, whatever its threads: they order its sums, and must not spin in wait.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_TRIM_THRESHOLD_": "4000000000",
        "MALLOC_MMAP_THRESHOLD_": "4000000000",
        "PYTHONWARNINGS": "ignore",
    }
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    given = [f"preset={preset.name}", "source=", "cohort="]

    def arm(name: str) -> None:
        command = [sys.executable, str(WORKFLOW / "compute.py"), "arm", name, *given]
        quiet = environment | {"SPARSITY_TRAP_PROGRESS": os.devnull}
        subprocess.run(command, check=True, cwd=ROOT, env=quiet)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(arm, dict.fromkeys(run.arm for run in preset.all_runs())))
    page = preset.folder / "notebooks" / "10_claims.ipynb"
    page.parent.mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "notebooks" / "10_claims.py")
    command = [sys.executable, str(WORKFLOW / "execute_notebook.py"), script, str(page), *given]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return read_ledgers(preset.folder / "tables")["build"]


def compare(ledgers: dict[str, pd.DataFrame]) -> dict:
    """Verdicts by set, which claims change sides, and how well the intervals foretell other sets.

    Parameters
    ----------
    ledgers
        Set -> claims, the book's first.

    Returns
    -------
    ``claims``: key -> text and, by set that it was judged on, verdict, value and interval.
    ``flips``: claims that are supported on one set and not supported on another. ``covered`` and
    ``compared``: how many of the other sets' values lie in the first set's interval for another
    value: its half-width times √2.
    """
    judged = {name: ledger.set_index("key") for name, ledger in ledgers.items()}
    claims, flips, inside = {}, [], []
    for key, row in next(iter(judged.values())).iterrows():
        found = {name: rows.loc[key] for name, rows in judged.items() if key in rows.index}
        columns = ["verdict", "value", "ci_low", "ci_high"]
        by_set = {
            name: {c: None if pd.isna(claim[c]) else claim[c] for c in columns}
            for name, claim in found.items()
        }
        claims[key] = {"text": row["text"], "sets": by_set}
        if {"supported", "not supported"} <= {claim["verdict"] for claim in found.values()}:
            flips.append(key)
        if np.isfinite(row["p"]):
            for name in list(found)[1:]:
                far = abs(found[name]["value"] - row["value"])
                inside.append(far <= np.sqrt(2) * (row["ci_high"] - row["ci_low"]) / 2)
    covered = {"covered": int(np.sum(inside)), "compared": len(inside)}
    return {"claims": claims, "flips": flips, **covered}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python workflow/stability.py")
    parser.add_argument("preset", nargs="?", default="laptop")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    options = parser.parse_args()
    ledgers = {}
    for name, (preset, threads) in sets(options.preset).items():
        ledgers[name] = run_set(preset, threads, options.cores, gpu=name == GPU)
    found = compare(ledgers)
    seeds = sorted({run.seed for run in preset.all_runs()})
    about = {"commit": commit(), "hardware": hardware(), "seeds": len(seeds)}
    if GPU in ledgers:
        about["gpu"] = read(preset.run_dir(run := preset.all_runs()[0]), run).provenance["hardware"]
    saved = json.loads(FILE.read_text()) if FILE.exists() else {}
    with building(FILE) as partial:
        partial.write_text(json.dumps(saved | {options.preset: about | found}, indent=1) + "\n")
    verdicts = {
        key: {name: claim["verdict"] for name, claim in row["sets"].items()}
        for key, row in found["claims"].items()
    }
    say(pd.DataFrame(verdicts).T.to_string())
    say(f"changed sides: {', '.join(found['flips']) or 'none'}")
    say(f"values in the book's interval: {found['covered']} of {found['compared']}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
