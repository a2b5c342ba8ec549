"""Tables that a user brings, from a file or from another library, as plain DataFrames.

The same table gives the same DataFrame wherever it comes from: words such as NA, None or 1E5 stay
what they are in columns of text, and numbers are numbers whatever a library calls their type.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparsity_trap.inputs import check_file, read_text, unreadable
from sparsity_trap.settings import UserError

#: Endings of files in parquet.
PARQUET = (".parquet", ".pq")

#: A line to skip; what spreadsheets write in place of a value is none.
_COMMENT = re.compile(r"#(?!N/A|NAME\?|REF!|VALUE!|NUM!|DIV/0!|NULL!)")

#: What programs write into a column of numbers where there is none.
_MISSING = {"", "na", "n/a", "nan", "none", "null", "<na>", "#n/a"}


def as_frame(
    table: Any, what: str, *, text: Sequence[str] = (), numbers: Sequence[str] = ()
) -> pd.DataFrame:
    """Take a table of whatever kind.

    Parameters
    ----------
    table
        A file (CSV with commas, semicolons or tabs; parquet), a DataFrame, a table of pyarrow,
        polars or another library that speaks Arrow, a mapping of columns, a list of rows, or a
        structured array. An index that is named is a column.
    what
        What it is, for errors.
    text, numbers
        Columns that it must have, and what these hold.

    Returns
    -------
    DataFrame with a plain index, columns of NumPy's types or of text, without categories.

    Raises
    ------
    UserError
        It is no table, lacks a column or has one twice, or a column of numbers holds something
        else.

    Examples
    --------
    >>> rows = [{"gene": "NA", "sparsity": "0.5"}, {"gene": "1E5", "sparsity": None}]
    >>> as_frame(rows, "this table", text=["gene"], numbers=["sparsity"])["sparsity"].tolist()
    [0.5, nan]
    """
    if isinstance(table, (str, Path)):
        what, frame = f"{what} {table}", _read(Path(table), what, text)
    else:
        frame = _taken(table, what)
    frame.columns = [str(name).strip() for name in frame.columns]
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise UserError(f"{what} has two columns {repeated[0]}: rename or remove one")
    missing = [name for name in (*text, *numbers) if name not in frame]
    if missing:
        raise UserError(
            f"{what} has no column {', '.join(missing)}: it has {', '.join(frame) or 'none'}; "
            "rename or add the column"
        )
    plain = {name: _plain(frame[name]) for name in frame}
    plain |= {name: _words(plain[name]) for name in text}
    plain |= {name: _numbers(plain[name], f"{what}: column {name}") for name in numbers}
    return pd.DataFrame(plain, index=pd.RangeIndex(len(frame)))


def _taken(table: Any, what: str) -> pd.DataFrame:
    try:
        if isinstance(table, pd.DataFrame):
            frame = table.copy(deep=False)
        elif hasattr(table, "to_pandas"):
            frame = table.to_pandas()
        elif hasattr(table, "__arrow_c_stream__"):
            import pyarrow as pa

            frame = pa.table(table).to_pandas()
        elif hasattr(table, "__dataframe__"):
            frame = pd.api.interchange.from_dataframe(table)
        elif isinstance(table, (Mapping, Sequence, np.ndarray)) and not isinstance(table, bytes):
            frame = pd.DataFrame(table)
        else:
            raise TypeError(f"a {type(table).__name__}")
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(f"a {type(frame).__name__}")
    except Exception as error:  # whatever other libraries raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{what} is no table ({reason}): give a DataFrame or the path of a CSV file"
        ) from error
    named = [name for name in frame.index.names if name is not None and name not in frame]
    return frame.reset_index(named) if named else frame.copy(deep=False)


def _read(path: Path, what: str, text: Sequence[str]) -> pd.DataFrame:
    """A file's table; of a CSV, columns that hold numbers alone are numbers, but for ``text``."""
    if path.suffix.lower() in PARQUET:
        check_file(path, "give the path of a table")
        try:
            return _taken(pd.read_parquet(path), what)
        except (OSError, ValueError) as error:
            raise unreadable(path, "a whole parquet table", error, own=b"PAR1") from None
    frame = read_csv(path)
    for name in frame.columns.difference(text):
        known = [value for value in frame[name] if value.lower() not in _MISSING]
        if known and all(map(_is_number, known)):
            frame[name] = _numbers(frame[name], str(name))
    return frame


def read_csv(path: Path, *, comments: bool = False) -> pd.DataFrame:
    """Columns of text from a file whose first line names them.

    Values are separated by tabs, semicolons or commas, whichever the first line holds. Empty lines
    are skipped, and with ``comments`` lines that
    begin with #, but for the errors that spreadsheets write, such as #NAME?.

    Raises
    ------
    UserError
        The file cannot be read, is no text, or a line has more values than the first.
    """
    check_file(path, "give the path of a table")
    text = read_text(path, "a table as text (CSV)")
    lines = [
        line
        for line in text.splitlines(keepends=True)
        if line.strip() and not (comments and _COMMENT.match(line))
    ]
    first = lines[0] if lines else ""
    separator = next((sign for sign in "\t;" if sign in first), ",")
    try:
        rows = list(csv.reader(io.StringIO("".join(lines)), delimiter=separator, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} is no table ({error}): save it as CSV again") from None
    if not rows:
        raise UserError(f"{path} is empty: give a CSV whose first line names the columns")
    header, *body = rows
    header = [name.strip() for name in header]
    for row in body:
        if len(row) > len(header) and any(cell.strip() for cell in row[len(header) :]):
            raise UserError(
                f"{path}: the line '{separator.join(row)[:80]}' has more cells than the first: "
                "name every column in the first line"
            )
    filled = [(row + [""] * len(header))[: len(header)] for row in body]
    frame = pd.DataFrame(filled, columns=header, dtype=object)
    return frame.loc[
        :, [bool(name) or (frame.iloc[:, i] != "").any() for i, name in enumerate(header)]
    ]


def _plain(column: pd.Series) -> pd.Series:
    """A column without categories, nullable types or types of Arrow."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if not pd.api.types.is_extension_array_dtype(column.dtype):
        return pd.Series(column.to_numpy())
    known = bool(column.notna().all())
    if pd.api.types.is_bool_dtype(column.dtype) and known:
        return pd.Series(column.to_numpy(bool))
    if pd.api.types.is_integer_dtype(column.dtype) and known:
        return pd.Series(column.to_numpy(np.int64))
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype):
        return pd.Series(column.to_numpy(float, na_value=np.nan))
    return pd.Series(column.astype(object).where(column.notna(), np.nan).to_numpy(), dtype=object)


def _words(column: pd.Series) -> pd.Series:
    return pd.Series(["" if value is None or value != value else str(value) for value in column])


def _numbers(column: pd.Series, where: str) -> pd.Series:
    """Numbers of a column, whatever it holds them as."""
    if column.dtype.kind in "iufb":
        return column
    values = [np.nan if value is None else value for value in column]
    for value in values:
        if not (_is_number(value) or str(value).lower() in _MISSING):
            raise UserError(f"{where} holds '{value}', which is no number: write it as 0.25")
    if all(re.fullmatch(r"\s*-?\d{1,18}\s*", str(value)) for value in values):
        return pd.Series([int(value) for value in values], dtype=np.int64)
    read = [np.nan if str(v).lower() in _MISSING else float(v) for v in values]
    return pd.Series(read, dtype=float)


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return not (isinstance(value, str) and "_" in value)  # Python's 1_0 is a name
