"""Put what the book reads into book/executed:

python workflow/stage_book.py preset=laptop source= cohort= -- results/laptop/notebooks/03_results.ipynb ...
"""

import json
import shutil
import sys
from pathlib import Path

import bench_tables
import book_tables
import nbformat
import pages

from sparsity_trap import runs
from sparsity_trap.data.sections import open_preset
from sparsity_trap.files import building
from sparsity_trap.settings import ROOT, UserError
from sparsity_trap.show import explorer
from sparsity_trap.training import open_tokens


def main() -> None:
    split = sys.argv.index("--")
    arguments = dict(pair.split("=", 1) for pair in sys.argv[1:split])
    preset = open_preset(**arguments)
    numbers = json.loads((preset.folder / "numbers.json").read_text())
    run = {
        "source": preset.source,
        "preset": preset.name,
        "commit": numbers["run.commit"],
        "hardware": numbers["run.hardware"],
        "data": ", ".join(f"{p} {numbers[f'cohort.sha256.{p}'][:12]}" for p in preset.patients),
        "seeds": ", ".join(map(str, sorted({r.seed for r in preset.all_runs()}))),
        "training": f"{numbers['training.seconds.total']:,.0f} s",
    }
    with building(ROOT / "book" / "executed") as folder:
        folder.mkdir()
        notebooks = [Path(name) for name in sys.argv[split + 1 :]]
        shutil.copytree(preset.folder / "tables", folder / "tables")
        for path in notebooks:
            # The book shows one run per arm, under the arm's name.
            name = path.stem.removesuffix("-s0").removesuffix(f"-{preset.main_patient}")
            notebook = nbformat.read(path, as_version=4)
            page = pages.as_page(notebook, name, preset, numbers, folder)
            nbformat.write(page, folder / f"{name}.ipynb")
        (folder / "numbers.json").write_text(json.dumps(numbers, indent=1))
        (folder / "run.json").write_text(json.dumps(run, indent=1))
        shutil.copytree(preset.folder / "viewer", folder / "viewer")
        store = runs.store(preset, preset.main_patient)
        channels = open_tokens(preset, preset.main_patient)[0].shape[2]
        tables = {
            "arms.md": book_tables.arms(preset),
            "decoders.md": book_tables.decoders(preset, channels, len(store.genes)),
            "encoders.md": book_tables.encoders(),
            "claims.md": book_tables.claims(folder / "tables" / "claims.csv"),
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
