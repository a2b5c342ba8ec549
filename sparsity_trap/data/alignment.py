"""Checks of a section's pairing: are image and counts shifted, and how strong are the stripes?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

#: Largest shift searched, in bins of 2 µm.
REACH = 24
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
