"""Real 8 µm cell-type maps laid out as tissue: the source ``tissue-map``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from sparsity_trap.settings import UserError
from sparsity_trap.simulation.cells import CELLS, HOME, SPINDLE, Body, Kind, Region, read_table
from sparsity_trap.simulation.tissue import Anatomy, Draft, lattice, smooth_field, unit

LABEL_UM = 8.0

#: The 38 deconvolution labels of the real sections, as cell types of the simulation.
LABEL_KINDS: dict[str, Kind] = {
    row.label: Kind[row.kind.upper()] for row in read_table("labels.csv").itertuples()
}

#: Coarse class of each `Kind`, for `choose_window`; -1 where none is sure.
_COARSE = pd.factorize(CELLS["coarse"])[0]

_LABEL_URL = (
    "https://raw.githubusercontent.com/10XGenomics/HumanColonCancer_VisiumHD/main/MetaData/"
)
LABEL_SHA256: dict[str, str] = {
    "P1": "57d6da8e0db912140ab6e060d26e802d31fba32f9a93a04ff5d3d2b753a8cb4b",
    "P2": "9edf48ba9a9daad7d29d8fc58968c8b94e07671c27f381a697ca50d5be554a12",
    "P5": "a77187c81cbdf984d0805ed73d5b9d0dd4367d882302794f82f735ffd99c4368",
}


def find_labels(patient: str, folder: Path | None) -> Path:
    """Return the real cell-type map of a patient, fetched once into `folder` and verified.

    Raises
    ------
    UserError
        No such map, no folder, no connection, or a file that differs from the published one.
    """
    if patient not in LABEL_SHA256:
        known = ", ".join(LABEL_SHA256)
        raise UserError(f"patient '{patient}' has no cell-type map: use one of {known}")
    name = f"DeconvolutionResults_{patient}CRC.csv.gz"
    if folder is None:
        raise UserError(f"the source tissue-map needs a folder that holds {name}: give one")
    path = Path(folder) / name
    if not path.is_file():
        import pooch

        try:
            pooch.retrieve(
                _LABEL_URL + name, f"sha256:{LABEL_SHA256[patient]}", fname=name, path=folder
            )
        except Exception as error:
            raise UserError(
                f"{name} could not be fetched ({error}): download {_LABEL_URL}{name} and put it "
                f"into {folder}"
            ) from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != LABEL_SHA256[patient]:
        raise UserError(
            f"{path} is not the published cell-type map (its SHA-256 differs): delete it and "
            f"download {_LABEL_URL}{name}"
        )
    return path


def read_label_grid(path: Path) -> np.ndarray:
    """Read a cell-type map: int8 [array_row, array_col] of `Kind` per 8 µm bin, -1 unlabelled."""
    table = pd.read_csv(path, usecols=["barcode", "DeconvolutionLabel2"], dtype=str)
    # s_008um_RRRRR_CCCCC-1, read as digits: string slicing is slow on 700,000 rows.
    digits = table.barcode.to_numpy().astype("S21").view(np.uint8).reshape(-1, 21).astype(int) - 48
    rows, cols = (digits[:, at : at + 5] @ 10 ** np.arange(4, -1, -1) for at in (8, 14))
    grid = np.full((rows.max() + 1, cols.max() + 1), -1, np.int8)
    grid[rows, cols] = table.DeconvolutionLabel2.map(LABEL_KINDS).fillna(-1).astype(np.int8)
    return grid


def choose_window(grid: np.ndarray, side: int) -> tuple[int, int]:
    """Choose the part of a real section to lay out.

    Blocks of 64 µm take the most frequent coarse class of their labels (normal epithelium,
    tumour, immune, stroma, muscle; adipocytes, where little RNA is found and labels are least
    sure, count as unlabelled). Of all windows on a lattice of an eighth side, take the one that
    maximises the entropy of its blocks times the share of its bins that carry their block's
    class; the first in reading order on a tie. So distinct compartments win over a mixture, and
    labelled bins over unlabelled ones.

    Parameters
    ----------
    grid
        Output of `read_label_grid`.
    side
        Side of the window, bins of 8 µm; at most the side of the grid.

    Returns
    -------
    Row and column of the upper-left bin.
    """
    if side > min(grid.shape):
        raise UserError(
            f"side_um {side * LABEL_UM:g} exceeds the cell-type map of "
            f"{min(grid.shape) * LABEL_UM:g} µm: lower simulation.side_um"
        )
    block = 8
    votes = np.stack([(grid >= 0) & (_COARSE[grid] == c) for c in range(_COARSE.max() + 1)])
    tall, wide = (size // block for size in grid.shape)
    votes = votes[:, : tall * block, : wide * block]
    votes = votes.reshape(-1, tall, block, wide, block).sum(axis=(2, 4))
    agreed = votes.max(axis=0)
    major = np.where(agreed > 0, votes.argmax(axis=0), -1)
    span = min(max(1, side // block), tall, wide)
    step = max(1, span // 8)
    best, where = -1.0, (0, 0)
    for i in range(0, tall - span + 1, step):
        for j in range(0, wide - span + 1, step):
            window = major[i : i + span, j : j + span]
            p = np.bincount(window[window >= 0], minlength=1) / window.size
            p = p[p > 0]
            score = -(p * np.log(p)).sum() * agreed[i : i + span, j : j + span].mean()
            row, col = (min(k * block, s - side) for k, s in zip((i, j), grid.shape, strict=True))
            if score > best:
                best, where = score, (row, col)
    return where


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
    region, glandular = _regions(kinds)
    n = len(region)
    down, right = np.gradient(_density(glandular, 10))
    inward = np.repeat(np.repeat(np.arctan2(down, right), 2, 0), 2, 1)[:n, :n]
    flow = np.arctan2(smooth_field(rng, (n, n), 60), smooth_field(rng, (n, n), 60))
    in_gland = np.isin(region, (Region.EPITHELIUM, Region.TUMOUR))
    axis = np.where(in_gland, inward, flow / 2).astype(np.float32)
    draft = Draft(rng, region, axis, np.zeros((1, 1), np.float32))
    _place_cells(draft, kinds, bins)
    fat = lattice(rng, (slice(0, n), slice(0, n)), 42)
    fat = fat[region[fat[:, 1].astype(int), fat[:, 0].astype(int)] == Region.FAT]
    draft.add_bodies(fat, rng.uniform(30, 42, (len(fat), 2)), 0.0, Body.FAT)
    return draft.finish()


def _density(mask: np.ndarray, sigma_um: float) -> np.ndarray:
    """Share of a mask of 2 µm pixels around each pixel."""
    return ndimage.gaussian_filter(mask.astype(np.float32), sigma_um / 2)


def _regions(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Region map at `STEP_UM`, and which 2 µm pixels are glands, from labels at `STEP_UM`."""
    n = kinds.shape[0]
    home = np.where(kinds >= 0, HOME[kinds], 0)
    coarse = home[::2, ::2]

    names = np.unique(HOME)
    scores = np.stack([0.7 * _density(coarse == 0, 5)] + [_density(coarse == r, 5) for r in names])
    winner = np.array([0, *names])[scores.argmax(axis=0)]
    glandular = np.isin(coarse, (Region.EPITHELIUM, Region.TUMOUR))
    wall = _density(glandular, 25)
    empty = np.where(wall > 0.35, Region.LUMEN, Region.SUBMUCOSA)
    # Off tissue: hardly a label around, or none here and few near, as along an edge.
    bare = _density(coarse > 0, 16) < 0.22
    bare |= (winner == 0) & (_density(coarse > 0, 10) < 0.42)
    winner = np.where(winner == 0, empty, winner)
    winner[bare] = Region.BACKGROUND
    region = np.repeat(np.repeat(winner.astype(np.uint8), 2, 0), 2, 1)[:n, :n]
    return region, glandular


def _place_cells(draft: Draft, kinds: np.ndarray, bins: np.ndarray) -> None:
    """One cell per labelled bin, and the mucin of goblet cells."""
    rng, axis = draft.rng, draft.axis
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
    spindle = SPINDLE[of_bin]
    columnar = of_bin <= Kind.TUMOUR
    angle = np.where(spindle | columnar, axis[i, j], rng.uniform(0, np.pi, len(xy)))
    angle = angle + rng.normal(0, 0.2, len(xy))
    reach = np.where(columnar, 5.0, np.where(spindle, 6.0, 0.0))[:, None]
    draft.add_cells(xy, of_bin, angle, reach * unit(angle))
    draft.cells[-1][rng.random(len(xy)) > CELLS["nucleated"].to_numpy()[of_bin], 3:5] = 0
    goblet = of_bin == Kind.GOBLET
    axes = rng.uniform([8, 6], [11, 7.5], (goblet.sum(), 2))
    draft.add_bodies(
        xy[goblet] + 6 * unit(axis[i, j])[goblet], axes, axis[i, j][goblet], Body.MUCIN
    )
