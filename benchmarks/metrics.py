"""Scoring of a section: seconds and peak memory against a loop over scipy and scikit-image.

    python -m benchmarks.metrics [--patches 570] [--rounds 3] [--folder CACHE] [--out JSON]

Counts and predictions of 50 genes are synthesised as a patch store and a run hold them (zarr, one
patch a chunk, uint16 and float16), with the sparsity published for patient P5 and tissue that ends
within some patches. The loop computes PCC per gene at 2 and 8 µm (`scipy.stats.pearsonr`) and SSIM
of every patch and gene at 2 µm (`skimage.metrics.structural_similarity`), `metrics.pcc` and
`metrics.ssim` the same; `GeneScores` computes these and all its other columns.

Scoring alone is timed on patches in memory: 64 different ones that return until there are 570,
since 570 different ones would fill more than the gigabyte that scoring may take. The last row reads
570 different ones from disk while it scores them. Each scorer runs in a process of its own; its
seconds hold neither imports nor the loading of compiled loops.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from benchmarks.processes import peak_mb, run_alone
from sparsity_trap.bins import PATCH_BINS, Maps
from sparsity_trap.data.genes import PANEL, panel_table
from sparsity_trap.files import building

N_PATCHES = 570
THREADS = 2
DIFFERENT = 64  # patches in memory
LOOP, READING = "scipy and scikit-image", "GeneScores, reading"
BATCH = 8  # patches, as they come from a model
TOKEN_BINS = 8


def main() -> None:
    """Synthesise, measure each scorer, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--patches", type=int, default=N_PATCHES)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of these counts")
    parser.add_argument("--folder", type=Path, help="keep the synthesised arrays here")
    parser.add_argument("--out", type=Path, default=Path("results/bench/metrics.json"))
    parser.add_argument("--run", nargs=2, metavar=("SCORER", "ARRAYS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_scorer(options.run[0], Path(options.run[1]))))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="metrics-"))
    try:
        report = measure(options.patches, folder, options.rounds)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    with building(options.out) as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)
    print(f"written to {options.out}")


def measure(patches: int, folder: Path, rounds: int) -> dict[str, object]:
    """Measure all scorers on the same arrays."""
    from sparsity_trap.files import commit, hardware

    arrays = folder / f"{patches}.zarr"
    if not arrays.is_dir():
        print(f"synthesising {patches} patches of {len(PANEL)} genes ...", flush=True)
        with building(arrays) as partial:
            write_arrays(partial, patches)
    rows: dict[str, dict] = {}
    for name in SCORERS:
        print(name, flush=True)
        run = ("benchmarks.metrics", "--run", name, str(arrays))
        runs = [run_alone(*run, OMP_NUM_THREADS=str(THREADS)) for _ in range(rounds)]
        rows[name] = min(runs, key=lambda row: row["seconds"])
    results = {name: row.pop("result") for name, row in rows.items()}
    loop = results.pop(LOOP)
    base = rows[LOOP]["seconds"]
    results.pop(READING)  # of other patches
    for name, result in results.items():
        rows[name]["times_faster"] = round(base / rows[name]["seconds"], 1)
        rows[name]["largest_difference"] = {
            column: float(np.abs(np.subtract(result[column], loop[column])).max())
            for column in loop
        }
    return {
        "commit": commit(),
        "hardware": hardware(),
        "threads": THREADS,
        "patches": patches,
        "genes": len(PANEL),
        "rounds": rounds,
        "note": f"{min(DIFFERENT, patches)} different patches in memory, again and again, but for "
        "the last row; without imports; peak memory of the whole process",
        "scorers": rows,
    }


def print_table(report: dict) -> None:
    """Print what was measured, one line per scorer."""
    print(f"\n{report['hardware']}; {report['patches']} patches x {report['genes']} genes")
    print(f"{'scorer':<24}{'seconds':>9}{'of CPU':>9}{'peak MB':>9}  x loop  largest difference")
    for name, row in report["scorers"].items():
        line = f"{name:<24}{row['seconds']:>9.2f}{row['cpu_seconds']:>9.2f}"
        line += f"{row['peak_mb']:>9}"
        if "times_faster" in row:
            worst = (f"{k} {v:.0e}" for k, v in row["largest_difference"].items())
            line += f"{row['times_faster']:>8.1f}  {', '.join(worst)}"
        print(line)


# Scorers, each run in a process of its own --------------------------------------------------------


class Repeated:
    """Maps of patches in memory that return until there are n."""

    def __init__(self, maps: np.ndarray, n: int) -> None:
        self.maps, self.shape = maps, (n, *maps.shape[1:])
        self.order = np.arange(n) % len(maps)

    def __getitem__(self, index: int | slice) -> np.ndarray:
        order = self.order[index]
        if np.ndim(order) and order[-1] - order[0] == len(order) - 1:
            return self.maps[order[0] : order[-1] + 1]  # without a copy
        return self.maps[order]


def run_scorer(name: str, path: Path) -> dict[str, object]:
    """Run one scorer: seconds, peak memory in MB, per-gene scores."""
    group = zarr.open_group(path, mode="r")
    maps = [group[kind] for kind in ("counts", "rate", "mask")]
    n = maps[0].shape[0]
    first = [Repeated(array[:DIFFERENT], n) for array in maps]
    score = SCORERS[name]
    score(*(Repeated(array.maps, 1) for array in first))  # imports and compiled loops
    start, start_cpu = time.perf_counter(), time.process_time()
    result = score(*(maps if name == READING else first))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    columns = ("pcc_2um", "pcc_8um", "ssim_2um")
    return {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "peak_mb": round(peak_mb()),
        "result": {column: list(map(float, result[column])) for column in columns},
    }


def by_loop(counts: Repeated, rates: Repeated, masks: Repeated) -> dict[str, list[float]]:
    """The customary way."""
    from scipy.stats import pearsonr
    from skimage.metrics import structural_similarity

    mask = masks.maps[masks.order]
    blocks = (len(mask), PATCH_BINS // 4, 4, PATCH_BINS // 4, 4)
    mask8 = mask.reshape(blocks).sum((2, 4)) > 8
    scores: dict[str, list[float]] = {"pcc_2um": [], "pcc_8um": [], "ssim_2um": []}
    for g in range(counts.shape[1]):
        maps = (v.maps[v.order, g] for v in (counts, rates))
        truth, pred = (np.where(mask, v, 0).astype(float) for v in maps)
        scores["pcc_2um"].append(pearsonr(truth[mask], pred[mask]).statistic)
        truth8, pred8 = (v.reshape(blocks).sum((2, 4))[mask8] for v in (truth, pred))
        scores["pcc_8um"].append(pearsonr(truth8, pred8).statistic)
        similarity = []
        for t, p in zip(truth, pred, strict=True):
            span = max(t.max(), p.max()) - min(t.min(), p.min())
            similarity.append(structural_similarity(t, p, data_range=span))
        scores["ssim_2um"].append(np.mean(similarity))
    return scores


def by_functions(*maps: Maps) -> dict[str, np.ndarray]:
    """Ours: the same scores by the same names, three passes over the maps."""
    from sparsity_trap import metrics

    return {
        "pcc_2um": metrics.pcc(*maps),
        "pcc_8um": metrics.pcc(*maps, bin_factor=4),
        "ssim_2um": metrics.ssim(*maps).mean(0),
    }


def by_gene_scores(*maps: Maps) -> dict[str, np.ndarray]:
    """Ours: every column of the per-gene table, in one pass."""
    from sparsity_trap.scores import GeneScores

    scores = GeneScores(PANEL)
    for start in range(0, maps[0].shape[0], BATCH):
        scores.update(*(array[start : start + BATCH] for array in maps))
    return scores.compute()


SCORERS: dict[str, Callable[..., dict]] = {
    LOOP: by_loop,
    "pcc and ssim": by_functions,
    "GeneScores": by_gene_scores,
    READING: by_gene_scores,
}


# Synthesis ----------------------------------------------------------------------------------------


def write_arrays(path: Path, patches: int) -> None:
    """Counts of smooth rates, and predictions that miss them by a factor per token."""
    from scipy.ndimage import zoom

    group = zarr.open_group(path, mode="w")
    chunk = (1, len(PANEL), PATCH_BINS, PATCH_BINS)
    shape = (patches, *chunk[1:])
    counts = group.create_array("counts", shape=shape, chunks=chunk, dtype="uint16")
    rates = group.create_array("rate", shape=shape, chunks=chunk, dtype="float16")
    masks = group.create_array(
        "mask", shape=(patches, *chunk[2:]), chunks=(1, *chunk[2:]), dtype=bool
    )
    rng = np.random.default_rng(0)
    mean = -np.log(panel_table()["published_sparsity"].to_numpy())[:, None, None]
    tokens = PATCH_BINS // TOKEN_BINS
    for i in range(patches):
        factors = rng.gamma(2, 0.5, (2, len(PANEL), tokens, tokens))
        truth, error = (zoom(f, (1, TOKEN_BINS, TOKEN_BINS), order=1) for f in factors)
        edge = rng.uniform(0.5, 4) * PATCH_BINS  # most patches are whole
        masks[i] = np.add.outer(np.arange(PATCH_BINS), np.arange(PATCH_BINS)) < edge
        counts[i] = rng.poisson(mean * truth)
        rates[i] = mean * truth * error


if __name__ == "__main__":
    main()
