"""Interactive exhibits as HTML: the gene browser and the loss explorer.

Each function returns one fragment with its own style and script, for `IPython.display.HTML`. It
needs no server and no other host, works from a file, and shows a picture where scripts are off.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.data.patches import OVERVIEW_BINS, PATCH_BINS, PatchStore, assemble
from sparsity_trap.files import building
from sparsity_trap.show.interactive import asset
from sparsity_trap.show.style import CATEGORY_COLOURS, MARKS, MSE_COLOUR, POISSON_COLOUR

#: Palette of every map: colours of the counts, then the mark's ink, then "no tissue here".
LEVELS = 254
INK, OUTSIDE = LEVELS, LEVELS + 1
_OUTSIDE_COLOUR, _INK_COLOUR = (0xED, 0xED, 0xED), (0xA3, 0x20, 0x20)

#: A page has to load quickly, and 50 genes of a whole section have to fit the site.
MAP_BYTES, PICTURE_BYTES = 200_000, 600_000
_PICTURE_PIXELS = 1600
#: Genes of one browser; more would be too many pictures for a site.
MOST_GENES = 100
_BIN_UM = 8
_SIDE = PATCH_BINS // OVERVIEW_BINS  # 8 µm bins along a patch


# --- gene browser ---------------------------------------------------------------------------------


def browsable(genes: pd.DataFrame) -> pd.DataFrame:
    """Genes that the browser holds: all of a panel up to `MOST_GENES`, else the largest changes.

    Parameters
    ----------
    genes
        From `stats.gene_table`.
    """
    if len(genes) <= MOST_GENES:
        return genes
    change = genes["delta_pcc_8um"].abs()
    return genes.loc[change.nlargest(MOST_GENES).index].sort_index()


def gene_browser(
    store: PatchStore, predictions: Mapping[str, Any], genes: pd.DataFrame, folder: Path
) -> str:
    """Browser over the genes of a section: H&E, counts and predictions, moved together.

    One palette picture per gene and map, one pixel per 8 µm bin, and one picture of the H&E are
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
    panels = [{"key": "he", "label": "H&E", "file": "he.jpg"}]
    panels.append({"key": "counts", "label": "Counts", "alt": "counts per 8 µm bin"})
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

    note = MARKS.get(store.source, "")
    places = [store.genes.index(gene) for gene in genes["gene"]]
    tops: list[float] = []
    with building(folder) as partial:
        partial.mkdir()
        window = _patch_window(store)
        _write_picture(partial / "he.jpg", store, window, note)
        mask = assemble(store, bin_mask(store.mask[:], 4).astype(np.float32), 4)[window] > 0.5
        for panel in panels[1:]:
            # Patch by patch, since a stored chunk holds all genes of one patch.
            values = np.stack(
                [_patch_map(maps[panel["key"]], i)[places] for i in range(len(store))], axis=1
            )
            for g, gene in enumerate(genes["gene"]):
                section = assemble(store, values[g], 4)[window]
                if panel["key"] == "counts":
                    tops.append(max(1.0, float(np.percentile(section[mask], 99.5))))
                info = {
                    "Title": f"{gene}, {panel['label']}, UMI per {_BIN_UM} µm bin",
                    "Source": f"patient {store.patient}, {note or 'measured'}",
                }
                path = partial / f"{_slug(gene)}-{panel['key']}.png"
                write_map(path, section, mask, tops[g], note, info)
    in_book = "SPARSITY_TRAP_BOOK" in os.environ
    address = folder.name if in_book else Path(os.path.relpath(folder)).as_posix()
    rows, columns = mask.shape
    data = {
        "folder": address,
        "columns": columns,
        "bin_um": _BIN_UM,
        "about_wide": len(panels) != 5,
        "panels": panels,
        "genes": [
            _gene_texts(row, panels, top)
            for row, top in zip(genes.to_dict("records"), tops, strict=True)
        ],
    }
    return _browser_page(data, columns / rows, note)


def write_map(
    path: Path,
    values: np.ndarray,
    mask: np.ndarray,
    top: float,
    note: str = "",
    info: Mapping[str, str] | None = None,
) -> None:
    """Write a map as a palette PNG, one pixel per bin, with a note in rows of pixels below it.

    Parameters
    ----------
    path
        The PNG; at most `MAP_BYTES` for a section of 800 x 800 bins.
    values, mask
        ``[H, W]`` UMI per bin, and where it is in tissue.
    top
        Value of the last colour; larger ones show it too. Colours follow the square root.
    note
        Written below the map, so that a copy of the file says what it shows.
    info
        Text chunks of the file.
    """
    position = np.sqrt(np.clip(np.nan_to_num(values) / top, 0, 1))
    below = np.where(_lettering(note, mask.shape[1]), np.uint8(INK), np.uint8(OUTSIDE))
    steps = LEVELS - 1
    while True:
        level = np.rint(np.rint(position * steps) * ((LEVELS - 1) / steps)).astype(np.uint8)
        content = _png(np.vstack([np.where(mask, level, np.uint8(OUTSIDE)), below]), info or {})
        excess = 8 * (len(content) - MAP_BYTES) / level.size
        if excess <= 0 or steps < 3:
            break
        # Predictions of a whole section hardly compress in 254 steps of colour. Half the steps
        # save up to one bit per bin; a little less than that is taken, so as not to overshoot.
        steps = int(steps / 2 ** max(0.3, 0.8 * excess))
    path.write_bytes(content)


def _png(pixels: np.ndarray, info: Mapping[str, str]) -> bytes:
    """PNG of palette indices, uint8 [H, W].

    Pillow writes palette pictures without filters. Colours are in the order of their values here,
    so differences of neighbours (Paeth's filter) are often shorter, by a third for predictions.
    """
    around = np.pad(pixels.astype(np.int16), ((1, 0), (1, 0)))
    here, left, up, corner = (
        around[1:, 1:], around[1:, :-1], around[:-1, 1:], around[:-1, :-1],
    )  # fmt: skip
    distances = [abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)]
    nearest = np.choose(np.argmin(distances, axis=0), [left, up, corner])
    variants = []
    # No filter with search for repeats; Paeth's filter (4) with runs alone.
    for kind, rows, strategy in (
        (0, here, zlib.Z_DEFAULT_STRATEGY), (4, here - nearest, zlib.Z_RLE),
    ):  # fmt: skip
        lines = np.insert((rows & 255).astype(np.uint8), 0, kind, axis=1)
        packer = zlib.compressobj(6, zlib.DEFLATED, 15, 9, strategy)
        variants.append(packer.compress(lines.tobytes()) + packer.flush())
    height, width = pixels.shape
    texts = [(b"iTXt", f"{k}\0\0\0\0\0{v}".encode()) for k, v in info.items()]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", map_palette().tobytes()),
        *texts,
        (b"IDAT", min(variants, key=len)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def map_palette() -> np.ndarray:
    """The 256 colours of every map, uint8 ``[256, 3]``."""
    colours = matplotlib.colormaps["magma"](np.linspace(0, 1, LEVELS), bytes=True)[:, :3]
    return np.vstack([colours, [_INK_COLOUR, _OUTSIDE_COLOUR]]).astype(np.uint8)


def _patch_map(values: Any, patch: int) -> np.ndarray:
    """All genes of one patch at 8 µm, float32 [G, 32, 32]."""
    return bin_sum(np.asarray(values[patch], np.float32), OVERVIEW_BINS)


def _lettering(note: str, width: int) -> np.ndarray:
    """The note as pixels, bool [rows, width]: one pixel per dot of a bitmap font, wrapped."""
    if not note:
        return np.zeros((0, width), bool)
    font = ImageFont.load_default_imagefont()
    lines: list[str] = []
    for word in note.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getbbox(joined)[2] <= width - 4:
            lines[-1] = joined
        else:
            lines.append(word)
    height = font.getbbox(note)[3] + 1
    strip = Image.new("1", (width, height * len(lines) + 2))
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(lines):
        draw.text((2, 1 + i * height), line, fill=1, font=font)
    return np.asarray(strip)


def _patch_window(store: PatchStore) -> tuple[slice, slice]:
    """Rows and columns of 8 µm bins that hold all patches."""
    first = store.origin[:].min(0) // OVERVIEW_BINS
    last = store.origin[:].max(0) // OVERVIEW_BINS + _SIDE
    return slice(first[0], last[0]), slice(first[1], last[1])


def _write_picture(path: Path, store: PatchStore, window: tuple[slice, slice], note: str) -> None:
    """H&E of the window as JPEG; finer than the overview where `_PICTURE_PIXELS` allow."""
    overview = store.overview[window]
    rows, columns = overview.shape[:2]
    finer = max((f for f in (4, 2) if f * max(rows, columns) <= _PICTURE_PIXELS), default=1)
    size = (columns * finer, rows * finer)
    picture = Image.fromarray(overview).resize(size, Image.Resampling.BICUBIC)
    side = _SIDE * finer
    for patch, (row, column) in enumerate(store.origin[:] // OVERVIEW_BINS):
        tile = Image.fromarray(store.images[patch]).resize((side, side), Image.Resampling.BOX)
        at = (column - window[1].start) * finer, (row - window[0].start) * finer
        picture.paste(tile, tuple(map(int, at)))
    ink = _lettering(note, columns).repeat(finer, 0).repeat(finer, 1)
    below = np.where(ink[..., None], _INK_COLOUR, _OUTSIDE_COLOUR).astype(np.uint8)
    image = Image.fromarray(np.vstack([np.asarray(picture), below]))
    for quality in range(88, 30, -6):
        image.save(path, "jpeg", quality=quality, optimize=True)
        if path.stat().st_size <= PICTURE_BYTES:
            break


def _gene_texts(row: dict, panels: list[dict], top: float) -> dict:
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
        "file": _slug(row["gene"]),
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


def _slug(text: str) -> str:
    """A name for files and keys."""
    return re.sub(r"[^\w.-]", "_", text)


def _browser_page(data: dict, aspect: float, note: str) -> str:
    panels, first = data["panels"], data["genes"][0]
    groups: dict[str, list[str]] = {}
    for gene in data["genes"]:
        groups.setdefault(gene["facts"][0], []).append(gene["name"])
    options = "".join(
        f'<optgroup label="{html.escape(category)}">'
        + "".join(f"<option>{html.escape(name)}</option>" for name in names)
        + "</optgroup>"
        for category, names in groups.items()
    )
    mark = f'<span class="gb-mark">{html.escape(note)}</span>' if note else ""

    def image(panel: dict, extra: str = "") -> str:
        name = panel.get("file") or f"{first['file']}-{panel['key']}.png"
        alt = panel["label"] if "file" in panel else f"{first['name']}, {panel['alt']}"
        smooth = ' class="gb-smooth"' if "file" in panel else ""
        return (
            f'<img src="{html.escape(data["folder"])}/{html.escape(name)}" '
            f'alt="{html.escape(alt)}" data-panel="{panel["key"]}"{smooth}{extra} '
            'draggable="false">'
        )

    def spans(lines: list[str]) -> str:
        return "".join(f"<span>{html.escape(line)}</span>" for line in lines)

    figures = "".join(
        f'<figure><div class="gb-view">{image(panel)}'
        + ('<span class="gb-scale"></span>' if i == 0 else "")
        + f'<span class="gb-cursor" hidden></span>{mark}</div>'
        f"<figcaption><b>{html.escape(panel['label'])}</b>"
        f'<span class="gb-scores" data-panel="{panel["key"]}">'
        f"{spans(first['scores'][panel['key']])}</span></figcaption></figure>"
        for i, panel in enumerate(panels)
    )
    sides = [p["key"] for p in panels[-2:]]

    def side(name: str, key: str) -> str:
        listed = "".join(
            f'<option value="{p["key"]}"{" selected" if p["key"] == key else ""}>'
            f"{html.escape(p['label'])}</option>"
            for p in panels
        )
        return (
            f'<label class="gb-group">{name} <select class="gb-side" '
            f'data-side="{name.lower()}">{listed}</select></label>'
        )

    by_key = {p["key"]: p for p in panels}
    colours = ", ".join(
        f"rgb({r},{g},{b})" for r, g, b in map_palette()[np.linspace(0, LEVELS - 1, 24, dtype=int)]
    )
    ticks = "".join(f'<span style="left:{at}%">{text}</span>' for text, at in first["ticks"])
    wide = " gb-wide" if data["about_wide"] else ""
    columns = 3 if len(panels) == 5 else 2
    return f"""
<div class="gene-browser" id="gene-browser" style="--gb-aspect: {aspect:.5f}; --gb-columns: {columns}">
<style>{asset("gene_browser.css")}</style>
<div class="gb-controls gb-scripted" hidden>
<span class="gb-group"><label class="gb-group">Gene <select class="gb-gene">{options}</select></label>
<button type="button" class="gb-previous" aria-label="Previous gene">‹</button>
<button type="button" class="gb-next" aria-label="Next gene">›</button></span>
<span class="gb-group" role="group" aria-label="Zoom">
<button type="button" class="gb-out" aria-label="Zoom out">−</button>
<button type="button" class="gb-in" aria-label="Zoom in">+</button>
<button type="button" class="gb-whole">Whole section</button></span>
<button type="button" class="gb-mode" aria-pressed="false">Swipe two maps</button>
</div>
<div class="gb-swipe" hidden>
<div class="gb-controls">{side("Left", sides[0])}{side("Right", sides[1])}</div>
<div class="gb-view" tabindex="0" role="group" aria-label="Two maps over each other">
{image(by_key[sides[0]], ' data-side="left"')}
<div class="gb-over">{image(by_key[sides[1]], ' data-side="right"')}</div>
<span class="gb-tag" data-side="left"></span>
<span class="gb-tag gb-tag-right" data-side="right"></span>
<span class="gb-divider"></span><span class="gb-scale"></span>{mark}</div>
<input type="range" class="gb-split" min="0" max="100" value="50" step="1"
 aria-label="Boundary between the left and the right map, in per cent">
</div>
<div class="gb-panels" role="group" aria-label="Maps of the section">
{figures}
<div class="gb-about{wide}">
<p class="gb-name">{html.escape(first["name"])}</p>
<p class="gb-facts" style="border-color: {first["colour"]}">{spans(first["facts"])}</p>
<div class="gb-bar" role="img" aria-label="Colour scale" style="background: linear-gradient(to right, {colours})"></div>
<div class="gb-ticks">{ticks}</div>
<p class="gb-note" style="display: block">UMI per {_BIN_UM} µm bin, one scale for all maps of the gene. Grey: outside tissue or patches.</p>
</div>
</div>
<p class="gb-status" role="status"></p>
<p class="gb-note gb-scripted" hidden>Drag to move; scroll or pinch to zoom. With the maps in focus, the arrow keys move, + and − zoom, 0 shows the whole section, N and P open the next and the previous gene.</p>
<noscript><p class="gb-note">Without scripts the browser shows its first gene.</p></noscript>
<script type="application/json" class="gb-data">{_json(data)}</script>
<script>{asset("gene_browser.js")}</script>
</div>
"""


# --- loss explorer --------------------------------------------------------------------------------


_LOSSES = {
    "mse": ("MSE", MSE_COLOUR),
    "poisson": ("Poisson", POISSON_COLOUR),
    "nb": ("negative binomial, θ = 1", "#7A4F9A"),
}


def loss_explorer() -> str:
    """Losses and their gradients at a rate and a count that the reader sets, as HTML.

    Shown per loss: its value above its minimum over the rate (for Poisson and negative binomial,
    half the deviance), and its derivative with respect to the decoder's output η under both links.
    The negative binomial has dispersion 1: variance λ + λ².
    """
    rows = "".join(
        f'<tr data-loss="{key}"><th scope="row"><span class="le-key" '
        f'style="border-color: var(--le-{key})"></span>{label}</th><td></td><td></td><td></td></tr>'
        for key, (label, _) in _LOSSES.items()
    )
    return f"""
<div class="loss-explorer" id="loss-explorer">
<style>{asset("loss_explorer.css")}</style>
<div class="le-scripted" hidden>
<div class="le-controls">
<label>predicted rate λ <output class="le-rate-value"></output>
<input type="range" class="le-rate" min="-2.3" max="1.3" step="0.05" value="-1.3"></label>
<label>observed count y <output class="le-count-value"></output>
<input type="range" class="le-count-input" min="0" max="10" step="1" value="1"></label>
</div>
<div class="le-plots">
<svg viewBox="0 0 360 250" role="img" aria-label="Loss above its minimum against the rate; the table gives its values">
<text class="le-title" x="0" y="12">loss above its minimum</text></svg>
<svg viewBox="0 0 360 250" role="img" aria-label="Derivative of the loss with respect to η against the rate; the table gives its values">
<text class="le-title" x="0" y="12">gradient ∂loss/∂η</text></svg>
</div>
<div class="le-scroll"><table>
<thead><tr><th scope="col">at this rate and count</th><th scope="col">loss above minimum</th><th scope="col">gradient, exp link (solid)</th><th scope="col">gradient, softplus (dashed)</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<p class="le-note">All three losses are least at λ = y for one bin, and on average at the mean count. They differ in how strongly they pull towards it: at a small rate an observed count moves MSE with a gradient that shrinks with λ, Poisson with one that stays near −y.</p>
</div>
<noscript>{_loss_picture()}</noscript>
<script>{asset("loss_explorer.js")}</script>
</div>
"""


def excess_loss(name: str, rate: np.ndarray, count: float, dispersion: float = 1.0) -> np.ndarray:
    """Loss of one bin above its minimum over the rate, which lies at rate = count."""

    def weighted(ratio: np.ndarray) -> np.ndarray:
        return count * np.log(ratio) if count else np.zeros_like(rate)

    if name == "mse":
        return (count - rate) ** 2
    if name == "poisson":
        return rate - count + weighted(count / rate)
    both = (count + dispersion) / (rate + dispersion)
    return weighted(count / rate) - (count + dispersion) * np.log(both)


def loss_gradient(
    name: str, link: str, rate: np.ndarray, count: float, dispersion: float = 1.0
) -> np.ndarray:
    """Derivative of the loss of one bin with respect to η, at the η that gives ``rate``.

    ``name`` is ``mse``, ``poisson`` or ``nb``; ``link`` is ``exp`` or ``softplus``.
    """
    slope = {
        "mse": 2 * (rate - count),
        "poisson": 1 - count / rate,
        "nb": (rate - count) / rate * dispersion / (dispersion + rate),
    }[name]
    return slope * (rate if link == "exp" else -np.expm1(-rate))


def _loss_picture(count: float = 1.0) -> str:
    """The explorer's two plots at one count as an SVG image, for readers without scripts."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    rate = np.logspace(-2.3, 1.3, 181)
    for name, (label, colour) in _LOSSES.items():
        left.plot(rate, excess_loss(name, rate, count), color=colour, label=label)
        for link, style in (("exp", "-"), ("softplus", "--")):
            right.plot(rate, loss_gradient(name, link, rate, count), style, color=colour)
    left.set(title="loss above its minimum", ylim=(0, 5))
    left.legend(fontsize=7)
    right.set(title="gradient ∂loss/∂η (dashed: softplus)", ylim=(-1.6, 1.6))
    for axis in (left, right):
        axis.set(xscale="log", xlabel="rate λ")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    address = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/svg+xml;base64,{address}" alt="Three losses above their minimum, '
        "and their gradients, against the rate for one bin with a count of 1: at small rates the "
        'gradient of MSE vanishes, those of Poisson and negative binomial stay near −1">'
    )


def _json(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
