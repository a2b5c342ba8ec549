"""Scoring of a section: seconds and peak memory against a loop over scipy and scikit-image.

    python -m benchmarks.metrics [--patches 570] [--rounds 3] [--folder CACHE] [--out results/bench/metrics.json]

Counts and predictions of 50 genes are synthesised as a patch store and a run hold them (zarr, one
patch a chunk, uint16 and float16), with the sparsity published for patient P5 and tissue that ends
within some patches. The loop computes PCC per gene at 2 and 8 µm (`scipy.stats.pearsonr`) and SSIM
of every patch and gene at 2 µm (`skimage.metrics.structural_similarity`), `metrics.pcc` and
`metrics.ssim` the same; `GeneScores` computes these and all its other columns. Each runs in a process of its own on the same arrays; seconds of
scoring and of reading are told apart, and neither holds imports and the loading of compiled loops.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zarr

from benchmarks.processes import peak_mb, run_alone
from sparsity_trap.files import building
from sparsity_trap.genes import PANEL, panel_table
from sparsity_trap.patches import PATCH_BINS

N_PATCHES = 570
THREADS = 2
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
    import torch

    from sparsity_trap.provenance import commit, hardware

    arrays = folder / f"{patches}.zarr"
    if not arrays.is_dir():
        print(f"synthesising {patches} patches of {len(PANEL)} genes ...", flush=True)
        with building(arrays) as partial:
            write_arrays(partial, patches)
    names = [name for name in SCORERS if name != "GeneScores, GPU" or torch.cuda.is_available()]
    rows: dict[str, dict] = {}
    for name in names:
        print(name, flush=True)
        run = ("benchmarks.metrics", "--run", name, str(arrays))
        runs = [run_alone(*run, OMP_NUM_THREADS=str(THREADS)) for _ in range(rounds)]
        rows[name] = min(runs, key=lambda row: row["seconds"])
    results = {name: row.pop("result") for name, row in rows.items()}
    loop = results.pop("scipy and scikit-image")
    base = rows["scipy and scikit-image"]["seconds"]
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
        "note": "seconds of scoring; without imports; peak memory of the whole process",
        "scorers": rows,
    }


def print_table(report: dict) -> None:
    """Print what was measured, one line per scorer."""
    print(f"\n{report['hardware']}; {report['patches']} patches x {report['genes']} genes")
    print(
        f"{'scorer':<24}{'seconds':>9}{'of CPU':>9}{'reading':>9}{'peak MB':>9}  x loop  largest difference"
    )
    for name, row in report["scorers"].items():
        line = f"{name:<24}{row['seconds']:>9.2f}{row['cpu_seconds']:>9.2f}"
        line += f"{row['reading_seconds']:>9.2f}{row['peak_mb']:>9}"
        if "times_faster" in row:
            worst = (f"{k} {v:.0e}" for k, v in row["largest_difference"].items())
            line += f"{row['times_faster']:>8.1f}  {', '.join(worst)}"
        print(line)


# Scorers, each run in a process of its own --------------------------------------------------------


class Arrays:
    """Counts, rates and masks, and the seconds spent on reading them."""

    def __init__(self, path: Path) -> None:
        self.group = zarr.open_group(path, mode="r")
        self.patches: int = self.group["mask"].shape[0]
        self.seconds = self.cpu_seconds = 0.0

    def read(self, name: str, part: int | slice) -> np.ndarray:
        """One array of some patches."""
        start, start_cpu = time.perf_counter(), time.process_time()
        array = self.group[name][part]
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - start_cpu
        return array

    def batches(self, n: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Counts, rates and masks of the first patches, in batches."""
        for start in range(0, n, BATCH):
            part = slice(start, min(start + BATCH, n))
            yield tuple(self.read(name, part) for name in ("counts", "rate", "mask"))


class Streamed:
    """One of the arrays, read patch by patch by whoever indexes it."""

    def __init__(self, arrays: Arrays, name: str, n: int) -> None:
        self.arrays, self.name = arrays, name
        self.shape = (n, *arrays.group[name].shape[1:])

    def __getitem__(self, i: int) -> np.ndarray:
        return self.arrays.read(self.name, i)


def run_scorer(name: str, path: Path) -> dict[str, object]:
    """Run one scorer: seconds, peak memory in MB, per-gene scores."""
    score = SCORERS[name]
    score(Arrays(path), 1)  # imports and compiled loops
    arrays = Arrays(path)
    start, start_cpu = time.perf_counter(), time.process_time()
    result = score(arrays, arrays.patches)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    columns = ("pcc_2um", "pcc_8um", "ssim_2um")
    return {
        "seconds": round(seconds - arrays.seconds, 3),
        "cpu_seconds": round(cpu_seconds - arrays.cpu_seconds, 3),
        "reading_seconds": round(arrays.seconds, 3),
        "peak_mb": round(peak_mb()),
        "result": {column: list(map(float, result[column])) for column in columns},
    }


def by_loop(arrays: Arrays, n: int) -> dict[str, list[float]]:
    """The customary way."""
    from scipy.stats import pearsonr
    from skimage.metrics import structural_similarity

    counts, rates, mask = (arrays.read(name, slice(0, n)) for name in ("counts", "rate", "mask"))
    blocks = (n, PATCH_BINS // 4, 4, PATCH_BINS // 4, 4)
    mask8 = mask.reshape(blocks).sum((2, 4)) > 8
    scores: dict[str, list[float]] = {"pcc_2um": [], "pcc_8um": [], "ssim_2um": []}
    for g in range(counts.shape[1]):
        truth, pred = (np.where(mask, v[:, g], 0).astype(float) for v in (counts, rates))
        scores["pcc_2um"].append(pearsonr(truth[mask], pred[mask]).statistic)
        truth8, pred8 = (v.reshape(blocks).sum((2, 4))[mask8] for v in (truth, pred))
        scores["pcc_8um"].append(pearsonr(truth8, pred8).statistic)
        similarity = []
        for t, p in zip(truth, pred, strict=True):
            span = max(t.max(), p.max()) - min(t.min(), p.min())
            similarity.append(structural_similarity(t, p, data_range=span))
        scores["ssim_2um"].append(np.mean(similarity))
    return scores


def by_functions(arrays: Arrays, n: int) -> dict[str, np.ndarray]:
    """Ours: the same scores by the same names, three passes over the arrays."""
    from sparsity_trap import metrics

    def maps() -> list[Streamed]:
        return [Streamed(arrays, name, n) for name in ("counts", "rate", "mask")]

    return {
        "pcc_2um": metrics.pcc(*maps()),
        "pcc_8um": metrics.pcc(*maps(), bin_factor=4),
        "ssim_2um": metrics.ssim(*maps()).mean(0),
    }


def by_gene_scores(arrays: Arrays, n: int) -> dict[str, np.ndarray]:
    """Ours: every column of the per-gene table, in one pass."""
    from sparsity_trap.metrics import GeneScores

    scores = GeneScores(PANEL)
    for counts, rate, mask in arrays.batches(n):
        scores.update(counts, rate, mask)
    return scores.compute()


def by_gene_scores_on_gpu(arrays: Arrays, n: int) -> dict[str, np.ndarray]:
    """Ours, on a GPU; the copying of arrays to it counts as scoring."""
    import torch

    from sparsity_trap.metrics import GeneScores

    scores = GeneScores(PANEL)
    for counts, rate, mask in arrays.batches(n):
        scores.update(counts, torch.as_tensor(rate).cuda(), mask)
    return scores.compute()


SCORERS: dict[str, Callable[[Arrays, int], dict]] = {
    "scipy and scikit-image": by_loop,
    "pcc and ssim": by_functions,
    "GeneScores": by_gene_scores,
    "GeneScores, GPU": by_gene_scores_on_gpu,
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
