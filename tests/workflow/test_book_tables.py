"""Tables that chapters include."""

from __future__ import annotations

import sys

import pandas as pd
from conftest import ROOT

from sparsity_trap import encoders
from sparsity_trap.analysis.claims import Claim

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
        "licence": "CC-BY-NC-ND 4.0",
        "gated": "yes",
        "trained at, µm per pixel": "0.25, 0.5, 1, 2",
        "patch, px": "14",
        "token grid": "16",
        "prefix tokens": "5",
        "channels": "1280",
        "parameters, millions": "631",
        "note": "the published encoder",
    }


def test_every_family_has_a_table_those_on_real_tissue_first(tmp_path):
    assert book_tables.claims(tmp_path) == ""
    claim = Claim(
        "a", "It is so.", "If so.", "build", "supported", "mean", 0.3, 0.2, 0.4, 5, "runs"
    )
    for family, text in (("build", "It is so."), ("printed", "It was so.")):
        table = pd.DataFrame([claim._replace(family=family, text=text)])
        table.to_csv(tmp_path / f"claims_{family}.csv", index=False)
    shown = book_tables.claims(tmp_path)
    lines = [line for line in shown.splitlines() if line.startswith(("###", "| It"))]
    assert lines == [
        "### Judged on printed numbers",
        "| It was so.<br><small>If so.</small> | **supported** | mean: 0.3 (0.2 to 0.4), 5 runs |",
        "### Judged on this build",
        "| It is so.<br><small>If so.</small> | **supported** | mean: 0.3 (0.2 to 0.4), 5 runs |",
    ]
