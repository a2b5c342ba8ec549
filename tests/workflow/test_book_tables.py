"""Tables that chapters include."""

from __future__ import annotations

import sys

from conftest import ROOT

from sparsity_trap import encoders

sys.path.append(str(ROOT / "workflow"))
import book_tables  # noqa: E402 - a script beside the module


def test_table_shows_every_encoder():
    """Millions of weights are those that the authors give."""
    lines = book_tables.encoders().splitlines()
    names, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)
    table = {row[0]: dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)}
    assert [row[0] for row in rows] == list(encoders.ENCODERS)
    assert table["virchow2"] == {
        "encoder": "virchow2",
        "weights": "[paige-ai/Virchow2](https://huggingface.co/paige-ai/Virchow2)",
        "licence": "CC-BY-NC-ND 4.0, gated",
        "trained at, µm per pixel": "0.25, 0.5, 1, 2",
        "tokens; patch; parameters": "(16² + 5) × 1280; 14 px; 631 M",
        "note": "the published encoder",
    }
