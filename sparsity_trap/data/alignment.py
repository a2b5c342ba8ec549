"""Checks of a section's pairing: do counts follow the image, are they shifted, or in stripes?"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import numpy as np

from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.geometry import GridFit
from sparsity_trap.data.image import BLACK, Pixels, read_region

#: Largest shift searched, in bins of 2 µm.
REACH = 24
#: Key of `follow` for the section as its positions say.
AS_PLACED = "as placed"
_SPOT_UM, _SPOTS = 8.0, 8  # width of the spots that are compared, and spots a side of a square
_SQUARES = 12  # squares along the section that are looked at, and at most twice as many in all
_FEWEST = 100  # spots that say something
#: A shift beyond this many bins spoils the pairing at 2 µm.
TOLERATED = 2.0


class Shift(NamedTuple):
    """Offset of the counts against the image.

    ``rows`` and ``columns`` are in bins of 2 µm, positive where counts lie below or right of the
    tissue that bore them. ``correlation`` is the mean over patches of the correlation of darkness
    and counts at each offset, ``[2 REACH + 1, 2 REACH + 1]``, no offset in the middle.
    """

    rows: float
    columns: float
    correlation: np.ndarray

    @property
    def bins(self) -> float:
        """Length of the offset, in bins."""
        return float(np.hypot(self.rows, self.columns))

    @property
    def warning(self) -> str | None:
        """A sentence where image and counts are too far apart; None where they are not."""
        if self.bins <= TOLERATED:
            return None
        return (
            f"counts lie {self.rows:+.1f} rows and {self.columns:+.1f} columns of 2 µm bins from "
            "the tissue in the image: check that this is the image Space Ranger was run with, and "
            "its alignment"
        )


def count_image_shift(images: Iterable[np.ndarray], counts: Iterable[np.ndarray]) -> Shift:
    """Find the offset at which counts follow the darkness of the H&E best.

    Nuclei and cytoplasm are darker than lumens, mucin and gaps, and bear the transcripts. Per
    patch, the cross-correlation of the image's optical density with the total counts is computed
    by Fourier transform, both smoothed to the size of a cell and standardised; the mean over
    patches has its peak, refined by a parabola, at the offset.

    Parameters
    ----------
    images
        H&E of each patch, uint8 ``[h, w, 3]``, over the same square as its counts.
    counts
        Counts of each patch, ``[genes, bins, bins]``.

    Returns
    -------
    Shift
    """
    from scipy import ndimage

    pairs = []
    for image, umi in zip(images, counts, strict=True):
        density = -np.log((image.astype(np.float32).mean(2) + 1) / 256)
        side = umi.shape[-1]
        dark = ndimage.zoom(ndimage.gaussian_filter(density, 2), side / density.shape[0], order=1)
        # The square root of a count has the same spread wherever its mean lies.
        many = ndimage.gaussian_filter(np.sqrt(umi.sum(0, dtype=np.float32)), 2)
        pairs.append(_cross_correlation(_detail(dark), _detail(many)))
    mean = np.mean(pairs, axis=0)
    peak = np.unravel_index(mean.argmax(), mean.shape)
    rows, columns = (
        peak[axis] - REACH + _parabola(np.take(mean, peak[1 - axis], 1 - axis), int(peak[axis]))
        for axis in (0, 1)
    )
    return Shift(float(rows), float(columns), mean)


def _detail(x: np.ndarray) -> np.ndarray:
    """Structure between the size of a cell and of a gland, standardised, faded at the borders."""
    from scipy import ndimage

    x = x - ndimage.gaussian_filter(x, 16)
    fade = np.hanning(x.shape[0] + 2)[1:-1]
    x = x * fade[:, None] * fade
    return x / max(float(np.sqrt((x**2).sum())), 1e-9)


def _cross_correlation(image: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Correlation at every offset of up to ``REACH`` bins, ``[2 REACH + 1, 2 REACH + 1]``."""
    from scipy import signal

    full = signal.correlate(counts, image, mode="full", method="fft")
    # No offset lies at the last element of the image.
    return full[tuple(slice(n - 1 - REACH, n + REACH) for n in image.shape)]


def _parabola(line: np.ndarray, peak: int) -> float:
    if not 0 < peak < len(line) - 1:
        return 0.0
    left, top, right = line[peak - 1 : peak + 2]
    bend = left - 2 * top + right
    return float(0.5 * (left - right) / bend) if bend < 0 else 0.0


def follow(
    image: Pixels, fit: GridFit, depth: np.ndarray, microns_per_pixel: float
) -> dict[str, float]:
    """How well counts follow the darkness of the image, as placed and placed otherwise.

    Squares all over the image are looked at, in spots of 8 µm. Their optical density is correlated
    with the counts of the bins that would lie there: by the positions as they are, or if the image
    or the array were mirrored, turned by quarters, or the image enlarged.

    Parameters
    ----------
    image
        H&E of the section.
    fit
        Map from the array to its pixels.
    depth
        Genes with a count in each bin ``[rows, cols]``, below zero where none is listed.
    microns_per_pixel
        Of the image.

    Returns
    -------
    Correlation by kind of placement; NaN where too few spots have bins.
    """
    from scipy import ndimage

    y, x, dark = _spots(image, fit, depth.shape, microns_per_pixel)
    reach = round(_SPOT_UM / BIN_UM)
    # The square root of a count has the same spread wherever its mean lies.
    counts = ndimage.uniform_filter(depth.clip(0).astype(np.float32), reach)
    counts = np.sqrt(counts.clip(0))  # rounding
    inverse = np.linalg.inv(fit.matrix[:, :2])
    fewest = _FEWEST

    def correlation(y: np.ndarray, x: np.ndarray) -> tuple[float, int]:
        """Of the spots at places that hold a bin, and their number; NaN for too few."""
        rows, cols = np.rint(inverse @ (np.stack([y, x]) - fit.matrix[:, 2:])).astype(int)
        known = (rows >= 0) & (rows < depth.shape[0]) & (cols >= 0) & (cols < depth.shape[1])
        known &= np.isfinite(dark)
        there, number = counts[rows[known], cols[known]], int(known.sum())
        if number < fewest or not there.std() or not dark[known].std():
            return float("nan"), number
        return float(np.corrcoef(there, dark[known])[0, 1]), number

    placed, number = correlation(y, x)
    found = {AS_PLACED: placed}
    fewest = max(_FEWEST, number // 2)  # or chance would decide among so many placements
    image_middle = (np.array(image.shape[:2]) - 1) / 2
    middle = fit(*((n - 1) / 2 for n in depth.shape))
    for swap, up, left in list(product((False, True), repeat=3))[1:]:
        how = ["with rows and columns swapped"] * swap + ["upside down"] * up
        name = " and ".join(how + ["mirrored"] * left)
        either = []
        # An image that is turned about its middle changes its sides, an array stays in its place.
        for centre, back in ((image_middle, image_middle[:: 1 - 2 * swap]), (middle, middle)):
            down, right = (1 - 2 * up) * (y - centre[0]), (1 - 2 * left) * (x - centre[1])
            down, right = (right, down) if swap else (down, right)
            either.append(correlation(back[0] + down, back[1] + right)[0])
        found[name] = max(either, key=np.nan_to_num)
    # In a reduced image, bins lie outside.
    for times in (2, 3, 4):
        found[f"with the image enlarged {times} times"] = correlation(y / times, x / times)[0]
    return found


def _spots(
    image: Pixels, fit: GridFit, shape: tuple[int, ...], microns_per_pixel: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel row and column of spots and their optical density, ``[spots]``; NaN in the black."""
    spot = max(round(_SPOT_UM / microns_per_pixel), 1)
    side = _SPOTS * spot
    corners = fit(*np.mgrid[0:2, 0:2].reshape(2, -1) * (np.array(shape)[:, None] - 1))
    gap = np.maximum(np.ptp(corners, axis=1) / _SQUARES, side)
    # The whole image: a section that lies elsewhere than its positions say lies anywhere.
    starts = [
        np.linspace(0, max(n - side, 0), min(int(n // step), 2 * _SQUARES) or 1).astype(int)
        for n, step in zip(image.shape, gap, strict=False)
    ]
    found = []
    for top, left in product(*starts):
        square = read_region(image, top, top + side, left, left + side)
        pieces = square.reshape(_SPOTS, spot, _SPOTS, spot, 3)
        density = -np.log10((pieces.mean((1, 3, 4)) + 1) / 256)
        density[pieces.max((1, 3, 4)) <= BLACK] = np.nan
        middle = (np.arange(_SPOTS) + 0.5) * spot - 0.5
        y, x = np.meshgrid(top + middle, left + middle, indexing="ij")
        found.append(np.stack([y, x, density]).reshape(3, -1))
    y, x, density = np.concatenate(found, axis=1)
    return y, x, density


def stripe_factors(total: np.ndarray, tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Capture efficiency of each row and column of bins against its neighbourhood.

    Parameters
    ----------
    total
        Counts per bin, [rows, columns].
    tissue
        True in tissue, same shape.

    Returns
    -------
    Row factors [rows] and column factors [columns], float32 with a geometric mean near 1. A line is
    compared with the mean of the lines around it, bins of the same columns (rows) alone, so that
    tissue that begins or ends along the way does not count as a stripe. Lines with fewer than 30
    tissue bins get the factor 1.
    """
    return _line_factors(total, tissue), _line_factors(total.T, tissue.T)


def _line_factors(total: np.ndarray, tissue: np.ndarray, reach: int = 4) -> np.ndarray:
    from scipy import ndimage

    # An even number of lines on either side, half weight at the ends: period 2 averages out.
    kernel = np.ones(2 * reach + 1, np.float32)
    kernel[[0, -1]] = 0.5
    own, usual, bins = np.zeros((3, len(total)))
    # In blocks across the lines, so that a full section needs no full-size temporaries.
    for start in range(0, total.shape[1], 256):
        weight = tissue[:, start : start + 256].astype(np.float32)
        counts = total[:, start : start + 256] * weight
        around, tissue_around = (
            ndimage.correlate1d(x, kernel, axis=0, mode="constant") for x in (counts, weight)
        )
        expected = np.divide(around, tissue_around, out=np.zeros_like(around), where=weight > 0)
        own += counts.sum(1)
        usual += expected.sum(1)
        bins += weight.sum(1)
    measured = (bins >= 30) & (own > 0) & (usual > 0)
    return np.divide(own, usual, out=np.ones_like(own), where=measured).astype(np.float32)
