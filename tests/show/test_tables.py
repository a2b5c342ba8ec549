"""Tables as the book shows them."""

from __future__ import annotations

import html
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from sparsity_trap.settings import UserError
from sparsity_trap.show import tables


def test_numbers_are_rounded_and_headings_are_words():
    table = pd.DataFrame(
        {
            "loss": ["mse", "<b>"],
            "n_genes": [50, 7],
            "rho": [-0.12345, np.nan],
            "p_value": [4.2e-9, 0.123],
            "converged": [True, False],
        }
    )
    shown = tables.show(table, 2).data
    assert "<script" not in shown and "<b>" not in shown
    cells = [html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", shown)]
    assert cells[:5] == ["loss", "genes", "ρ", "p", "converged"]
    assert cells[5:10] == ["MSE", "50", "−0.12", "4.2e−09", "yes"]
    assert cells[10:] == ["<b>", "7", "–", "0.12", "no"]


def test_levels_of_headings_and_rows_stay():
    columns = pd.MultiIndex.from_product([["pcc_8um_mse"], ["published", "this run"]])
    shown = tables.show(pd.DataFrame([[0.1, None]], ["MUC12"], columns), index=True).data
    assert all(text in shown for text in ("PCC 8 µm, MSE", "this run", "MUC12", "0.100", "–"))


def test_table_sorts_by_the_heading_that_is_pressed(driven, tmp_path):
    table = pd.DataFrame({"gene": ["B", "C", "A"], "gain": [-0.5, np.nan, 0.25]})
    page = tmp_path / "table.html"
    shown = tables.show(table, 2, missing="undefined", sortable=True).data
    page.write_text(f'<!doctype html><meta charset="utf8"><title>t</title>{shown}')
    driven.open(page.as_uri())
    order = "[...document.querySelectorAll('tbody tr')].map((r) => r.cells[0].textContent).join('')"

    def press(column: int) -> str:
        driven.value(f"document.querySelectorAll('th button')[{column}].click()")
        return driven.value(order)

    assert driven.value(order) == "BCA"
    assert press(1) == "ABC"  # largest first, undefined last
    assert press(1) == "BAC"
    assert driven.value("document.querySelectorAll('th')[1].ariaSort") == "ascending"
    assert press(0) == "CBA"


def test_any_table_is_shown_or_refused():
    table = pa.table({"gene": ["NA"], "pcc_8um": [0.5]})
    assert tables.show(table).data == tables.show(table.to_pandas()).data
    with pytest.raises(UserError, match="the table to show is no table"):
        tables.show(3)
