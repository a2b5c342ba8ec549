"""Predictions and counts of whole cells: sums over their bins as AnnData, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sparsity_trap.bin_table import MAX_VALUES, Layout, as_anndata, chosen, sums
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
    side = layout.shape[::-1] if layout.orientation.transpose else layout.shape
    if cells.of_bin.shape != tuple(side):
        raise UserError(
            f"cells lie on an array of {cells.of_bin.shape} bins, section {layout.name} on one of "
            f"{tuple(side)}: give the cells of this section"
        )
    of_bin = cells.of_bin.ravel()
    parts = [of_bin[layout.bins(i, 1)] for i in range(len(layout.origin))]
    held = np.zeros(len(cells.names), int)
    for part in parts:
        held += np.bincount(part[part >= 0], minlength=len(held))
    share = held / np.bincount(of_bin[of_bin >= 0], minlength=len(held)).clip(min=1)
    number = np.flatnonzero(share > 0.5)
    column, var = chosen(panel, genes)
    if not number.size:
        raise UserError(
            f"none of the {len(held)} cells lies in the patches of section {layout.name}: give the "
            "cells of this section"
        )
    if number.size * len(var) > MAX_VALUES:
        raise UserError(
            f"{number.size} cells × {len(var)} genes exceed {MAX_VALUES} values (1 GiB): pass at "
            f"most {MAX_VALUES // number.size} in genes="
        )
    centre = _centres(layout, cells)[number]
    values, counts = sums(layout, rates, parts, number, column, list(var.index))

    names = pd.Index([cells.names[i] for i in number], name="cell_id")
    obs = pd.DataFrame({"bins": held[number].astype(np.int32), "share": share[number]}, names)
    if cells.types is not None:
        known = cells.types[number]
        obs["cell_type"] = pd.Categorical(known, sorted(set(known) - {""}))
    diameter = 2 * BIN_UM * np.sqrt(np.median(held[number]) / np.pi)
    adata = as_anndata(layout, values, counts, obs, var, float(diameter))
    adata.obsm["spatial"] = centre
    return adata


def _centres(layout: Layout, cells: Cells) -> np.ndarray:
    """Centre of each cell, pixel x and y: of its polygon or, without one, of its bins."""
    at = np.flatnonzero(cells.of_bin >= 0)
    who = cells.of_bin.ravel()[at]
    pixels = layout.pixels(*np.divmod(at, cells.of_bin.shape[1]), 1)
    known = np.isfinite(pixels).all(axis=1)
    who, pixels = who[known], pixels[known]
    n = np.bincount(who, minlength=len(cells.names))
    total = np.stack([np.bincount(who, part, len(n)) for part in pixels.T], axis=1)
    middle = total / np.where(n, n, np.nan)[:, None]
    drawn = np.isfinite(cells.centre).all(axis=1)
    if drawn.any():
        away = np.hypot(*(cells.centre - middle)[drawn].T) * layout.microns_per_pixel
        if np.nanmedian(away) > _APART_UM:
            raise UserError(
                f"polygons of section {layout.name} lie {np.nanmedian(away):.0f} µm beside the "
                "bins of their cells: give polygons and bins of one segmentation"
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
        kinds = table.obs["cell_type"]
        groups |= {str(kind): (kinds == kind).to_numpy() for kind in kinds.cat.categories}
    rows = []
    for name, inside in groups.items():
        y, p, size = truth[:, inside], rate[:, inside], bins[inside]
        level = y.sum(1, dtype=np.float64) / size.sum()
        alone = (level[:, None] * size).astype(np.float32)
        null = poisson_deviance(_maps(y), _maps(alone))
        with np.errstate(invalid="ignore", divide="ignore"):
            gain = 1 - poisson_deviance(_maps(y), _maps(p)) / null
        scores = {
            "cell_type": name,
            "gene": table.var_names,
            "cells": len(size),
            "mean_count": y.mean(1, dtype=np.float64),
            "pcc": pcc(_maps(y), _maps(p)),
            "pcc_bins": pcc(_maps(y), _maps(np.broadcast_to(size, y.shape))),
            "spearman": [spearman(*pair) for pair in zip(y, p, strict=True)],
            "d2": np.where(null > 0, gain, np.nan),
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
    if "counts" not in table.layers:
        raise UserError("the table has no counts to score against: predict a section with counts")
    counts = table.layers["counts"].T.astype(np.float32).toarray()
    return counts, np.ascontiguousarray(np.asarray(table.X, np.float32).T)


def _maps(values: np.ndarray) -> np.ndarray:
    """Values [G, n] as maps of one column, [1, G, n, 1], which the metrics take."""
    return values[None, :, :, None]
