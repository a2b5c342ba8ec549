"""Cells of a simulated section, in the files that Space Ranger 4 writes of segmented nuclei.

What a cell is here follows Space Ranger, with nuclei that are known and not found: a bin lies in a
nucleus when its centre does, and a cell is the bins that are nearer to its nucleus than to another,
up to 8 µm away. So its sum is not all that it shed: a tall cell reaches farther than 8 µm, and RNA
of neighbours lies in its bins. Cells whose nucleus the section misses are nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from scipy import ndimage

from sparsity_trap.bins import BIN_UM
from sparsity_trap.simulation.cells import Kind

#: How far a cell reaches beyond its nucleus, µm: what Space Ranger 4 takes unless told otherwise.
REACH_UM = 8.0

_CHUNK = 4_000  # cells in hand at a time
_STRIP = 128  # rows of the array in hand at a time

#: Takes x and y, gives x and y, of any one shape.
Place = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def cell_name(number: int) -> str:
    """Space Ranger's name of a cell."""
    return f"cellid_{number:09d}-1"


def write_cells(
    outs: Path, cells: pd.DataFrame, to_um: Place, to_array: Place, to_pixels: Place, side: int
) -> np.ndarray:
    """Write bins, outlines and types of a section's cells.

    Parameters
    ----------
    outs
        Gets ``barcode_mappings.parquet``, ``segmented_outputs/cell_segmentations.geojson`` and,
        with the true types and the nuclei's centres in pixels, ``truth_cells.csv``.
    cells
        As `Anatomy.cells`. Cell ``n`` of the files is row ``n - 1``.
    to_um, to_array, to_pixels
        From array column and row to µm in the image, back, and to full-resolution pixels.
    side
        Rows, and columns, of the array.

    Returns
    -------
    int32 [side, side]: number of each bin's cell, 0 where there is none.
    """
    nucleus = label_nuclei(cells, to_um, to_array, side)
    away, (row, col) = ndimage.distance_transform_edt(nucleus == 0, return_indices=True)
    cell = np.where(away <= REACH_UM / BIN_UM, nucleus[row, col], 0)
    del away, row, col
    _write_mappings(outs / "barcode_mappings.parquet", nucleus, cell)
    folder = outs / "segmented_outputs"
    folder.mkdir()
    _write_outlines(folder / "cell_segmentations.geojson", cell, to_pixels)
    seen = np.unique(cell[cell > 0])
    known = cells.iloc[seen - 1]
    x, y = to_pixels(*to_array(known.x.to_numpy(float), known.y.to_numpy(float)))
    truth = {
        "cell_id": [cell_name(n) for n in seen.tolist()],
        "cell_type": [Kind(kind).name.lower() for kind in known.kind],
        "pxl_row_in_fullres": y.round(1),
        "pxl_col_in_fullres": x.round(1),
    }
    pd.DataFrame(truth).to_csv(outs / "truth_cells.csv", index=False)
    return cell


def label_nuclei(cells: pd.DataFrame, to_um: Place, to_array: Place, side: int) -> np.ndarray:
    """Number (row + 1) of the nucleus in which the centre of each bin lies, int32 [side, side].

    Of nuclei that overlap, a bin is in the one whose centre is nearer, as a share of its radius. A
    nucleus that is too thin to hold the centre of a bin has the bin that holds its own.
    """
    label = np.zeros((side, side), np.int32)
    # By size: few are so large that far bins have to be looked at.
    seen = np.argsort(cells.major.to_numpy(), kind="stable")[np.count_nonzero(cells.major <= 0) :]
    parts = []
    for first in range(0, len(seen), _CHUNK):
        number = seen[first : first + _CHUNK]
        reach = int(np.ceil(cells.major.iloc[number[-1]] / 2 / BIN_UM)) + 1
        down, right = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
        x, y, major, minor, angle = (
            cells[name].to_numpy(float)[number, None]
            for name in ("x", "y", "major", "minor", "angle")
        )
        col, row = (np.rint(v).astype(int) for v in to_array(x, y))
        col, row = col + right, row + down
        dx, dy = (a - b for a, b in zip(to_um(col, row), (x, y), strict=True))
        along = (dx * np.cos(angle) + dy * np.sin(angle)) * (2 / major)
        across = (dy * np.cos(angle) - dx * np.sin(angle)) * (2 / minor)
        far = np.hypot(along, across)
        own = (down == 0) & (right == 0)
        far[:, own] = far[:, own].clip(max=1)
        held = (far <= 1) & (row >= 0) & (row < side) & (col >= 0) & (col < side)
        who = np.broadcast_to(number[:, None], held.shape)[held]
        parts.append((row[held] * side + col[held], far[held], who))
    if parts:
        at, distance, who = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.lexsort((distance, at))
        at, nearest = np.unique(at[order], return_index=True)
        label.reshape(-1)[at] = who[order][nearest] + 1
    return label


def _write_mappings(path: Path, nucleus: np.ndarray, cell: np.ndarray) -> None:
    """Write a row for each bin: its own barcode, those of larger bins, and its cell."""
    side = len(cell)
    names = pa.array([cell_name(n) for n in range(int(cell.max()) + 1)])
    kinds = {f"square_{um:03d}um": pa.string() for um in (2, 8, 16)}
    kinds |= {"cell_id": pa.string(), "in_nucleus": pa.bool_(), "in_cell": pa.bool_()}
    schema = pa.schema(list(kinds.items()))
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, side, _STRIP):
            rows = np.arange(first, min(first + _STRIP, side))
            number = cell[rows].ravel()
            columns = [_barcodes(um, rows, side) for um in (2, 8, 16)]
            columns.append(names.take(pa.array(number, mask=number == 0)))
            columns += [pa.array(nucleus[rows].ravel() > 0), pa.array(number > 0)]
            writer.write_table(pa.table(columns, schema=schema))


def _barcodes(um: int, rows: np.ndarray, side: int) -> pa.Array:
    """Names of the bins of this width that hold each 2 µm bin of some rows."""
    factor = round(um / BIN_UM)
    begin = pa.array([f"s_{um:03d}um_{row:05d}_" for row in (rows // factor).tolist()])
    end = pa.array([f"{col:05d}-1" for col in (np.arange(side) // factor).tolist()])
    row, col = np.divmod(np.arange(len(rows) * side), side)
    return pc.binary_join_element_wise(begin.take(pa.array(row)), end.take(pa.array(col)), "")


def _write_outlines(path: Path, label: np.ndarray, to_pixels: Place) -> None:
    """Write the outline of each label's bins as GeoJSON, in pixels of the image."""

    def place(points: np.ndarray) -> np.ndarray:
        return np.stack(to_pixels(*points.T), axis=1).round(1)

    with path.open("w") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        between = ""
        for numbers, shapes in _outlines(label):
            texts = shapely.to_geojson(shapely.transform(shapes, place))
            for number, text in zip(numbers.tolist(), texts.tolist(), strict=True):
                file.write(
                    f'{between}{{"type": "Feature", "geometry": {text}, '
                    f'"properties": {{"cell_id": {number}}}}}'
                )
                between = ", "
        file.write("]}\n")


def _outlines(label: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield numbers and outlines, in array columns and rows, of some labels at a time.

    Of a label in several pieces it is the outline of the largest, as Space Ranger draws it.
    """
    at = np.flatnonzero(label)
    at = at[np.argsort(label.reshape(-1)[at], kind="stable")]
    number, first = np.unique(label.reshape(-1)[at], return_index=True)
    ends = np.append(first, len(at))
    for start in range(0, len(number), _CHUNK):
        some = number[start : start + _CHUNK]
        cuts = ends[start : start + len(some) + 1]
        row, col = np.divmod(at[cuts[0] : cuts[-1]], label.shape[1])
        squares = shapely.box(col - 0.5, row - 0.5, col + 0.5, row + 0.5)
        whole = [shapely.coverage_union_all(p) for p in np.split(squares, cuts[1:-1] - cuts[0])]
        parts, owner = shapely.get_parts(whole, return_index=True)
        order = np.lexsort((shapely.area(parts), owner))
        last = np.flatnonzero(np.diff(owner[order], append=len(some)))
        yield some, shapely.simplify(parts[order][last], 0)
