"""Predictions and counts of whole cells: sums over their bins as AnnData, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sparsity_trap.bin_table import MAX_VALUES, Layout, as_anndata, check_library, chosen, sums
from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.cells import Cells
from sparsity_trap.metrics import calibration, pcc, poisson_deviance, spearman
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    from anndata import AnnData

#: Largest median distance, µm, between the centre of a cell's polygon and that of its bins. In
#: files of one segmentation it is a fraction of a bin, in those of two that of strangers.
_APART_UM = 8.0

#: Name of the rows that hold every cell.
ALL_CELLS = "all cells"


def cell_table(
    layout: Layout,
    rates: Iterator[tuple[int, np.ndarray]],
    panel: pd.DataFrame,
    cells: Cells,
    genes: Sequence[str] | None = None,
) -> AnnData:
    """Sum patches to cells.

    A cell is the sum over its bins of 2 µm in tissue, and is kept when more than half of its bins
    are in tissue and in a patch. Patches are summed one at a time, by a sparse matrix of ones.

    Parameters
    ----------
    layout
        The section.
    rates
        Patches in any order, and their rates per 2 µm bin [G, 128, 128].
    panel
        Columns ``gene`` and ``category`` of the genes of ``rates``.
    cells
        Of the same section.
    genes
        Leave out the others.

    Returns
    -------
    AnnData
        ``X`` float32, expected counts per cell; ``layers["counts"]`` the measured ones (csr), where
        there are any; ``obs``: ``bins`` that were summed, their ``share`` of the cell's, and
        ``cell_type`` where types are known; ``obsm["spatial"]``: full-resolution pixel x and y of
        the polygon's centroid, of a cell without polygon those of its bins' mean; the rest as
        `bin_table.bin_table`.

    Raises
    ------
    UserError
        The cells are of another section or segmentation, an unknown gene, or more than
        ``MAX_VALUES``.
    """
    check_library(layout.name)
    side = layout.shape[::-1] if layout.orientation.transpose else layout.shape
    if cells.of_bin.shape != tuple(side):
        raise UserError(
            f"cells lie on an array of {cells.of_bin.shape} bins, section {layout.name} on one of "
            f"{tuple(side)}: give the cells of this section"
        )
    of_bin = cells.of_bin.ravel()
    parts = [of_bin[layout.bins(i, 1)] for i in range(len(layout.origin))]
    number, obs = kept(cells, parts, f"in the patches of section {layout.name}")
    column, var = chosen(panel, genes)
    if number.size * len(var) > MAX_VALUES:
        raise UserError(
            f"{number.size} cells × {len(var)} genes exceed {MAX_VALUES} values (1 GiB): pass at "
            f"most {MAX_VALUES // number.size} in genes="
        )
    at = np.flatnonzero(of_bin >= 0)
    pixels = layout.pixels(*np.divmod(at, cells.of_bin.shape[1]), 1)
    centre = centres(cells, of_bin[at], pixels, layout.microns_per_pixel)
    del at, pixels
    values, counts = sums(layout, rates, parts, number, column, list(var.index))
    diameter = 2 * BIN_UM * np.sqrt(obs["bins"].median() / np.pi)
    adata = as_anndata(layout, values, counts, obs, var, float(diameter))
    adata.obsm["spatial"] = centre[number]
    return adata


def sum_bins(table: AnnData, cells: Cells) -> AnnData:
    """Sum a table of 2 µm bins to cells: predictions of any model.

    Parameters
    ----------
    table
        A row per bin, with ``array_row`` and ``array_col`` in ``obs``. ``X`` and
        ``layers["counts"]``, dense or sparse, are summed; ``obsm["spatial"]`` is averaged where a
        cell has no polygon.
    cells
        Of the same section.

    Returns
    -------
    AnnData as from `cell_table`, of the cells of which the table holds more than half of the bins.

    Raises
    ------
    UserError
        The table is not of 2 µm bins, has a bin beyond the array, or holds none of the cells.

    Examples
    --------
    Of a section they come from `data.cells.read_cells`; here two of two bins each:

    >>> from anndata import AnnData
    >>> cells = Cells(("left", "right"), np.array([[0, 0, 1, 1]]), np.full((2, 2), np.nan))
    >>> places = pd.DataFrame({"array_row": 0, "array_col": range(4)}, index=list("abcd"))
    >>> bins = AnnData(np.array([[0.5], [1], [2], [3]], "f4"), places, pd.DataFrame(index=["VIM"]))
    >>> bins.layers["counts"] = np.array([[1], [0], [3], [4]])
    >>> summed = sum_bins(bins, cells)
    >>> summed.to_df()["VIM"].to_dict(), summed.layers["counts"].toarray().ravel().tolist()
    ({'left': 1.5, 'right': 5.0}, [1, 7])
    >>> float(score_genes(summed)["calibration"].iloc[0])  # predicted over counted
    0.8125
    """
    import scipy.sparse as sp
    from anndata import AnnData

    try:
        row, col = (table.obs[name].to_numpy(int) for name in ("array_row", "array_col"))
    except (KeyError, ValueError):
        raise UserError(
            "the table of bins has no array_row and array_col: add them to obs"
        ) from None
    wide = table.obs_names.str.extract(r"^s_(\d{3})um_", expand=False).dropna().unique()
    beyond = (row < 0) | (row >= len(cells.of_bin)) | (col < 0) | (col >= cells.of_bin.shape[1])
    if set(wide) - {"002"} or beyond.any():
        raise UserError(
            "the table of bins is not of this section's bins of 2 µm: cells are sums of those, so "
            "give predictions at 2 µm"
        )
    own = cells.of_bin[row, col]
    number, obs = kept(cells, [own], "in the table of bins")
    place = np.full(len(cells.names) + 1, -1)
    place[number] = np.arange(len(number))
    held = np.flatnonzero(place[own] >= 0)
    ones = sp.csr_array(
        (np.ones(len(held), np.float32), (place[own[held]], held)), shape=(len(number), len(own))
    )
    adata = AnnData(ones @ table.X, obs, table.var.copy(), uns=dict(table.uns))
    if "counts" in table.layers:
        adata.layers["counts"] = sp.csr_matrix(ones.astype(np.int32) @ table.layers["counts"])
    known = own >= 0
    pixels = np.asarray(table.obsm["spatial"], float) if "spatial" in table.obsm else None
    if pixels is not None:
        adata.obsm["spatial"] = centres(cells, own[known], pixels[known])[number]
    return adata


def kept(cells: Cells, parts: Sequence[np.ndarray], where: str) -> tuple[np.ndarray, pd.DataFrame]:
    """Numbers of the cells of which more than half is held, and what the table says of them.

    ``parts`` are the cells of the bins that are held, -1 where there is none.
    """
    held = np.zeros(len(cells.names), int)
    for part in parts:
        held += np.bincount(part[part >= 0], minlength=len(held))
    share = held / np.bincount(cells.of_bin[cells.of_bin >= 0], minlength=len(held)).clip(min=1)
    number = np.flatnonzero(share > 0.5)
    if not number.size:
        raise UserError(
            f"none of the {len(held)} cells lies {where}: give the cells of this section"
        )
    names = pd.Index([cells.names[i] for i in number], name="cell_id")
    obs = pd.DataFrame({"bins": held[number].astype(np.int32), "share": share[number]}, names)
    if cells.types is not None:
        known = cells.types[number]
        obs["cell_type"] = pd.Categorical(known, sorted(set(known) - {""}))
    return number, obs


def centres(
    cells: Cells, who: np.ndarray, pixels: np.ndarray, microns_per_pixel: float | None = None
) -> np.ndarray:
    """Centre of each cell, pixel x and y: of its polygon or, without one, of its bins.

    ``who`` is the cell of each bin, ``pixels`` where it lies.
    """
    known = np.isfinite(pixels).all(axis=1)
    who, pixels = who[known], pixels[known]
    n = np.bincount(who, minlength=len(cells.names))
    total = np.stack([np.bincount(who, part, len(n)) for part in pixels.T], axis=1)
    middle = total / np.where(n, n, np.nan)[:, None]
    drawn = np.isfinite(cells.centre).all(axis=1)
    if microns_per_pixel is not None and drawn.any():
        away = np.hypot(*(cells.centre - middle)[drawn].T) * microns_per_pixel
        if np.nanmedian(away) > _APART_UM:
            raise UserError(
                f"polygons of cells lie {np.nanmedian(away):.0f} µm beside their bins: give "
                "polygons and bins of one segmentation"
            )
    return np.where(drawn[:, None], cells.centre, middle)


def score_genes(table: AnnData) -> pd.DataFrame:
    """Score each gene over cells: over all, and over those of each type.

    Parameters
    ----------
    table
        From `cell_table`, with counts.

    Returns
    -------
    DataFrame
        A row per group of cells and gene: ``cell_type`` (``ALL_CELLS`` first), ``gene``, ``cells``,
        ``mean_count``, ``pcc``, ``spearman``, ``d2``, ``calibration`` as in `metrics`, and
        ``pcc_bins``, what a prediction has that knows the size of a cell alone: the PCC of counts
        and number of bins. ``d2`` is the share of the deviance explained beyond that: against the
        group's own mean per bin, times the bins. Undefined values are NaN.
    """
    truth, rate = _by_gene(table)
    bins = table.obs["bins"].to_numpy(np.float32)
    groups = {ALL_CELLS: np.ones(table.n_obs, bool)}
    if "cell_type" in table.obs:
        kinds = table.obs["cell_type"].astype("category").cat.remove_unused_categories()
        groups |= {str(kind): (kinds == kind).to_numpy() for kind in kinds.cat.categories}
    rows = []
    for name, inside in groups.items():
        y, p, size = truth[:, inside], rate[:, inside], bins[inside]
        level = y.sum(1, dtype=np.float64) / size.sum()
        alone = (level[:, None] * size).astype(np.float32)
        null = np.where(level > 0, poisson_deviance(_maps(y), _maps(alone)), np.nan)
        scores = {
            "cell_type": name,
            "gene": table.var_names,
            "cells": len(size),
            "mean_count": y.mean(1, dtype=np.float64),
            "pcc": pcc(_maps(y), _maps(p)),
            "pcc_bins": pcc(_maps(y), _maps(np.broadcast_to(size, y.shape))),
            "spearman": [spearman(*pair) for pair in zip(y, p, strict=True)],
            "d2": 1 - poisson_deviance(_maps(y), _maps(p)) / np.where(null > 0, null, np.nan),
            "calibration": calibration(_maps(y), _maps(p)),
        }
        rows.append(pd.DataFrame(scores))
    return pd.concat(rows, ignore_index=True)


def score_cells(table: AnnData) -> pd.DataFrame:
    """Score each cell over genes.

    Returns
    -------
    DataFrame
        A row per cell, in the table's order: ``cell_type`` where types are known, ``bins``,
        ``count`` and ``rate`` (measured and predicted, all genes), ``pcc`` over genes, ``pcc_mean``
        of a prediction that gives every cell the genes' means, and ``deviance`` per gene.
    """
    truth, rate = _by_gene(table)
    mean = np.broadcast_to(truth.mean(1, dtype=np.float64).astype(np.float32), truth.T.shape)
    y, p = np.ascontiguousarray(truth.T), np.ascontiguousarray(rate.T)
    known = [name for name in ("cell_type", "bins") if name in table.obs]
    return table.obs[known].assign(
        count=y.sum(1),
        rate=p.sum(1),
        pcc=pcc(_maps(y), _maps(p)),
        pcc_mean=pcc(_maps(y), _maps(mean)),
        deviance=poisson_deviance(_maps(y), _maps(p)),
    )


def _by_gene(table: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Counts and rates, float32 [genes, cells]."""
    import scipy.sparse as sp

    if "counts" not in table.layers:
        raise UserError("the table has no counts to score against: predict a section with counts")
    counts, rates = (
        np.ascontiguousarray(sp.csr_array(values).toarray().T, np.float32)
        for values in (table.layers["counts"], table.X)
    )
    if not (np.isfinite(rates).all() and (rates >= 0).all()):
        raise UserError(
            "the table's predictions are negative or undefined in places: give expected counts, no "
            "logarithms or z-scores"
        )
    return counts, rates


def _maps(values: np.ndarray) -> np.ndarray:
    """Values [G, n] as maps of one column, [1, G, n, 1], which the metrics take."""
    return values[None, :, :, None]
