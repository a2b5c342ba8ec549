"""Colorectal tissue as geometry: a region map and a list of cells.

Lengths are µm, ``x`` runs right and ``y`` runs down as in the H&E image, angles are radians
from the x axis. Neither colour nor expression is decided here: `stain` paints an `Anatomy`
and `section` draws transcripts from it, so both see the same cells.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import ndimage
from skimage.measure import find_contours

from sparsity_trap.simulation.cells import CELLS, Body

STEP_UM = 1.0  # pixel of the region map

#: Long and short axis of the nucleus, µm, and their coefficient of variation, [kind, 3].
_NUCLEUS = CELLS[["nucleus_long_um", "nucleus_short_um", "nucleus_cv"]].to_numpy()


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
        (nucleus axes, µm; 0 where the section misses it), ``angle`` (of the long axis),
        ``apical_x, apical_y`` (µm from the nucleus to the far end of the cell body; 0 for cells
        without polarity).
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
class Draft:
    """A section under construction; lists are joined into tables at the end."""

    rng: np.random.Generator
    region: np.ndarray
    axis: np.ndarray
    wobble: np.ndarray
    cells: list[np.ndarray] = field(default_factory=list)
    bodies: list[np.ndarray] = field(default_factory=list)

    def add_cells(self, xy, kinds, angle, apical=None) -> None:
        """Append cells at ``xy`` [m, 2], with nuclei of their kinds."""
        if len(xy) == 0:
            return
        kinds = np.broadcast_to(kinds, len(xy))
        size = _NUCLEUS[kinds]
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


def window(draft: Draft, x: float, y: float, reach: float):
    """Slices of the map within ``reach`` of a point, and the x and y of their pixels."""
    n = draft.region.shape[0]
    rows = slice(max(0, int(y - reach)), min(n, int(y + reach) + 1))
    cols = slice(max(0, int(x - reach)), min(n, int(x + reach) + 1))
    gy, gx = np.mgrid[rows, cols].astype(np.float32)
    return (rows, cols), gx, gy


def to_capsule(gx, gy, x, y, half, angle) -> np.ndarray:
    """Distance of pixels to a segment of half length ``half`` through (x, y)."""
    dx, dy = gx - x, gy - y
    along = np.clip(dx * np.cos(angle) + dy * np.sin(angle), -half, half)
    return np.hypot(dx - along * np.cos(angle), dy - along * np.sin(angle))


def ring(draft: Draft, box, height: np.ndarray, level: float, spacing: float):
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


def unit(angle) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def lattice(rng: np.random.Generator, box, spacing: float) -> np.ndarray:
    """Jittered hexagonal lattice inside a box of pixels, [m, 2] as x, y."""
    ys = np.arange(box[0].start, box[0].stop, spacing * 0.866)
    xs = np.arange(box[1].start, box[1].stop, spacing)
    gy, gx = np.meshgrid(ys, xs, indexing="ij")
    gx = gx + (np.arange(len(ys)) % 2)[:, None] * spacing / 2
    xy = np.stack([gx.ravel(), gy.ravel()], 1) + rng.uniform(-0.28, 0.28, (gx.size, 2)) * spacing
    low = [box[1].start, box[0].start]
    high = [box[1].stop - 1, box[0].stop - 1]
    return xy[((xy >= low) & (xy <= high)).all(axis=1)]
