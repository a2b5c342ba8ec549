"""Reading of whole sections: seconds and peak memory against scanpy, and the bound below.

    python -m benchmarks.ingest [--sizes 1 2 4 8.7] [--repeats 3] [--folder CACHE] [--out JSON]

Sections are synthesised in the layout of Space Ranger: 18,085 genes, barcodes in random order (as
in real files), HDF5 chunks of 80,000 entries with shuffle and gzip, genes of the panel as frequent
as published for patient P5, about 12 non-zero entries per bin. `feature_slice.h5` holds the maps
of the panel only, including counts of bins outside tissue, in random order. The largest section is
written once more with twice as many non-zero entries of other genes. Readers take turns, each in a
process of its own on the same files, and the median of their runs is reported. Seconds do not
include imports or the disk (files are in the system's cache); peak memory is the largest resident
memory of the whole process.
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
from sparsity_trap.data.genes import PANEL, PUBLISHED_SPARSITY
from sparsity_trap.data.inflate import in_threads, pieces, reader
from sparsity_trap.data.patches import PATCH_BINS
from sparsity_trap.data.spaceranger import SQUARE, in_order, open_slide
from sparsity_trap.files import building

if TYPE_CHECKING:
    import h5py
    import scipy.sparse as sp
    from anndata import AnnData

GRID = 3350  # bins a side of a 6.5 mm capture area
N_GENES = 18_085
NONZEROS_PER_BIN = 12.0
CHUNK = 80_000
BATCH = 200_000  # bins synthesised at a time
IMAGE_PIXELS, TILE = 20_000, 512
IMAGE_COUNTS = 10**6  # entries of the panel in its section
PATCHES_A_SIDE = 21  # of 128 bins: at 3.7 pixels per µm they fill the image
#: Peak memory of scanpy, measured on sections of up to 8.7 million bins (0.45), rounded up.
SCANPY_GIB_PER_MILLION_BINS = 0.6
MATRIX = f"binned_outputs/{SQUARE}/filtered_feature_bc_matrix.h5"
HDF5 = {"chunks": (CHUNK,), "maxshape": (None,), "compression": "gzip", "shuffle": True}


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
    print_table(report)
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
    rows = _run_all(["matrix", "matrix and totals", "inflate matrix"], denser, repeats)
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
        "note": "feature_slice.h5 synthesised for the panel only; barcodes in random order; "
        f"seconds without imports or disk, median of {repeats} runs; peak memory of the whole process",
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


def print_table(report: dict) -> None:
    """Print what was measured, one line per reader and section."""
    print(f"\n{report['hardware']}")
    print(f"{'million bins':>12}  {'reader':<22}{'seconds':>9}{'peak MB':>9}  x scanpy")
    for section in [*report["sections"], report["twice_other_nonzeros"]]:
        faster = section.get("times_faster_than_scanpy", {})
        for name, row in section["readers"].items():
            line = f"{section['million_bins']:>12g}  {name:<22}"
            if "skipped" in row:
                print(f"{line} {row['skipped']}")
                continue
            print(f"{line}{row['seconds']:>9.2f}{row['peak_mb']:>9.0f}  {faster.get(name, '')}")
        print(f"{'':>14}{section['nonzeros']:,} non-zeros, {section['panel_nonzeros']:,} of the panel; "
              f"arrays equal: {section['arrays_equal']}; "
              f"seconds over bound: {section.get('seconds_over_bound')}")  # fmt: skip
    for name, row in report["patches"].items():
        print(f"{name} of {report['image_pixels']} x {report['image_pixels']} pixels: "
              f"{row['patches']} in {row['seconds']:.1f} s, peak {row['peak_mb']} MB")  # fmt: skip


def _ratios(rows: dict[str, dict]) -> dict[str, dict[str, float]]:
    seconds = {name: row["seconds"] for name, row in rows.items() if "seconds" in row}
    base = seconds.get("scanpy")
    bound = {"matrix": "inflate matrix", "feature_slice": "inflate feature_slice"}
    return {
        "times_faster_than_scanpy": {
            name: round(base / seconds[name], 2) for name in bound if base and name in seconds
        },
        "seconds_over_bound": {
            name: round(seconds[name] / seconds[floor], 2) for name, floor in bound.items()
        },
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
    source = load_entries(outs) if read is sort_entries else outs
    start, cpu = time.perf_counter(), time.process_time()
    result = read(source)
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
    """Ours, when there is no feature_slice.h5 (a missing one is what the open slide sees)."""
    slide = open_slide(outs / "no-slices", outs / "none.tif")
    return slide.counts(PANEL)


def by_matrix_with_totals(outs: Path) -> sp.csc_array:
    """Ours, with totals of all genes in the same pass."""
    slide = open_slide(outs / "no-slices", outs / "none.tif")
    return slide.counts_and_totals(PANEL)[0]


def by_feature_slice(outs: Path) -> sp.csc_array:
    """Ours, from feature_slice.h5."""
    return open_slide(outs, outs / "none.tif").counts(PANEL)


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


def inflate_feature_slice(outs: Path) -> None:
    """Bound of feature_slice.h5: the panel's maps and the tissue mask."""
    import h5py

    with h5py.File(outs / "feature_slice.h5") as file:
        groups = [*file["feature_slices"].values()]
        datasets = [group[name] for group in groups for name in ("row", "col", "data")]
        _inflate_all([*datasets, file["masks/filtered/row"], file["masks/filtered/col"]])


def _inflate_all(datasets: Iterable[h5py.Dataset]) -> None:
    """Read and inflate all chunks in threads, and drop what they hold."""

    def tasks() -> Iterator[Callable[[], np.ndarray]]:
        for dataset in datasets:
            read = reader(dataset, lambda planes: planes[0, :0])
            yield from (partial(read, *piece) for piece in pieces(dataset, CHUNK))

    for _ in in_threads(tasks()):
        pass


def load_entries(outs: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bin and count of the entries of each gene, as they lie in feature_slice.h5."""
    import h5py

    with h5py.File(outs / "feature_slice.h5") as file:
        return [
            (
                (group["row"][:] * np.uint32(GRID) + group["col"][:]).view(np.int32),
                group["data"][:].astype(np.uint16),
            )
            for group in file["feature_slices"].values()
        ]


def sort_entries(genes: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Second bound of feature_slice.h5: its entries put in the order of bins, once in memory."""
    for _ in in_threads(partial(in_order, *entries, Path()) for entries in genes):
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
    "matrix and totals": (by_matrix_with_totals, digest_of_counts),
    "feature_slice": (by_feature_slice, digest_of_counts),
    "inflate matrix": (inflate_matrix, None),
    "inflate by zlib": (inflate_matrix_by_zlib, None),
    "inflate feature_slice": (inflate_feature_slice, None),
    "sort feature_slice": (sort_entries, None),
}


# Synthesis ----------------------------------------------------------------------------------------


def write_section(outs: Path, n_bins: int, other_genes: int = 1) -> None:
    """Write a section of ``n_bins`` bins under tissue, in bounded memory.

    With ``other_genes`` of 2, twice as many non-zero entries of genes outside the panel, and the
    same bins and counts of the panel.
    """
    import h5py

    square = outs / "binned_outputs" / SQUARE
    (square / "spatial").mkdir(parents=True)
    rng = np.random.default_rng(n_bins)
    mean, panel_of = _gene_means(rng)
    other, more_rng = mean.copy(), np.random.default_rng([n_bins, 1])
    other[panel_of] = 0
    # Tissue is the middle of the capture area; the matrix lists its bins in random order.
    side = np.abs(np.arange(GRID) - (GRID - 1) / 2)
    distance = np.maximum(side[:, None], side).astype(np.float32).ravel()
    distance += rng.random(distance.size, dtype=np.float32) / 4
    bins = np.argpartition(distance, n_bins - 1).astype(np.int32)
    under_tissue, outside = np.split(bins, [n_bins])
    rng.shuffle(under_tissue)
    rng.shuffle(outside)
    in_tissue = np.zeros(GRID * GRID, bool)
    in_tissue[under_tissue] = True
    _write_positions(square, in_tissue.reshape(GRID, GRID))

    slices: list[list[tuple]] = [[] for _ in PANEL]
    names = np.array([f"GENE{i}" for i in range(N_GENES)], "S")
    names[panel_of] = np.array(PANEL, "S")
    with h5py.File(outs / MATRIX, "w") as file:
        matrix = file.create_group("matrix")
        _write_features(matrix, names)
        indices = matrix.create_dataset("indices", (0,), "int64", **HDF5)
        data = matrix.create_dataset("data", (0,), "int32", **HDF5)
        barcodes = matrix.create_dataset("barcodes", (n_bins,), "S21", **HDF5)
        indptr = np.zeros(n_bins + 1, np.int64)
        cumulative = np.cumsum(mean) / mean.sum()
        for first in range(0, n_bins, BATCH):
            part = under_tissue[first : first + BATCH]
            barcodes[first : first + len(part)] = _barcodes(part)
            bin_, gene, count = _draw(rng, cumulative, len(part), NONZEROS_PER_BIN)
            _collect(slices, panel_of, part[bin_], gene, count)
            if other_genes == 2:
                more = _draw(more_rng, np.cumsum(other) / other.sum(), len(part), other.sum())
                bin_, gene, count = _add((bin_, gene, count), more)
            at = len(data)
            for dataset, values in ((indices, gene), (data, count)):
                dataset.resize(at + len(values), axis=0)
                dataset[at:] = values
            ends = np.cumsum(np.bincount(bin_, minlength=len(part)))
            indptr[first + 1 : first + 1 + len(part)] = at + ends
        matrix.create_dataset("indptr", data=indptr, **HDF5)
        matrix["shape"] = np.array([N_GENES, n_bins], np.int32)
        nonzeros = len(data)
    part = outside[: 10**6]
    bin_, gene, count = _draw(rng, cumulative, len(part), NONZEROS_PER_BIN / 20)
    _collect(slices, panel_of, part[bin_], gene, count)

    panel_nonzeros = 0
    with h5py.File(outs / "feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps({"nrows": GRID, "ncols": GRID, "spot_pitch": 2.0})
        _write_features(file, names)
        for i, parts in enumerate(slices):
            bins, count = (np.concatenate(values) for values in zip(*parts, strict=True))
            parts.clear()
            panel_nonzeros += len(bins)
            _write_coo(file.create_group(f"feature_slices/{panel_of[i]}"), bins, count)
        _write_coo(file.create_group("masks/filtered"), under_tissue, np.ones(n_bins, np.uint32))
    # A second door to the same files, without feature_slice.h5.
    (outs / "no-slices").mkdir()
    (outs / "no-slices" / "binned_outputs").symlink_to("../binned_outputs")
    (outs / "none.tif").touch()
    (outs / "section.json").write_text(
        json.dumps({"nonzeros": nonzeros, "panel_nonzeros": panel_nonzeros})
    )


def _gene_means(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean non-zero entries per bin of each gene, and the feature number of each panel gene."""
    panel = np.array(
        [100 - zero for group in PUBLISHED_SPARSITY.values() for zero in group.values()]
    )
    mean = 1 / np.arange(20, 20 + N_GENES) ** 0.9
    mean *= (NONZEROS_PER_BIN - panel.sum() / 100) / mean.sum()
    mean = rng.permutation(mean)
    panel_of = rng.choice(N_GENES, len(PANEL), replace=False)
    mean[panel_of] = panel / 100
    return mean, panel_of


def _draw(
    rng: np.random.Generator, cumulative: np.ndarray, n_bins: int, per_bin: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bin, gene and count of non-zero entries, in the order of bins and genes."""
    bin_ = np.repeat(np.arange(n_bins), rng.poisson(per_bin, n_bins))
    gene = np.searchsorted(cumulative, rng.random(len(bin_)), "right").clip(max=N_GENES - 1)
    entries, count = np.unique(bin_ * N_GENES + gene, return_counts=True)
    bin_, gene = np.divmod(entries, N_GENES)
    return bin_, gene, count.astype(np.int32)


def _add(*drawn: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Sum of what was drawn, again in the order of bins and genes."""
    bin_, gene, count = map(np.concatenate, zip(*drawn, strict=True))
    entries, place = np.unique(bin_ * N_GENES + gene, return_inverse=True)
    return [*np.divmod(entries, N_GENES), np.bincount(place, count).astype(np.int32)]


def _collect(
    slices: list[list[tuple]],
    panel_of: np.ndarray,
    bins: np.ndarray,
    gene: np.ndarray,
    count: np.ndarray,
) -> None:
    column_of = np.full(N_GENES, -1, np.int16)
    column_of[panel_of] = np.arange(len(panel_of))
    column = column_of[gene]
    for i, parts in enumerate(slices):
        kept = np.flatnonzero(column == i)
        parts.append((bins[kept], count[kept].astype(np.uint16)))


def _write_coo(group: h5py.Group, bins: np.ndarray, count: np.ndarray) -> None:
    row, col = np.divmod(bins, np.int32(GRID))
    for name, values in (("row", row), ("col", col), ("data", count)):
        group.create_dataset(name, data=values.astype(np.uint32), **HDF5)


def _write_features(parent: h5py.Group, names: np.ndarray) -> None:
    features = parent.create_group("features")
    features["id"] = np.array([f"ENSG{i:011d}" for i in range(len(names))], "S")
    features["name"] = names
    features["feature_type"] = np.array(["Gene Expression"] * len(names), "S")
    features["genome"] = np.array(["GRCh38"] * len(names), "S")


def _barcodes(bins: np.ndarray) -> np.ndarray:
    text = np.tile(np.frombuffer(b"s_002um_RRRRR_CCCCC-1", np.uint8), (len(bins), 1))
    row, col = np.divmod(bins, GRID)
    for number, first in ((row, 8), (col, 14)):
        for i in range(5):
            text[:, first + i] = 48 + number // 10 ** (4 - i) % 10
    return text.view("S21")[:, 0]


def _write_positions(square: Path, in_tissue: np.ndarray, pixels_per_bin: float = 7.3) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = square / "spatial" / "tissue_positions.parquet"
    rows, cols = in_tissue.shape
    col = np.arange(cols, dtype=np.uint32)
    writer = None
    for row in range(0, rows, 50):
        tissue = in_tissue[row : row + 50]
        array_row = np.repeat(np.arange(row, row + len(tissue), dtype=np.uint32), cols)
        array_col = np.tile(col, len(tissue))
        barcode = _barcodes(array_row.astype(np.int32) * GRID + array_col.astype(np.int32))
        table = pa.table(
            {
                "barcode": pa.array(barcode.astype("U21")),
                "in_tissue": tissue.ravel().astype(np.uint8),
                "array_row": array_row,
                "array_col": array_col,
                "pxl_row_in_fullres": (array_row + 0.5) * pixels_per_bin,
                "pxl_col_in_fullres": (array_col + 0.5) * pixels_per_bin,
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
    scales = {"bin_size_um": 2.0, "microns_per_pixel": 2 / pixels_per_bin}
    (square / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))


# Patches ------------------------------------------------------------------------------------------


def write_image_section(outs: Path) -> None:
    """Write a section whose image is a BigTIFF of 20,000 x 20,000 pixels in JPEG tiles."""
    import h5py
    import tifffile

    square = outs / "binned_outputs" / SQUARE
    (square / "spatial").mkdir(parents=True)
    in_tissue = np.ones((PATCHES_A_SIDE * PATCH_BINS,) * 2, bool)
    _write_positions(square, in_tissue, IMAGE_PIXELS / len(in_tissue))
    rng = np.random.default_rng(0)
    with h5py.File(outs / MATRIX, "w") as file:
        matrix = file.create_group("matrix")
        _write_features(matrix, np.array(PANEL, "S"))
        row, col = np.divmod(
            rng.choice(in_tissue.size, IMAGE_COUNTS, replace=False), len(in_tissue)
        )
        matrix["barcodes"] = _barcodes(row * GRID + col)
        matrix["indices"] = rng.integers(len(PANEL), size=IMAGE_COUNTS)
        matrix["data"] = np.ones(IMAGE_COUNTS, np.int32)
        matrix["indptr"] = np.arange(IMAGE_COUNTS + 1)
    base = rng.integers(120, 255, (TILE // 8, TILE // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    n_tiles = (-(-IMAGE_PIXELS // TILE)) ** 2
    tifffile.imwrite(
        outs / "tissue_image.btf",
        (np.roll(base, int(shift), axis=0) for shift in rng.integers(TILE, size=n_tiles)),
        shape=(IMAGE_PIXELS, IMAGE_PIXELS, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="rgb",
        compression="jpeg",
        bigtiff=True,
    )


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
    from sparsity_trap.data.patches import resample
    from sparsity_trap.data.spaceranger import GridFit

    pitch = IMAGE_PIXELS / (PATCHES_A_SIDE * PATCH_BINS)
    fit = GridFit(np.array([[pitch, 0, pitch / 2], [0, pitch, pitch / 2]]), 0.0, 0.0)
    starts = range(0, PATCHES_A_SIDE * PATCH_BINS, PATCH_BINS)
    cut = 0
    with open_slide(outs).open_image() as image:
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
