"""Gene panels: the published one, a user's list, or variable genes of the training patients.

``panel.csv`` beside this file is the published panel: 50 genes with categories and the sparsity
printed for patient P5, the percentage of in-tissue 2 µm bins with a count of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from sparsity_trap.settings import ROOT, Preset, UserError

if TYPE_CHECKING:
    from anndata import AnnData

_PANEL = pd.read_csv(Path(__file__).with_name("panel.csv"))

#: Published panel, in the order of every array in the project (axis "gene").
PANEL: tuple[str, ...] = tuple(_PANEL["gene"])

#: Kinds of genes that figures know.
CATEGORIES: tuple[str, ...] = tuple(_PANEL["category"].unique())

#: What spreadsheets make of symbols such as SEPT2 and MARCH1.
_DATE = r"\d{1,2}-[A-Za-z]{3}|[A-Za-z]{3}-\d{2}|\d{4}-\d{2}-\d{2}.*"

#: Least mean count per 8 µm bin of a variable gene: dispersions of rarer ones are mostly noise.
_LEAST_MEAN = 0.05


def panel_table() -> pd.DataFrame:
    """Return the published panel as a table.

    Returns
    -------
    DataFrame with columns ``gene``, ``category`` and ``published_sparsity`` (fraction 0-1), in
    panel order.
    """
    sparsity = _PANEL["published_sparsity_percent"] / 100
    return _PANEL[["gene", "category"]].assign(published_sparsity=sparsity)


def panel(preset: Preset) -> pd.DataFrame:
    """Genes that a preset predicts, in the order of every gene axis.

    Returns
    -------
    DataFrame with columns ``gene`` and ``category``.

    Raises
    ------
    UserError
        The list cannot be read, or variable genes have not been chosen yet.
    """
    if preset.genes.panel == "paper":
        return panel_table()[["gene", "category"]]
    if preset.genes.panel == "variable":
        if not preset.panel_file.is_file():
            raise UserError(
                f"{preset.panel_file} does not exist: run `make book`, or notebooks/01_data.py, "
                "which choose the variable genes"
            )
        return load_panel(preset.panel_file)
    return load_panel(ROOT / preset.genes.panel)


def load_panel(path: Path | str) -> pd.DataFrame:
    """Read a user's panel.

    Parameters
    ----------
    path
        A comma- or tab-separated table with a column ``gene`` and, if wanted, ``category``. Lines
        that begin with # are skipped.

    Returns
    -------
    DataFrame with columns ``gene`` and ``category`` in the file's order; genes without a category
    are "other".

    Raises
    ------
    UserError
        The file cannot be read, has no column ``gene``, lists no gene, one twice or a date, or
        names a category that figures do not know.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            separator = "\t" if "\t" in file.read(10_000) else ","
            file.seek(0)
            options = {"dtype": str, "keep_default_na": False, "comment": "#"}
            table = pd.read_csv(file, sep=separator, **options)
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("a line has more cells than the first")
    except (OSError, ValueError) as error:
        raise UserError(
            f"panel {path} cannot be read ({str(error).strip()}): give a CSV with a column 'gene'"
        ) from None
    table = table.rename(columns=str.strip).map(str.strip)
    if "gene" not in table or table.empty or (table["gene"] == "").any():
        raise UserError(
            f"panel {path} has no column 'gene' or a line without one: name the column in the "
            "first line and give a symbol in each other"
        )
    dates = table["gene"][table["gene"].str.fullmatch(_DATE)]
    if len(dates):
        raise UserError(
            f"panel {path}: {dates.iloc[0]} is a date, which a spreadsheet made of a gene symbol: "
            "write the symbol again, as text"
        )
    if repeated := list(table["gene"][table["gene"].duplicated()].unique()):
        raise UserError(f"panel {path}: gene {repeated[0]} occurs twice: keep one of them")
    if "category" not in table:
        table["category"] = "other"
    table["category"] = table["category"].replace("", "other")
    if unknown := sorted(set(table["category"]) - set(CATEGORIES)):
        raise UserError(
            f"panel {path}: category '{unknown[0]}' is unknown; choose among "
            f"{', '.join(CATEGORIES)}"
        )
    return table[["gene", "category"]]


def choose_variable_genes(tables: Mapping[str, AnnData], count: int) -> pd.DataFrame:
    """Choose the most variable genes of some patients, by scanpy.

    Counts of 8 µm bins are scaled to one total and logged, and genes are ranked within each patient
    by their dispersion among genes of a like mean (:func:`scanpy.pp.highly_variable_genes`, flavour
    "seurat"), so that differences between patients do not count.

    Parameters
    ----------
    tables
        Patient -> counts of all genes (:func:`sparsity_trap.data.spaceranger.read_8um_table`).
        Leave the test patient out, or the choice has seen what it is tested on.
    count
        Number of genes.

    Returns
    -------
    DataFrame with columns ``gene`` and ``category`` ("other"), most variable first.

    Raises
    ------
    UserError
        Fewer genes are expressed enough.
    """
    import anndata
    import numpy as np
    import scanpy as sc

    counts = anndata.concat(tables, label="patient", index_unique="-")
    counts = counts[:, np.asarray(counts.X.mean(axis=0)).ravel() >= _LEAST_MEAN].copy()
    if counts.n_vars < count:
        raise UserError(
            f"{counts.n_vars} genes have a mean of {_LEAST_MEAN} counts per 8 µm bin, {count} are "
            "asked for: lower genes.count in the preset"
        )
    sc.pp.normalize_total(counts)
    sc.pp.log1p(counts)
    ranked = sc.pp.highly_variable_genes(
        counts, n_top_genes=count, batch_key="patient", inplace=False
    )
    ranked.index = counts.var_names
    ranked = ranked[ranked["highly_variable"]].sort_values(
        ["highly_variable_nbatches", "dispersions_norm"], ascending=False
    )
    return pd.DataFrame({"gene": ranked.index, "category": "other"})


def in_panel(genes: Sequence[str], panel: Sequence[str]) -> list[str]:
    """Those of ``genes`` that the panel holds, made up to as many with the panel's first others."""
    known = [gene for gene in genes if gene in panel]
    return (known + [gene for gene in panel if gene not in known])[: len(genes)]
