"""Colorectal tissue as geometry: a region map and a list of cells.

Lengths are µm, ``x`` runs right and ``y`` runs down as in the H&E image, angles are radians
from the x axis. Neither colour nor expression is decided here: `histology` paints an `Anatomy`
and `simulate` draws transcripts from it, so both see the same cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import pandas as pd
from scipy import ndimage
from skimage.measure import find_contours

STEP_UM = 1.0  # pixel of the region map


class Region(IntEnum):
    """What fills a pixel of the region map."""

    BACKGROUND = 0
    LUMEN = 1
    EPITHELIUM = 2
    TUMOUR = 3
    LAMINA_PROPRIA = 4
    SUBMUCOSA = 5
    DESMOPLASIA = 6
    MUSCLE = 7
    LYMPHOID = 8
    NECROSIS = 9
    VESSEL = 10
    VESSEL_WALL = 11
    FAT = 12


class Kind(IntEnum):
    """Cell types."""

    ABSORPTIVE = 0
    GOBLET = 1
    CRYPT_BASE = 2
    TUMOUR = 3
    PLASMA_IGA = 4
    PLASMA_IGG = 5
    T_CELL = 6
    B_CELL = 7
    MACROPHAGE = 8
    NEUTROPHIL = 9
    MAST = 10
    FIBROBLAST = 11
    CAF = 12
    SMOOTH_MUSCLE = 13
    ENDOTHELIAL = 14
    ADIPOCYTE = 15
    GLIA = 16


class Body(IntEnum):
    """Bodies without a nucleus that are painted but express nothing."""

    MUCIN = 0
    RED_CELL = 1
    FAT = 2
    DEBRIS = 3


#: Nucleus of each cell type: long axis, short axis (µm) and coefficient of variation.
NUCLEUS: dict[Kind, tuple[float, float, float]] = {
    Kind.ABSORPTIVE: (9.0, 5.0, 0.10),
    Kind.GOBLET: (7.0, 4.2, 0.12),
    Kind.CRYPT_BASE: (9.5, 5.2, 0.10),
    Kind.TUMOUR: (11.5, 6.2, 0.20),
    Kind.PLASMA_IGA: (6.4, 5.8, 0.08),
    Kind.PLASMA_IGG: (6.4, 5.8, 0.08),
    Kind.T_CELL: (6.0, 5.5, 0.08),
    Kind.B_CELL: (6.6, 6.2, 0.08),
    Kind.MACROPHAGE: (9.0, 6.0, 0.15),
    Kind.NEUTROPHIL: (5.5, 4.8, 0.12),
    Kind.MAST: (6.8, 6.0, 0.10),
    Kind.FIBROBLAST: (14.0, 3.2, 0.20),
    Kind.CAF: (16.0, 4.8, 0.20),
    Kind.SMOOTH_MUSCLE: (19.0, 3.2, 0.20),
    Kind.ENDOTHELIAL: (9.5, 2.3, 0.15),
    Kind.ADIPOCYTE: (8.0, 2.4, 0.15),
    Kind.GLIA: (11.0, 3.6, 0.20),
}

_SPINDLE = (Kind.FIBROBLAST, Kind.CAF, Kind.SMOOTH_MUSCLE, Kind.ENDOTHELIAL, Kind.GLIA)

#: Cells per mm² of connective and muscular regions, and their share of each cell type.
_STROMA: dict[Region, tuple[float, dict[Kind, float]]] = {
    Region.LAMINA_PROPRIA: (
        7500,
        {
            Kind.PLASMA_IGA: 0.36, Kind.T_CELL: 0.20, Kind.MACROPHAGE: 0.10,
            Kind.FIBROBLAST: 0.18, Kind.B_CELL: 0.05, Kind.ENDOTHELIAL: 0.06,
            Kind.MAST: 0.03, Kind.PLASMA_IGG: 0.02,
        },
    ),
    Region.SUBMUCOSA: (
        1900,
        {
            Kind.FIBROBLAST: 0.60, Kind.MACROPHAGE: 0.10, Kind.T_CELL: 0.08,
            Kind.ENDOTHELIAL: 0.10, Kind.MAST: 0.04, Kind.GLIA: 0.05, Kind.PLASMA_IGA: 0.03,
        },
    ),
    Region.DESMOPLASIA: (
        3600,
        {
            Kind.CAF: 0.52, Kind.MACROPHAGE: 0.13, Kind.T_CELL: 0.11, Kind.PLASMA_IGG: 0.10,
            Kind.FIBROBLAST: 0.06, Kind.ENDOTHELIAL: 0.05, Kind.NEUTROPHIL: 0.03,
        },
    ),
    Region.MUSCLE: (
        1900,
        {
            Kind.SMOOTH_MUSCLE: 0.88, Kind.FIBROBLAST: 0.05, Kind.ENDOTHELIAL: 0.03,
            Kind.GLIA: 0.04,
        },
    ),
    Region.LYMPHOID: (
        14500, {Kind.B_CELL: 0.55, Kind.T_CELL: 0.38, Kind.MACROPHAGE: 0.05, Kind.PLASMA_IGG: 0.02}
    ),
    Region.NECROSIS: (2500, {Kind.NEUTROPHIL: 0.8, Kind.MACROPHAGE: 0.2}),
}  # fmt: skip

#: Shares of a patient's tissue: mucosa, muscularis mucosae, submucosa; the rest is muscularis
#: propria. ``tumour`` then replaces that share of the whole.
_PROPORTIONS: dict[str, dict[str, float]] = {
    "P1": {"mucosa": 0.40, "thin_muscle": 0.05, "submucosa": 0.27, "tumour": 0.40},
    "P2": {"mucosa": 0.44, "thin_muscle": 0.05, "submucosa": 0.22, "tumour": 0.29},
    "P5": {"mucosa": 0.48, "thin_muscle": 0.05, "submucosa": 0.23, "tumour": 0.34},
}
_BACKGROUND = 0.12


@dataclass
class Anatomy:
    """Geometry of one section.

    Attributes
    ----------
    side_um
        Side of the square image, µm.
    region
        uint8 [n, n] of `Region`, pixel `STEP_UM`.
    axis
        float32 [n, n], direction of fibres in stroma and of the cell axis in epithelium, radians.
    cells
        One row per cell: ``x, y`` (nucleus centre, µm), ``kind`` (`Kind`), ``major, minor``
        (nucleus axes, µm; 0 where the section misses it), ``angle`` (of the long axis), ``apical_x, apical_y`` (µm from the
        nucleus to the far end of the cell body; 0 for cells without polarity).
    bodies
        One row per body without nucleus: ``x, y, major, minor, angle, body`` (`Body`).
    """

    side_um: float
    region: np.ndarray
    axis: np.ndarray
    cells: pd.DataFrame
    bodies: pd.DataFrame


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Draw a Gaussian random field of unit variance.

    Parameters
    ----------
    rng
        Source of randomness.
    shape
        Rows and columns of the result.
    sigma
        Standard deviation of the smoothing kernel, pixels; structures are about 4 sigma wide.

    Returns
    -------
    float32 array of `shape`.
    """
    # A smooth field holds no detail below sigma, so it is drawn coarse and interpolated.
    shrink = max(1.0, sigma / 4)
    coarse = [int(np.ceil(s / shrink)) + 3 for s in shape]
    pad = int(np.ceil(4 * sigma / shrink))
    noise = rng.standard_normal([c + 2 * pad for c in coarse]).astype(np.float32)
    noise = ndimage.gaussian_filter(noise, sigma / shrink, mode="wrap")
    noise *= 2 * np.sqrt(np.pi) * sigma / shrink
    noise = noise[pad:-pad, pad:-pad]
    if shrink == 1.0:
        return noise[: shape[0], : shape[1]]
    out = ndimage.zoom(noise[: coarse[0], : coarse[1]], shrink, order=1, output=np.float32)
    return out[: shape[0], : shape[1]]


@dataclass
class _Draft:
    """A section under construction; lists are joined into tables at the end."""

    rng: np.random.Generator
    region: np.ndarray
    axis: np.ndarray
    wobble: np.ndarray
    cells: list[np.ndarray] = field(default_factory=list)
    bodies: list[np.ndarray] = field(default_factory=list)

    def add_cells(self, xy, kinds, angle, apical=None) -> None:
        """Append cells at ``xy`` [m, 2], with nuclei drawn from `NUCLEUS`."""
        if len(xy) == 0:
            return
        kinds = np.broadcast_to(kinds, len(xy))
        size = np.array([NUCLEUS[k] for k in Kind])[kinds]
        scale = np.exp(size[:, 2:] * self.rng.standard_normal((len(xy), 2)).clip(-2, 2))
        axes = size[:, :2] * scale
        apical = np.zeros((len(xy), 2)) if apical is None else apical
        columns = [xy, kinds[:, None], axes, np.broadcast_to(angle, len(xy))[:, None], apical]
        self.cells.append(np.concatenate(columns, axis=1))

    def add_bodies(self, xy, axes, angle, body: Body) -> None:
        """Append bodies at ``xy`` [m, 2] with ``axes`` [m, 2]."""
        if len(xy):
            rest = [np.broadcast_to(a, len(xy))[:, None] for a in (angle, int(body))]
            self.bodies.append(np.concatenate([xy, axes, *rest], axis=1))

    def finish(self) -> Anatomy:
        names = ["x", "y", "kind", "major", "minor", "angle", "apical_x", "apical_y"]
        cells = pd.DataFrame(np.concatenate(self.cells or [np.empty((0, 8))]), columns=names)
        bodies = pd.DataFrame(
            np.concatenate(self.bodies or [np.empty((0, 6))]),
            columns=names[:2] + names[3:6] + ["body"],
        )
        side = self.region.shape[0] * STEP_UM
        cells = cells[cells.x.between(0, side) & cells.y.between(0, side)]
        cells = cells.astype({c: np.float32 for c in cells if c != "kind"} | {"kind": np.uint8})
        bodies = bodies.astype({c: np.float32 for c in bodies if c != "body"} | {"body": np.uint8})
        return Anatomy(side, self.region, self.axis, cells.reset_index(drop=True), bodies)


def grow_section(patient: str, side_um: float, rng: np.random.Generator) -> Anatomy:
    """Lay out one colorectal section with normal mucosa, muscle, stroma and carcinoma.

    A smooth depth field orders the layers of the bowel wall from the lumen (background) over
    mucosa, muscularis mucosae and submucosa to the muscularis propria, so that each layer meets
    its true neighbours; a second field says where carcinoma has replaced them.

    Parameters
    ----------
    patient
        Sets the proportions of the compartments; names other than P1, P2, P5 get those of P5.
    side_um
        Side of the square, µm.
    rng
        Source of randomness; the same state gives the same section.
    """
    n = int(np.ceil(side_um / STEP_UM))
    share = _PROPORTIONS.get(patient, _PROPORTIONS["P5"])
    sigma = min(120.0, 0.13 * n)
    depth = smooth_field(rng, (n, n), sigma) + 0.08 * smooth_field(rng, (n, n), 14)
    turn = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, n, dtype=np.float32)
    depth += 0.7 * (np.cos(turn) * ramp[None, :] + np.sin(turn) * ramp[:, None])
    invasion = smooth_field(rng, (n, n), 0.8 * sigma) + 0.15 * smooth_field(rng, (n, n), 18)

    tissue = 1 - _BACKGROUND
    mucosa = tissue * (1 - share["mucosa"])
    thin = mucosa - tissue * share["thin_muscle"]
    deep = thin - tissue * share["submucosa"]
    cuts = np.quantile(depth[::4, ::4], [deep, thin, mucosa, tissue])
    layer = np.digitize(depth, cuts).astype(np.uint8)
    by_layer = [Region.MUSCLE, Region.SUBMUCOSA, Region.MUSCLE, Region.LAMINA_PROPRIA]
    region = np.array([*by_layer, Region.BACKGROUND], np.uint8)[layer]
    inside = region != Region.BACKGROUND
    edge = np.quantile(invasion[::4, ::4][inside[::4, ::4]], 1 - share["tumour"])
    region[inside & (invasion > edge)] = Region.DESMOPLASIA

    # Fibres run along the layers; collagen is wavier than muscle. Directions are averaged as
    # doubled angles, in which opposite gradients agree, so that layers keep parallel bundles.
    down, right = np.gradient(ndimage.gaussian_filter(depth, 8)[::4, ::4])
    double = np.stack([2 * down * right, right**2 - down**2])
    double = ndimage.gaussian_filter(double, (0, 10, 10))
    double = ndimage.zoom(double, (1, 4, 4), order=1)[:, :n, :n]
    double = np.pad(double, ((0, 0), (0, n - double.shape[1]), (0, n - double.shape[2])), "edge")
    normal = np.arctan2(double[0], double[1]).astype(np.float32) / 2
    wave = smooth_field(rng, (n, n), 16)
    axis = normal + np.float32(np.pi / 2)
    axis += wave * np.where(region == Region.MUSCLE, 0.12, 0.55).astype(np.float32)

    # Bounded, so that an outline never leaves the window its gland is drawn in.
    wobble = smooth_field(rng, (n, n), 7).clip(-2, 2)
    draft = _Draft(rng, region, axis, wobble)
    _surface_epithelium(draft)
    carcinoma = inside & (invasion > edge + 0.10)
    normal_mucosa = (layer == 3) & (region == Region.LAMINA_PROPRIA)
    base = np.clip((cuts[3] - depth) / (cuts[3] - cuts[2]), 0, 1)

    def crypt(draft: _Draft, x: int, y: int, size: float) -> None:
        _crypt(draft, x, y, size, normal, base)

    _fill(draft, carcinoma, _tumour_gland, 8, (1.8, 1.3, 0.95, 0.7, 0.5))
    _fill(draft, normal_mucosa, crypt, 10, (1.15, 1.0, 0.85, 0.7))
    _lymphoid(draft)
    _vessels(draft)
    _scatter_stroma(draft)
    return draft.finish()


def _fill(draft: _Draft, zone: np.ndarray, make: Callable, tries: float, sizes: tuple) -> None:
    """Throw glands at ``zone`` until it is crowded: the large ones first, small ones between.

    ``tries`` is the number of attempts per area of one gland, for each of ``sizes``.
    """
    zone_y, zone_x = np.nonzero(zone[::2, ::2])
    if len(zone_y) == 0:
        return
    last = draft.region.shape[0] - 1
    free = (Region.LAMINA_PROPRIA, Region.DESMOPLASIA)
    compass = 0.6 * np.array([[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]])
    for size in sizes:
        attempts = int(np.ceil(tries * 4 * len(zone_y) / (2500 * size**2)))
        ys = 2 * zone_y[picks := draft.rng.integers(len(zone_y), size=attempts)]
        xs = 2 * zone_x[picks]
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            # A glance at the surroundings spares most of the costly attempts.
            at = np.rint([x, y] + 27 * size * compass).astype(int).clip(0, last)
            if np.isin(draft.region[at[:, 1], at[:, 0]], free).all():
                make(draft, x, y, size)


def _window(draft: _Draft, x: float, y: float, reach: float):
    """Slices of the map within ``reach`` of a point, and the x and y of their pixels."""
    n = draft.region.shape[0]
    rows = slice(max(0, int(y - reach)), min(n, int(y + reach) + 1))
    cols = slice(max(0, int(x - reach)), min(n, int(x + reach) + 1))
    gy, gx = np.mgrid[rows, cols].astype(np.float32)
    return (rows, cols), gx, gy


def _to_capsule(gx, gy, x, y, half, angle) -> np.ndarray:
    """Distance of pixels to a segment of half length ``half`` through (x, y)."""
    dx, dy = gx - x, gy - y
    along = np.clip(dx * np.cos(angle) + dy * np.sin(angle), -half, half)
    return np.hypot(dx - along * np.cos(angle), dy - along * np.sin(angle))


def _ring(draft: _Draft, box, height: np.ndarray, level: float, spacing: float):
    """Points along the contour ``height == level``, with the direction of ascent there."""
    points = []
    for line in find_contours(height[::2, ::2], level):
        line = 2 * line
        step = np.hypot(*np.diff(line, axis=0).T)
        length = np.concatenate([[0], np.cumsum(step)])
        if length[-1] < 3 * spacing:
            continue
        count = int(length[-1] / spacing)
        at = (np.arange(count) + draft.rng.uniform(-0.2, 0.2, count) + 0.5) * spacing
        points.append(np.stack([np.interp(at, length, line[:, i]) for i in (1, 0)], axis=1))
    if not points:
        return np.empty((0, 2)), np.empty(0)
    xy = np.concatenate(points)
    down, right = np.gradient(height)
    i = np.clip(np.rint(xy[:, 1]).astype(int), 0, height.shape[0] - 1)
    j = np.clip(np.rint(xy[:, 0]).astype(int), 0, height.shape[1] - 1)
    return xy + [box[1].start, box[0].start], np.arctan2(down[i, j], right[i, j])


def _unit(angle) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _fit(
    draft: _Draft, box, shape: Callable, gap: float, host: Region, free: float
) -> np.ndarray | None:
    """Mould a gland to its neighbours, or refuse it where they leave too little room.

    ``shape(k)`` gives the height above the outline at every k-th row and column; the result is
    that height lowered to keep ``gap`` from everything but the host region.
    """
    # A third of the rows and columns refuses most candidates at a ninth of the cost.
    height, here = shape(3), draft.region[box][::3, ::3]
    inside = height > 0
    if np.count_nonzero(inside) < 40 or (here[inside] == host).mean() < free:
        return None
    height, here = shape(1), draft.region[box]
    before = np.count_nonzero(height > 0)
    if (here[height > -gap] != host).any():
        room = ndimage.distance_transform_edt(here == host).astype(np.float32)
        height = np.minimum(height, room - gap)
        parts, count = ndimage.label(height > 0)
        if count > 1:  # keep the largest of the pieces
            largest = np.bincount(parts.ravel())[1:].argmax() + 1
            height = np.where((parts == largest) | (height <= 0), height, -1)
    return height if np.count_nonzero(height > 0) > max(350, free * before) else None


def _crypt(draft: _Draft, x, y, size, normal, base) -> None:
    """Place a crypt: basal nuclei, goblet mucin towards a small lumen; cut across or along."""
    rng = draft.rng
    lengthwise = rng.random() < 0.4
    radius = size * rng.uniform(34, 42)
    half = rng.uniform(40, 95) if lengthwise else rng.uniform(0, 0.5) * radius
    angle = normal[y, x] + rng.normal(0, 0.15) if lengthwise else rng.uniform(0, np.pi)
    box, gx, gy = _window(draft, x, y, radius + half + 8)

    def shape(every: int) -> np.ndarray:
        sparse = slice(None, None, every), slice(None, None, every)
        away = _to_capsule(gx[sparse], gy[sparse], x, y, half, angle)
        return radius - away + 1.8 * draft.wobble[box][sparse]

    height = _fit(draft, box, shape, rng.uniform(5, 9), Region.LAMINA_PROPRIA, 0.85)
    if height is None:
        return
    inside = height > 0
    here = draft.region[box]
    at_base = float(base[y, x])
    slit = rng.uniform(3, 9) + (0 if rng.random() < 0.7 else 6)
    thickness = max(14.0, float(height.max()) - slit)
    here[inside] = Region.EPITHELIUM
    here[height > thickness] = Region.LUMEN
    down, right = np.gradient(height)
    draft.axis[box][inside] = np.arctan2(down, right)[inside]

    xy, inward = _ring(draft, box, height, 5.5, 5.6)
    goblet_share = np.clip(rng.normal(0.55, 0.12) - 0.25 * (at_base > 0.75), 0.15, 0.8)
    young = rng.random(len(xy)) < np.clip(2.4 * (at_base - 0.52), 0, 0.85)
    kinds = np.where(young, int(Kind.CRYPT_BASE), int(Kind.ABSORPTIVE))
    kinds[rng.random(len(xy)) < goblet_share] = Kind.GOBLET
    xy = xy + rng.normal(0, 0.7, xy.shape)
    tall = max(8.0, thickness - 8)
    goblet = kinds == Kind.GOBLET
    # A goblet nucleus is pressed flat against the basement membrane by the mucin above it.
    angle = inward + np.where(goblet, np.pi / 2, 0) + rng.normal(0, 0.15, len(xy))
    draft.add_cells(xy, kinds, angle, _unit(inward) * tall * 0.75)

    mucin, up = xy[goblet], inward[goblet]
    long = np.minimum(tall * 0.80, rng.uniform(13, 20, len(mucin)))
    lift = 4.5 + long / 2 + rng.uniform(0, 2.5, len(mucin))
    wide = rng.uniform(7.0, 9.5, len(mucin))
    axes = np.stack([long, wide], axis=1)
    draft.add_bodies(mucin + _unit(up) * lift[:, None], axes, up, Body.MUCIN)
    if tall > 24:  # mucin of cells cut above their nucleus fills the second row
        xy, up = _ring(draft, box, height, 5.5 + 19, 9.5)
        keep = rng.random(len(xy)) < 0.75 * goblet_share + 0.2
        axes = rng.uniform([9, 6.5], [13, 8.5], (keep.sum(), 2))
        draft.add_bodies(xy[keep], axes, up[keep], Body.MUCIN)


def _tumour_gland(draft: _Draft, x, y, size) -> None:
    """Place a malignant gland: fused, irregular, stratified; cribriform or necrotic when large."""
    rng = draft.rng
    lobes = rng.integers(1, 4) if size > 0.6 else 1
    centres = [(x, y)]
    for _ in range(lobes - 1):
        centres.append(np.array(centres[-1]) + _unit(rng.uniform(0, 2 * np.pi)) * 45 * size)
    radii = rng.uniform(34, 52, lobes) * size
    halves, angles = rng.uniform(0, 0.7, lobes) * radii, rng.uniform(0, np.pi, lobes)
    reach = 45 * size * (lobes - 1) + (radii + halves).max() + 6 + 8 * size
    box, gx, gy = _window(draft, x, y, reach)

    def shape(every: int) -> np.ndarray:
        sparse = slice(None, None, every), slice(None, None, every)
        parts = [
            radius - _to_capsule(gx[sparse], gy[sparse], *centre, half, angle)
            for centre, radius, half, angle in zip(centres, radii, halves, angles, strict=True)
        ]
        return np.maximum.reduce(parts) + (2 + 4 * size) * draft.wobble[box][sparse]

    height = _fit(draft, box, shape, rng.uniform(4, 12), Region.DESMOPLASIA, 0.65)
    if height is None:
        return
    inside = height > 0
    here = draft.region[box]
    here[inside] = Region.TUMOUR
    down, right = np.gradient(ndimage.gaussian_filter(height, 2))
    draft.axis[box][inside] = np.arctan2(down, right)[inside]
    thickness = rng.uniform(26, 40)
    cribriform = height.max() > 42 and rng.random() < 0.22
    if cribriform:
        _cribriform(draft, box, height, gx, gy)
        return
    lumen = height > thickness
    here[lumen] = Region.LUMEN
    tall = min(thickness, float(height.max()))
    levels = np.arange(6.5, max(7.0, 0.68 * tall), 8.0)[:3]
    for k, level in enumerate(levels):
        xy, inward = _ring(draft, box, height, level, 7.2 + 1.8 * k)
        angle = inward + rng.normal(0, 0.18, len(xy))
        xy = xy + _unit(inward) * rng.uniform(-1.5, 3.5, (len(xy), 1))
        draft.add_cells(xy, Kind.TUMOUR, angle, _unit(inward) * max(4.0, tall - level - 4) * 0.7)
    if lumen.sum() > 700 and rng.random() < 0.45:
        _dirty_lumen(draft, box, height - thickness)


def _cribriform(draft: _Draft, box, height, gx, gy) -> None:
    """Punch round lumens into a solid nest and line them and the outer border with nuclei."""
    rng = draft.rng
    here = draft.region[box]
    holes = np.full(height.shape, -np.inf, np.float32)
    rows, cols = np.nonzero(height > 16)
    for pick in rng.integers(len(rows), size=40):
        radius = rng.uniform(6, 15)
        i, j = rows[pick], cols[pick]
        if height[i, j] > radius + 13 and holes[i, j] < -radius - 17:
            holes = np.maximum(holes, radius - np.hypot(gx - gx[i, j], gy - gy[i, j]))
    holes = holes + 1.5 * draft.wobble[box]
    here[holes > 0] = Region.LUMEN
    for surface, level in ((height, 5.0), (-holes, 7.0)):
        xy, away = _ring(draft, box, np.maximum(surface, -50), level, 6.8)
        draft.add_cells(xy, Kind.TUMOUR, away + rng.normal(0, 0.25, len(xy)))
    between = np.minimum(height, -holes) - 11
    xy = _lattice(rng, box, 10.2)
    i, j = (xy[:, 1] - box[0].start).astype(int), (xy[:, 0] - box[1].start).astype(int)
    xy = xy[between[i, j] > 0]
    draft.add_cells(xy, Kind.TUMOUR, rng.uniform(0, np.pi, len(xy)))


def _dirty_lumen(draft: _Draft, box, height) -> None:
    """Fill a tumour lumen with the eosinophilic debris typical of colorectal carcinoma."""
    rng = draft.rng
    debris = height + 5 * draft.wobble[box] > 5
    draft.region[box][debris & (height > 2)] = Region.NECROSIS
    rows, cols = np.nonzero(debris)
    pick = rng.integers(len(rows), size=len(rows) // 45) if len(rows) else np.empty(0, int)
    xy = np.stack([cols[pick] + box[1].start, rows[pick] + box[0].start], 1).astype(float)
    axes = rng.uniform([1.2, 1.0], [3.6, 2.8], (len(xy), 2))
    draft.add_bodies(xy, axes, rng.uniform(0, np.pi, len(xy)), Body.DEBRIS)


def _surface_epithelium(draft: _Draft) -> None:
    """Line the mucosa where it meets the bowel lumen with tall columnar cells."""
    rng, region = draft.rng, draft.region
    height = ndimage.distance_transform_edt(region[::2, ::2] != Region.BACKGROUND)
    height = 2 * height.astype(np.float32)
    n = region.shape[0]
    height = np.repeat(np.repeat(height, 2, 0), 2, 1)[:n, :n]
    height = ndimage.gaussian_filter(height, 2)
    band = (height < 24) & (region == Region.LAMINA_PROPRIA)
    region[band] = Region.EPITHELIUM
    for row in range(0, n, 512):  # contours tile by tile keep the gradient arrays small
        box = slice(row, min(n, row + 512)), slice(0, n)
        down, right = np.gradient(height[box])
        inward = np.arctan2(down, right)
        draft.axis[box][band[box]] = inward[band[box]]
        xy, up = _ring(draft, box, height[box], 7.0, 6.2)
        if not len(xy):
            continue
        i, j = np.clip(xy[:, 1].astype(int), 0, n - 1), np.clip(xy[:, 0].astype(int), 0, n - 1)
        keep = region[i, j] == Region.EPITHELIUM
        xy, up = xy[keep], up[keep]
        goblet = rng.random(len(xy)) < 0.22
        kinds = np.where(goblet, int(Kind.GOBLET), int(Kind.ABSORPTIVE))
        # Nuclei are basal: the free surface is on the background side, 24 µm away.
        base = xy + _unit(up) * 10
        draft.add_cells(base, kinds, up + rng.normal(0, 0.12, len(xy)), -_unit(up) * 13)
        axes = rng.uniform([8, 6], [11, 7.5], (goblet.sum(), 2))
        draft.add_bodies(xy[goblet] - _unit(up[goblet]), axes, up[goblet], Body.MUCIN)


def _lymphoid(draft: _Draft) -> None:
    """Place lymphoid aggregates in lamina propria, submucosa and around the tumour."""
    rng, region = draft.rng, draft.region
    homes = (Region.SUBMUCOSA, Region.DESMOPLASIA, Region.LAMINA_PROPRIA)
    rows, cols = np.nonzero(np.isin(region[::4, ::4], homes))
    wanted, placed = max(2, round(region.size / 2.6e5)), 0
    for pick in rng.integers(max(1, len(rows)), size=300 if len(rows) else 0):
        x, y = 4 * int(cols[pick]), 4 * int(rows[pick])
        radius = rng.uniform(38, 80)
        box, gx, gy = _window(draft, x, y, radius + 25)
        height = radius - np.hypot(gx - x, gy - y) + 7 * draft.wobble[box]
        here = draft.region[box]
        room = (height > 0) & np.isin(here, homes)
        if room.sum() < 0.7 * (height > 0).sum():
            continue
        here[room] = Region.LYMPHOID
        placed += 1
        if placed == wanted:
            break


def _vessels(draft: _Draft) -> None:
    """Place small vessels with endothelium, a thin wall and red cells."""
    rng, region = draft.rng, draft.region
    homes = (Region.SUBMUCOSA, Region.DESMOPLASIA, Region.LAMINA_PROPRIA)
    rows, cols = np.nonzero(np.isin(region[::4, ::4], homes[:2]))
    attempts = round(region.size / 13000) if len(rows) else 0
    for pick in rng.integers(max(1, len(rows)), size=attempts):
        x, y = 4 * int(cols[pick]), 4 * int(rows[pick])
        radius = rng.uniform(5, 14)
        half = rng.uniform(0, 0.9) * radius
        box, gx, gy = _window(draft, x, y, radius + half + 12)
        height = radius - _to_capsule(gx, gy, x, y, half, draft.axis[y, x]) + draft.wobble[box]
        here = draft.region[box]
        if not np.isin(here[height > -6], homes).all():
            continue
        here[height > -4] = Region.VESSEL_WALL
        here[height > 0] = Region.VESSEL
        xy, inward = _ring(draft, box, height, -1.0, 19)
        draft.add_cells(xy, Kind.ENDOTHELIAL, inward + np.pi / 2)
        if radius > 11:
            xy, inward = _ring(draft, box, height, -4, 36)
            draft.add_cells(xy, Kind.SMOOTH_MUSCLE, inward + np.pi / 2)
        xy = _lattice(rng, box, 6.0)
        i, j = (xy[:, 1] - box[0].start).astype(int), (xy[:, 0] - box[1].start).astype(int)
        xy = xy[(height[i, j] > 2.5) & (rng.random(len(xy)) < rng.uniform(0.2, 1.0))]
        axes = rng.uniform(5.2, 6.6, (len(xy), 2))
        draft.add_bodies(xy, axes, 0.0, Body.RED_CELL)


def _lattice(rng: np.random.Generator, box, spacing: float) -> np.ndarray:
    """Jittered hexagonal lattice inside a box of pixels, [m, 2] as x, y."""
    ys = np.arange(box[0].start, box[0].stop, spacing * 0.866)
    xs = np.arange(box[1].start, box[1].stop, spacing)
    gy, gx = np.meshgrid(ys, xs, indexing="ij")
    gx = gx + (np.arange(len(ys)) % 2)[:, None] * spacing / 2
    xy = np.stack([gx.ravel(), gy.ravel()], 1) + rng.uniform(-0.28, 0.28, (gx.size, 2)) * spacing
    low = [box[1].start, box[0].start]
    high = [box[1].stop - 1, box[0].stop - 1]
    return xy[((xy >= low) & (xy <= high)).all(axis=1)]


def _scatter_stroma(draft: _Draft) -> None:
    """Scatter the cells of connective tissue, muscle, lymphoid tissue and necrosis."""
    rng, n = draft.rng, draft.region.shape[0]
    spacing = 7.9  # dense enough for the most crowded region
    crowd = 1e6 / (0.866 * spacing**2)
    xy = _lattice(rng, (slice(0, n), slice(0, n)), spacing)
    i, j = xy[:, 1].astype(int), xy[:, 0].astype(int)
    region, axis = draft.region[i, j], draft.axis[i, j]
    # Inflammation comes in clusters, not evenly.
    patchy = np.exp(0.45 * smooth_field(rng, (n, n), 22)[i, j])
    for name, (density, mix) in _STROMA.items():
        even = name in (Region.LYMPHOID, Region.MUSCLE)
        wanted = density if even else density * patchy
        here = (region == name) & (rng.random(len(xy)) * crowd < wanted)
        kinds = rng.choice([int(k) for k in mix], here.sum(), p=_normalised(mix.values()))
        spindle = np.isin(kinds, [int(k) for k in _SPINDLE])
        free = rng.uniform(0, np.pi, here.sum())
        angle = np.where(spindle, axis[here] + rng.normal(0, 0.2, here.sum()), free)
        stretch = np.where(spindle, 14.0, 0.0)[:, None] * _unit(angle)
        draft.add_cells(xy[here], kinds, angle, stretch)


def _normalised(shares) -> np.ndarray:
    shares = np.array(list(shares), float)
    return shares / shares.sum()


#: Region that a labelled bin of each cell type speaks for.
_HOME: dict[Kind, Region] = {
    Kind.ABSORPTIVE: Region.EPITHELIUM,
    Kind.GOBLET: Region.EPITHELIUM,
    Kind.CRYPT_BASE: Region.EPITHELIUM,
    Kind.TUMOUR: Region.TUMOUR,
    Kind.PLASMA_IGA: Region.LAMINA_PROPRIA,
    Kind.PLASMA_IGG: Region.LAMINA_PROPRIA,
    Kind.T_CELL: Region.LAMINA_PROPRIA,
    Kind.B_CELL: Region.LYMPHOID,
    Kind.MACROPHAGE: Region.DESMOPLASIA,
    Kind.NEUTROPHIL: Region.DESMOPLASIA,
    Kind.MAST: Region.SUBMUCOSA,
    Kind.FIBROBLAST: Region.SUBMUCOSA,
    Kind.CAF: Region.DESMOPLASIA,
    Kind.SMOOTH_MUSCLE: Region.MUSCLE,
    Kind.ENDOTHELIAL: Region.VESSEL_WALL,
    Kind.ADIPOCYTE: Region.FAT,
    Kind.GLIA: Region.MUSCLE,
}


#: Share of labelled 8 µm bins whose cell is cut through its nucleus; the rest is cytoplasm.
_NUCLEATED = np.array(
    [0.6, 0.5, 0.7, 0.6, 0.5, 0.5, 0.55, 0.8, 0.4, 0.5, 0.5, 0.2, 0.22, 0.2, 0.25, 0.04, 0.25]
)


def section_from_kinds(kinds: np.ndarray, bins: np.ndarray, rng: np.random.Generator) -> Anatomy:
    """Lay out a section from a map of cell types: one cell per labelled bin.

    Regions are the locally most frequent homes of the labelled types. Unlabelled bins become
    lumen where epithelium surrounds them, loose collagen elsewhere in tissue, and background
    where hardly any bin is labelled.

    Parameters
    ----------
    kinds
        Integer [n, n] at `STEP_UM`: `Kind` of the bin a pixel lies in, -1 where it has none.
    bins
        Integer [n, n]: number of that bin, -1 outside the map.
    rng
        Source of randomness.
    """
    n = kinds.shape[0]
    homes = np.array([_HOME[k] for k in Kind])
    home = np.where(kinds >= 0, homes[kinds], 0)
    coarse = home[::2, ::2]

    def density(mask: np.ndarray, sigma_um: float) -> np.ndarray:
        return ndimage.gaussian_filter(mask.astype(np.float32), sigma_um / 2)

    names = np.unique(homes)
    scores = np.stack([0.7 * density(coarse == 0, 5)] + [density(coarse == r, 5) for r in names])
    winner = np.array([0, *names])[scores.argmax(axis=0)]
    glandular = np.isin(coarse, (Region.EPITHELIUM, Region.TUMOUR))
    wall = density(glandular, 25)
    empty = np.where(wall > 0.35, Region.LUMEN, Region.SUBMUCOSA)
    # Off tissue: hardly a label around, or none here and few near, as along an edge.
    bare = density(coarse > 0, 16) < 0.22
    bare |= (winner == 0) & (density(coarse > 0, 10) < 0.42)
    winner = np.where(winner == 0, empty, winner)
    winner[bare] = Region.BACKGROUND
    region = np.repeat(np.repeat(winner.astype(np.uint8), 2, 0), 2, 1)[:n, :n]

    down, right = np.gradient(density(glandular, 10))
    inward = np.repeat(np.repeat(np.arctan2(down, right), 2, 0), 2, 1)[:n, :n]
    flow = np.arctan2(smooth_field(rng, (n, n), 60), smooth_field(rng, (n, n), 60))
    in_gland = np.isin(region, (Region.EPITHELIUM, Region.TUMOUR))
    axis = np.where(in_gland, inward, flow / 2).astype(np.float32)

    draft = _Draft(rng, region, axis, np.zeros((1, 1), np.float32))
    numbers, inverse = np.unique(bins[kinds >= 0], return_inverse=True)
    at_y, at_x = np.nonzero(kinds >= 0)
    size = np.bincount(inverse)
    xy = np.stack([np.bincount(inverse, v) / size for v in (at_x, at_y)], axis=1) + 0.5
    of_bin = np.zeros(len(numbers), int)
    of_bin[inverse] = kinds[kinds >= 0]
    whole = size > 32  # bins cut by the image border are left out
    xy, of_bin = xy[whole], of_bin[whole]
    i, j = xy[:, 1].astype(int), xy[:, 0].astype(int)
    xy = xy + rng.uniform(-3.2, 3.2, xy.shape)
    spindle = np.isin(of_bin, [int(k) for k in _SPINDLE])
    columnar = of_bin <= Kind.TUMOUR
    angle = np.where(spindle | columnar, axis[i, j], rng.uniform(0, np.pi, len(xy)))
    angle = angle + rng.normal(0, 0.2, len(xy))
    reach = np.where(columnar, 5.0, np.where(spindle, 6.0, 0.0))[:, None]
    draft.add_cells(xy, of_bin, angle, reach * _unit(angle))
    draft.cells[-1][rng.random(len(xy)) > _NUCLEATED[of_bin], 3:5] = 0
    goblet = of_bin == Kind.GOBLET
    axes = rng.uniform([8, 6], [11, 7.5], (goblet.sum(), 2))
    draft.add_bodies(
        xy[goblet] + 6 * _unit(axis[i, j])[goblet], axes, axis[i, j][goblet], Body.MUCIN
    )
    fat = _lattice(rng, (slice(0, n), slice(0, n)), 42)
    fat = fat[region[fat[:, 1].astype(int), fat[:, 0].astype(int)] == Region.FAT]
    draft.add_bodies(fat, rng.uniform(30, 42, (len(fat), 2)), 0.0, Body.FAT)
    return draft.finish()
