"""Put what the book reads into book/executed:

python workflow/stage_book.py preset=laptop source= cohort= -- results/laptop/notebooks/03_results.ipynb ...
"""

import json
import shutil
import sys
from pathlib import Path

import book_tables
import nbformat

from sparsity_trap import steps, viewers
from sparsity_trap.cohort import open_preset
from sparsity_trap.config import ROOT
from sparsity_trap.files import building
from sparsity_trap.training import open_tokens


def as_page(path: Path) -> nbformat.NotebookNode:
    """Executed notebook as a page: its title as text, papermill's parameters out of sight.

    A title that depends on a parameter is the output of the cell tagged ``title``, but the book
    takes titles from text alone.
    """
    notebook = nbformat.read(path, as_version=4)
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if "title" in tags:
            heading = cell.outputs[0]["data"]["text/markdown"]
            notebook.cells[i] = nbformat.v4.new_markdown_cell(heading)
        elif "injected-parameters" in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]
    return notebook


def ingest_table(path: Path) -> str:
    """Benchmark of reading as a Markdown table, or a sentence where none has been measured."""
    if not path.is_file():
        return "Not measured yet: `make bench` does it.\n"
    bench = json.loads(path.read_text())
    names = {
        "scanpy": "`scanpy.read_10x_h5` and subsetting",
        "matrix": "matrix",
        "matrix and totals": "matrix, with totals of all genes",
        "feature_slice": "`feature_slice.h5`",
        "inflate matrix": "*bound:* inflating the matrix alone",
        "inflate feature_slice": "*bound:* inflating the slices alone",
        "sort feature_slice": "*bound:* putting their entries in order, once in memory",
    }
    sizes = bench["sections"]
    lines = [
        "| seconds (peak MB) | "
        + " | ".join(f"{s['million_bins']:g} M bins" for s in sizes)
        + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for key, name in names.items():
        cells = [s["readers"].get(key) for s in sizes]
        text = [f"{c['seconds']:.2f} ({c['peak_mb']:.0f})" if c else "–" for c in cells]
        lines.append(f"| {name} | " + " | ".join(text) + " |")
    for reader in ("matrix", "feature_slice"):
        faster = [s["times_faster_than_scanpy"].get(reader) for s in sizes]
        text = [f"{f:.1f} ×" if f else "–" for f in faster]
        lines.append(f"| {names[reader]}, faster than scanpy | " + " | ".join(text) + " |")
    lines += _ingest_notes(sizes[-1], bench["twice_other_nonzeros"])
    side = bench["image_pixels"]
    for key, name in (("patch images", "images"), ("patches", "whole patch store")):
        cell = bench["patches"][key]
        lines.append(
            f"\n{name.capitalize()} of {cell['patches']} patches from a BigTIFF of {side:,} × "
            f"{side:,} pixels, {bench['image_counts']:,} counts: {cell['seconds']:.0f} s, peak "
            f"{cell['peak_mb']:.0f} MB."
        )
    same = all(s["arrays_equal"] for s in sizes)
    lines.append(
        f"\nMeasured on {bench['hardware']}, commit {bench['commit']}. The readers returned "
        f"{'identical' if same else '**different**'} arrays. Note: {bench['note']}."
    )
    return "\n".join(lines) + "\n"


def _ingest_notes(largest: dict, twice: dict) -> list[str]:
    """What bounds the reading, and what memory depends on, of the largest section measured."""
    entries = largest["panel_nonzeros"]
    seconds = {name: row.get("seconds") for name, row in largest["readers"].items()}
    memory = largest["readers"]["matrix"]["peak_mb"], twice["readers"]["matrix"]["peak_mb"]
    return [
        f"\nWhat bounds the {seconds['feature_slice']:.2f} s through `feature_slice.h5` at "
        f"{largest['million_bins']:g} M bins: inflating takes {seconds['inflate feature_slice']:.2f} s, "
        f"and putting {entries / 1e6:.1f} M entries of the panel in the order of bins "
        f"{seconds['sort feature_slice']:.2f} s "
        f"({seconds['sort feature_slice'] / entries * 1e9:.0f} ns each). The rest is the tissue mask "
        f"and {entries * 6 / 1e6:.0f} MB of result. Inflating the matrix takes "
        f"{seconds['inflate matrix']:.2f} s of {seconds['matrix']:.2f} s.",
        f"\nThe same bins and panel with {twice['nonzeros'] / 1e6:.0f} M instead of "
        f"{largest['nonzeros'] / 1e6:.0f} M non-zero entries: peak {memory[1]:.0f} instead of "
        f"{memory[0]:.0f} MB through the matrix. Memory grows with bins (by 8 to 12 bytes each) and "
        "entries of the panel (by 6 bytes each in the result, as many while it is put together), "
        "not with entries of other genes.",
    ]


if __name__ == "__main__":
    split = sys.argv.index("--")
    arguments = dict(pair.split("=", 1) for pair in sys.argv[1:split])
    preset = open_preset(**arguments)
    numbers = json.loads((preset.folder / "numbers.json").read_text())
    run = {
        "source": preset.source,
        "preset": preset.name,
        "commit": numbers["run.commit"],
        "hardware": numbers["run.hardware"],
        "seeds": sorted({r.seed for r in preset.all_runs()}),
        "training_seconds": numbers["training.seconds.total"],
    }
    with building(ROOT / "book" / "executed") as folder:
        folder.mkdir()
        for notebook in map(Path, sys.argv[split + 1 :]):
            # The book shows one run per arm, under the arm's name.
            name = notebook.stem.removesuffix("-s0").removesuffix(f"-{preset.main_patient}")
            nbformat.write(as_page(notebook), folder / f"{name}.ipynb")
        (folder / "numbers.json").write_text(json.dumps(numbers, indent=1))
        (folder / "run.json").write_text(json.dumps(run, indent=1))
        shutil.copytree(preset.folder / "tables", folder / "tables")
        shutil.copytree(preset.folder / "viewer", folder / "viewer")
        store = steps.store(preset, preset.main_patient)
        channels = open_tokens(preset, preset.main_patient)[0].shape[2]
        pages = {
            "arms.md": book_tables.arms(preset),
            "decoders.md": book_tables.decoders(preset, channels, len(store.genes)),
            "encoders.md": book_tables.encoders(),
            "claims.md": book_tables.claims(folder / "tables" / "claims.csv"),
            "scale.md": book_tables.scale(),
            "loss_explorer.html": viewers.loss_explorer(),
        }
        for name, text in pages.items():
            (folder / name).write_text(text)
        bench = ROOT / "results" / "bench" / "ingest.json"
        (folder / "ingest.md").write_text(ingest_table(bench))
