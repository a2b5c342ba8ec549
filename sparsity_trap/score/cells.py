"""Predictions of 2 µm bins summed to whole cells, beside the counts of the same bins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from sparsity_trap.bin_table import MAX_VALUES
from sparsity_trap.bins import PATCH_BINS
from sparsity_trap.cells import ALL_CELLS, centres, kept
from sparsity_trap.data.cells import Cells, read_cells
from sparsity_trap.data.spaceranger import read_positions
from sparsity_trap.score.pairing import Pairing
from sparsity_trap.score.section import OutsSection
from sparsity_trap.settings import UserError

if TYPE_CHECKING:
    from anndata import AnnData

#: In place of a table of bin and cell: Space Ranger's.
OWN = "own"


def cells_of(found: Pairing, table: str, types: str = "") -> Cells:
    """Read the cells to sum predictions to.

    Parameters
    ----------
    found
        Predictions laid over a section.
    table
        ``OWN``, or a file of bin and cell as for `data.cells.read_cells`.
    types
        File of cell and type; default: Space Ranger's clusters for its own cells.

    Raises
    ------
    UserError
        The predictions are no counts of 2 µm bins of Space Ranger's array, or as from
        `data.cells.read_cells`.
    """
    outs = _section(found).outs
    return read_cells(outs, None if table == OWN else table, types=types or None)


def _section(found: Pairing) -> OutsSection:
    """The section, where bins may be summed to its cells."""
    if not (isinstance(found.section, OutsSection) and found.summable):
        raise UserError(
            f"{found.name}: cells are sums of 2 µm bins of Space Ranger's array: give counts or "
            "log1p counts at 2 µm and its outs as the section, or leave the cells out"
        )
    return found.section


def cell_sums(found: Pairing, cells: Cells) -> AnnData:
    """Sum predicted and measured bins to cells.

    A cell is kept when more than half of its bins are in tissue and predicted.

    Returns
    -------
    AnnData as from `cells.sum_bins`, for `cells.score_genes` and `cells.score_cells`.

    Raises
    ------
    UserError
        None of the cells is predicted, polygons lie beside their bins, or the table would exceed
        ``bin_table.MAX_VALUES``.
    """
    import scipy.sparse as sp
    from anndata import AnnData

    section, n = _section(found), len(cells.names)
    if n * len(found.genes) > MAX_VALUES:
        raise UserError(
            f"{found.name}: {n} cells × {len(found.genes)} genes exceed {MAX_VALUES} values "
            f"(1 GiB): name at most {MAX_VALUES // n} genes (--genes)"
        )
    rates = np.zeros((n, len(found.genes)), np.float32)
    counted, parts = np.zeros_like(rates, np.int32), []
    columns = section.tissue.shape[1] // PATCH_BINS
    for counts, rate, mask in found.rates():
        top, left = (PATCH_BINS * place for place in divmod(found.numbers[-1], columns))
        own = np.full(mask.shape, -1, np.int32)
        window = cells.of_bin[top : top + PATCH_BINS, left : left + PATCH_BINS]
        own[: window.shape[0], : window.shape[1]] = window
        held = mask & (own >= 0)
        parts.append(own[held])
        who, place = np.unique(parts[-1], return_inverse=True)
        ones = sp.csr_array(
            (np.ones(len(place), np.float32), (place, np.arange(len(place)))),
            shape=(len(who), len(place)),
        )
        rates[who] += ones @ rate[:, held].T.astype(np.float32)
        counted[who] += (ones @ counts[:, held].T.astype(np.float32)).astype(np.int32)
    number, obs = kept(cells, parts, f"in the predicted tissue of {section.name}")
    adata = AnnData(rates[number], obs, pd.DataFrame(index=pd.Index(found.genes, name="gene")))
    adata.layers["counts"] = sp.csr_matrix(counted[number])
    at = cells.of_bin >= 0
    positions = read_positions(section.outs)
    pixels = np.stack([positions.x[at], positions.y[at]], axis=1)
    middle = centres(cells, cells.of_bin[at], pixels, section.microns_per_pixel)
    adata.obsm["spatial"] = middle[number]
    adata.uns["sparsity_trap"] = {"unit": "expected UMI count per cell", "section": section.name}
    return adata


def type_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over genes of `cells.score_genes`, a row per cell type, the largest first."""
    columns = ["cells", "mean_count", "pcc", "pcc_bins", "spearman", "d2", "calibration"]
    means = scores.groupby("cell_type", sort=False, observed=True)[columns].mean()
    means["cells"] = means["cells"].astype(int)
    order = means["cells"].rank(ascending=False, method="first").where(means.index != ALL_CELLS, 0)
    return means.loc[order.sort_values().index].rename_axis("cells of type")
