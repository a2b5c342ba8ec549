"""Patches of one section as zarr: H&E images, counts and tissue mask on one grid.

The stored grid is the array grid turned until rows run down and columns run right in the H&E.
Patches are 128 x 128 bins (256 µm) at 2 µm, images 224 x 224 pixels over the same square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from sparsity_trap.bins import BIN_UM, PATCH_BINS
from sparsity_trap.data.alignment import stripe_factors
from sparsity_trap.data.geometry import (
    GridFit,
    Orientation,
    coarse_fit,
    fit_grid_to_pixels,
    orientation_of,
)
from sparsity_trap.data.image import Pixels, open_image, read_region
from sparsity_trap.data.matrix import in_order
from sparsity_trap.data.spaceranger import MATRIX, Positions, Slide, read_counts
from sparsity_trap.data.tissue import read_tissue
from sparsity_trap.files import building
from sparsity_trap.progress import track
from sparsity_trap.settings import Patches, Source, UserError

if TYPE_CHECKING:
    import scipy.sparse as sp

PATCH_PIXELS = 224  # side of an image, what pathology encoders were trained on
PITCH = PATCH_BINS / PATCH_PIXELS  # bins per image pixel, 4/7
OVERVIEW_BINS = 4  # an overview pixel is 8 µm wide
OVERVIEW_PIXELS = round(OVERVIEW_BINS / PITCH)  # and 7 image pixels


class PatchStore:
    """Read access to the patches of one section.

    Parameters
    ----------
    path
        Folder written by :func:`write_store`.

    Attributes
    ----------
    images
        uint8 ``[N, 224, 224, 3]``.
    counts
        uint16 ``[N, G, 128, 128]``, raw UMI counts.
    mask
        bool ``[N, 128, 128]``, bins in tissue.
    origin
        int32 ``[N, 2]``, row and column of each patch's first bin in the oriented grid.
    truth
        float16 ``[N, G, 128, 128]``, the rate each count was drawn from; None for real sections.
    overview
        uint8 ``[h, w, 3]``, H&E of the whole grid at 8 µm per pixel.
    total
        uint32 ``[h, w]``, counts of all genes per 8 µm bin, on the grid of ``overview``.
    row_factor, col_factor
        float32 ``[rows]`` and ``[cols]`` of the oriented grid: capture efficiency of single lines
        of bins, estimated from all genes; see ``alignment.stripe_factors``.
    genes, patient, source, bin_um, grid_shape, microns_per_pixel
        What the section is; ``microns_per_pixel`` is that of the full-resolution image.
    left_out
        Why bins in tissue were left out, and how many; see :func:`~.tissue.read_tissue`.
    registration
        Residuals in full-resolution pixels: ``patch_rms_px`` and ``patch_max_px``, the largest over
        patches with a map of their own; ``section_max_px`` with one affine map for the section.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / "zarr.json").is_file():
            raise UserError(f"{self.path} is not a patch store: run the data step for this patient")
        group = zarr.open_group(self.path, mode="r")
        if "row_factor" not in group:
            raise UserError(f"{self.path} was written by an older version: run the data step again")
        self.images: zarr.Array = group["images"]
        self.counts: zarr.Array = group["counts"]
        self.mask: zarr.Array = group["mask"]
        self.origin: zarr.Array = group["origin"]
        self.truth: zarr.Array | None = group.get("truth")
        self.overview: zarr.Array = group["overview"]
        self.total: zarr.Array = group["total"]
        self.row_factor: zarr.Array = group["row_factor"]
        self.col_factor: zarr.Array = group["col_factor"]
        attrs: dict[str, Any] = dict(group.attrs)
        self.genes: tuple[str, ...] = tuple(attrs["genes"])
        self.patient: str = attrs["patient"]
        self.source: Source = attrs["source"]
        self.bin_um: float = attrs["bin_um"]
        self.grid_shape: tuple[int, int] = tuple(attrs["grid_shape"])
        self.microns_per_pixel: float = attrs["microns_per_pixel"]
        self.left_out: dict[str, int] = attrs.get("left_out", {})
        self.registration: dict[str, float] = attrs["registration"]

    def __len__(self) -> int:
        return self.images.shape[0]


def write_store(
    slide: Slide,
    genes: Sequence[str],
    path: Path | str,
    *,
    patient: str,
    source: Source,
    settings: Patches,
    mask: Path | None = None,
) -> None:
    """Cut a section into patches and write them.

    Patches do not overlap; those cut off by the edge of the grid, or with less tissue than
    ``settings.min_tissue``, are left out. Where ``outs/truth.zarr`` exists (simulated sections),
    the true rates are stored beside the counts.

    Parameters
    ----------
    slide
        The section.
    genes
        Symbols, in the order of the gene axis.
    path
        Folder to write; it appears, or is replaced, only when complete.
    patient, source, settings
        Recorded in the store's attributes, and the least share of tissue.
    mask
        Picture that is dark where bins do not count as tissue; see
        :func:`~sparsity_trap.data.image.read_mask`.

    Raises
    ------
    UserError
        A file is damaged, a gene is missing, or no patch has enough tissue. Whether image and
        positions belong together is for :func:`sparsity_trap.data.sections.check_section` to say.
    """
    positions, _, left_out = read_tissue(slide, mask)
    orientation = orientation_of(coarse_fit(positions.y, positions.x))
    grid = Positions(*map(orientation.apply, positions))
    section = coarse_fit(grid.y, grid.x)
    shape = grid.in_tissue.shape
    origin = choose_patches(grid.in_tissue, settings.min_tissue)
    if len(origin) == 0:
        raise UserError(
            f"{slide.outs}: no patch of {PATCH_BINS} x {PATCH_BINS} bins has a tissue share of "
            f"{settings.min_tissue}: lower patches.min_tissue in the preset or check in_tissue"
        )
    counts = read_counts(slide.outs, genes)
    _turn(counts, orientation, slide, shape)

    with building(Path(path)) as folder:
        group = zarr.create_group(folder)
        group.create_array("origin", data=origin)
        tissue = [grid.in_tissue[patch_window(row, col)] for row, col in origin]
        group.create_array("mask", data=np.stack(tissue))
        _write_totals(group, counts, grid.in_tissue)
        _write_counts(group, counts, origin, shape)
        _write_truth(group, slide, genes, orientation, origin, shape)
        with open_image(slide.image) as image:
            fits = _write_images(group, image, grid, section, origin, f"patches of {patient}")
        group.attrs.update(
            genes=list(genes),
            patient=patient,
            source=source,
            bin_um=BIN_UM,
            grid_shape=list(shape),
            microns_per_pixel=slide.microns_per_pixel,
            left_out=left_out,
            registration={
                "patch_rms_px": max(fit.rms_px for fit in fits),
                "patch_max_px": max(fit.max_px for fit in fits),
                "section_max_px": section.max_px,
            },
        )


def assemble(store: PatchStore, values: np.ndarray, bin_factor: int) -> np.ndarray:
    """Lay patches out as a map of the whole section.

    Parameters
    ----------
    store
        Gives position of the patches and shape of the section.
    values
        ``[N, h, w]`` or ``[N, h, w, 3]`` with ``h = w = 128 / bin_factor``.
    bin_factor
        Width of a value in 2 µm bins, a divisor of 128.

    Returns
    -------
    float32 ``[grid_rows // bin_factor, grid_cols // bin_factor]`` (with a last axis of 3 for
    images), NaN where no patch lies.
    """
    side = PATCH_BINS // bin_factor
    if values.shape[:3] != (len(store), side, side) or side * bin_factor != PATCH_BINS:
        raise ValueError(
            f"values of shape {values.shape} are not {len(store)} patches of {side} x {side}"
        )
    rows, cols = (n // bin_factor for n in store.grid_shape)
    section = np.full((rows, cols, *values.shape[3:]), np.nan, np.float32)
    for value, (row, col) in zip(values, store.origin[:] // bin_factor, strict=True):
        section[row : row + side, col : col + side] = value
    return section


def patch_window(row: int, col: int) -> tuple[slice, slice]:
    """Slices of the patch that begins at this row and column of bins."""
    return slice(row, row + PATCH_BINS), slice(col, col + PATCH_BINS)


def choose_patches(in_tissue: np.ndarray, min_tissue: float) -> np.ndarray:
    """First bins ``[N, 2]`` (int32) of the whole patches with enough tissue, row by row."""
    rows, cols = (n // PATCH_BINS for n in in_tissue.shape)
    whole = in_tissue[: rows * PATCH_BINS, : cols * PATCH_BINS]
    share = whole.reshape(rows, PATCH_BINS, cols, PATCH_BINS).mean((1, 3))
    # A patch without any tissue has nothing to learn from, whatever the setting.
    return np.argwhere((share >= min_tissue) & (share > 0)).astype(np.int32) * PATCH_BINS


def resample(image: Pixels, fit: GridFit, row: int, col: int, shape: tuple[int, int]) -> np.ndarray:
    """H&E of one block of the grid, uint8 ``[height, width, 3]``, 224 pixels per 128 bins.

    Pixel p of the result lies at bin coordinate ``row + (p + 0.5) * 128 / 224 - 0.5``, so that
    pixels and bins share the edges of the block. Blocks at the end of the grid are smaller, in
    whole overview pixels.
    """
    from scipy import ndimage

    height, width = (
        min(PATCH_BINS, n - first) // OVERVIEW_BINS * OVERVIEW_PIXELS
        for n, first in zip(shape, (row, col), strict=True)
    )
    if not height or not width:
        return np.empty((height, width, 3), np.uint8)
    step = fit.matrix[:, :2] * PITCH  # image pixels per pixel of the result
    first = fit(row + 0.5 * PITCH - 0.5, col + 0.5 * PITCH - 0.5)
    # Anti-aliasing as in skimage.transform.resize: a Gaussian of (factor - 1) / 2 before sampling.
    sigma = max(0.0, (np.sqrt(abs(np.linalg.det(step))) - 1) / 2)
    margin = int(np.ceil(4 * sigma)) + 2
    corners = first[:, None] + step @ np.array([[0, 0, height, height], [0, width, 0, width]])
    y0, x0 = np.floor(corners.min(1)).astype(int) - margin
    y1, x1 = np.ceil(corners.max(1)).astype(int) + margin
    region = read_region(image, y0, y1, x0, x1)
    channels = []
    for channel in np.moveaxis(region, 2, 0):
        smooth = ndimage.gaussian_filter(channel.astype(np.float32), sigma)
        channels.append(
            ndimage.affine_transform(
                smooth,
                step,
                first - (y0, x0),
                output_shape=(height, width),
                order=1,
                mode="nearest",
            )
        )
    return np.rint(np.stack(channels, axis=2)).astype(np.uint8)


def _write_totals(group: zarr.Group, counts: sp.csc_array, in_tissue: np.ndarray) -> None:
    """Counts of all genes per 8 µm bin, and the capture efficiency of rows and columns."""
    from skimage.measure import block_reduce

    total = np.zeros(in_tissue.shape, np.uint32)
    for bins, values in _genes(counts):
        total.reshape(-1)[bins] += values
    rows, cols = (side // OVERVIEW_BINS for side in in_tissue.shape)  # a rest is left out
    coarse = block_reduce(total, OVERVIEW_BINS, np.sum)[:rows, :cols]
    group.create_array("total", data=coarse.astype(np.uint32))
    stripes = stripe_factors(total, in_tissue)
    for name, factor in zip(("row_factor", "col_factor"), stripes, strict=True):
        group.create_array(name, data=factor)


def _write_counts(
    group: zarr.Group, counts: sp.csc_array, origin: np.ndarray, shape: tuple[int, int]
) -> None:
    """Counts of each patch, from one row of patches after the other."""
    n_genes = counts.shape[1]
    stored = _create_maps(group, "counts", len(origin), n_genes, "uint16")
    band = np.empty((n_genes, PATCH_BINS, shape[1]), np.uint16)
    for i, (row, col) in enumerate(origin.tolist()):
        if i == 0 or row != origin[i - 1, 0]:
            _fill(band, counts, row)
        stored[i] = band[:, :, col : col + PATCH_BINS]


def _write_truth(
    group: zarr.Group,
    slide: Slide,
    genes: Sequence[str],
    orientation: Orientation,
    origin: np.ndarray,
    shape: tuple[int, int],
) -> None:
    """True rates of each patch, where the section is a simulated one."""
    path = slide.outs / "truth.zarr"
    if not path.is_dir():
        return
    truth = zarr.open_group(path, mode="r")
    known = list(truth.attrs["genes"])
    if missing := [gene for gene in genes if gene not in known]:
        raise UserError(
            f"{path} lacks gene {', '.join(missing)}: delete the section's outs folder and "
            "simulate it again"
        )
    index = [known.index(gene) for gene in genes]
    stored = _create_maps(group, "truth", len(origin), len(genes), "float16")
    for row in np.unique(origin[:, 0]).tolist():
        rows = slice(row, row + PATCH_BINS)
        window = orientation.array_window(shape, rows, slice(0, shape[1]))
        strip = orientation.apply(truth["rate"][(slice(None), *window)])[index]
        for i in np.flatnonzero(origin[:, 0] == row):
            stored[i] = strip[:, :, origin[i, 1] : origin[i, 1] + PATCH_BINS]


def _write_images(
    group: zarr.Group,
    image: Pixels,
    grid: Positions,
    section: GridFit,
    origin: np.ndarray,
    label: str,
) -> list[GridFit]:
    """H&E of each patch, and of the whole grid at 8 µm; the patches' maps from grid to image."""
    from skimage.transform import downscale_local_mean

    shape, square = grid.in_tissue.shape, (PATCH_PIXELS, PATCH_PIXELS, 3)
    images = group.create_array(
        "images", shape=(len(origin), *square), chunks=(1, *square), dtype="uint8"
    )
    number = {(row, col): i for i, (row, col) in enumerate(origin.tolist())}
    overview = np.full((shape[0] // OVERVIEW_BINS, shape[1] // OVERVIEW_BINS, 3), 255, np.uint8)
    fits = []
    for row in track(range(0, shape[0], PATCH_BINS), label, "row"):
        for col in range(0, shape[1], PATCH_BINS):
            fit = _patch_fit(grid, row, col) or section
            picture = resample(image, fit, row, col, shape)
            if picture.size:
                small = np.rint(
                    downscale_local_mean(picture, (OVERVIEW_PIXELS, OVERVIEW_PIXELS, 1))
                )
                r, c = row // OVERVIEW_BINS, col // OVERVIEW_BINS
                overview[r : r + small.shape[0], c : c + small.shape[1]] = small
            if (row, col) in number:
                images[number[row, col]] = picture
                fits.append(fit)
    group.create_array("overview", data=overview)
    return fits


def _create_maps(group: zarr.Group, name: str, n: int, n_genes: int, dtype: str) -> zarr.Array:
    """An array of maps, one chunk per patch."""
    maps = (n_genes, PATCH_BINS, PATCH_BINS)
    return group.create_array(name, shape=(n, *maps), chunks=(1, *maps), dtype=dtype)


def _patch_fit(positions: Positions, row: int, col: int) -> GridFit | None:
    """The patch's own map; None where the table lists under half of its bins."""
    y, x = (grid[patch_window(row, col)] for grid in (positions.y, positions.x))
    if min(y.shape) < 2 or np.isfinite(y).mean() < 0.5:
        return None
    rows, cols = np.indices(y.shape).reshape(2, -1)
    return fit_grid_to_pixels(rows + row, cols + col, y.ravel(), x.ravel())


def _genes(counts: sp.csc_array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Bins, in order, and counts of each gene; writing to them changes ``counts``."""
    for first, stop in pairwise(counts.indptr):
        yield counts.indices[first:stop], counts.data[first:stop]


def _turn(
    counts: sp.csc_array, orientation: Orientation, slide: Slide, shape: tuple[int, int]
) -> None:
    """Number the bins as the oriented grid of ``shape`` does, in place."""
    for bins, values in _genes(counts):
        row, col = np.divmod(bins, np.int32(slide.array_shape[1]))
        if orientation.transpose:
            row, col = col, row
        if orientation.flip_rows:
            row = shape[0] - 1 - row
        if orientation.flip_cols:
            col = shape[1] - 1 - col
        bins[:] = row * np.int32(shape[1]) + col
        in_order(bins, values, slide.outs / MATRIX)


def _fill(band: np.ndarray, counts: sp.csc_array, row: int) -> None:
    """Lay out the counts of one row of patches as ``band [G, 128, cols]``."""
    band[:] = 0
    first = row * band.shape[2]
    for dense, (bins, values) in zip(band.reshape(len(band), -1), _genes(counts), strict=True):
        # Limits of the bins' own type, or the search would convert them all.
        limits = np.array([first, first + len(dense)], bins.dtype)
        here = slice(*np.searchsorted(bins, limits))
        dense[bins[here] - first] = values[here]
