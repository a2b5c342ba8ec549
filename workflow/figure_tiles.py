"""Read maps out of figures that matplotlib drew: tiles of the repository sparsity-trap-publication.

A figure shows some tiles of one gene, a column each: H&E, counts, and the predictions of two
models. Every panel is an image of its own in the PDF, each bin a square of equal pixels, and each
map has a colour bar. From a bin's colour follows its place on the bar, from the ticks of the bar
its value: exactly for counts, which are whole numbers, and in 256 steps for predictions. What lies
beyond the bar is clipped.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from sparsity_trap.bins import PATCH_BINS

#: Colours of the maps, and of bins off tissue.
COLOURS = (matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3]).astype(int)
OFF_TISSUE = 0xE8

#: Rows of panels below H&E.
ROWS = ("counts", "mse", "poisson")

_TOKEN = re.compile(rb"\((?:\\.|[^\\()])*\)|[\[\]]|/[^\s\[\]()<>/]+|[^\s\[\]()<>/]+", re.DOTALL)
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|.)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"f": b"\f"}


@dataclass
class Panel:
    """An image on a page.

    Attributes
    ----------
    name
        Of the image in the file.
    axes, place
        Left, bottom, width and height, in points, of the axes and of the image, which may reach
        beyond them by a part of a pixel.
    ticks
        Place along the page of each tick below the image, and its label.
    """

    name: bytes
    axes: tuple[float, ...]
    place: tuple[float, ...]
    ticks: list[tuple[float, str]] = field(default_factory=list)


class Figure:
    """The panels of a PDF of one page, as matplotlib writes it.

    Raises
    ------
    ValueError
        It is another kind of PDF.
    """

    def __init__(self, data: bytes):
        self.data = data
        table = re.search(rb"startxref\s+(\d+)\s+%%EOF", data)
        page = re.search(rb"/Contents (\d+) 0 R", data)
        if not (data.startswith(b"%PDF") and table and page):
            raise ValueError("no PDF that matplotlib wrote")
        self.starts = [int(x) for x in re.findall(rb"(\d{10}) \d{5} [nf]", data[int(table[1]) :])]
        self.images = {m[1]: int(m[2]) for m in re.finditer(rb"/(I\d+) (\d+) 0 R", data)}
        self.panels = list(_panels(self._stream(int(page[1]))[1]))

    def _stream(self, number: int) -> tuple[bytes, bytes]:
        """Dictionary of an object, and its bytes after inflation."""
        start = self.starts[number]
        begin = self.data.index(b"stream\n", start)
        head = self.data[start:begin]
        return head, zlib.decompressobj().decompress(self.data[begin + len(b"stream\n") :])

    def pixels(self, panel: Panel) -> np.ndarray:
        """Colours of an image, uint8 [height, width, 3]."""
        head, rows = self._stream(self.images[panel.name])
        width, height, bits = (
            int(re.search(rb"/%s (\d+)" % key, head)[1])
            for key in (b"Width", b"Height", b"BitsPerComponent")
        )
        palette = re.search(rb"/Indexed /DeviceRGB \d+\s+(\((?:\\.|[^\\)])*\))", head, re.DOTALL)
        # The rows are filtered as in a PNG, so a PNG of them is what can read them.
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 3 if palette else 2, 0, 0, 0))
        ]
        if palette:
            chunks.append((b"PLTE", _text(palette[1])))
        chunks += [(b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
        png = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
            for kind, c in chunks
        )
        with Image.open(io.BytesIO(png)) as image:
            return np.asarray(image.convert("RGB"))

    def bins(self, panel: Panel) -> np.ndarray:
        """Colours of a map, uint8 [128, 128, 3]: of each bin that of the pixel in its middle."""
        pixels = self.pixels(panel)
        (left, bottom, width, height), (x, y, w, h) = panel.place, panel.axes
        middle = (np.arange(PATCH_BINS) + 0.5) / PATCH_BINS
        column = (x + middle * w - left) / width * pixels.shape[1]
        row = (bottom + height - (y + h - middle * h)) / height * pixels.shape[0]
        return pixels[np.ix_(row.astype(int), column.astype(int))]


def _panels(content: bytes) -> Iterator[Panel]:
    """Images of a page in the order in which they are drawn, each with the ticks that follow it."""
    operands: list[bytes] = []
    path: list[tuple[float, float]] = []
    clip: tuple[float, ...] | None = None
    axes: tuple[float, ...] = ()
    place: tuple[float, ...] = ()
    tick: float | None = None
    panel: Panel | None = None
    for token in _TOKEN.findall(content):
        if not re.fullmatch(rb"[A-Za-z*]+", token):
            operands.append(token)
            continue
        if token == b"m":
            path = []
        if token in (b"m", b"l"):
            path.append(tuple(map(float, operands[-2:])))
        elif token == b"h":  # a rectangle behind an image: its axes, where it is not clipped
            (x, y), (right, top) = np.min(path, 0), np.max(path, 0)
            axes = (x, y, right - x, top - y)
        elif token == b"re":
            clip = tuple(map(float, operands[-4:]))
        elif token == b"Q":
            clip = None
        elif token == b"cm":
            a, _, _, d, left, bottom = map(float, operands[-6:])
            place = (left, bottom, a, d)
        elif token == b"B" and len(path) == 2 and path[0][0] == path[1][0]:
            tick = path[0][0]
        elif token == b"TJ" and panel and tick is not None:
            text = b"".join(_text(part) for part in operands if part.startswith(b"("))
            panel.ticks.append((tick, text.decode("latin1")))
            tick = None
        elif token == b"Do" and operands[-1].startswith(b"/I"):
            if panel:
                yield panel
            panel, tick = Panel(operands[-1][1:], clip or axes, place), None
        operands = []
    if panel:
        yield panel


def _text(string: bytes) -> bytes:
    """Bytes of a string in brackets."""

    def plain(match: re.Match) -> bytes:
        code = match[1]
        return bytes([int(code, 8)]) if code.isdigit() else _LETTERS.get(code, code)

    return _ESCAPE.sub(plain, string[1:-1])


# --- values ---------------------------------------------------------------------------------------


def steps(colours: np.ndarray) -> np.ndarray:
    """Steps of the colour map, [128, 128], from 0 to 255; −1 off tissue.

    Raises
    ------
    ValueError
        A colour is none of the map's.
    """
    number = {tuple(c): i for i, c in enumerate(COLOURS)} | {(OFF_TISSUE,) * 3: -1}
    try:
        flat = [number[tuple(c)] for c in colours.reshape(-1, 3).tolist()]
    except KeyError as colour:
        raise ValueError(f"colour {colour} is none of the map's") from None
    return np.array(flat).reshape(colours.shape[:2])


def _ticks(bar: Panel) -> tuple[np.ndarray, np.ndarray]:
    """Places of ticks as shares of the bar, and their values."""
    left, _, width, _ = bar.axes
    place, text = zip(*bar.ticks, strict=True)
    return (np.array(place) - left) / width, np.array(text, dtype=float)


def whole_numbers(steps: np.ndarray, bar: Panel) -> np.ndarray:
    """Counts, uint8 [128, 128]; 0 off tissue, and where there is none.

    The place of a value on the bar is a power of its share of the largest, some figures' the first.

    Raises
    ------
    ValueError
        A step is none of a whole number.
    """
    place, value = _ticks(bar)
    inner = (place > 0.01) & (place < 0.99)
    power, at_one = np.polyfit(np.log(place[inner]), np.log(value[inner]), 1)
    largest = round(float(np.exp(at_one)), 3)  # ticks are drawn to a millionth of a point
    whole = np.arange(np.ceil(largest) + 1)  # the last stands for the largest and more
    own = np.minimum((whole / largest) ** (1 / power) * 256, 255).astype(int)
    far = np.abs(steps.clip(min=0)[..., None] - own)
    if far.min(-1).max() > 1:
        raise ValueError("a colour stands for no whole number of counts")
    return far.argmin(-1).astype(np.uint8)


def rates(steps: np.ndarray, bar: Panel) -> np.ndarray:
    """Predictions, float16 [128, 128], each in the middle of its step; NaN off tissue."""
    slope, start = np.polyfit(*_ticks(bar), 1)
    return np.where(steps < 0, np.nan, start + slope * (steps + 0.5) / 256).astype(np.float16)


def tiles(gene: str, data: bytes) -> Iterator[dict[str, Any]]:
    """Tiles of a figure: ``id`` (of the H&E), ``he``, ``mask``, ``gene`` and the maps of `ROWS`.

    Raises
    ------
    ValueError
        The figure is not laid out as expected, or has other colours.
    """
    figure = Figure(data)
    bars = [panel for panel in figure.panels if panel.ticks]
    panels = [panel for panel in figure.panels if not panel.ticks]
    columns, rest = divmod(len(panels), 1 + len(ROWS))
    if rest or len(bars) != columns * len(ROWS):
        raise ValueError(f"{len(panels)} panels and {len(bars)} colour bars")
    for column in range(columns):
        own, scales = panels[column::columns], bars[len(ROWS) * column :][: len(ROWS)]
        he = figure.bins(own[0])
        seen = [steps(figure.bins(panel)) for panel in own[1:]]
        found = {"counts": whole_numbers(seen[0], scales[0])}
        for name, step, bar in zip(ROWS[1:], seen[1:], scales[1:], strict=True):
            found[name] = rates(step, bar)
        digest = hashlib.md5(he.tobytes(), usedforsecurity=False).hexdigest()
        yield {"id": digest[:8], "he": he, "mask": seen[0] >= 0, "gene": gene, **found}


def arrays(found: Iterable[dict[str, Any]], places: Mapping[str, tuple[int, int]]) -> dict:
    """Arrays as `sparsity_trap.tiles.read_tiles` reads them, from the tiles of all figures.

    Parameters
    ----------
    found
        From `tiles`; a tile may be in the figures of several genes.
    places
        Row and column of each tile in the section, by id.

    Raises
    ------
    ValueError
        A tile has no place, or two masks.
    """
    maps = sorted(found, key=lambda tile: (tile["id"], tile["gene"]))
    whole = {tile["id"]: tile for tile in maps}
    for tile in maps:
        if tile["id"] not in places:
            raise ValueError(f"tile {tile['id']} has no place in the section")
        if (tile["mask"] != whole[tile["id"]]["mask"]).any():
            raise ValueError(f"tile {tile['id']} has two masks")
    ids = list(whole)
    return {
        "tile_id": np.array(ids),
        "he": np.stack([whole[i]["he"] for i in ids]),
        "mask": np.stack([whole[i]["mask"] for i in ids]),
        "patch_rc": np.array([places[i] for i in ids]),
        "pair_tile": np.array([ids.index(tile["id"]) for tile in maps]),
        "pair_gene": np.array([tile["gene"] for tile in maps]),
        "pair_counts": np.stack([tile["counts"] for tile in maps]),
        **{f"pair_pred_{name}": np.stack([t[name] for t in maps]) for name in ROWS[1:]},
    }
