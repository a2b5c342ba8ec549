"""Whether maps fit better when turned or shifted: a mistake that no score names.

Counts and predictions of some patches are compared under the eight turns of the square and shifts
of up to 8 bins. A placement is believed when what each half of the patches finds holds in the
other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

#: Largest shift looked for, in bins; genes and patches looked at.
REACH, _GENES, _PATCHES = 8, 8, 16

#: Pairs of bins without which no correlation is taken.
_LEAST_BINS = 50

_QUICK = 32  # lengths of transforms are multiples of it

#: What a placement must gain, in PCC, in both halves of the patches.
CLEARLY = 0.02

#: Transpose, flip rows, flip columns -> what was done to the prediction.
TURNS = {
    (False, False, False): "as given",
    (False, True, False): "flipped top to bottom",
    (False, False, True): "flipped left to right",
    (False, True, True): "turned by 180°",
    (True, False, False): "transposed (rows are columns)",
    (True, True, False): "turned by 90° against the clock",
    (True, False, True): "turned by 90° with the clock",
    (True, True, True): "transposed along the other diagonal",
}


class Found(NamedTuple):
    """A placement under which the prediction fits better.

    Attributes
    ----------
    turn
        What has to be done to the prediction, of `TURNS`.
    down, right
        Bins by which the prediction then lies below and to the right of the counts.
    pcc, given
        Mean PCC of the genes looked at, so placed and as given.
    """

    turn: str
    down: int
    right: int
    pcc: float
    given: float

    def sentence(self, bin_um: float) -> str:
        """What is wrong, and what it costs."""
        what = [] if self.turn == TURNS[False, False, False] else [self.turn]
        for bins, words in ((self.down, ("up", "down")), (self.right, ("left", "right"))):
            if bins:
                what.append(f"moved {abs(bins) * bin_um:g} µm {words[bins < 0]}")
        return (
            f"The prediction fits better {' and '.join(what)}: mean PCC {self.pcc:.2f} instead of "
            f"{self.given:.2f} for {_GENES} genes or fewer with most counts"
        )


def turned(maps: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """Transpose the last two axes, flip the first of them, flip the second; where asked for."""
    transpose, rows, columns = turn
    maps = maps.swapaxes(-1, -2) if transpose else maps
    maps = maps[..., ::-1, :] if rows else maps
    return maps[..., ::-1] if columns else maps


class Placement:
    """Sums over patches for every turn and shift, of two halves of the patches.

    Of the patches that pass by, all of the first 16 are looked at and then ever fewer, of the genes
    the 8 with most counts in the first patch that holds any.
    """

    def __init__(self) -> None:
        self.seen = self.taken = 0
        self.genes: np.ndarray | None = None
        self.turns: list[tuple[bool, bool, bool]] = []
        self.sums: np.ndarray  # [half, turn, 6 sums, genes, shifts, shifts], from the first patch

    def update(
        self,
        counts: np.ndarray,
        rate: np.ndarray,
        mask: np.ndarray,
        known: np.ndarray | None = None,
    ) -> None:
        """Add a patch, [G, H, W] and [H, W].

        Its counts are looked at in ``mask``, its prediction where it is ``known``: there too, by
        default.
        """
        known = mask if known is None else known
        number, self.seen = self.seen, self.seen + 1
        if min(mask.shape) <= 2 * REACH or number % max(1, number // _PATCHES) or not mask.any():
            return
        if self.genes is None:
            total = counts[:, mask].sum(1)
            if not total.any():
                return
            self.genes = np.argsort(-total, kind="stable")[:_GENES]
            square = mask.shape[0] == mask.shape[1]
            self.turns = [turn for turn in TURNS if square or not turn[0]]
            size = 2 * REACH + 1
            self.sums = np.zeros((2, len(self.turns), 6, len(self.genes), size, size))
        y = np.where(mask, np.asarray(counts[self.genes], np.float32), 0)
        p = np.where(known, np.asarray(rate[self.genes], np.float32), 0)
        # Decoders that double their maps may leave a chequered pattern, which a shift by one bin
        # turns over: weights of 1, 2, 1 take out whatever alternates from bin to bin.
        for axis in (1, 2):
            p = (np.roll(p, 1, axis) + 2 * p + np.roll(p, -1, axis)) / 4
        half = self.taken % 2
        self.taken += 1
        for sums, turn in zip(self.sums[half], self.turns, strict=True):
            sums += _products(y, mask, turned(p, turn), turned(known, turn))

    def best(self) -> Found | None:
        """The placement that is clearly better than the given one, where there is one."""
        if self.taken < 2:
            return None
        *halves, whole = (_mean_pcc(sums) for sums in (*self.sums, self.sums.sum(0)))
        middle, place = (0, REACH, REACH), _highest(whole)
        # What each half finds has to hold in the other.
        gains = [
            other[_highest(half)] - other[middle]
            for half, other in zip(halves, halves[::-1], strict=True)
        ]
        turns = {_highest(pcc)[0] for pcc in (*halves, whole)}
        gain = whole[place] - whole[middle]
        if len(turns) > 1 or min(gains) < CLEARLY or gain < max(CLEARLY, 0.1 * whole[place]):
            return None
        turn, down, right = place
        return Found(
            TURNS[self.turns[turn]],
            down - REACH,
            right - REACH,
            float(whole[place]),
            float(whole[middle]),
        )


def _products(y: np.ndarray, inside: np.ndarray, p: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Bins, sums, squares and products of y and p at every shift, [6, G, shifts, shifts].

    ``[REACH + d, REACH + e]`` pairs y at (i, j) with p at (i + d, j + e), over the bins of y that
    are ``inside`` and the bins of p that are ``known``, without a margin as wide as the shifts.
    """
    within = np.zeros(inside.shape, np.float32)
    within[REACH:-REACH, REACH:-REACH] = inside[REACH:-REACH, REACH:-REACH]
    y = y * within
    # Zeros at the end up to a length that is quick to transform.
    size = [-(-n // _QUICK) * _QUICK for n in inside.shape]
    of_y = [torch.fft.rfft2(torch.from_numpy(x), s=size).conj() for x in (within[None], y, y * y)]
    known = np.ascontiguousarray(known, np.float32)
    p = np.ascontiguousarray(p, np.float32)
    of_p = [torch.fft.rfft2(torch.from_numpy(x), s=size) for x in (known[None], p, p * p)]
    pairs = ((0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1))  # n, y, p, yy, pp, yp
    shifts = np.arange(-REACH, REACH + 1)
    sums = np.empty((6, len(y), len(shifts), len(shifts)))
    for out, (a, b) in zip(sums, pairs, strict=True):
        found = torch.fft.irfft2(of_y[a] * of_p[b], s=size).numpy()
        out[:] = found[:, shifts[:, None], shifts]
    return sums


def _highest(pcc: np.ndarray) -> tuple[int, ...]:
    """Turn and shifts of the highest correlation."""
    return tuple(map(int, np.unravel_index(pcc.argmax(), pcc.shape)))


def _mean_pcc(sums: np.ndarray) -> np.ndarray:
    """Mean PCC over genes [turn, shifts, shifts]; -1 where no gene varies."""
    n, y, p, yy, pp, yp = np.moveaxis(sums, 1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((n * yy - y * y).clip(min=0) * (n * pp - p * p).clip(min=0))
        # Sums by Fourier transform are not exact: what is left of a constant is no variance.
        varies = (n > _LEAST_BINS) & (spread > 1e-4 * n * np.sqrt(yy * pp))
        pcc = np.where(varies, ((n * yp - y * p) / spread).clip(-1, 1), np.nan)
    known = ~np.isnan(pcc)
    total = np.where(known, pcc, 0).sum(1)
    mean = np.divide(total, known.sum(1), where=known.any(1), out=np.full(total.shape, -1.0))
    return mean
