"""Put what the book reads into book/executed:

python workflow/stage_book.py preset=laptop source= cohort= -- results/laptop/notebooks/03_results.ipynb ...
"""

import json
import shutil
import sys
from pathlib import Path

import nbformat

from sparsity_trap.cohort import open_preset
from sparsity_trap.config import ROOT
from sparsity_trap.files import building


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
    side = bench["image_pixels"]
    for key, name in (("patch images", "images"), ("patches", "whole patch store")):
        cell = bench["patches"][key]
        lines.append(
            f"\n{name.capitalize()} of {cell['patches']} patches from a BigTIFF of {side:,} × "
            f"{side:,} pixels: {cell['seconds']:.0f} s, peak {cell['peak_mb']:.0f} MB."
        )
    same = all(s["arrays_equal"] for s in sizes)
    lines.append(
        f"\nMeasured on {bench['hardware']}, commit {bench['commit']}. The readers returned "
        f"{'identical' if same else '**different**'} arrays. Note: {bench['note']}."
    )
    return "\n".join(lines) + "\n"


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
        bench = ROOT / "results" / "bench" / "ingest.json"
        (folder / "ingest.md").write_text(ingest_table(bench))
