"""Cells of a section: which bins each holds, where it lies and of what type it is.

Read from what Space Ranger 4 writes of segmented nuclei, or from tables of the user's own. Tables
are CSV or parquet files or DataFrames, with the same result: values are compared as they are
written, and what is empty, 0 or NA names no cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd

from sparsity_trap.data.matrix import DAMAGE
from sparsity_trap.data.spaceranger import POSITIONS, read_array_shape
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    import pyarrow as pa

#: Of Space Ranger 4, relative to its ``outs`` folder.
MAPPINGS = Path("barcode_mappings.parquet")
POLYGONS = Path("segmented_outputs", "cell_segmentations.geojson")
_CLUSTERS = Path(
    "segmented_outputs", "analysis", "clustering", "gene_expression_graphclust", "clusters.csv"
)
#: Types of cells, the first that is there: those of a simulation, or Space Ranger's clusters.
TYPES = (Path("truth_cells.csv"), _CLUSTERS)

#: Names that a column may have, in lower case; the first that a table has is taken.
_BARCODE = ("square_002um", "barcode")
_CELL = ("cell_id", "cell")
_TYPE = ("cell_type", "type", "cluster")

_MISSING = ("", "NA", "NaN", "nan")
_BIN_NAME = r"^s_002um_\d{5}_\d{5}(-\d+)?$"
_BATCH = 200_000  # rows of a table in hand at a time

Table: TypeAlias = Path | str | pd.DataFrame


@dataclass(frozen=True)
class Cells:
    """Cells of one section.

    Attributes
    ----------
    names
        Of each cell, as in the table of bins.
    of_bin
        int32 [array rows, array columns]: the cell of each 2 µm bin, -1 where there is none.
    centre
        float64 [cells, 2]: full-resolution pixel x and y of the polygon's centroid, NaN where the
        cell has no polygon.
    types
        Type of each cell, "" where it is not known; None where no type is.
    """

    names: tuple[str, ...]
    of_bin: np.ndarray
    centre: np.ndarray
    types: np.ndarray | None = None


def has_cells(outs: Path | str) -> bool:
    """Whether Space Ranger has left a table of bins and cells in this folder.

    Without segmentation it leaves one of bins alone.
    """
    path = Path(outs) / MAPPINGS
    if not path.is_file():
        return False
    with _readable(str(path)):
        return bool(_find(_open(path)[0], _CELL))


def read_cells(
    outs: Path | str,
    table: Table | None = None,
    *,
    polygons: Path | str | None = None,
    types: Table | None = None,
) -> Cells:
    """Read the cells of a section.

    Parameters
    ----------
    outs
        Space Ranger's folder.
    table
        Bin and cell, a row per bin: a column ``barcode`` (or ``square_002um``), or ``array_row``
        and ``array_col``; and a column ``cell_id`` or ``cell``. Default: Space Ranger's own
        ``barcode_mappings.parquet``.
    polygons
        GeoJSON in full-resolution pixels, with a property ``cell_id`` in each feature. Default:
        Space Ranger's own for its own table, none for another.
    types
        Cell and type: a column ``cell_id``, ``cell`` or ``barcode``, and one ``cell_type``,
        ``type`` or ``cluster``. Default for Space Ranger's own table: its clusters, or the truth of
        a simulation, where these are there.

    Raises
    ------
    UserError
        A file is missing or damaged, a column is missing, a bin is listed twice or is none of the
        section, or no bin has a cell; polygons or types are of other cells, or list one twice.
    """
    outs, own = Path(outs), table is None
    table = outs / MAPPINGS if table is None else table
    if own and not (outs / MAPPINGS).is_file():
        raise UserError(
            f"{table} does not exist: Space Ranger writes it from version 4 on; run that, or give "
            "a table of bin and cell"
        )
    names, of_bin = _read_bins(table, outs)
    if own and polygons is None:
        polygons = _first(outs, [POLYGONS])
    if own and types is None:
        types = _first(outs, TYPES)
    return Cells(
        names,
        of_bin,
        np.full((len(names), 2), np.nan) if polygons is None else _centres(Path(polygons), names),
        None if types is None else _types(types, names),
    )


def _first(outs: Path, files: Sequence[Path]) -> Path | None:
    """The first of some files that is there."""
    return next((outs / file for file in files if (outs / file).is_file()), None)


def _read_bins(table: Table, outs: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the cells, in order, and the cell of each bin."""
    said, shape = _said(table), read_array_shape(outs)
    number: dict[str, int] = {}
    of_bin = np.full(shape[0] * shape[1], -1, np.int32)
    listed = np.zeros(len(of_bin), bool)

    def wanted(names: Sequence[str]) -> list[str]:
        barcode = _find(names, _BARCODE)
        rows = [_find(names, [name]) for name in ("array_row", "array_col")]
        return [*([barcode] if barcode else rows), _find(names, _CELL)]

    for *place, cell in _columns(table, wanted, "barcode (or array_row and array_col) and cell_id"):
        row, col = _rows_and_columns(place, said)
        beyond = (row < 0) | (row >= shape[0]) | (col < 0) | (col >= shape[1])
        if beyond.any():
            raise UserError(
                f"{said} names the bin in row {row[beyond][0]} and column {col[beyond][0]}, which "
                f"{outs / POSITIONS} does not list: give the table of this very section"
            )
        at = row.astype(np.int64) * shape[1] + col
        _refuse_twice(at, listed, shape, said)
        names = _text(cell, said, (*_MISSING, "0")).dictionary_encode()
        codes = [number.setdefault(name, len(number)) for name in names.dictionary.to_pylist()]
        own = np.array([*codes, -1], np.int32)
        of_bin[at] = own[names.indices.fill_null(len(codes)).to_numpy(zero_copy_only=False)]
    if not number:
        raise UserError(
            f"{said} gives no bin a cell: run Space Ranger with its segmentation, or name the cell "
            "of each bin"
        )
    # The order of cells does not depend on that of rows.
    ordered = sorted(number, key=lambda name: (len(name), name))
    rank = np.full(len(number) + 1, -1, np.int32)
    rank[[number[name] for name in ordered]] = np.arange(len(number))
    return tuple(ordered), rank[of_bin].reshape(shape)


def _refuse_twice(at: np.ndarray, listed: np.ndarray, shape: tuple[int, int], said: str) -> None:
    """Mark bins as listed; raise ``UserError`` where one was listed before."""
    before = listed[at]
    listed[at] = True
    ordered = np.sort(at)
    twice = np.concatenate([at[before], ordered[1:][ordered[1:] == ordered[:-1]]])
    if len(twice):
        row, col = divmod(int(twice[0]), shape[1])
        raise UserError(
            f"{said} lists the bin in row {row} and column {col} twice: give each bin one cell"
        )


def _rows_and_columns(place: Sequence[pa.Array], said: str) -> tuple[np.ndarray, np.ndarray]:
    """Array rows and columns of bins, from barcodes or from numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(place) == 1:
        barcode = _text(place[0], said).fill_null("")
        fits = pc.match_substring_regex(barcode, _BIN_NAME)
        if not pc.all(fits).as_py():
            wrong = barcode.filter(pc.invert(fits))[0].as_py()
            raise UserError(
                f"{said}: barcode '{wrong}' is not that of a 2 µm bin (s_002um_00000_00000-1): "
                "give the table of bins in square_002um"
            )
        parts = (pc.utf8_slice_codeunits(barcode, first, first + 5) for first in (8, 14))
    else:
        parts = (_text(part, said) for part in place)
    try:
        row, col = (part.cast(pa.int32()).fill_null(-1).to_numpy() for part in parts)
    except pa.ArrowException as error:
        raise UserError(
            f"{said}: array_row and array_col must be whole numbers ({_reason(error)}): write them "
            "as Space Ranger does"
        ) from None
    return row, col


def _centres(path: Path, names: Sequence[str]) -> np.ndarray:
    """Centroid of each cell's polygon, x and y; NaN for a cell that has none."""
    import geopandas
    import shapely

    if not path.is_file():
        raise UserError(f"{path} does not exist: give the GeoJSON of the cells' polygons")
    try:
        frame = geopandas.read_file(path, columns=["cell_id"])
        middle = shapely.centroid(frame.geometry.to_numpy())
    except (RuntimeError, AttributeError, *DAMAGE) as error:
        raise UserError(
            f"{path} cannot be read as GeoJSON ({_reason(error)}): copy it again"
        ) from error
    if "cell_id" not in frame:
        raise UserError(f"{path} has no property cell_id: name the cell of each polygon in it")
    points = np.stack([shapely.get_x(middle), shapely.get_y(middle)], axis=1)
    points = np.concatenate([points, np.full((1, 2), np.nan)])
    return points[_matched(frame["cell_id"].astype(str), names, str(path))]


def _types(table: Table, names: Sequence[str]) -> np.ndarray:
    """Type of each cell, "" where none is given."""
    said = _said(table)

    def wanted(columns: Sequence[str]) -> list[str]:
        return [_find(columns, (*_CELL, "barcode")), _find(columns, _TYPE)]

    cell: list[str] = []
    kind: list[str] = []
    for batch in _columns(table, wanted, "cell_id and cell_type"):
        for part, text in zip((cell, kind), batch, strict=True):
            part += _text(text, said, _MISSING).fill_null("").to_pylist()
    return np.array([*kind, ""])[_matched(cell, names, said)]


def _matched(given: Sequence[str], names: Sequence[str], said: str) -> np.ndarray:
    """Place of each cell among some names; that behind their end where it is not among them."""
    place = pd.Series(np.arange(len(given)), index=[_key(name) for name in given])
    if place.index.has_duplicates:
        twice = place.index[place.index.duplicated()][0]
        raise UserError(f"{said} lists cell {twice} twice: list each cell once")
    found = place.reindex([_key(name) for name in names])
    if found.isna().all():
        raise UserError(
            f"{said} names none of the cells of the table of bins, such as {names[0]}: give both "
            "of one segmentation"
        )
    return found.fillna(len(given)).to_numpy(int)


def _key(name: str) -> str:
    """Number of a cell that is known by one, as in ``cellid_000000001-1``; else its name."""
    number = re.fullmatch(r"cellid_0*(\d+)(-\d+)?", name)
    return number[1] if number else name


# --- tables ---------------------------------------------------------------------------------------


def _said(table: Table) -> str:
    return "the table of cells" if isinstance(table, pd.DataFrame) else str(table)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _find(names: Sequence[str], wanted: Sequence[str]) -> str:
    """The column of one of these names, in whatever case; "" where there is none."""
    lower = {str(name).lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), "")


def _columns(
    table: Table, wanted: Callable[[Sequence[str]], list[str]], needed: str
) -> Iterator[list[pa.Array]]:
    """Some columns of a table, piece by piece.

    ``wanted`` takes the names of all and gives those of the columns to read, "" where one is
    missing; ``needed`` says which these are.
    """
    said = _said(table)
    if not isinstance(table, pd.DataFrame) and not Path(table).is_file():
        raise UserError(f"{said} does not exist: give a table with columns {needed}")
    with _readable(said):
        names, read = _open(table)
        columns = wanted(names)
        if not all(columns):
            raise UserError(f"{said} has columns {', '.join(names[:12])}: it needs {needed}")
        for batch in read(columns):
            yield [batch.column(name) for name in columns]


@contextmanager
def _readable(said: str) -> Iterator[None]:
    """Make one sentence of whatever a damaged table raises."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, *DAMAGE) as error:
        raise UserError(
            f"{said} cannot be read as a table ({_reason(error)}): give a whole CSV or parquet file"
        ) from error


def _open(table: Table) -> tuple[list[str], Callable[[list[str]], Iterator[pa.RecordBatch]]]:
    """Names of a table's columns, and a function that reads some of them in pieces."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    if isinstance(table, pd.DataFrame):
        frame = table.set_axis(table.columns.astype(str), axis=1)

        def of_frame(columns: list[str]) -> Iterator[pa.RecordBatch]:
            try:
                part = pa.Table.from_pandas(frame[columns], preserve_index=False)
            except pa.ArrowException:  # of several types: what is written of them
                part = pa.Table.from_pandas(frame[columns].astype("string"), preserve_index=False)
            yield from part.to_batches(_BATCH)

        return list(frame.columns), of_frame

    path = Path(table)
    with path.open("rb") as file:
        parquet = file.read(4) == b"PAR1"
    if parquet:
        names = pq.read_schema(path).names
        return names, lambda columns: pq.ParquetFile(path).iter_batches(_BATCH, columns=columns)

    tabs = path.name.removesuffix(".gz").endswith((".tsv", ".txt"))
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if tabs else ",")
    names = pyarrow.csv.open_csv(str(path), parse_options=parse).schema.names

    def of_text(columns: list[str]) -> Iterator[pa.RecordBatch]:
        # As it is written: a name such as 001 is no number.
        convert = pyarrow.csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.string())
        )
        yield from pyarrow.csv.open_csv(str(path), parse_options=parse, convert_options=convert)

    return names, of_text


def _text(values: pa.Array, said: str, missing: Sequence[str] = ()) -> pa.Array:
    """What is written in a column; whole numbers without a point, null for the missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):  # as pandas holds whole numbers with gaps
        values = pc.if_else(pc.is_nan(values), None, values)
        if pc.all(pc.equal(pc.floor(values), values)).as_py() is not False:
            values = values.cast(pa.int64())
    try:
        text = pc.utf8_trim_whitespace(values.cast(pa.string()))
    except pa.ArrowException as error:
        raise UserError(f"{said}: {_reason(error)}: give numbers or words") from None
    text = pc.replace_substring_regex(text, r"^(\d+)\.0*$", r"\1")
    return pc.if_else(pc.is_in(text, pa.array(missing, pa.string())), None, text)
