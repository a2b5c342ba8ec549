"""Score files of predictions: ``python -m sparsity_trap.score PREDICTIONS --section SECTION``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from sparsity_trap.data.cells import Cells
from sparsity_trap.evaluation.evaluate import UNITS
from sparsity_trap.evaluation.result import Evaluation
from sparsity_trap.score import report
from sparsity_trap.score.cells import OWN, cell_sums, cells_of
from sparsity_trap.score.compare import differences, summary
from sparsity_trap.score.pairing import Pairing, pair
from sparsity_trap.score.recalibrate import recalibration
from sparsity_trap.settings import UserError


def main(arguments: list[str] | None = None) -> None:
    """Score every file given, print its verdict, write its card."""
    options = _parser().parse_args(arguments)
    names = [Path(path).name for path in options.predictions]
    twice = len(set(names)) < len(names)
    cards = options.predictions if twice else names
    evaluated: dict[str, Evaluation] = {}
    pairings: dict[str, Pairing] = {}
    cells = None
    for card, path in zip(cards, options.predictions, strict=True):
        print(f"scoring {path} ...", flush=True)
        found = pair(
            path, options.section, units=options.units, bin_um=options.bin_um,
            genes=_names(options.genes), table=options.table,
        )  # fmt: skip
        pairings[card] = found
        if options.cells:  # whatever is wrong with them is said before the minutes that follow
            cells = cells_of(found, options.cells, options.cell_types)
        evaluated[card] = found.evaluate(_training_mean(options.train_mean, found.genes))
    for i, (card, found) in enumerate(pairings.items()):
        folder = Path(options.out) if len(pairings) == 1 else Path(options.out) / f"{i + 1}"
        page = _write(folder, found, evaluated, card, cells)
        print(f"\n{card}")
        for sentence in evaluated[card].findings + evaluated[card].verdict:
            print(f"  - {sentence}")
        print(f"  the report card: {page}")


def _write(
    folder: Path, found: Pairing, evaluated: dict[str, Evaluation], card: str, cells: Cells | None
) -> Path:
    """The card of one file, with its differences to the others."""
    evaluation, recalibrated = evaluated[card], None
    if found.summable and evaluation.about["patches"] > 1:
        recalibrated = recalibration(found.rates, found.genes)
    comparison = None
    others = {name: other for name, other in evaluated.items() if name != card}
    if others:
        comparison = {
            "summary": summary(evaluated),
            "differences": {
                f"{name} minus {card}": differences(evaluation, other)
                for name, other in others.items()
            },
        }

    def picture(number: int) -> np.ndarray:
        return found.section.picture(found.numbers[number])

    return report.write(
        evaluation,
        folder,
        picture=picture if found.section.pictured else None,
        upright=found.section.upright,
        recalibrated=recalibrated,
        comparison=comparison,
        cells=None if cells is None else cell_sums(found, cells),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_trap.score",
        description="Score predictions of gene counts beside nulls, ceilings and published "
        "protocols, and write a report card.",
    )
    parser.add_argument(
        "predictions", nargs="+",
        help="AnnData (.h5ad, .zarr), SpatialData (.zarr) or maps (.zarr, .npz); several are "
        "compared",
    )  # fmt: skip
    parser.add_argument("--section", required=True, help="Space Ranger's outs, or a patch store")
    parser.add_argument("--out", default="score", help="folder of the report card")
    parser.add_argument("--units", default="", help=f"of the predictions: {', '.join(UNITS)}")
    parser.add_argument("--bin-um", type=float, help="width of bins, where barcodes do not say")
    parser.add_argument("--genes", default="", help="symbols with commas between, or a file")
    parser.add_argument("--table", default="", help="of a SpatialData with several")
    parser.add_argument(
        "--cells", default="", metavar="TABLE",
        help=f"score whole cells too: '{OWN}', those of Space Ranger, or a table of bin and cell",
    )  # fmt: skip
    parser.add_argument(
        "--cell-types", default="", metavar="TABLE", help="of cell_id and cell_type"
    )
    parser.add_argument(
        "--train-mean", help="table with columns gene and mean: count per bin in training"
    )
    return parser


def _names(genes: str) -> list[str]:
    """Symbols of the option: themselves, or the lines of a file."""
    path = Path(genes)
    text = path.read_text(encoding="utf-8") if genes and path.is_file() else genes
    return text.replace(",", " ").split()


def _training_mean(path: str | None, genes: tuple[str, ...]) -> np.ndarray | None:
    """Mean count per bin in training, in the order of the genes."""
    if path is None:
        return None
    try:
        mean = pd.read_csv(path).set_index("gene")["mean"].reindex(list(genes))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not a table with columns gene and mean ({error}): give one, or leave "
            "--train-mean out"
        ) from error
    if mean.isna().any():
        raise UserError(f"{path} has no mean of gene {mean.index[mean.isna()][0]}: add it")
    return mean.to_numpy(float)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
