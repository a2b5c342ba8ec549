"""Tables as the book shows them: headings in words, numbers rounded, columns that sort."""

from __future__ import annotations

from numbers import Real

import numpy as np
import pandas as pd
import yaml
from IPython.display import HTML

from sparsity_trap.frames import as_frame
from sparsity_trap.show.page import asset

#: Column of a table -> its heading.
TITLES: dict[str, str] = yaml.safe_load(asset("titles.yaml"))


def show(
    table: pd.DataFrame,
    digits: int = 3,
    *,
    index: bool = False,
    missing: str = "–",
    sortable: bool = False,
) -> HTML:
    """Display a table.

    Parameters
    ----------
    table
        Columns of text, numbers or both. Headings and values found in `TITLES` are put in words.
    digits
        Decimals of numbers that are not whole; p- and q-values have two significant digits.
    index
        Show the row labels.
    missing
        In place of undefined values.
    sortable
        Sort by the column whose heading is pressed.
    """
    if not isinstance(table, pd.DataFrame):
        table = as_frame(table, "the table to show")
    shown = table.copy().astype(object)
    for i, column in enumerate(table.columns):
        spec = ".2g" if column in ("p", "q", "p_value", "q_value") else f".{digits}f"
        shown.isetitem(i, [_text(value, spec, missing) for value in table.iloc[:, i]])
    shown = shown.rename(columns=TITLES, index=TITLES)
    classes = "dataframe sortable" if sortable else "dataframe"
    html = shown.to_html(index=index, classes=classes, border=0)
    if sortable:
        html = (
            f"<style>{asset('sortable.css')}</style>{html}<script>{asset('sortable.js')}</script>"
        )
    return HTML(html)


def _text(value: object, spec: str, missing: str) -> str:
    if pd.isna(value):
        return missing
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, Real):
        text = format(value, ".0f" if float(value).is_integer() else spec)
        return text.replace("-", "\N{MINUS SIGN}")
    return TITLES.get(str(value), str(value))
