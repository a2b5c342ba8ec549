"""Put what the book reads into book/executed:

python workflow/stage_book.py preset=laptop source= cohort= -- results/laptop/notebooks/*.ipynb
"""

import json
import shutil
import sys
from pathlib import Path

import bench_tables
import book_tables
import citation
import front
import nbformat
import pages
import scaling

from sparsity_trap import runs
from sparsity_trap.analysis.claims import read_ledgers
from sparsity_trap.data.sections import open_preset
from sparsity_trap.encoders import PATCH_UM_PER_PX, open_tokens
from sparsity_trap.files import building
from sparsity_trap.presets import other_worlds
from sparsity_trap.settings import ROOT, Preset, UserError
from sparsity_trap.show import explorer


def quoted(preset: Preset, names: list[str]) -> dict[str, object]:
    """Every number that prose may quote: those of the pages' notebooks, and the settings.

    What else lies beside them was written for arms that the preset no longer trains.

    Raises
    ------
    UserError
        Two notebooks quote one key with different values, or one quotes a setting.
    """
    numbers: dict[str, object] = {}
    origin: dict[str, str] = {}
    sources = {
        name: json.loads(path.read_text())
        for name in names
        if (path := preset.folder / "numbers" / f"{name}.json").is_file()
    }
    for name, values in {**sources, "the preset": of_preset(preset)}.items():
        for key, value in values.items():
            # Sums of floats may differ in the last digit: what the preset says, no notebook does.
            if key in numbers and (numbers[key] != value or name == "the preset"):
                raise UserError(
                    f"'{key}' is {numbers[key]} in {origin[key]} and {value} in {name}: "
                    "quote it once"
                )
            numbers[key] = value
            origin.setdefault(key, name)
    numbers["cohort.n_patches"] = sum(numbers[f"cohort.n_patches.{p}"] for p in preset.patients)
    return numbers


def of_preset(preset: Preset) -> dict[str, object]:
    """Settings of a preset by dotted key, and totals over its runs."""
    this = preset.all_runs()
    records = [
        json.loads((world.run_dir(r) / "provenance.json").read_text())
        for world in (preset, *other_worlds(preset).values())
        for r in world.all_runs()
    ]
    values: dict[str, object] = {
        "preset.name": preset.name,
        "preset.source": preset.source,
        "preset.main_patient": preset.main_patient,
        "preset.n_runs": len(this),
        "preset.n_arms": len({r.arm for r in this}),
        "encoder.um_per_px": PATCH_UM_PER_PX,
        "training.seconds.total": sum(record["seconds"] for record in records),
        "run.commit": records[0]["commit"],
        "run.hardware": records[0]["hardware"],
        "panel.n_genes": len(runs.panel(preset)),
        "scale.patches": scaling.patches_per_section(),
        "scale.hardware": scaling.MEASURED["hardware"],
    }
    for name in ("simulation", "genes", "patches", "encoder", "decoder", "training"):
        if name != "simulation" or preset.source != "spaceranger":
            fields = getattr(preset, name).model_dump(mode="json").items()
            values |= {f"{name}.{key}": v for key, v in fields if not isinstance(v, list)}
    return values


def main() -> None:
    split = sys.argv.index("--")
    arguments = dict(pair.split("=", 1) for pair in sys.argv[1:split])
    preset = open_preset(**arguments)
    notebooks = [Path(name) for name in sys.argv[split + 1 :]]
    numbers = quoted(preset, [path.stem for path in notebooks])
    ledgers = read_ledgers(preset.folder / "tables").values()
    numbers |= {f"verdict.{row.key}": row.verdict for x in ledgers for row in x.itertuples()}
    cited = citation.read()
    run = {
        "authors": ", ".join(map(citation.full_name, cited["authors"])),
        "repository": cited.get("repository-code", ""),
        "source": preset.source,
        "preset": preset.name,
        "hardware": numbers["run.hardware"],
        "data": ", ".join(f"{p} {numbers[f'cohort.sha256.{p}'][:12]}" for p in preset.patients),
        "seeds": ", ".join(map(str, sorted({r.seed for r in preset.all_runs()}))),
        "training": f"{numbers['training.seconds.total']:,.0f} s",
    }
    with building(ROOT / "book" / "executed") as folder:
        folder.mkdir()
        shutil.copytree(preset.folder / "tables", folder / "tables")
        for path in notebooks:
            notebook = nbformat.read(path, as_version=4)
            page = pages.as_page(notebook, path.stem, preset, numbers, folder)
            nbformat.write(page, folder / path.name)
        (folder / "numbers.json").write_text(json.dumps(numbers, indent=1))
        (folder / "run.json").write_text(json.dumps(run, indent=1))
        for name in ("viewer", "score"):
            shutil.copytree(preset.folder / name, folder / name)
        store = runs.store(preset, preset.main_patient)
        runs.tokens(preset, preset.main_patient)
        channels = open_tokens(preset, preset.main_patient)[0].shape[2]
        tables = {
            "arms.md": book_tables.arms(preset),
            "decoders.md": book_tables.decoders(preset, channels, len(store.genes)),
            "encoders.md": book_tables.encoders(),
            "protocols.md": book_tables.protocols(),
            "claims_first.md": front.claims(folder / "tables", first=True),
            "claims_others.md": front.claims(folder / "tables", first=False),
            "scale.md": book_tables.scale(),
            "packages.md": book_tables.packages(),
            "times.md": book_tables.times(preset, notebooks),
            "loss_explorer.html": explorer.loss_explorer(),
        }
        for name, text in tables.items():
            (folder / name).write_text(text)
        for name in bench_tables.TABLES:
            text = bench_tables.table(name, ROOT / "results" / "bench")
            (folder / f"bench_{name}.md").write_text(text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
