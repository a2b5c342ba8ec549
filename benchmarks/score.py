"""Scoring a whole section's predictions from a file: seconds and peak memory, beside a plain loop.

    python -m benchmarks.score [--million-bins 8.7] [--folder CACHE] [--out JSON]

A section of 2 µm bins in the layout of Space Ranger is synthesised as for `benchmarks.ingest`, and
predictions of its 50 genes as AnnData: float32, a row per bin, rows in random order, gzip. `score`
reads both and gives the model, its nulls, ceilings and protocols: everything of a report card but
the page. The loop is the customary way: all of X in memory, then `scipy.stats.pearsonr` and
`scipy.stats.spearmanr` of each gene at 2 µm, of the model alone. Each runs in a process of its own;
seconds hold no imports and no compiling of loops, peak memory is that of the whole process.
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

from benchmarks.processes import peak_mb, run_alone
from benchmarks.synthesis import BATCH, GRID, write_section
from sparsity_trap.data.genes import PANEL, panel_table
from sparsity_trap.data.spaceranger import read_array_shape, read_counts, read_positions
from sparsity_trap.files import building

THREADS = 2
FACTOR = 64  # bins along one of the squares in which predictions vary


def main() -> None:
    """Synthesise, measure both, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--million-bins", type=float, default=8.7)
    parser.add_argument("--folder", type=Path, help="keep the synthesised files here")
    parser.add_argument("--out", type=Path, default=Path("results/bench/score.json"))
    parser.add_argument("--run", nargs=2, metavar=("SCORER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_scorer(options.run[0], Path(options.run[1]))))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="score-"))
    try:
        report = measure(round(options.million_bins * 1e6), folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    with building(options.out) as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print(f"written to {options.out}")


def measure(bins: int, folder: Path) -> dict[str, object]:
    """Measure both on the same files."""
    from sparsity_trap.files import commit, hardware

    place = folder / f"{bins}"
    if not place.is_dir():
        print(f"synthesising {bins / 1e6:g} million bins ...", flush=True)
        with building(place) as partial:
            write_section(partial / "outs", bins)
            write_predictions(partial / "predictions.h5ad", partial / "outs")
    rows = {}
    for name in SCORERS:
        print(name, flush=True)
        rows[name] = run_alone(
            "benchmarks.score", "--run", name, str(place), OMP_NUM_THREADS=str(THREADS)
        )
    results = [row.pop("pcc_2um") for row in rows.values()]
    difference = float(np.abs(np.subtract(*results)).max())
    return {
        "commit": commit(),
        "hardware": hardware(),
        "threads": THREADS,
        "bins": bins,
        "genes": len(PANEL),
        "largest_difference": difference,
        "scorers": rows,
    }


def run_scorer(name: str, folder: Path) -> dict[str, object]:
    """Run one of both: seconds, CPU seconds, peak memory in MB, PCC at 2 µm of every gene."""
    SCORERS[name](None)  # imports and compiled loops
    start, start_cpu = time.perf_counter(), time.process_time()
    pcc = SCORERS[name](folder)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_mb": round(peak_mb()),
        "pcc_2um": list(map(float, pcc)),
    }


def by_score(folder: Path | None) -> np.ndarray:
    """Ours: the model, eight nulls, two ceilings and every protocol."""
    import sparsity_trap as st
    from sparsity_trap.score.pairing import pair

    if folder is None:
        counts = np.ones((2, 2, 32, 32), np.uint16)
        mask = np.ones((2, 32, 32), bool)
        return st.evaluate(counts, counts.astype(np.float32), mask).scores["model"]["pcc_2um"]
    found = pair(folder / "predictions.h5ad", folder / "outs", units="counts").evaluate()
    return found.scores["model"]["pcc_2um"]


def by_loop(folder: Path | None) -> np.ndarray:
    """The customary way: everything in memory, two correlations of the model."""
    import anndata
    from scipy.stats import pearsonr, spearmanr

    if folder is None:
        return np.zeros(0)
    adata = anndata.read_h5ad(folder / "predictions.h5ad")
    _, columns = read_array_shape(folder / "outs")
    counts = read_counts(folder / "outs", PANEL)
    place = adata.obs["array_row"].to_numpy() * columns + adata.obs["array_col"].to_numpy()
    scores = []
    for g in range(len(PANEL)):
        truth = counts[:, [g]].toarray()[place, 0]
        scores.append(pearsonr(truth, adata.X[:, g]).statistic)
        spearmanr(truth, adata.X[:, g])
    return np.array(scores)


SCORERS: dict[str, Callable[[Path | None], np.ndarray]] = {"score": by_score, "loop": by_loop}


def write_predictions(path: Path, outs: Path) -> None:
    """Predictions of every bin in tissue as AnnData lays them out, written in bounded memory."""
    import anndata
    import h5py
    import pandas as pd

    rows, cols = np.nonzero(read_positions(outs).in_tissue)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(rows))
    rows, cols = rows[order].astype(np.int32), cols[order].astype(np.int32)
    mean = -np.log(panel_table()["published_sparsity"].to_numpy())
    side = -(-GRID // FACTOR)
    level = rng.gamma(2, 0.5, (len(PANEL), side, side)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        var = pd.DataFrame(index=list(PANEL))
        anndata.io.write_elem(file, "var", var)
        x = file.create_dataset(
            "X", (len(rows), len(PANEL)), np.float32, chunks=(8192, len(PANEL)), compression="gzip"
        )
        x.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            x[part] = (mean[:, None] * level[:, rows[part] // FACTOR, cols[part] // FACTOR]).T
        names = np.char.add(np.char.add(np.char.zfill(rows.astype("S5"), 5), b"_"),
                            np.char.zfill(cols.astype("S5"), 5))  # fmt: skip
        index = np.char.add(np.char.add(b"s_002um_", names), b"-1").astype(str)
        obs = pd.DataFrame({"array_row": rows, "array_col": cols}, index=index)
        anndata.io.write_elem(file, "obs", obs)


if __name__ == "__main__":
    main()
