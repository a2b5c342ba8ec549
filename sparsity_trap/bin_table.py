"""Patches of a section as one table: a row per bin in tissue, as AnnData.

Rows are named as Space Ranger names bins; pixel positions, images and scale lie where scanpy and
squidpy look for them. scanpy's relatives are imported where they are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.geometry import Orientation
from sparsity_trap.data.patches import patch_window
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    import scipy.sparse as sp
    import zarr
    from anndata import AnnData

#: Largest ``X``, in values of 4 bytes: 1 GiB. All 50 genes of a full section fit at 8 µm; at 2 µm,
#: about 24 genes do.
MAX_VALUES = 2**28


@dataclass(frozen=True)
class Layout:
    """Where the patches of a section lie, in the oriented grid, in the array and in the image.

    Attributes
    ----------
    name
        Library id.
    microns_per_pixel
        Of the full-resolution image.
    orientation, shape
        Turns the array into the oriented grid; rows and columns of the latter.
    origin
        First bin of each patch in the oriented grid, [N, 2].
    mask
        Bins in tissue, bool [N, 128, 128].
    pixels
        Takes rows and columns [n] of array bins and the number of 2 µm bins along their side;
        gives full-resolution pixel x and y of their centres, [n, 2].
    images, scales
        Small images by name, and the scale factors to them by Space Ranger's names.
    counts, count_genes
        Measured counts [N, G, 128, 128] and their genes, where there are any.
    """

    name: str
    microns_per_pixel: float
    orientation: Orientation
    shape: tuple[int, int]
    origin: np.ndarray
    mask: np.ndarray
    pixels: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    images: dict[str, np.ndarray]
    scales: dict[str, float]
    counts: zarr.Array | None = None
    count_genes: Sequence[str] = ()

    def width(self, factor: int) -> int:
        """Columns of the array in bins of ``factor`` times 2 µm; the last may be narrower."""
        columns = self.shape[0] if self.orientation.transpose else self.shape[1]
        return -(-columns // factor)

    def bins(self, patch: int, factor: int) -> np.ndarray:
        """Number of the larger bin in the array that each bin of a patch in tissue lies in, [n]."""
        window = patch_window(*self.origin[patch].tolist())
        rows, cols = self.orientation.array_window(self.shape, *window)
        row, col = (np.arange(part.start, part.stop) // factor for part in (rows, cols))
        number = (row[:, None] * self.width(factor) + col).astype(np.int32)
        return self.orientation.apply(number)[self.mask[patch]]


def bin_table(
    layout: Layout,
    rates: Iterator[tuple[int, np.ndarray]],
    panel: pd.DataFrame,
    bin_um: int,
    genes: Sequence[str] | None = None,
) -> AnnData:
    """Lay patches out as one row per bin in tissue, in array order.

    Parameters
    ----------
    layout
        The section.
    rates
        Patches in any order, and their rates per 2 µm bin [G, 128, 128].
    panel
        Columns ``gene`` and ``category`` of the genes of ``rates``.
    bin_um
        2 or 8. A bin of 8 µm is the sum over its bins of 2 µm in tissue, and is kept when more than
        half of them are.
    genes
        Leave out the others.

    Returns
    -------
    AnnData
        As `predict.predict_section` describes it, without its origin.

    Raises
    ------
    UserError
        Another width, an unknown gene, a name that cannot be a key of ``uns``, or more than
        ``MAX_VALUES``.
    """
    check_library(layout.name)
    if bin_um not in (2, 8):
        raise UserError(f"bin_um is {bin_um}: choose 2 or 8")
    genes = [genes] if isinstance(genes, str) else genes
    factor = round(bin_um / BIN_UM)
    column, var = chosen(panel, genes)
    parts = [layout.bins(i, factor) for i in range(len(layout.origin))]
    number, members = np.unique(np.concatenate(parts), return_counts=True)
    number = number[2 * members > factor**2]
    if number.size * len(var) > MAX_VALUES:
        raise UserError(
            f"{number.size} bins of {bin_um} µm × {len(var)} genes exceed {MAX_VALUES} values "
            f"(1 GiB): pass at most {MAX_VALUES // number.size} in genes=, or use bin_um=8"
        )
    values, counts = sums(layout, rates, parts, number, column, list(var.index))

    rows, cols = np.divmod(number, layout.width(factor))
    adata = as_anndata(layout, values, counts, _bin_names(rows, cols, bin_um), var, bin_um)
    adata.obsm["spatial"] = layout.pixels(rows, cols, factor).astype(np.float64)
    adata.uns["spatial"][layout.name]["scalefactors"]["bin_size_um"] = float(bin_um)
    return adata


def chosen(panel: pd.DataFrame, genes: Sequence[str] | None) -> tuple[np.ndarray, pd.DataFrame]:
    """Channels of the rates to take, and what the table says of these genes."""
    categories = panel.set_index("gene")["category"]
    wanted = list(dict.fromkeys(categories.index if genes is None else genes))
    if unknown := set(wanted) - set(categories.index):
        raise UserError(
            f"the run does not predict gene {', '.join(sorted(unknown))}: choose among its "
            f"{len(categories)} genes"
        )
    category = pd.Categorical(categories.loc[wanted].astype(str))  # those that occur
    var = pd.DataFrame({"category": category}, index=pd.Index(wanted, name="gene"))
    return categories.index.get_indexer(wanted), var


def as_anndata(
    layout: Layout,
    values: np.ndarray,
    counts: sp.csr_matrix | None,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    diameter_um: float,
) -> AnnData:
    """Rates and counts as AnnData, with images and scales where scanpy and squidpy look for them.

    ``diameter_um`` is the width at which these draw an observation.
    """
    from anndata import AnnData

    adata = AnnData(values, obs=obs, var=var)
    if counts is not None:
        adata.layers["counts"] = counts
    scales = {
        **layout.scales,
        "spot_diameter_fullres": diameter_um / layout.microns_per_pixel,
        "microns_per_pixel": float(layout.microns_per_pixel),
    }
    adata.uns["spatial"] = {layout.name: {"images": layout.images, "scalefactors": scales}}
    return adata


def check_library(name: str) -> None:
    """Raise ``UserError`` where a library id would not come back from an AnnData file as it is.

    Keys of its tables are paths in HDF5 and Zarr, and files are called by it.
    """
    plain = name.isprintable() and not re.search(r"[/\\]", name)
    if not plain or name in ("", ".", ".."):
        raise UserError(
            f"library name {name!r} cannot be a key of an AnnData file: give another (name=), "
            "without slashes and signs that cannot be printed"
        )


def sums(
    layout: Layout,
    rates: Iterator[tuple[int, np.ndarray]],
    parts: list[np.ndarray],
    number: np.ndarray,
    column: np.ndarray,
    genes: list[str],
) -> tuple[np.ndarray, sp.csr_matrix | None]:
    """Rates and, where all genes were measured, counts of the larger bins or cells in ``number``.

    ``parts`` lists, per patch, the one that each of its bins in tissue lies in; ``column`` the
    channels of the rates to take.
    """
    import scipy.sparse as sp

    values = np.zeros((number.size, len(genes)), np.float32)
    measured = layout.counts is not None and set(genes) <= set(layout.count_genes)
    count_column = [list(layout.count_genes).index(gene) for gene in genes] if measured else []
    counted = []
    for i, rate in rates:
        ones, row = _sum_matrix(parts[i], number)
        inside = layout.mask[i]
        values[row] += ones @ rate[column][:, inside].T
        if layout.counts is not None and measured:
            count = layout.counts[i][count_column][:, inside].T.astype(np.int32)
            piece = sp.coo_array(ones.astype(np.int32) @ sp.csr_array(count))
            counted.append((piece.data, row[piece.row], piece.col))
    if not measured:
        return values, None
    data, row, col = (np.concatenate(part) for part in zip(*counted, strict=True))
    # Patches whose edge cuts a large bin each hold a part of it; the conversion adds them.
    return values, sp.csr_matrix((data, (row, col)), shape=values.shape)


def _sum_matrix(bins: np.ndarray, number: np.ndarray) -> tuple[sp.csr_array, np.ndarray]:
    """Matrix that sums small bins into the rows kept of the table, and those rows."""
    import scipy.sparse as sp

    place = np.searchsorted(number, bins)
    kept = np.flatnonzero(number[np.minimum(place, number.size - 1)] == bins)
    row, local = np.unique(place[kept], return_inverse=True)
    ones = np.ones(len(kept), np.float32)
    return sp.csr_array((ones, (local, kept)), shape=(len(row), len(bins))), row


def _bin_names(rows: np.ndarray, cols: np.ndarray, bin_um: int) -> pd.DataFrame:
    """What Space Ranger says of bins: barcode (the index), tissue, row and column."""
    places = zip(rows.tolist(), cols.tolist(), strict=True)
    return pd.DataFrame(
        {
            "in_tissue": np.ones(rows.size, np.int32),
            "array_row": rows.astype(np.int32),
            "array_col": cols.astype(np.int32),
        },
        index=[f"s_{bin_um:03d}um_{row:05d}_{col:05d}-1" for row, col in places],
    )
