"""Gene panels: the published one, a user's list, or variable genes of the training patients.

``panel.csv`` beside this file is the published panel: 50 genes with categories and the sparsity
printed for patient P5, the percentage of in-tissue 2 µm bins with a count of zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sparsity_trap.frames import PARQUET, as_frame, read_csv
from sparsity_trap.settings import ROOT, Preset, UserError

if TYPE_CHECKING:
    from anndata import AnnData

_PANEL = pd.read_csv(Path(__file__).with_name("panel.csv"))

#: Published panel, in the order of every array in the project (axis "gene").
PANEL: tuple[str, ...] = tuple(_PANEL["gene"])

#: Kinds of genes that figures know.
CATEGORIES: tuple[str, ...] = tuple(_PANEL["category"].unique())

_MONTH = (
    "jan(uary?)?|feb(ruary?)?|mar(ch)?|apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|"
    "o[ck]t(ober)?|nov(ember)?|de[cz](ember)?|jän(ner)?|märz?|mrz|mai|juni|juli|"  # German too
    "janv(ier)?|févr?(ier)?|mars|avr(il)?|juin|juil(let)?|août|déc(embre)?|ene|abr|ago|dic"
)
#: What spreadsheets make of symbols such as SEPT2 and MARCH1, or of others that read as a number.
_DATE = re.compile(
    rf"\d{{1,2}}[-./ ]+({_MONTH})\.?([-./ ]+\d{{2,4}})?"  # 1-Mar, 1. Mrz 2024
    rf"|({_MONTH})\.?[-/ ]+\d{{2,4}}"  # Mar-01
    r"|\d{4}-\d{1,2}-\d{1,2}\b.*|\d{1,2}[./]\d{1,2}[./](\d{2,4})?",  # 2024-03-01, 3/1/24, 1.3.
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?(e[-+]?\d+)?", re.IGNORECASE)
_ERROR = re.compile(r"#(N/A|NAME\?|REF!|VALUE!|NUM!|DIV/0!|NULL!)")
_ENSEMBL = re.compile(r"ENS[A-Z]*[GT]\d{11}(\.\d+)?")

#: Families that were given new names, so that spreadsheets leave them alone.
_RENAMED = {"MARCH": "MARCHF", "SEPT": "SEPTIN", "MARC": "MTARC", "DEC": "DELEC"}

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


def load_panel(table: Any) -> pd.DataFrame:
    """Read a user's panel.

    Parameters
    ----------
    table
        Path of a table separated by commas, semicolons or tabs, or any table that
        :func:`sparsity_trap.frames.as_frame` takes, with a column ``gene`` and, if wanted,
        ``category``. Lines of a file that begin with # are skipped.

    Returns
    -------
    DataFrame with columns ``gene`` and ``category`` in the table's order; genes without a category
    are "other".

    Raises
    ------
    UserError
        It cannot be read, has no column ``gene``, lists no gene, one twice or none that is a
        symbol, or names a category that figures do not know.
    """
    called = f"panel {table}" if isinstance(table, (str, Path)) else "panel"
    if isinstance(table, (str, Path)) and Path(table).suffix.lower() not in PARQUET:
        table = read_csv(Path(table), comments=True)
    frame = as_frame(table, called)
    frame = frame.rename(columns={n: n.lower() for n in frame if n.lower() in ("gene", "category")})
    if "gene" not in frame or frame.empty:
        raise UserError(
            f"{called} has no column 'gene' or no line below it: name the column in the first line "
            "and give a symbol in each other"
        )
    frame = as_frame(frame, called, text=["gene", "category"] if "category" in frame else ["gene"])
    genes = frame["gene"].str.strip()
    if said := not_symbols(genes):
        raise UserError(f"{called}: {said}")
    if ids := [gene for gene in genes if _ENSEMBL.fullmatch(gene)]:
        raise UserError(f"{called}: {ids[0]} is an id of Ensembl: give gene symbols in its place")
    category = frame["category"].str.strip().str.lower() if "category" in frame else ""
    frame = pd.DataFrame({"gene": genes, "category": category})
    frame["category"] = frame["category"].replace("", "other")
    if unknown := sorted(set(frame["category"]) - set(CATEGORIES)):
        raise UserError(
            f"{called}: category '{unknown[0]}' is unknown; choose among {', '.join(CATEGORIES)}"
        )
    return frame


def not_symbols(genes: pd.Series) -> str:
    """What is wrong with a column of gene symbols, and what helps; else nothing."""
    again = "write the symbol again, as text"
    by_spreadsheet = "which a spreadsheet made of a gene symbol"
    for gene in genes:
        if not gene:
            return "a line has no gene: give its symbol, or remove the line"
        if _DATE.fullmatch(gene):
            return f"{gene} is a date, {by_spreadsheet}: {again}"
        if _ERROR.fullmatch(gene):
            return f"{gene} is an error, {by_spreadsheet}: {again}"
        if _NUMBER.fullmatch(gene):
            return f"{gene} is a number, {by_spreadsheet} (a date is one to it), or an id: {again}"
    if repeated := list(genes[genes.duplicated()].unique()):
        return f"gene {repeated[0]} occurs twice: keep one of them"
    return ""


def near_symbols(missing: Sequence[str], names: Sequence[str | None]) -> str:
    """What a section calls genes that it lacks under these names, in brackets; else nothing."""
    by_capitals = {name.upper(): name for name in names if name}
    found = []
    for gene in missing:
        family = re.fullmatch(rf"({'|'.join(_RENAMED)})(\d+)", gene.upper())
        now = f"{_RENAMED[family[1]]}{family[2]}" if family else gene.upper()
        if now in by_capitals:
            found.append(f"{by_capitals[now]} for {gene}")
    damaged = [name for name in by_capitals.values() if _DATE.fullmatch(name)]
    if damaged:
        found.append(f"{damaged[0]}, a date that a spreadsheet made of a symbol")
    return f" (it has {'; '.join(found)})" if found else ""


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
