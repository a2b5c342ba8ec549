"""A build as one file that can be deposited, an RO-Crate:

python workflow/archive.py preset=laptop source= cohort=
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import citation
import crate
import pandas as pd

from sparsity_trap.data.sections import open_preset
from sparsity_trap.files import building
from sparsity_trap.presets import other_worlds
from sparsity_trap.settings import ROOT, SOURCE_NAMES, Preset, UserError

#: The source, by name: what else lies in the checkout, such as a cohort file, is somebody's own.
SOURCE = (
    "binder", ".ci", ".github", "benchmarks", "book", "notebooks", "presets", "published",
    "results/bench", "results/real_tiles", "sparsity_trap", "tests", "workflow",
    ".dockerignore", ".gitignore", ".zenodo.json", "CHANGELOG.md", "CITATION.cff",
    "CONTRIBUTING.md", "Dockerfile", "LICENSE", "Makefile", "README.md", "_config.yml", "_toc.yml",
    "codemeta.json", "cohort.example.yaml", "content", "environment.yml", "paper.bib", "paper.md",
    "pyproject.toml",
)  # fmt: skip

README = """# {title}

{source} · preset {preset} · commit {commit}

| | |
|---|---|
{rows}

`ro-crate-metadata.json` says the same to programs (RO-Crate 1.1, Workflow Run Crate 0.5). Sections,
tokens, weights and predictions are not in here: `make book PRESET={preset}` in `source/` makes them
again, from the same sections where those are real.
"""


def source_files(root: Path = ROOT) -> list[Path]:
    """Files of the source, sorted; without what was computed or compiled among them."""
    patterns = [*SOURCE, "requirements*"]
    tops = [path for pattern in patterns for path in root.glob(pattern)]
    found = [p for top in tops for p in (top.rglob("*") if top.is_dir() else [top]) if p.is_file()]
    return sorted(p for p in found if not _is_computed(p.relative_to(root)))


def _is_computed(path: Path) -> bool:
    parts = set(path.parts)
    hidden = path.parts[0] == "book" and any(part.startswith(".") for part in path.parts)
    return hidden or bool({"__pycache__", "executed"} & parts) or path.suffix == ".ipynb"


def gene_table(preset: Preset) -> pd.DataFrame:
    """Scores of each gene in each run of a preset and of its other worlds."""
    parts = []
    for world in (preset, *other_worlds(preset).values()):
        for run in world.all_runs():
            genes = pd.read_parquet(world.run_dir(run) / "genes.parquet")
            named = {"world": world.world or "home", "run": run.name, **run.model_dump()}
            for place, (name, value) in enumerate(named.items()):
                genes.insert(place, name, value)
            parts.append(genes)
    return pd.concat(parts, ignore_index=True)


def provenance(preset: Preset) -> dict[str, Path]:
    """Path in the crate -> record of a run, for all runs of a preset and of its worlds."""
    return {
        f"results/provenance/{world.world or 'home'}/{run.name}.json": (
            world.run_dir(run) / "provenance.json"
        )
        for world in (preset, *other_worlds(preset).values())
        for run in world.all_runs()
    }


def collect(preset: Preset, root: Path = ROOT) -> dict[str, Path | bytes]:
    """What the archive holds, by path in it: files, or their content.

    Raises
    ------
    UserError
        There is no book, or it is one of another preset or of other sections.
    """
    built, staged = root / "_build" / "html", root / "book" / "executed"
    if not (built / "index.html").is_file() or not (staged / "run.json").is_file():
        raise UserError("there is no book in _build/html yet: run make book")
    run = json.loads((staged / "run.json").read_text())
    if (run["preset"], run["source"]) != (preset.name, preset.source):
        raise UserError(
            f"the book in _build/html is of preset {run['preset']}, source {run['source']}: run "
            f"make book PRESET={preset.name} SOURCE={preset.source} first"
        )
    files: dict[str, Path | bytes] = {
        f"book/{path.relative_to(built).as_posix()}": path
        for path in sorted(built.rglob("*"))
        if path.is_file()
    }
    pdf = root / "_build" / "pdf" / "the-sparsity-trap.pdf"
    # Older than the pages, it is of another build.
    if pdf.is_file() and pdf.stat().st_mtime >= (built / "index.html").stat().st_mtime:
        files[pdf.name] = pdf
    files |= {f"source/{path.relative_to(root).as_posix()}": path for path in source_files(root)}
    files |= {f"results/{name}": staged / name for name in ("numbers.json", "run.json")}
    for path in sorted((staged / "tables").rglob("*")):
        name = f"results/tables/{path.relative_to(staged / 'tables').as_posix()}"
        if path.suffix == ".csv":
            files[name] = path
        elif path.suffix == ".parquet":
            files[name.removesuffix(".parquet") + ".csv"] = _csv(pd.read_parquet(path))
    files["results/genes.csv"] = _csv(gene_table(preset))
    files |= provenance(preset)
    files["README.md"] = _readme(run, files).encode()
    return files


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


def _readme(run: dict[str, str], files: dict[str, Path | bytes]) -> str:
    texts = {name: text for name, text in crate.FILES.items() if name in files}
    texts |= {folder: crate.FOLDERS[folder] for folder in crate.folders(files)}
    rows = "\n".join(f"| `{name}` | {text} |" for name, text in sorted(texts.items()))
    title = citation.read()["title"]
    named = {"title": title, "source": SOURCE_NAMES[run["source"]], "rows": rows}
    return README.format(**named, preset=run["preset"], commit=run["commit"])


def write(files: dict[str, Path | bytes], made: datetime, target: Path) -> None:
    """Write the archive: its metadata first, the same bytes for the same build."""
    cited = citation.read()
    run = json.loads(Path(files["results/run.json"]).read_text())
    sizes = {name: _size(content) for name, content in files.items()}
    metadata = crate.describe(sizes, run, cited, made)
    text = json.dumps(metadata, indent=1, ensure_ascii=False)
    with building(target) as partial, zipfile.ZipFile(partial, "w") as archive:
        # A folder that is described has an entry of its own.
        entries = {crate.METADATA: text.encode(), **dict.fromkeys(crate.folders(files), b"")}
        for name, content in (entries | files).items():
            entry = zipfile.ZipInfo(name, made.timetuple()[:6])
            entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, sizes.get(name, 0)
            entry.external_attr = 0o644 << 16
            stream = content.open("rb") if isinstance(content, Path) else io.BytesIO(content)
            with stream as source, archive.open(entry, "w") as copy:
                while piece := source.read(1 << 20):
                    copy.write(piece)


def _size(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def main() -> None:
    preset = open_preset(**dict(pair.split("=", 1) for pair in sys.argv[1:]))
    files = collect(preset)
    made = datetime.fromtimestamp((ROOT / "_build/html/index.html").stat().st_mtime, UTC)
    version = citation.read()["version"]
    target = ROOT / "_build" / "archive" / f"the-sparsity-trap-{version}-{preset.folder.name}.zip"
    write(files, made, target)
    size = target.stat().st_size / 1e6
    print(f"the archive: {target} ({len(files) + 1} files, {size:.1f} MB)")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
