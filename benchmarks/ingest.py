"""Reading of whole sections: seconds and peak memory against scanpy, and the bound below.

    python -m benchmarks.ingest [--sizes 1 2 4 8.7] [--repeats 3] [--folder CACHE] [--out JSON]

Sections are synthesised in the layout of Space Ranger: 18,085 genes, barcodes in random order (as
in real files), HDF5 chunks of 80,000 entries with shuffle and gzip, genes of the panel as frequent
as published for patient P5, about 12 non-zero entries per bin. The largest section is written once
more with twice as many non-zero entries of other genes. Readers take turns, each in a process of
its own on the same files, and the median of their runs is reported. Seconds do not include imports
or the disk (files are in the system's cache); peak memory is the largest resident memory of the
whole process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.processes import peak_mb, run_alone
from benchmarks.synthesis import (
    CHUNK,
    GRID,
    IMAGE_COUNTS,
    IMAGE_PIXELS,
    N_GENES,
    PATCHES_A_SIDE,
    write_image_section,
    write_section,
)
from sparsity_trap.bins import PATCH_BINS
from sparsity_trap.data.genes import PANEL
from sparsity_trap.data.inflate import in_threads, pieces, reader
from sparsity_trap.data.spaceranger import (
    MATRIX,
    open_slide,
    read_8um_table,
    read_counts,
)
from sparsity_trap.files import building
from workflow.bench_tables import ingest

if TYPE_CHECKING:
    import h5py
    import scipy.sparse as sp
    from anndata import AnnData

#: Peak memory of scanpy, measured on sections of up to 8.7 million bins (0.45), rounded up.
SCANPY_GIB_PER_MILLION_BINS = 0.6


def main() -> None:
    """Synthesise, measure each reader, write JSON, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 2, 4, 8.7])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each reader")
    parser.add_argument("--folder", type=Path, help="keep the synthesised sections here")
    parser.add_argument("--out", type=Path, default=Path("results/bench/ingest.json"))
    parser.add_argument("--run", nargs=2, metavar=("READER", "OUTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_reader(options.run[0], Path(options.run[1]))))
        return
    if min(options.sizes) <= 0 or max(options.sizes) > GRID**2 / 1e6:
        parser.error(f"--sizes are millions of bins, at most {GRID**2 / 1e6:.1f}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="ingest-"))
    try:
        report = measure(options.sizes, options.repeats, folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    with building(options.out) as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{ingest(report)}")
    print(f"written to {options.out}")


def measure(sizes: list[float], repeats: int, folder: Path) -> dict[str, object]:
    """Measure all readers on sections of some million bins each."""
    from sparsity_trap.files import commit, hardware

    memory_gib = _available_gib()
    sections = []
    for size in sizes:
        outs = _section(folder, size)
        skipped = {}
        needed = SCANPY_GIB_PER_MILLION_BINS * size
        if needed > 0.9 * memory_gib:
            why = f"needs about {needed:.0f} GiB, {memory_gib:.0f} GiB available"
            skipped["scanpy"] = {"skipped": why}
        rows = skipped | _run_all([name for name in READERS if name not in skipped], outs, repeats)
        sections.append({"million_bins": size, **_about(outs, rows), **_ratios(rows)})
    denser = _section(folder, max(sizes), other_genes=2)
    rows = _run_all(["matrix", "inflate matrix"], denser, repeats)
    image = folder / "image"
    if not image.is_dir():
        print(f"synthesising an image of {IMAGE_PIXELS} pixels a side ...", flush=True)
        with building(image) as partial_:
            write_image_section(partial_)
    return {
        "commit": commit(),
        "hardware": hardware(),
        "memory_available_gib": round(memory_gib, 1),
        "genes": N_GENES,
        "panel_genes": len(PANEL),
        "note": "barcodes in random order; seconds without imports or disk, median of "
        f"{repeats} runs; peak memory of the whole process",
        "sections": sections,
        "twice_other_nonzeros": {"million_bins": max(sizes), **_about(denser, rows)},
        "image_pixels": IMAGE_PIXELS,
        "image_counts": IMAGE_COUNTS,
        "patches": _run_all(PATCH_READERS, image, 1),
    }


def _section(folder: Path, size: float, other_genes: int = 1) -> Path:
    """A section of some million bins, synthesised where it is not yet in the folder."""
    outs = folder / (f"section-{size:g}" + ("-twice" if other_genes == 2 else ""))
    if not outs.is_dir():
        print(f"synthesising a section of {size:g} million bins ...", flush=True)
        with building(outs) as partial_:
            write_section(partial_, round(size * 1e6), other_genes)
    return outs


def _run_all(names: Iterable[str], outs: Path, repeats: int) -> dict[str, dict]:
    """Run readers in turns; the median of their seconds, the largest of their peaks."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, done in runs.items():
            print(f"{outs.name}: {name}", flush=True)
            done.append(run_alone("benchmarks.ingest", "--run", name, str(outs)))
    return {
        name: done[-1]
        | {
            "seconds": round(statistics.median(run["seconds"] for run in done), 3),
            "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in done), 3),
            "peak_mb": max(run["peak_mb"] for run in done),
            "runs": [run["seconds"] for run in done],
        }
        for name, done in runs.items()
    }


def _about(outs: Path, rows: dict[str, dict]) -> dict[str, object]:
    digests = {row["digest"] for row in rows.values() if row.get("digest")}
    return {
        **json.loads((outs / "section.json").read_text()),
        "arrays_equal": len(digests) == 1,
        "readers": rows,
    }


def _ratios(rows: dict[str, dict]) -> dict[str, dict[str, float]]:
    seconds = {name: row["seconds"] for name, row in rows.items() if "seconds" in row}
    ours = seconds["matrix"]
    faster = {"matrix": round(seconds["scanpy"] / ours, 2)} if "scanpy" in seconds else {}
    return {
        "times_faster_than_scanpy": faster,
        "seconds_over_bound": {"matrix": round(ours / seconds["inflate matrix"], 2)},
    }


def _available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return 0.0


# Readers, each run in a process of its own --------------------------------------------------------


def run_reader(name: str, outs: Path) -> dict[str, object]:
    """Run one reader: seconds, peak memory in MB, digest of the counts it gave."""
    read, digest = (READERS | PATCH_READERS)[name]
    prepare(name)
    _warm(outs)
    start, cpu = time.perf_counter(), time.process_time()
    result = read(outs)
    row: dict[str, object] = {
        "seconds": round(time.perf_counter() - start, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "peak_mb": round(peak_mb()),
    }
    if digest:
        row["digest"] = digest(result)
    if name in PATCH_READERS:
        row["patches"] = result
    return row


def _warm(outs: Path) -> None:
    """Read all files once, so that seconds do not depend on what the system had in its cache."""
    for path in outs.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass


def prepare(name: str) -> None:
    """Import what a reader imports, so that its seconds are of reading alone."""
    import h5py  # noqa: F401

    if name == "scanpy":
        import scanpy  # noqa: F401
    else:
        import imagecodecs  # noqa: F401
        import pyarrow.parquet  # noqa: F401
        import scipy.sparse  # noqa: F401


def by_scanpy(outs: Path) -> AnnData:
    """The customary way: read all, keep the panel."""
    import scanpy

    whole = scanpy.read_10x_h5(outs / MATRIX)
    return whole[:, list(PANEL)].copy()


def by_matrix(outs: Path) -> sp.csc_array:
    """Ours: pieces of the matrix pass by, the panel is kept."""
    return read_counts(outs, PANEL)


def by_8um_table(outs: Path) -> None:
    """All genes, summed to 8 µm, for scanpy's quality control and variable genes."""
    read_8um_table(outs)


def inflate_matrix(outs: Path) -> None:
    """Bound of the matrix: read its compressed chunks, inflate them, do nothing with them."""
    import h5py

    with h5py.File(outs / MATRIX) as file:
        matrix = file["matrix"]
        _inflate_all(matrix[name] for name in ("barcodes", "indptr", "indices", "data"))


def inflate_matrix_by_zlib(outs: Path) -> None:
    """The same through h5py: zlib in one thread, as any reader that slices."""
    import h5py

    with h5py.File(outs / MATRIX) as file:
        for name in ("barcodes", "indptr", "indices", "data"):
            dataset = file["matrix"][name]
            for start in range(0, len(dataset), CHUNK):
                dataset[start : start + CHUNK]


def _inflate_all(datasets: Iterable[h5py.Dataset]) -> None:
    """Read and inflate all chunks in threads, and drop what they hold."""

    def tasks() -> Iterator[Callable[[], np.ndarray]]:
        for dataset in datasets:
            read = reader(dataset, lambda planes: planes[0, :0])
            yield from (partial(read, *piece) for piece in pieces(dataset, CHUNK))

    for _ in in_threads(tasks()):
        pass


def digest_of_counts(counts: sp.csc_array) -> str:
    """Digest of counts ``[bins of the grid, genes]`` with sorted columns (csc)."""
    digest = hashlib.sha256()
    digest.update(counts.indptr.astype(np.int64))
    digest.update(counts.indices.astype(np.int32))
    digest.update(counts.data.astype(np.uint16))
    return digest.hexdigest()


def digest_of_anndata(data: AnnData) -> str:
    """Digest of the same counts from scanpy, laid out on the grid."""
    import scipy.sparse as sp

    place = data.obs_names.to_numpy().astype("S19").view(np.uint8).reshape(-1, 19) - np.uint8(48)
    power = 10 ** np.arange(4, -1, -1)
    bins = (place[:, 8:13] @ power) * GRID + place[:, 14:19] @ power
    counts = data.X.tocoo()
    shape = (GRID * GRID, data.shape[1])
    grid = sp.coo_array((counts.data, (bins[counts.row], counts.col)), shape=shape).tocsc()
    grid.sort_indices()
    return digest_of_counts(grid)


READERS: dict[str, tuple[Callable, Callable | None]] = {
    "scanpy": (by_scanpy, digest_of_anndata),
    "matrix": (by_matrix, digest_of_counts),
    "8 um table": (by_8um_table, None),
    "inflate matrix": (inflate_matrix, None),
    "inflate by zlib": (inflate_matrix_by_zlib, None),
}


# Patches ------------------------------------------------------------------------------------------


def cut_patches(outs: Path) -> int:
    """Write the whole patch store of a section, as the data step does; gives its patches."""
    from sparsity_trap.data.patches import PatchStore, write_store
    from sparsity_trap.settings import Patches

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.zarr"
        write_store(
            open_slide(outs),
            PANEL,
            store,
            patient="bench",
            source="spaceranger",
            settings=Patches(),
        )
        return len(PatchStore(store))


def cut_images(outs: Path) -> int:
    """Cut the pictures alone: open the image, read and resample the window of each patch."""
    from sparsity_trap.data.geometry import GridFit
    from sparsity_trap.data.image import open_image
    from sparsity_trap.data.patches import resample

    pitch = IMAGE_PIXELS / (PATCHES_A_SIDE * PATCH_BINS)
    fit = GridFit(np.array([[pitch, 0, pitch / 2], [0, pitch, pitch / 2]]), 0.0, 0.0)
    starts = range(0, PATCHES_A_SIDE * PATCH_BINS, PATCH_BINS)
    cut = 0
    with open_image(outs / "tissue_image.btf") as image:
        for row in starts:
            for col in starts:
                cut += len(resample(image, fit, row, col, (GRID, GRID))) > 0
    return cut


PATCH_READERS: dict[str, tuple[Callable, Callable | None]] = {
    "patches": (cut_patches, None),
    "patch images": (cut_images, None),
}


if __name__ == "__main__":
    main()
