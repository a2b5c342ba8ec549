"""Guards against sections whose files agree with each other, but not with what the science needs.

Positions that do not lie as bins of 2 µm do, an image too coarse for them, of another scan or
turned against the counts, bins that were never measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsity_trap.bins import BIN_UM, PATCH_BINS
from sparsity_trap.data.alignment import AS_PLACED, follow
from sparsity_trap.data.geometry import GridFit, coarse_fit
from sparsity_trap.data.image import check_scale, check_stain, open_image
from sparsity_trap.data.spaceranger import POSITIONS, SPATIAL, Slide, read_scales
from sparsity_trap.data.tissue import Tissue, read_tissue
from sparsity_trap.settings import UserError

#: How far a bin width measured from pixel positions may be from 2 µm, as a share of it. Real
#: sections agree to 0.1 %; the scale factors of another scan do not.
_SCALE_TOLERANCE = 0.02

#: Cosine of the angle between array rows and columns, and root mean square distance of bins from
#: their places on an affine grid, in bins. Real sections bend by 0.2 bins.
_SKEW, _BEND = 0.02, 2.0

#: Rows of the positions table whose barcodes are compared with their place.
_NAMES = 1000

#: Share of tissue bins that may lie outside the image. The capture area may reach over its edge:
#: in the public section P2, 8 % of all bins and 0.06 % of tissue bins do.
_OUTSIDE = 0.01

#: A section lies otherwise than its positions say where counts then correlate with darkness at
#: least so much, and so much more than as placed. In real tiles of P5 without any glass, counts of
#: one or two genes correlate by 0.25 as placed and by 0.04 upside down; all genes do so more.
_FOLLOWS, _BETTER = 0.3, 0.2


class Geometry(NamedTuple):
    """Bins of a section, and where they lie in its image.

    Attributes
    ----------
    tissue
        See :func:`~sparsity_trap.data.tissue.read_tissue`.
    fit
        Map from the array to pixels.
    """

    tissue: Tissue
    fit: GridFit

    @property
    def step(self) -> np.ndarray:
        """Pixels from a bin to the next along array rows and columns, ``[2]``."""
        return np.linalg.norm(self.fit.matrix[:, :2], axis=0)


def read_geometry(slide: Slide, mask: Path | None = None) -> Geometry:
    """Measure where bins lie in the image.

    Raises
    ------
    UserError
        As from :func:`~sparsity_trap.data.tissue.read_tissue`, or the bins do not span the plane.
    """
    tissue = read_tissue(slide, mask)
    _, y, x = tissue.positions
    stride = max(1, min(16, min(y.shape) // 2))
    return Geometry(tissue, coarse_fit(y, x, stride))


def check_geometry(slide: Slide, geometry: Geometry) -> None:
    """Raise ``UserError`` where bins are not 2 µm apart on a grid, by positions and scale."""
    path = slide.outs / POSITIONS
    width = geometry.step * slide.microns_per_pixel
    if not np.allclose(width, BIN_UM, rtol=_SCALE_TOLERANCE):
        raise UserError(
            f"bins in {path} are {width[0]:.3g} x {width[1]:.3g} µm apart at "
            f"{slide.microns_per_pixel:g} µm per pixel, not {BIN_UM:g}: give the positions and "
            "scalefactors_json.json of one run, both from square_002um"
        )
    down, right = geometry.fit.matrix[:, :2].T / geometry.step[:, None]
    bend = geometry.fit.rms_px / geometry.step.mean()
    if abs(down @ right) > _SKEW or bend > _BEND:
        raise UserError(
            f"bins in {path} lie {bend:.1f} bins from a grid of right angles: give Space Ranger's "
            "own table"
        )


def check_names(slide: Slide) -> None:
    """Raise ``UserError`` where the table's first bins are not where their barcodes say.

    Counts are placed by barcodes and pixels by array row and column, so both must mean the same.
    """
    import pyarrow.parquet as pq

    path = slide.outs / POSITIONS
    columns = ["barcode", "array_row", "array_col"]
    with pq.ParquetFile(path) as table:
        if "barcode" not in table.schema_arrow.names:
            return
        first = next(table.iter_batches(batch_size=_NAMES, columns=columns)).to_pydict()
    for barcode, row, col in zip(*(first[name] for name in columns), strict=True):
        if not str(barcode).startswith(f"s_002um_{row:05.0f}_{col:05.0f}"):
            raise UserError(
                f"{path} lists {barcode} at array row {row:.0f}, column {col:.0f}: give Space "
                "Ranger's own table"
            )


def check_image(slide: Slide, geometry: Geometry) -> None:
    """Raise ``UserError`` when the image cannot be the one the section was aligned to.

    It must have the scale, the glass and the colours of H&E, and all but a few tissue bins must lie
    inside it. Where Space Ranger's downsized copy is at hand, that must have been made from an
    image of this size: in a larger copy of the right image, all bins lie inside, at the wrong
    places.
    """
    check_scale(slide.microns_per_pixel, slide.image)
    remedy = (
        "give the full-resolution image that Space Ranger was run on for this section, not a "
        "resized copy or that of another"
    )
    left_out = geometry.tissue.left_out["outside what was scanned"]
    outside = left_out / (left_out + geometry.tissue.positions.in_tissue.sum())
    with open_image(slide.image) as image:
        size = np.array(image.shape[:2])
        if outside > _OUTSIDE:
            raise UserError(
                f"{outside:.0%} of tissue bins lie outside {slide.image} of {size[0]} x {size[1]} "
                f"pixels, or where it was not scanned: {remedy}"
            )
        check_stain(image, slide.image)
    expected = _size_of_copy(slide.outs)
    if expected is not None and (np.abs(size - expected[0]) > expected[1]).any():
        height, width = expected[0]
        raise UserError(
            f"{slide.image} has {size[0]} x {size[1]} pixels, but Space Ranger's copy of it was "
            f"made from {height:.0f} x {width:.0f}: {remedy}"
        )


def _size_of_copy(outs: Path) -> tuple[np.ndarray, float] | None:
    """Size of the image that Space Ranger's small copy was made from, and how rounded it is."""
    from PIL import Image

    try:
        scale = read_scales(outs)["tissue_hires_scalef"]
        with Image.open(outs / SPATIAL / "tissue_hires_image.png") as picture:
            # The copy's size is rounded to whole pixels, each of which is many of the original.
            return np.array(picture.size[::-1]) / scale, 2 / scale
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError):
        return None  # it is not read for anything else


def check_placement(slide: Slide, geometry: Geometry) -> float:
    """Correlation of counts with the darkness of the image where they lie; NaN for few bins.

    Raises
    ------
    UserError
        Counts follow an image that is mirrored, turned or enlarged much better than the image as
        it is placed.
    """
    if min(slide.array_shape) < PATCH_BINS:
        return float("nan")
    with open_image(slide.image) as image:
        found = follow(image, geometry.fit, geometry.tissue.depth, slide.microns_per_pixel)
    placed = found.pop(AS_PLACED)
    other, best = max(found.items(), key=lambda item: np.nan_to_num(item[1]))
    if best > _FOLLOWS and best > np.nan_to_num(placed) + _BETTER:
        raise UserError(
            f"counts follow {slide.image} less as placed (correlation {placed:.2f} with its "
            f"darkness) than {other} ({best:.2f}): give the image as Space Ranger was run on it, "
            f"and its own {POSITIONS.name}"
        )
    return placed
