"""Which bins of a section can be learned from: in tissue, measured, and on the scanned image."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsity_trap.data.image import open_image, read_mask, scanned
from sparsity_trap.data.matrix import read_depth
from sparsity_trap.data.spaceranger import MATRIX, POSITIONS, Positions, Slide, read_positions
from sparsity_trap.settings import UserError

#: Share of the tissue bins that the matrix may lack. Space Ranger lists them all, empty ones too.
_UNMEASURED = 0.5


class Tissue(NamedTuple):
    """Bins of a section, those that cannot be learned from taken out of the tissue.

    Attributes
    ----------
    positions
        Bins on their grid, ``in_tissue`` without what is left out.
    depth
        int32 ``[rows, cols]``, genes with a count; -1 where the matrix does not list the bin.
    left_out
        Why bins were left out, and how many.
    """

    positions: Positions
    depth: np.ndarray
    left_out: dict[str, int]


def read_tissue(slide: Slide, mask: Path | None = None) -> Tissue:
    """Read where bins lie, and leave out of the tissue those without a count or a picture.

    Parameters
    ----------
    slide
        The section.
    mask
        Picture that is dark where bins do not count as tissue; see
        :func:`~sparsity_trap.data.image.read_mask`.

    Raises
    ------
    UserError
        A file is damaged, bins in tissue have no position, no bin remains, or the matrix lacks so
        many that it cannot be of this section.
    """
    positions = read_positions(slide.outs)
    depth = read_depth(slide.outs / MATRIX, slide.array_shape)
    in_tissue, y, x = positions
    placed = np.isfinite(y) & np.isfinite(x)
    if unplaced := int((in_tissue & ~placed).sum()):
        raise UserError(
            f"{slide.outs / POSITIONS} has no pixel position for {unplaced} bins in tissue, values "
            "are missing: give Space Ranger's own table"
        )
    left_out = {"without a position": int(((depth >= 0) & ~placed).sum())}
    bins = np.nonzero(in_tissue)
    tests = {"not in the matrix": depth[bins] >= 0}
    with open_image(slide.image) as image:
        where = y[bins], x[bins]
        tests["outside what was scanned"] = scanned(image, *where)
        if mask is not None:
            kept = read_mask(mask, image.shape)
            places = (
                ((pixel + 0.5) * n / full - 0.5).round().clip(0, n - 1).astype(int)
                for pixel, n, full in zip(where, kept.shape, image.shape, strict=False)
            )
            tests["dark in the mask"] = kept[tuple(places)]
    remain = np.ones(len(bins[0]), bool)
    for reason, good in tests.items():
        left_out[reason] = int((remain & ~good).sum())
        remain &= good
    _check(slide, left_out, remain, mask)
    in_tissue = in_tissue.copy()
    in_tissue[bins] = remain
    return Tissue(positions._replace(in_tissue=in_tissue), depth, left_out)


def _check(slide: Slide, left_out: dict[str, int], remain: np.ndarray, mask: Path | None) -> None:
    """Raise ``UserError`` where too few of the bins in tissue, ``remain`` [bins], are left."""
    if not remain.size:
        raise UserError(
            f"{slide.outs / POSITIONS} has no bin in tissue: detect tissue again, or leave the "
            "section out"
        )
    lacking = left_out["not in the matrix"] / remain.size
    if lacking > _UNMEASURED:
        raise UserError(
            f"{slide.outs / MATRIX} lacks {lacking:.0%} of the bins in tissue, which were not "
            "measured or taken out: give the matrix and tissue_positions.parquet of one run"
        )
    if left_out.get("dark in the mask") and not remain.any():
        raise UserError(
            f"mask {mask} is dark at every bin in tissue: draw it bright where bins are kept"
        )
