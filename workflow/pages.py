"""Executed notebooks as pages of the book: data of their figures, and how each was made."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat

from sparsity_trap.analysis.families import MARKED
from sparsity_trap.settings import SOURCE_NAMES, Preset, UserError


def as_page(
    notebook: nbformat.NotebookNode, name: str, preset: Preset, numbers: dict, folder: Path
) -> nbformat.NotebookNode:
    """Turn an executed notebook into a page.

    A title that depends on a parameter is the output of the cell tagged ``title``, but the book
    takes titles from text alone. Papermill's parameters go out of sight, the numbers behind each
    figure into a CSV file, the picture of the cell tagged ``front-page`` into ``front.jpg``, that
    of the cell tagged ``lead`` to the top, and a table at the end says how the page was made.

    Parameters
    ----------
    notebook
        As papermill left it; changed in place.
    name
        Of the page, such as ``04_sparsity``.
    preset
        What was run.
    numbers
        From ``numbers.json``.
    folder
        Of the staged book; tables go to ``tables/figures`` in it.

    Raises
    ------
    UserError
        A cell's output would show as the address of an object in memory.
    """
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if "title" in tags:
            heading = cell.outputs[0]["data"]["text/markdown"]
            notebook.cells[i] = nbformat.v4.new_markdown_cell(heading)
        elif "injected-parameters" in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]
        elif "front-page" in tags:
            picture = base64.b64decode(cell.outputs[0]["data"]["image/jpeg"])
            (folder / "front.jpg").write_bytes(picture)
            cell.outputs = []
        _refuse_objects(cell, name)
    _lead(notebook)
    files = _figure_data(notebook, name, folder / "tables" / "figures")
    made = _how_made(notebook, preset, numbers, files)
    notebook.cells.append(nbformat.v4.new_markdown_cell(made))
    return notebook


def _refuse_objects(cell: nbformat.NotebookNode, name: str) -> None:
    """Python's own words for an object, such as ``<Markdown object>``, tell a reader nothing."""
    for output in cell.get("outputs", []):
        shown = [kind for kind, content in output.get("data", {}).items() if content]
        text = output.get("data", {}).get("text/plain", "")
        if shown == ["text/plain"] and re.search(r"<[A-Za-z_][^<>]* (object|at 0x)", text):
            raise UserError(
                f"page {name}: the cell '{cell.source[:60]}' shows {text}: end it with something "
                "that the page can show"
            )


def _lead(notebook: nbformat.NotebookNode) -> None:
    """Show the picture of the cell tagged ``lead`` below the title; its code stays in its place."""
    for cell in notebook.cells:
        if "lead" in cell.metadata.get("tags", []):
            look = {"tags": ["remove-input"], "mystnb": cell.metadata.pop("mystnb")}
            # MyST-NB leaves out a cell without source.
            picture = nbformat.v4.new_code_cell("figure", metadata=look, outputs=cell.outputs)
            cell.outputs = []
            notebook.cells.insert(1, picture)
            return


def _figure_data(notebook: nbformat.NotebookNode, name: str, folder: Path) -> list[str]:
    """Write the CSV that each figure carries; return the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {}).pop("text/csv", None)
            if data is None:
                continue
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            label = figure.get("name", f"fig-{len(names) + 1}").removeprefix("fig-")
            names.append(f"{name}-{label}.csv")
            (folder / names[-1]).write_text(data, encoding="utf8")
    return names


def _code(text: str) -> str:
    """Text as code in a table of Markdown, whatever signs a path in it has."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{space}{' '.join(text.split()).replace('|', chr(92) + '|')}{space}{fence}"


def _how_made(
    notebook: nbformat.NotebookNode, preset: Preset, numbers: dict, files: list[str]
) -> str:
    """Markdown of the table that ends a page."""
    papermill, own = notebook.metadata.papermill, notebook.metadata.sparsity_trap
    parameters = papermill.parameters
    script = Path(papermill.input_path).with_suffix(".py").name
    runs = [run for run in preset.all_runs() if run.arm == parameters.get("arm", run.arm)]
    seeds = sorted({run.seed for run in runs})
    hashes = "; ".join(f"{p} `{numbers[f'cohort.sha256.{p}'][:12]}`" for p in preset.patients)
    given = " ".join(f"{key}={value}" for key, value in parameters.items() if value != "")
    family = MARKED.get(Path(script).stem)
    data = family and family.data
    rows = {
        "data": data or f"{SOURCE_NAMES[preset.source]}; SHA-256 of the patches: {hashes}",
        "script": f"{{download}}`{script} </notebooks/{script}>`, run with {_code(given)}",
        "data of the figures": ", ".join(
            f"{{download}}`{file} <tables/figures/{file}>`" for file in files
        )
        or "maps and tables only",
        "seed" if len(seeds) == 1 else "seeds": ", ".join(map(str, seeds)),
        "commit": f"`{own.commit}`",
        "hardware": own.hardware,
        "wall time": f"{papermill.duration:.0f} s for this page; "
        f"{numbers['training.seconds.total']:,.0f} s for the training of all runs",
    }
    if family:
        del rows["seed" if len(seeds) == 1 else "seeds"]
        rows["wall time"] = f"{papermill.duration:.0f} s"
    lines = [":::{dropdown} How this page was made", ":open:", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join([*lines, ":::"])
