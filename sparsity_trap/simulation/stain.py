"""Paint an `Anatomy` as haematoxylin-eosin stained tissue.

Amounts of both stains are laid down per pixel (fibres and cytoplasm first, then one stamp per
nucleus) and turned into light by the Beer-Lambert law with one vector of optical densities per
stain (the model of Ruifrok & Johnston, 2001), so colours mix as they do on a slide. The vectors
themselves are chosen by eye: a purpler haematoxylin and a pinker eosin than the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sparsity_trap.simulation.cells import CELLS, Body, Kind, Region
from sparsity_trap.simulation.tissue import STEP_UM, Anatomy, smooth_field

_TILE_UM = 512.0
_PAD_UM = 24.0  # longer than half a nucleus or vacuole, so stamps cross tile borders unseen

#: Haematoxylin and eosin in the ground substance of each region, and amplitude of its fibres.
_GROUND: dict[Region, tuple[float, float, float]] = {
    Region.BACKGROUND: (0.0, 0.0, 0.0),
    Region.LUMEN: (0.03, 0.03, 0.0),
    Region.EPITHELIUM: (0.26, 0.46, 0.16),
    Region.TUMOUR: (0.30, 0.52, 0.18),
    Region.LAMINA_PROPRIA: (0.14, 0.40, 0.30),
    Region.SUBMUCOSA: (0.06, 0.38, 0.50),
    Region.DESMOPLASIA: (0.12, 0.52, 0.38),
    Region.MUSCLE: (0.13, 0.78, 0.20),
    Region.LYMPHOID: (0.24, 0.28, 0.12),
    Region.NECROSIS: (0.16, 0.62, 0.35),
    Region.VESSEL: (0.02, 0.06, 0.0),
    Region.VESSEL_WALL: (0.12, 0.58, 0.20),
    Region.FAT: (0.03, 0.22, 0.25),
}

#: Haematoxylin of the nucleus, chromatin contrast, membrane, nucleolus, irregularity of outline.
_CHROMATIN = CELLS.loc[:, "haematoxylin":"roughness"].to_numpy().tolist()

#: Cytoplasm around nuclei of cells that show one: radius µm, haematoxylin, eosin, and how far
#: (µm) the nucleus lies off its centre; NaN for the others.
_CYTOPLASM = CELLS.filter(like="cytoplasm").to_numpy().tolist()
_WITH_CYTOPLASM = np.flatnonzero(CELLS["cytoplasm_um"].notna())

_MARGIN = 0.45  # softness of outlines, µm


@dataclass(frozen=True)
class Stain:
    """Staining and scanning of one slide.

    Attributes
    ----------
    haematoxylin, eosin
        Optical density per unit of stain in red, green and blue, [3].
    white
        Light without tissue, 0-255, [3].
    blur_um
        Standard deviation of the optical blur.
    noise
        Standard deviation of sensor noise, grey levels.
    """

    haematoxylin: np.ndarray
    eosin: np.ndarray
    white: np.ndarray
    blur_um: float
    noise: float


def draw_stain(rng: np.random.Generator) -> Stain:
    """Draw the stain of one patient around usual laboratory practice."""
    haematoxylin = np.array([0.59, 0.75, 0.30]) * np.exp(0.06 * rng.standard_normal(3))
    eosin = np.array([0.09, 0.80, 0.36]) * np.exp([0.25, 0.05, 0.12] * rng.standard_normal(3))
    return Stain(
        haematoxylin=haematoxylin * 0.95 * np.exp(0.10 * rng.standard_normal()),
        eosin=eosin * 0.92 * np.exp(0.12 * rng.standard_normal()),
        white=np.array([241.0, 239.0, 238.0]) + rng.normal(0, [1.5, 1.5, 2.5]),
        blur_um=rng.uniform(0.32, 0.48),
        noise=rng.uniform(1.2, 2.2),
    )


def render(anatomy: Anatomy, stain: Stain, pixel_um: float, rng: np.random.Generator) -> np.ndarray:
    """Paint a section.

    Parameters
    ----------
    anatomy
        What to paint.
    stain
        Stain and scanner.
    pixel_um
        Size of a pixel, µm.
    rng
        Source of randomness for texture and noise.

    Returns
    -------
    uint8 [n, n, 3], with n the side of the section over `pixel_um`, rounded up.
    """
    n = int(np.ceil(anatomy.side_um / pixel_um))
    image = np.empty((n, n, 3), np.uint8)
    side = anatomy.region.shape[0]
    fibres = _fibres(anatomy, rng)
    # Sections are never cut, nor stained, evenly.
    thickness = np.exp(0.07 * smooth_field(rng, (side, side), 110))
    grain = _grain(rng)
    tile = max(1, int(_TILE_UM / pixel_um))
    cells = anatomy.cells.to_numpy(np.float32)
    bodies = anatomy.bodies.to_numpy(np.float32)
    looks = rng.random((len(cells), 3), np.float32)
    for row in range(0, n, tile):
        for col in range(0, n, tile):
            height, width = min(tile, n - row), min(tile, n - col)
            canvas = _Canvas(anatomy.region, fibres, row, col, height, width, pixel_um, grain)
            for body in bodies[canvas.covers(bodies)]:
                canvas.body(body)
            near = canvas.covers(cells)
            # Cytoplasm first: nuclei of neighbours lie over it.
            order = np.argsort(np.isin(cells[near, 2], _WITH_CYTOPLASM))[::-1]
            for cell, look in zip(cells[near][order], looks[near][order], strict=True):
                canvas.cell(cell, look)
            image[row : row + height, col : col + width] = canvas.develop(stain, thickness, rng)
    return image


def _grain(rng: np.random.Generator) -> np.ndarray:
    """Chromatin texture, unit variance, for stamps to cut their pieces from."""
    noise = rng.standard_normal((512, 512)).astype(np.float32)
    fine = ndimage.gaussian_filter(noise, 1.1, mode="wrap")
    fine -= ndimage.gaussian_filter(noise, 3.0, mode="wrap")
    return fine / fine.std()


def _fibres(anatomy: Anatomy, rng: np.random.Generator) -> np.ndarray:
    """Streaks along the local axis: white noise averaged over a short line at each pixel."""
    n = anatomy.region.shape[0]
    noise = rng.standard_normal((n, n)).astype(np.float32)
    noise = ndimage.gaussian_filter(noise, 0.7)
    noise /= noise.std()
    out = np.empty((n, n), np.float32)
    for row in range(0, n, 512):
        rows = slice(row, min(n, row + 512))
        angle = anatomy.axis[rows]
        dx, dy = np.cos(angle), np.sin(angle)
        gy, gx = np.mgrid[rows, 0:n].astype(np.float32)
        total = np.zeros_like(gx)
        for k in range(-12, 13, 2):
            i = np.clip(gy + k * dy + 0.5, 0, n - 1).astype(np.int32)
            j = np.clip(gx + k * dx + 0.5, 0, n - 1).astype(np.int32)
            total += noise[i, j]
        out[rows] = total
    return out / out.std()


class _Canvas:
    """Amounts of stain on one tile and its surroundings."""

    def __init__(self, region, fibres, row, col, height, width, pixel_um, grain):
        self.pixel, self.grain = pixel_um, grain
        self.pad = int(np.ceil(_PAD_UM / pixel_um))
        self.shape = height, width
        self.top, self.left = row - self.pad, col - self.pad
        # µm of pixel centres, and the pixels of the 1 µm map that they fall between
        self.y = (self.top + np.arange(height + 2 * self.pad) + 0.5) * pixel_um
        self.x = (self.left + np.arange(width + 2 * self.pad) + 0.5) * pixel_um
        rows = np.clip(self.y / STEP_UM - 0.5, 0, region.shape[0] - 1)
        cols = np.clip(self.x / STEP_UM - 0.5, 0, region.shape[1] - 1)
        table = np.array([_GROUND[r] for r in Region], np.float32)
        i, j = (np.unique(np.floor(v).astype(int)) for v in (rows, cols))
        part = np.ix_(i, np.append(j, min(j[-1] + 1, region.shape[1] - 1)))
        part = np.ix_(np.append(i, min(i[-1] + 1, region.shape[0] - 1)), part[1][0])
        low = region[part]
        streak = table[low, 2] * fibres[part]
        # Jagged 1 µm outlines are smoothed before they are enlarged.
        h = ndimage.gaussian_filter(table[low, 0] * (1 + 0.5 * streak), 0.6)
        e = ndimage.gaussian_filter(table[low, 1] * np.maximum(1 + streak, 0.1), 0.6)
        self.h = _enlarge(h, rows - i[0], cols - j[0])
        self.e = _enlarge(e, rows - i[0], cols - j[0])

    def covers(self, table: np.ndarray) -> np.ndarray:
        """Rows of a table of cells or bodies whose centre lies on the padded tile."""
        x, y = table[:, 0], table[:, 1]
        return (x > self.x[0]) & (x < self.x[-1]) & (y > self.y[0]) & (y < self.y[-1])

    def _stamp(self, x, y, major, minor, angle):
        """Slices around an ellipse, and its own coordinates (centre 0, outline 1) there."""
        reach = int(max(major, minor) / 2 / self.pixel * 1.25) + 3
        i = round((y - self.y[0]) / self.pixel)
        j = round((x - self.x[0]) / self.pixel)
        rows = slice(max(0, i - reach), i + reach + 1)
        cols = slice(max(0, j - reach), j + reach + 1)
        dy = (self.y[rows] - y)[:, None]
        dx = (self.x[cols] - x)[None, :]
        c, s = np.cos(angle), np.sin(angle)
        u = (dx * c + dy * s) * (2 / major)
        v = (dy * c - dx * s) * (2 / minor)
        return (rows, cols), u, v

    def body(self, body: np.ndarray) -> None:
        x, y, major, minor, angle, kind = body
        box, u, v = self._stamp(x, y, major, minor, angle)
        radius = np.hypot(u, v)
        inside = _soft((1 - radius) * minor / 2)
        h, e = self.h[box], self.e[box]
        if kind == Body.MUCIN:
            # Washed out in processing, hence pale; the squeezed cytoplasm is a rim 0.7 µm thick.
            rim = np.exp(-(((1 - radius) * minor / 2 / 0.7) ** 2))
            h += inside * (0.10 - h) + 0.10 * rim
            e += inside * (0.05 - e) + 0.16 * rim
        elif kind == Body.RED_CELL:
            # Eosin alone, paler in the middle, where the disc is thinner.
            pale = 1 - 0.3 * np.exp(-((radius / 0.5) ** 2))
            h += inside * (0.05 - h)
            e += inside * (1.25 * pale - e)
        elif kind == Body.FAT:  # dissolved by the solvents: empty
            h += inside * (0.01 - h)
            e += inside * (0.02 - e)
        else:  # debris of nuclei, over whatever lies there
            h += inside * 0.9
            e += inside * 0.3

    def cell(self, cell: np.ndarray, look: np.ndarray) -> None:
        """Paint a cell; ``look`` [3], from 0 to 1, makes it unlike others of its kind."""
        x, y, kind, major, minor, angle = cell[:6]
        kind = Kind(int(kind))
        if kind in _WITH_CYTOPLASM:
            self._cytoplasm(x, y, kind, look)
        if major > 0:  # the section may miss the nucleus
            self._nucleus(x, y, kind, major, minor, angle, look)

    def _cytoplasm(self, x, y, kind, look) -> None:
        radius, ch, ce, off = _CYTOPLASM[kind]
        turn = 2 * np.pi * look[0]
        cx, cy = x + off * np.cos(turn), y + off * np.sin(turn)
        # Somewhat longer than wide, as round cells are where they are packed.
        box, u, v = self._stamp(cx, cy, 2.3 * radius, 1.8 * radius, turn)
        inside = 0.85 * _soft((1 - np.hypot(u, v)) * radius)  # the ground shines through
        # The hof: a pale Golgi area beside the plasma cell's nucleus.
        hof = 0.55 * np.exp(-((u + 0.05) ** 2 + v**2) / 0.10) if "PLASMA" in kind.name else 0.0
        self.h[box] += inside * (ch * (1 - hof) - self.h[box])
        self.e[box] += inside * (ce * (1 - 0.6 * hof) - self.e[box])

    def _nucleus(self, x, y, kind, major, minor, angle, look) -> None:
        dark, contrast, membrane, nucleolus, rough = _CHROMATIN[kind]
        box, u, v = self._stamp(x, y, major, minor, angle)
        radius = np.hypot(u, v)
        if rough > 0.04:  # smoother outlines show no dents at this pixel size
            phase = np.arctan2(v, u)  # two and three lobes, turned by the cell's own look
            radius = radius * (
                1
                + rough * np.sin(2 * phase + 6.3 * look[1])
                + 0.7 * rough * np.sin(3 * phase + 6.3 * look[2])
            )
        deep = (1 - radius) * minor / 2  # µm below the outline
        inside = _soft(deep)
        # A window of the one grain texture, wherever the cell's look points to.
        i, j = (int(p * (512 - s)) for p, s in zip(look, radius.shape, strict=False))
        grain = self.grain[i : i + radius.shape[0], j : j + radius.shape[1]]
        level = dark * (0.8 + 0.4 * look[2])  # nuclei of a kind differ by a fifth to either side
        # Clumped chromatin, and a membrane 0.65 µm thick.
        ink = level * (1 + contrast * 0.55 * grain) + membrane * np.exp(-((deep / 0.65) ** 2))
        if nucleolus and look[2] > 0.35:  # a third of the sections miss the nucleolus
            spot = (u - 0.35 * (look[0] - 0.5)) ** 2 * major**2
            spot += (v - 0.35 * (look[1] - 0.5)) ** 2 * minor**2
            ink += nucleolus * np.exp(-spot / 4 / 0.8)
        # The nucleus covers most of what lies below, and eosin stains it little.
        self.h[box] += inside * (np.maximum(ink, 0.25 * level) - 0.85 * self.h[box])
        self.e[box] *= 1 - 0.40 * inside

    def develop(self, stain: Stain, thickness: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Turn the stain on the tile, without its padding, into light: uint8 [h, w, 3]."""
        height, width = self.shape
        inner = slice(self.pad, self.pad + height), slice(self.pad, self.pad + width)
        rows = np.clip(self.y[inner[0]] / STEP_UM - 0.5, 0, thickness.shape[0] - 1)
        cols = np.clip(self.x[inner[1]] / STEP_UM - 0.5, 0, thickness.shape[1] - 1)
        cut = thickness[np.ix_(np.rint(rows).astype(int), np.rint(cols).astype(int))]
        blur = stain.blur_um / self.pixel
        h = ndimage.gaussian_filter(self.h, blur)[inner] * cut
        e = ndimage.gaussian_filter(self.e, blur)[inner] * cut
        noise = stain.noise * rng.standard_normal((height, width), np.float32)
        out = np.empty((height, width, 3), np.uint8)
        for c in range(3):
            light = stain.white[c] * np.exp(-(stain.haematoxylin[c] * h + stain.eosin[c] * e))
            light += noise + 0.7 * stain.noise * rng.standard_normal((height, width), np.float32)
            out[..., c] = np.clip(np.rint(light), 0, 255)
        return out


def _soft(depth: np.ndarray) -> np.ndarray:
    """Coverage of a pixel ``depth`` µm inside an outline, 0-1."""
    return np.clip(0.5 + depth / (2 * _MARGIN), 0, 1)


def _enlarge(low: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of a grid at the product of fractional rows and columns."""
    i, j = rows.astype(int), cols.astype(int)
    i1, j1 = np.minimum(i + 1, low.shape[0] - 1), np.minimum(j + 1, low.shape[1] - 1)
    fi, fj = (rows - i).astype(np.float32)[:, None], (cols - j).astype(np.float32)
    tall = low[i] * (1 - fi) + low[i1] * fi
    return tall[:, j] * (1 - fj) + tall[:, j1] * fj
