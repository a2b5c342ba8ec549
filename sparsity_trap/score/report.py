"""The report card: one page that needs no other file, with its numbers beside it.

``index.html``, ``scores.csv`` (every score of every set of maps and gene) and ``card.json`` (what
the page says); of whole cells also ``cells.h5ad``, ``cells_genes.csv`` and ``cells.csv``. The page
holds its pictures, works without a network and without scripts, where only sorting is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from sparsity_trap import __version__
from sparsity_trap.cells import score_cells, score_genes
from sparsity_trap.evaluation.protocols import PROTOCOLS, mean_of
from sparsity_trap.evaluation.result import INFORMED, MODEL, ORACLE, Evaluation
from sparsity_trap.evaluation.verdict import beaten_under, blind_nulls
from sparsity_trap.files import building, commit
from sparsity_trap.quotes import plain
from sparsity_trap.score.cells import type_table
from sparsity_trap.score.drawings import curve, map_rows
from sparsity_trap.score.recalibrate import WAYS, recalibration_table
from sparsity_trap.show import style, tables
from sparsity_trap.show.page import render

if TYPE_CHECKING:
    from anndata import AnnData

#: Kinds of score in the table of nulls, those of the own and the larger bins alone.
_SHOWN = ("pcc", "spearman", "ssim", "auprc", "d2", "deviance", "mse", "calibration")


def write(
    found: Evaluation,
    folder: Path | str,
    *,
    picture: Callable[[int], np.ndarray] | None = None,
    upright: Callable[[np.ndarray], np.ndarray] = lambda maps: maps,
    recalibrated: pd.DataFrame | None = None,
    comparison: Mapping[str, Any] | None = None,
    cells: AnnData | None = None,
    mark: str = "",
) -> Path:
    """Write the report card of an evaluation.

    Parameters
    ----------
    found
        From `evaluation.evaluate`.
    folder
        Appears, or is replaced, only when complete.
    picture
        Gives the H&E of a patch by its number, uint8 [H, W, 3].
    upright
        Turns maps [..., h, w] like that picture.
    recalibrated
        From `recalibrate.recalibration`.
    comparison
        ``summary`` from `compare.summary`, and ``differences`` by the other's name.
    cells
        From `score.cells.cell_sums`.
    mark
        What sets the data apart, such as that they are simulated.

    Returns
    -------
    Path of the page.
    """
    folder, mark = Path(folder), mark or str(found.about.get("mark", ""))
    genes = gene_table(found)
    files = {"scores.csv": found.to_dataframe()}
    means: dict[str, pd.DataFrame] = {}
    if recalibrated is not None:
        means["recalibration"] = recalibration_table(recalibrated)
    if cells is not None:
        files |= {
            "cells_genes.csv": score_genes(cells),
            "cells.csv": score_cells(cells).reset_index(),
        }
        means["cells"] = type_table(files["cells_genes.csv"])
    values = _values(found, genes, means, comparison or {}) | {"mark": mark}
    with style.used():
        values |= {"maps": map_rows(found, picture, upright, mark), "curve": curve(found, mark)}
    card = _card(found, genes, means, comparison or {})
    with building(folder) as partial:
        partial.mkdir()
        (partial / "index.html").write_text(render("report_card.html", **values), encoding="utf-8")
        (partial / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False))
        for name, table in files.items():
            table.to_csv(partial / name, index=False, float_format="%.6g")
        if cells is not None:
            cells.write_h5ad(partial / "cells.h5ad")
    return folder / "index.html"


def _values(
    found: Evaluation,
    genes: pd.DataFrame,
    means: Mapping[str, pd.DataFrame],
    comparison: Mapping[str, Any],
) -> dict[str, Any]:
    """What the page's template takes, but for the drawings."""
    return {
        "name": Path(str(found.about["name"])).name or str(found.about["name"]),
        "facts": _facts(found),
        "findings": found.findings,
        "verdict": found.verdict,
        "oracle": ORACLE in found.scores,
        "nulls": _html(null_table(found), marked={MODEL: "model"}),
        "protocols": _protocols(found),
        "definitions": [PROTOCOLS[name] for name in found.protocols[MODEL]],
        "recalibration": _html(means["recalibration"]) if "recalibration" in means else None,
        "recalibration_text": _level_text(means),
        "cells": _html(means["cells"]) if "cells" in means else None,
        "comparison": _comparison(comparison),
        "genes": _html(genes, index=False, sortable=True),
        "made": _made(found),
        "missing": ", ".join(found.about.get("missing", [])),
    }


# --- tables ---------------------------------------------------------------------------------------


def null_table(found: Evaluation) -> pd.DataFrame:
    """Means over genes, a row for each set of maps, and the ceiling."""
    widths = {"", *(f"{found.about[key]:g}um" for key in ("bin_um", "wide_um"))}
    shown = [
        column
        for column in found.scores[MODEL]
        if column.partition("_")[0] in _SHOWN and column.partition("_")[2] in widths
    ]
    rows = {
        name: {column: mean_of(columns[column]) for column in shown}
        for name, columns in found.scores.items()
    }
    table = pd.DataFrame(rows).T
    for name, values in found.ceilings.items():
        table.loc["ceiling", name.replace("ceiling", "pcc")] = mean_of(values)
    return table


def gene_table(found: Evaluation) -> pd.DataFrame:
    """One row per gene: the model's scores beside the best null and the ceiling."""
    main, model = found.main, found.scores[MODEL]
    blind = [found.scores[name][main] for name in blind_nulls(found.scores)]
    known = [np.nan_to_num(values, nan=-np.inf) for values in blind]
    best = np.max(known, axis=0) if known else np.full(len(found.genes), -np.inf)
    ceiling = found.ceilings[main.replace("pcc", "ceiling")]
    columns = {"gene": found.genes, "sparsity": model["sparsity"]}
    columns |= {
        "mean_count": model["mean_count"],
        main: model[main],
        "best null": np.where(np.isfinite(best), best, np.nan),
        "ceiling": ceiling,
        "share of ceiling": model[main] / ceiling,
    }
    others = ("spearman", "ssim", "d2", "auprc", "calibration")
    columns |= {
        k: v for k, v in model.items() if k.split("_")[0] in others and not k.endswith("base")
    }
    return pd.DataFrame(columns).sort_values(main, ascending=False, na_position="last")


def _level_text(means: Mapping[str, pd.DataFrame]) -> str:
    if "recalibration" not in means:
        return ""
    before, factor, increasing = (means["recalibration"].loc[way] for way in WAYS)
    return (
        "Rescaled on every other patch, scored on the rest, mean over genes. A factor per gene "
        f"takes D² from {before['d2']:.3f} to {factor['d2']:.3f} and SSIM from "
        f"{before['ssim_2um']:.3f} to {factor['ssim_2um']:.3f}, an increasing map per gene to "
        f"{increasing['d2']:.3f} and {increasing['ssim_2um']:.3f}: so much of either was level."
    )


def _protocols(found: Evaluation) -> Markup:
    """A row for each protocol: the model, the best blind null, those that know part, the oracle."""
    beaten, rows = beaten_under(found.protocols), {}
    for name, value in found.protocols[MODEL].items():
        every = {of: own[name] for of, own in found.protocols.items()}
        blind = {of: every[of] for of in blind_nulls(every) if not np.isnan(every[of])}
        best = max(blind, key=lambda of: blind[of], default="")
        row = {"model": value, "best null": blind.get(best, np.nan), "which": best or "–"}
        row |= {of: every[of] for of in (*INFORMED, ORACLE) if of in every}
        row["beaten"] = (
            "a null scores as high" if set(beaten[name]) - set(INFORMED)
            else "only one that knows part" if beaten[name] else "no"
        )  # fmt: skip
        rows[PROTOCOLS[name].title] = row
    html = str(_html(pd.DataFrame(rows).T))
    return Markup(html.replace("<td>a null scores", '<td class="beaten">a null scores'))


def _html(
    table: pd.DataFrame,
    *,
    index: bool = True,
    sortable: bool = False,
    marked: Mapping[str, str] | None = None,
) -> Markup:
    """A table as the book shows it, its first column as headings of rows."""
    html = tables.show(table, index=index, sortable=False, missing="undefined").data
    if sortable:
        html = html.replace('class="dataframe', 'class="sortable dataframe', 1)
    for row, name in (marked or {}).items():
        html = html.replace(f"<tr>\n      <th>{row}<", f'<tr class="{name}">\n      <th>{row}<')
    return Markup(html)


def _comparison(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not comparison:
        return []
    parts = [
        {
            "title": "Against other models",
            "text": "Difference of the mean PCC, other minus one, with 95 % intervals over genes "
            "and patches; genes in which the other is ahead, with exact limits of their share; "
            "Spearman's ρ of the difference with sparsity, its p from orders dealt anew. None of "
            "these holds what another training would have changed.",
            "table": _html(comparison["summary"], index=False),
        }
    ]
    for title, table in comparison["differences"].items():
        parts.append(
            {
                "title": title,
                "text": "Gene by gene, with 95 % intervals over patches (jackknife); q corrects p "
                "for the number of genes.",
                "table": _html(table, index=False, sortable=True),
            }
        )
    return parts


# --- words ----------------------------------------------------------------------------------------


def _facts(found: Evaluation) -> str:
    about = found.about
    said = (
        f"{len(found.genes)} genes, {about['bins']:,} bins of {about['bin_um']:g} µm in "
        f"{about['patches']} patches, units: {about['units']}"
    )
    if "coverage" in about:
        said += f"; {about['coverage']:.1%} of the section's tissue is predicted"
    return said + "."


def _made(found: Evaluation) -> dict[str, str]:
    about = found.about
    made = {"predictions": str(about["name"])}
    if "section" in about:
        made["section"] = str(about["section"])
    made |= {
        "D² against": f"each gene's {about['baseline']}",
        "ceilings": str(about["ceilings"]),
        "made with": f"sparsity-trap {__version__}, commit {commit()}, {date.today().isoformat()}",
        "again": "python -m sparsity_trap.score PREDICTIONS --section SECTION --units "
        f"'{about['units']}'",
    }
    return made


def _card(
    found: Evaluation,
    genes: pd.DataFrame,
    means: Mapping[str, pd.DataFrame],
    comparison: Mapping[str, Any],
) -> dict[str, Any]:
    """What the page says, as JSON."""
    about = {k: v if isinstance(v, (str, list)) else plain(v) for k, v in found.about.items()}
    card: dict[str, Any] = {
        "about": about,
        "findings": list(found.findings),
        "verdict": list(found.verdict),
        "means": _rows(null_table(found)),
        "protocols": {of: _plain(own) for of, own in found.protocols.items()},
        "beaten_under": beaten_under(found.protocols),
        "genes": [_plain(row) for row in genes.to_dict("records")],
        "made": _made(found),
    }
    card |= {name: _rows(table) for name, table in means.items()}
    if comparison:
        card["comparison"] = [_plain(row) for row in comparison["summary"].to_dict("records")]
    return card


def _rows(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {str(name): _plain(row) for name, row in table.to_dict("index").items()}


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): plain(value) for key, value in row.items()}
