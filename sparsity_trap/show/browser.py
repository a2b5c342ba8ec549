"""The gene browser: pictures of every gene on a section, and a page that moves them together.

The page is one fragment with its own style and script, for `IPython.display.HTML`. It needs no
server and no other host, works from a file, and shows a picture where scripts are off.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from sparsity_trap.bins import PATCH_BINS, bin_sum
from sparsity_trap.data.patches import OVERVIEW_BINS, PatchStore, assemble
from sparsity_trap.files import building
from sparsity_trap.settings import MARKS
from sparsity_trap.show.maps import tissue_bins
from sparsity_trap.show.page import render
from sparsity_trap.show.pictures import write_map, write_picture
from sparsity_trap.show.style import CATEGORY_COLOURS

#: Genes of one browser; more would be too many pictures for a site.
MOST_GENES = 100
_BIN_UM = 8
_SIDE = PATCH_BINS // OVERVIEW_BINS  # 8 µm bins along a patch


def browsable(genes: pd.DataFrame) -> pd.DataFrame:
    """Genes that the browser holds: all of a panel up to `MOST_GENES`, else the largest changes.

    Parameters
    ----------
    genes
        From `association.gene_table`.
    """
    if len(genes) <= MOST_GENES:
        return genes
    change = genes["delta_pcc_8um"].abs()
    return genes.loc[change.nlargest(MOST_GENES).index].sort_index()


def gene_browser(
    store: PatchStore, predictions: Mapping[str, Any], genes: pd.DataFrame, folder: Path
) -> str:
    """Browser over the genes of a section: H&E, counts and predictions, moved together.

    One WebP per gene and map, one pixel per 8 µm bin, and one picture of the H&E are
    written to ``folder``. All maps of a gene share a colour scale that ends at the 99.5th
    percentile of its counts in tissue. Where the section is not measured, the pictures carry that
    in their pixels, below the map.

    Parameters
    ----------
    store
        The section.
    predictions
        Label → predicted rates per 2 µm bin, ``[N, G, 128, 128]`` in store order.
    genes
        One row per gene to show: ``gene``, ``category``, ``sparsity``, ``mean_count`` and, for a
        label ``MSE``, any of ``pcc_8um_mse``, ``ssim_8um_mse`` and ``pcc_8um_rate_mse``.
    folder
        Where the pictures go; it appears, or is replaced, only when complete.

    Returns
    -------
    HTML. In the book it looks for the pictures in a folder of the same name beside the page,
    elsewhere at their place relative to the working directory. ``#gene=PIGR`` in the address opens
    a gene, ``#gene=PIGR&view=swipe`` in swipe view.
    """
    note = MARKS.get(store.source, "")
    panels, maps = _panels(store, predictions)
    with building(folder) as partial:
        partial.mkdir()
        window = _patch_window(store)
        write_picture(partial / "he.jpg", store, window, note)
        tops = _write_maps(partial, store, panels, maps, list(genes["gene"]), window, note)
    rows, columns = (part.stop - part.start for part in window)
    in_book = "SPARSITY_TRAP_BOOK" in os.environ
    data = {
        "folder": folder.name if in_book else Path(os.path.relpath(folder)).as_posix(),
        "columns": int(columns),
        "bin_um": _BIN_UM,
        "about_wide": len(panels) != 5,
        "panels": panels,
        "genes": [
            _gene_texts(row, file, panels, top)
            for row, file, top in zip(
                genes.to_dict("records"), _file_names(genes["gene"]), tops, strict=True
            )
        ],
    }
    colours = 255 * matplotlib.colormaps["magma"](np.linspace(0, 1, 24))[:, :3]
    return render(
        "gene_browser.html",
        data=data,
        **data,
        by_category={c: list(part["gene"]) for c, part in genes.groupby("category", sort=False)},
        aspect=columns / rows,
        colours=["rgb({:.0f},{:.0f},{:.0f})".format(*colour) for colour in colours],
        note=note,
    )


def _panels(
    store: PatchStore, predictions: Mapping[str, Any]
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """What the browser shows side by side, and by panel the values [N, G, 128, 128] of its maps."""
    panels = [
        {"key": "he", "label": "H&E", "file": "he.jpg"},
        {"key": "counts", "label": "Counts", "alt": "counts per 8 µm bin"},
    ]
    maps: dict[str, Any] = {"counts": store.counts}
    if store.truth is not None:
        panels.append(
            {"key": "rate", "label": "True rate", "alt": "true rate per 8 µm bin of the simulation"}
        )
        maps["rate"] = store.truth
    for label, values in predictions.items():
        key = _slug(label).lower()
        panels.append({"key": key, "label": label, "alt": f"rate predicted with {label}"})
        maps[key] = values
    return panels, maps


def _write_maps(
    folder: Path,
    store: PatchStore,
    panels: list[dict[str, str]],
    maps: Mapping[str, Any],
    genes: list[str],
    window: tuple[slice, slice],
    note: str,
) -> list[float]:
    """Write all maps of all genes; return where each gene's colour scale ends."""
    mask = assemble(store, tissue_bins(store).astype(np.float32), OVERVIEW_BINS)[window] > 0.5
    places = [store.genes.index(gene) for gene in genes]
    tops: list[float] = []
    for panel in panels[1:]:
        # Patch by patch, since a stored chunk holds all genes of one patch.
        values = np.stack(
            [_patch_map(maps[panel["key"]], i)[places] for i in range(len(store))], axis=1
        )
        for g, (gene, file) in enumerate(zip(genes, _file_names(genes), strict=True)):
            section = assemble(store, values[g], OVERVIEW_BINS)[window]
            if panel["key"] == "counts":
                tops.append(max(1.0, float(np.percentile(section[mask], 99.5))))
            title = f"{gene}, {panel['label']}, UMI per {_BIN_UM} um bin"  # Exif is in ASCII
            about = f"{title}; patient {store.patient}, {note or 'measured'}"
            path = folder / f"{file}-{panel['key']}.webp"
            write_map(path, section, mask, tops[g], note, about)
    return tops


def _patch_map(values: Any, patch: int) -> np.ndarray:
    """All genes of one patch at 8 µm, float32 [G, 32, 32]."""
    return bin_sum(np.asarray(values[patch], np.float32), OVERVIEW_BINS)


def _patch_window(store: PatchStore) -> tuple[slice, slice]:
    """Rows and columns of 8 µm bins that hold all patches."""
    first = store.origin[:].min(0) // OVERVIEW_BINS
    last = store.origin[:].max(0) // OVERVIEW_BINS + _SIDE
    return slice(first[0], last[0]), slice(first[1], last[1])


def _gene_texts(row: dict, file: str, panels: list[dict], top: float) -> dict:
    """What the browser writes beside the pictures of one gene."""
    facts = [
        str(row["category"]),
        f"{row['sparsity']:.1%} of 2 µm bins are empty".replace("%", " %"),
        f"mean {row['mean_count']:.2g} UMI per 2 µm bin",
    ]
    scores = {}
    for panel in panels:
        found = {
            name: _number(row[f"{column}_{panel['key']}"])
            for name, column in (
                ("PCC", "pcc_8um"), ("SSIM", "ssim_8um"), ("PCC with true rate", "pcc_8um_rate"),
            )
            if f"{column}_{panel['key']}" in row
        }  # fmt: skip
        last = found.pop("PCC with true rate", "undefined")
        lines = [" · ".join(f"{name} {value}" for name, value in found.items())]
        if last != "undefined":
            lines.append(f"PCC with true rate {last}")
        scores[panel["key"]] = [line for line in lines if line]
    return {
        "name": row["gene"],
        "file": file,
        "colour": CATEGORY_COLOURS.get(row["category"], CATEGORY_COLOURS["other"]),
        "facts": facts,
        "scores": scores,
        "ticks": _ticks(top),
    }


def _number(value: float) -> str:
    return "undefined" if pd.isna(value) else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _ticks(top: float) -> list[tuple[str, float]]:
    """Labels of the colour bar and their places in per cent; the last colour holds more."""
    series = [n * 10.0**k for k in range(-3, 6) for n in (1, 2, 5)]
    places = [(value, math.sqrt(value / top)) for value in series]
    inner = [(f"{v:g}", round(100 * p, 2)) for v, p in places if 0.25 <= p <= 0.84]
    return [("0", 0.0), *inner, (f"≥ {top:.3g}", 100.0)]


def _file_names(genes: Iterable[str]) -> list[str]:
    """Name of each gene's pictures; those of A/B and A_B, or of Actb and ACTB, differ."""
    names = [_slug(gene) for gene in genes]
    taken = Counter(name.lower() for name in names)
    return [name if taken[name.lower()] == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def _slug(text: str) -> str:
    """A name for files and keys."""
    return re.sub(r"[^\w.-]", "_", text)
