"""Grow colorectal tissue: crypts, tumour glands, vessels, lymphoid aggregates and stroma."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from sparsity_trap.simulation.cells import SPINDLE, STROMA, Body, Kind, Region
from sparsity_trap.simulation.tissue import (
    STEP_UM,
    Anatomy,
    Draft,
    lattice,
    ring,
    smooth_field,
    to_capsule,
    unit,
    window,
)

#: Shares of a patient's tissue: mucosa, muscularis mucosae, submucosa; the rest is muscularis
#: propria. ``tumour`` then replaces that share of the whole.
_PROPORTIONS: dict[str, dict[str, float]] = {
    "P1": {"mucosa": 0.40, "thin_muscle": 0.05, "submucosa": 0.27, "tumour": 0.40},
    "P2": {"mucosa": 0.44, "thin_muscle": 0.05, "submucosa": 0.22, "tumour": 0.29},
    "P5": {"mucosa": 0.48, "thin_muscle": 0.05, "submucosa": 0.23, "tumour": 0.34},
}
_BACKGROUND = 0.12


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
    draft = Draft(rng, region, axis, wobble)
    _surface_epithelium(draft)
    carcinoma = inside & (invasion > edge + 0.10)
    normal_mucosa = (layer == 3) & (region == Region.LAMINA_PROPRIA)
    base = np.clip((cuts[3] - depth) / (cuts[3] - cuts[2]), 0, 1)

    def crypt(draft: Draft, x: int, y: int, size: float) -> None:
        _crypt(draft, x, y, size, normal, base)

    _fill(draft, carcinoma, _tumour_gland, 8, (1.8, 1.3, 0.95, 0.7, 0.5))
    _fill(draft, normal_mucosa, crypt, 10, (1.15, 1.0, 0.85, 0.7))
    _lymphoid(draft)
    _vessels(draft)
    _scatter_stroma(draft)
    return draft.finish()


def _fill(draft: Draft, zone: np.ndarray, make: Callable, tries: float, sizes: tuple) -> None:
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


def _fit(
    draft: Draft, box, shape: Callable, gap: float, host: Region, free: float
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


def _crypt(draft: Draft, x, y, size, normal, base) -> None:
    """Place a crypt: basal nuclei, goblet mucin towards a small lumen; cut across or along."""
    rng = draft.rng
    # A crypt of size 1 is about 76 µm wide; most are cut across, some along their axis, which
    # stands on the bowel wall.
    lengthwise = rng.random() < 0.4
    radius = size * rng.uniform(34, 42)
    half = rng.uniform(40, 95) if lengthwise else rng.uniform(0, 0.5) * radius
    angle = normal[y, x] + rng.normal(0, 0.15) if lengthwise else rng.uniform(0, np.pi)
    box, gx, gy = window(draft, x, y, radius + half + 8)

    def shape(every: int) -> np.ndarray:
        sparse = slice(None, None, every), slice(None, None, every)
        away = to_capsule(gx[sparse], gy[sparse], x, y, half, angle)
        return radius - away + 1.8 * draft.wobble[box][sparse]

    height = _fit(draft, box, shape, rng.uniform(5, 9), Region.LAMINA_PROPRIA, 0.85)
    if height is None:
        return
    inside = height > 0
    here = draft.region[box]
    at_base = float(base[y, x])
    # Most lumens are slits; cells keep 14 µm of height whatever the room.
    slit = rng.uniform(3, 9) + (0 if rng.random() < 0.7 else 6)
    thickness = max(14.0, float(height.max()) - slit)
    here[inside] = Region.EPITHELIUM
    here[height > thickness] = Region.LUMEN
    down, right = np.gradient(height)
    draft.axis[box][inside] = np.arctan2(down, right)[inside]

    # Nuclei in one row, 5.5 µm above the basement membrane and a nucleus wide apart.
    xy, inward = ring(draft, box, height, 5.5, 5.6)
    # Goblet cells are half of a crypt's, fewer at its base, where dividing cells are instead.
    goblet_share = np.clip(rng.normal(0.55, 0.12) - 0.25 * (at_base > 0.75), 0.15, 0.8)
    young = rng.random(len(xy)) < np.clip(2.4 * (at_base - 0.52), 0, 0.85)
    kinds = np.where(young, int(Kind.CRYPT_BASE), int(Kind.ABSORPTIVE))
    kinds[rng.random(len(xy)) < goblet_share] = Kind.GOBLET
    xy = xy + rng.normal(0, 0.7, xy.shape)
    tall = max(8.0, thickness - 8)
    goblet = kinds == Kind.GOBLET
    # A goblet nucleus is pressed flat against the basement membrane by the mucin above it.
    angle = inward + np.where(goblet, np.pi / 2, 0) + rng.normal(0, 0.15, len(xy))
    draft.add_cells(xy, kinds, angle, unit(inward) * tall * 0.75)

    mucin, up = xy[goblet], inward[goblet]
    long = np.minimum(tall * 0.80, rng.uniform(13, 20, len(mucin)))
    lift = 4.5 + long / 2 + rng.uniform(0, 2.5, len(mucin))
    wide = rng.uniform(7.0, 9.5, len(mucin))
    axes = np.stack([long, wide], axis=1)
    draft.add_bodies(mucin + unit(up) * lift[:, None], axes, up, Body.MUCIN)
    if tall > 24:  # mucin of cells cut above their nucleus fills the second row
        xy, up = ring(draft, box, height, 5.5 + 19, 9.5)
        keep = rng.random(len(xy)) < 0.75 * goblet_share + 0.2
        axes = rng.uniform([9, 6.5], [13, 8.5], (keep.sum(), 2))
        draft.add_bodies(xy[keep], axes, up[keep], Body.MUCIN)


def _tumour_gland(draft: Draft, x, y, size) -> None:
    """Place a malignant gland: fused, irregular, stratified; cribriform or necrotic when large."""
    rng = draft.rng
    # Up to three lobes in a chain, near enough (45 µm) to fuse.
    lobes = rng.integers(1, 4) if size > 0.6 else 1
    centres = [(x, y)]
    for _ in range(lobes - 1):
        centres.append(np.array(centres[-1]) + unit(rng.uniform(0, 2 * np.pi)) * 45 * size)
    radii = rng.uniform(34, 52, lobes) * size
    halves, angles = rng.uniform(0, 0.7, lobes) * radii, rng.uniform(0, np.pi, lobes)
    reach = 45 * size * (lobes - 1) + (radii + halves).max() + 6 + 8 * size
    box, gx, gy = window(draft, x, y, reach)

    def shape(every: int) -> np.ndarray:
        sparse = slice(None, None, every), slice(None, None, every)
        parts = [
            radius - to_capsule(gx[sparse], gy[sparse], *centre, half, angle)
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
    # Stratified: up to three rows of nuclei, 8 µm apart, each less crowded than the one below.
    levels = np.arange(6.5, max(7.0, 0.68 * tall), 8.0)[:3]
    for k, level in enumerate(levels):
        xy, inward = ring(draft, box, height, level, 7.2 + 1.8 * k)
        angle = inward + rng.normal(0, 0.18, len(xy))
        xy = xy + unit(inward) * rng.uniform(-1.5, 3.5, (len(xy), 1))
        draft.add_cells(xy, Kind.TUMOUR, angle, unit(inward) * max(4.0, tall - level - 4) * 0.7)
    if lumen.sum() > 700 and rng.random() < 0.45:
        _dirty_lumen(draft, box, height - thickness)


def _cribriform(draft: Draft, box, height, gx, gy) -> None:
    """Punch round lumens into a solid nest and line them and the outer border with nuclei."""
    rng = draft.rng
    here = draft.region[box]
    holes = np.full(height.shape, -np.inf, np.float32)
    rows, cols = np.nonzero(height > 16)
    for pick in rng.integers(len(rows), size=40):
        radius = rng.uniform(6, 15)
        i, j = rows[pick], cols[pick]
        # Bridges between lumens are two rows of nuclei wide, 17 µm.
        if height[i, j] > radius + 13 and holes[i, j] < -radius - 17:
            holes = np.maximum(holes, radius - np.hypot(gx - gx[i, j], gy - gy[i, j]))
    holes = holes + 1.5 * draft.wobble[box]
    here[holes > 0] = Region.LUMEN
    for surface, level in ((height, 5.0), (-holes, 7.0)):
        xy, away = ring(draft, box, np.maximum(surface, -50), level, 6.8)
        draft.add_cells(xy, Kind.TUMOUR, away + rng.normal(0, 0.25, len(xy)))
    between = np.minimum(height, -holes) - 11
    xy = lattice(rng, box, 10.2)
    i, j = (xy[:, 1] - box[0].start).astype(int), (xy[:, 0] - box[1].start).astype(int)
    xy = xy[between[i, j] > 0]
    draft.add_cells(xy, Kind.TUMOUR, rng.uniform(0, np.pi, len(xy)))


def _dirty_lumen(draft: Draft, box, height) -> None:
    """Fill a tumour lumen with the eosinophilic debris typical of colorectal carcinoma."""
    rng = draft.rng
    debris = height + 5 * draft.wobble[box] > 5
    draft.region[box][debris & (height > 2)] = Region.NECROSIS
    rows, cols = np.nonzero(debris)
    pick = rng.integers(len(rows), size=len(rows) // 45) if len(rows) else np.empty(0, int)
    xy = np.stack([cols[pick] + box[1].start, rows[pick] + box[0].start], 1).astype(float)
    axes = rng.uniform([1.2, 1.0], [3.6, 2.8], (len(xy), 2))
    draft.add_bodies(xy, axes, rng.uniform(0, np.pi, len(xy)), Body.DEBRIS)


def _surface_epithelium(draft: Draft) -> None:
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
        xy, up = ring(draft, box, height[box], 7.0, 6.2)
        if not len(xy):
            continue
        i, j = np.clip(xy[:, 1].astype(int), 0, n - 1), np.clip(xy[:, 0].astype(int), 0, n - 1)
        keep = region[i, j] == Region.EPITHELIUM
        xy, up = xy[keep], up[keep]
        goblet = rng.random(len(xy)) < 0.22
        kinds = np.where(goblet, int(Kind.GOBLET), int(Kind.ABSORPTIVE))
        # Nuclei are basal: the free surface is on the background side, 24 µm away.
        base = xy + unit(up) * 10
        draft.add_cells(base, kinds, up + rng.normal(0, 0.12, len(xy)), -unit(up) * 13)
        axes = rng.uniform([8, 6], [11, 7.5], (goblet.sum(), 2))
        draft.add_bodies(xy[goblet] - unit(up[goblet]), axes, up[goblet], Body.MUCIN)


def _lymphoid(draft: Draft) -> None:
    """Place lymphoid aggregates in lamina propria, submucosa and around the tumour."""
    rng, region = draft.rng, draft.region
    homes = (Region.SUBMUCOSA, Region.DESMOPLASIA, Region.LAMINA_PROPRIA)
    rows, cols = np.nonzero(np.isin(region[::4, ::4], homes))
    wanted, placed = max(2, round(region.size / 2.6e5)), 0  # four per mm²
    for pick in rng.integers(max(1, len(rows)), size=300 if len(rows) else 0):
        x, y = 4 * int(cols[pick]), 4 * int(rows[pick])
        radius = rng.uniform(38, 80)
        box, gx, gy = window(draft, x, y, radius + 25)
        height = radius - np.hypot(gx - x, gy - y) + 7 * draft.wobble[box]
        here = draft.region[box]
        room = (height > 0) & np.isin(here, homes)
        if room.sum() < 0.7 * (height > 0).sum():
            continue
        here[room] = Region.LYMPHOID
        placed += 1
        if placed == wanted:
            break


def _vessels(draft: Draft) -> None:
    """Place small vessels with endothelium, a thin wall and red cells."""
    rng, region = draft.rng, draft.region
    homes = (Region.SUBMUCOSA, Region.DESMOPLASIA, Region.LAMINA_PROPRIA)
    rows, cols = np.nonzero(np.isin(region[::4, ::4], homes[:2]))
    attempts = round(region.size / 13000) if len(rows) else 0  # 77 per mm², not all of which fit
    for pick in rng.integers(max(1, len(rows)), size=attempts):
        x, y = 4 * int(cols[pick]), 4 * int(rows[pick])
        radius = rng.uniform(5, 14)
        half = rng.uniform(0, 0.9) * radius
        box, gx, gy = window(draft, x, y, radius + half + 12)
        height = radius - to_capsule(gx, gy, x, y, half, draft.axis[y, x]) + draft.wobble[box]
        here = draft.region[box]
        if not np.isin(here[height > -6], homes).all():
            continue
        here[height > -4] = Region.VESSEL_WALL
        here[height > 0] = Region.VESSEL
        xy, inward = ring(draft, box, height, -1.0, 19)
        draft.add_cells(xy, Kind.ENDOTHELIAL, inward + np.pi / 2)
        if radius > 11:  # smaller ones are capillaries and venules without muscle
            xy, inward = ring(draft, box, height, -4, 36)
            draft.add_cells(xy, Kind.SMOOTH_MUSCLE, inward + np.pi / 2)
        xy = lattice(rng, box, 6.0)
        i, j = (xy[:, 1] - box[0].start).astype(int), (xy[:, 0] - box[1].start).astype(int)
        xy = xy[(height[i, j] > 2.5) & (rng.random(len(xy)) < rng.uniform(0.2, 1.0))]
        axes = rng.uniform(5.2, 6.6, (len(xy), 2))
        draft.add_bodies(xy, axes, 0.0, Body.RED_CELL)


def _scatter_stroma(draft: Draft) -> None:
    """Scatter the cells of connective tissue, muscle, lymphoid tissue and necrosis."""
    rng, n = draft.rng, draft.region.shape[0]
    spacing = 7.9  # dense enough for the most crowded region
    crowd = 1e6 / (0.866 * spacing**2)  # points per mm² of a hexagonal lattice
    xy = lattice(rng, (slice(0, n), slice(0, n)), spacing)
    i, j = xy[:, 1].astype(int), xy[:, 0].astype(int)
    region, axis = draft.region[i, j], draft.axis[i, j]
    # Inflammation comes in clusters, not evenly.
    patchy = np.exp(0.45 * smooth_field(rng, (n, n), 22)[i, j])
    for name, mix in STROMA.items():
        even = name in (Region.LYMPHOID, Region.MUSCLE)
        density = sum(mix.values())
        wanted = density if even else density * patchy
        here = (region == name) & (rng.random(len(xy)) * crowd < wanted)
        shares = np.array(list(mix.values())) / density
        kinds = rng.choice([int(k) for k in mix], here.sum(), p=shares)
        spindle = SPINDLE[kinds]
        free = rng.uniform(0, np.pi, here.sum())
        angle = np.where(spindle, axis[here] + rng.normal(0, 0.2, here.sum()), free)
        stretch = np.where(spindle, 14.0, 0.0)[:, None] * unit(angle)
        draft.add_cells(xy[here], kinds, angle, stretch)
