"""Gene panels: the published one, a user's list, or variable genes of the training patients.

The published panel has 50 genes with categories and the sparsity printed for patient P5: the
percentage of in-tissue 2 µm bins with a count of zero.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from sparsity_trap.settings import ROOT, Preset, UserError

if TYPE_CHECKING:
    from sparsity_trap.data.spaceranger import GeneTotals

#: category -> {symbol: published % of zero bins in patient P5}, in the order of the paper.
PUBLISHED_SPARSITY: dict[str, dict[str, float]] = {
    "mitochondrial": {
        "MT-ATP6": 74.9, "MT-ND4": 75.2, "MT-CO3": 76.4, "MT-CO2": 79.5, "MT-CYB": 79.5,
        "MT-ND3": 85.9, "MT-ND4L": 88.1, "MT-ND2": 90.0, "MT-ND1": 95.2, "MT-ND5": 96.6,
    },
    "secretory": {"PIGR": 92.7, "LCN2": 95.5, "MUC12": 95.7, "FCGBP": 97.5},
    "epithelial": {
        "CEACAM5": 94.7, "EPCAM": 95.3, "PHGR1": 96.2, "TSPAN8": 96.5,
        "KRT8": 97.1, "OLFM4": 97.4, "CEACAM6": 97.5, "CD24": 97.7,
    },
    "stromal": {
        "VIM": 95.6, "COL3A1": 95.6, "DES": 96.4, "TAGLN": 97.0, "COL1A1": 97.4, "COL1A2": 98.0,
    },
    "immune": {
        "IGKC": 90.0, "IGHG1": 96.6, "JCHAIN": 96.9, "CD74": 97.9, "IGHA1": 98.1, "IGHM": 99.2,
    },
    "housekeeping": {
        "TMSB4X": 87.7, "TMSB10": 94.1, "ACTB": 94.7, "FTH1": 95.3, "B2M": 95.8,
        "OAZ1": 96.8, "FTL": 96.9, "EEF1G": 97.9, "CFL1": 98.1, "HSPA8": 98.4,
    },
    "other": {
        "S100A6": 95.9, "CST3": 96.9, "S100A10": 97.9, "LGALS3": 98.2, "SYNGR2": 98.7, "PYGB": 98.8,
    },
}  # fmt: skip

#: Panel order used by every array in the project (axis "gene").
PANEL: tuple[str, ...] = tuple(g for genes in PUBLISHED_SPARSITY.values() for g in genes)

#: Largest file that is read as a panel, bytes; and what a symbol may look like, so that a page or
#: program given by mistake is not taken for a list.
_PANEL_BYTES, _SYMBOL = 4 << 20, r"[^\W_][\w.:@/+()'-]{0,63}"


def panel_table() -> pd.DataFrame:
    """Return the panel as a table.

    Returns
    -------
    DataFrame with columns ``gene``, ``category`` and ``published_sparsity`` (fraction 0-1), in
    panel order.
    """
    rows = [
        (gene, category, percent / 100)
        for category, genes in PUBLISHED_SPARSITY.items()
        for gene, percent in genes.items()
    ]
    return pd.DataFrame(rows, columns=["gene", "category", "published_sparsity"])


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
        A comma- or tab-separated table with a column ``gene`` and, if wanted, ``category``; or a
        text file of one symbol per line. Empty lines and lines that begin with # are skipped.

    Returns
    -------
    DataFrame with columns ``gene`` and ``category`` in the file's order; genes without a category
    are "other".

    Raises
    ------
    UserError
        The file is missing or not text, lists no gene or one twice, or names a category that
        figures do not know.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        if path.stat().st_size > _PANEL_BYTES:
            raise OSError(f"more than {_PANEL_BYTES >> 20} MB")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(
            f"panel {path} cannot be read ({error}): give a CSV with a column 'gene', or one "
            "symbol per line"
        ) from None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    try:
        table = csv.reader(lines, delimiter=delimiter, strict=True)
        rows = [[cell.strip() for cell in row] for row in table]
    except csv.Error as error:
        raise UserError(f"panel {path} is not a table ({error}): mend its quotes") from None
    header = rows[0] if rows else []
    if "gene" not in header:
        if any(len(row) > 1 for row in rows):
            raise UserError(f"panel {path} has no column 'gene': name it so in the first line")
        header, rows = ["gene"], [["gene"], *rows]
    if any(len(row) > len(header) for row in rows):
        raise UserError(f"panel {path}: a line has more cells than the first: mend it")
    records = [dict(zip(header, row, strict=False)) for row in rows[1:]]
    table = pd.DataFrame(
        {
            "gene": [record.get("gene", "") for record in records],
            "category": [record.get("category") or "other" for record in records],
        }
    )
    if table.empty or (table["gene"] == "").any():
        raise UserError(f"panel {path} has no gene, or a line without one: give a symbol per line")
    odd = table["gene"][~table["gene"].str.fullmatch(_SYMBOL)]
    if len(odd):
        raise UserError(
            f"panel {path}: {odd.iloc[0][:40]!r} is not a gene symbol: give one symbol per line"
        )
    _refuse_repeated(table["gene"], f"panel {path}")
    if unknown := sorted(set(table["category"]) - set(PUBLISHED_SPARSITY)):
        raise UserError(
            f"panel {path}: category '{unknown[0]}' is unknown; choose among "
            f"{', '.join(PUBLISHED_SPARSITY)}"
        )
    return table


def moments_of_totals(genes: Sequence[str], totals: GeneTotals) -> pd.DataFrame:
    """Per-gene sums over the 2 µm bins of a section, sufficient for mean and variance.

    Symbols that several features share are left out: squares of their sums are not known.

    Parameters
    ----------
    genes
        ``Slide.genes``.
    totals
        From ``Slide.counts_and_totals``.

    Returns
    -------
    DataFrame with columns ``gene``, ``bins``, ``total`` and ``total_squares``.
    """
    table = pd.DataFrame(
        {
            "gene": list(genes),
            "bins": totals.n_bins,
            "total": totals.umis.astype(float),
            "total_squares": totals.squares.astype(float),
        }
    )
    return table[~table["gene"].duplicated(keep=False)].reset_index(drop=True)


def choose_variable_genes(
    moments: Mapping[str, pd.DataFrame],
    k: int,
    *,
    patients: Sequence[str],
    test_patient: str,
    min_mean: float = 0.003,
) -> pd.DataFrame:
    """Choose the k most variable genes, from training patients alone.

    The criterion is the overdispersion of counts per bin, (variance − mean) / mean²: the moment
    estimate of a negative binomial's dispersion, 0 for Poisson noise around one rate. It is
    computed within each section and averaged over sections, so that differences between patients
    do not count. Genes with a mean under ``min_mean`` in any section are left out, as their
    overdispersion is mostly noise.

    Parameters
    ----------
    moments
        Patient -> `moments_of_totals` of that patient's section.
    k
        Number of genes.
    patients
        Training patients; exactly those in ``moments``.
    test_patient
        Patient left out, who must not take part.
    min_mean
        Least mean count per 2 µm bin; the default is 0.05 per 8 µm bin.

    Returns
    -------
    DataFrame with columns ``gene``, ``category`` ("other") and ``overdispersion``, largest first;
    ties in alphabetical order.

    Raises
    ------
    UserError
        The test patient, or one who is not in ``patients``, takes part; a patient or gene is
        missing or repeated; fewer than k genes are expressed enough.
    """
    if test_patient in patients or test_patient in moments:
        raise UserError(
            f"test patient '{test_patient}' must not choose genes: pass training patients only"
        )
    if not patients or set(moments) != set(patients):
        raise UserError(
            f"genes must be chosen on the training patients {', '.join(patients) or '(none)'}, not "
            f"on {', '.join(moments) or 'none'}: pass the moments of exactly those"
        )
    tables = {}
    for patient in sorted(moments):
        table = moments[patient]
        _refuse_repeated(table["gene"], f"moments of patient {patient}")
        table = table.set_index("gene")
        mean = table["total"] / table["bins"]
        variance = (table["total_squares"] - table["total"] * mean) / (table["bins"] - 1)
        tables[patient] = pd.DataFrame({"mean": mean, "excess": (variance - mean) / mean**2})
    joined = pd.concat(tables, axis=1)
    mean, excess = (joined.xs(name, axis=1, level=1) for name in ("mean", "excess"))
    # A gene that one section lacks has mean NaN there and fails the comparison.
    expressed = (mean >= min_mean).all(axis=1)
    chosen = excess[expressed].mean(axis=1).rename("overdispersion").reset_index()
    chosen.columns = ["gene", "overdispersion"]
    if not 1 <= k <= len(chosen):
        raise UserError(
            f"{len(chosen)} genes have a mean of {min_mean} counts per bin in every training "
            f"section, {k} are asked for: lower genes.count in the preset"
        )
    chosen = chosen.sort_values(["overdispersion", "gene"], ascending=[False, True]).head(k)
    chosen.insert(1, "category", "other")
    return chosen.reset_index(drop=True)


def in_panel(genes: Sequence[str], panel: Sequence[str]) -> list[str]:
    """Those of ``genes`` that the panel holds, made up to as many with the panel's first others."""
    known = [gene for gene in genes if gene in panel]
    return (known + [gene for gene in panel if gene not in known])[: len(genes)]


def _refuse_repeated(genes: pd.Series, what: str) -> None:
    repeated = genes[genes.duplicated()].unique()
    if len(repeated):
        raise UserError(f"{what}: gene {', '.join(repeated[:5])} occurs twice: keep one of them")
