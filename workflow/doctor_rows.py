"""A row of the doctor's table, and the table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from sparsity_trap.settings import UserError

#: Width of the text columns, in characters.
_WIDTH = 58

State = Literal["ok", "warn", "FAIL"]


class Row(NamedTuple):
    """One line of the table."""

    check: str
    state: State
    found: str
    mend: str = ""


def guarded(check: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Rows of a check, under its name where they have none; an error becomes a row."""
    try:
        for row in rows():
            yield row if row.check else row._replace(check=check)
    except Exception as error:  # a table that stops at the first surprise would hide the rest
        yield failed(check, error)


def failed(check: str, error: Exception) -> Row:
    """What an error says, and the remedy apart where it names one."""
    if not isinstance(error, UserError):
        return Row(check, "FAIL", f"{type(error).__name__}: {error}", "make env, or report this")
    # Messages read "what is wrong: what to do".
    found, _, mend = str(error).rpartition(": ")
    return Row(check, "FAIL", found or mend, mend if found else "")


def table(rows: Sequence[Row]) -> str:
    """Aligned plain text of the rows."""
    cells = [("check", "state", "found", "how to mend"), *rows]
    # Paths stay whole, so that they can be copied.
    wrapper = textwrap.TextWrapper(_WIDTH, break_long_words=False, break_on_hyphens=False)
    wrapped = [[wrapper.wrap(cell) or [""] for cell in row] for row in cells]
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(cells[0]))]
    lines = []
    for row in wrapped:
        for i in range(max(map(len, row))):
            parts = [cell[i] if i < len(cell) else "" for cell in row]
            joined = "  ".join(p.ljust(w) for p, w in zip(parts, widths, strict=True))
            lines.append(joined.rstrip())
    return "\n".join(lines)
