"""Maps that no model is needed for, and maps of a model that were spoilt: what a score must beat.

Functions of one patch: counts and rates are [G, H, W], its mask [H, W].
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

#: Patches of which `Dealt` holds predictions and counts, and bytes that these may take.
_HELD, _HELD_BYTES = 32, 2**27


def constant(counts: np.ndarray, mean: np.ndarray | float) -> np.ndarray:
    """The same rate everywhere, [G] or one for all; 0 is the map without a count."""
    level = np.broadcast_to(np.asarray(mean, np.float32), len(counts))
    return np.broadcast_to(level[:, None, None], counts.shape)


def patch_mean(counts: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Each gene's mean count over the tissue of the patch itself.

    Knows the answer between patches and nothing within: what a model scores above it, it owes to
    structure within patches.
    """
    return constant(counts, counts[:, mask].sum(1) / max(mask.sum(), 1))


def depth(counts: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Each gene's mean [G] times the bin's total, both over the other genes of the panel.

    Knows how much was caught in each bin and nothing of which gene. The total is that of the other
    genes, or every gene would predict itself; so a single gene has no such map, which is then 0.
    """
    mean = np.asarray(mean, np.float64)
    others = mean.sum() - mean
    factor = np.divide(mean, others, where=others > 0, out=np.zeros_like(mean))
    rest = counts.sum(0, dtype=np.float64) - counts
    return (factor[:, None, None] * rest).astype(np.float32)


def blurred(rate: np.ndarray, mask: np.ndarray | None, sigma: float) -> np.ndarray:
    """The map under a Gaussian of ``sigma`` bins, cut at 4 sigma; the border is repeated.

    With a mask, over tissue alone: weights of bins off tissue go to the others.
    """
    down, across = (_smoothing(n, sigma) for n in rate.shape[1:])

    def smooth(x: np.ndarray) -> np.ndarray:
        return down @ np.asarray(x, np.float32) @ across.T

    if mask is None or mask.all():
        return smooth(rate)
    share = smooth(mask[None])
    inside = smooth(np.where(mask, rate, 0))
    return np.divide(inside, share, where=share > 0, out=np.zeros_like(inside))


def _smoothing(n: int, sigma: float) -> np.ndarray:
    """Matrix [n, n] that smooths n bins in a row: each row holds the weights of one bin."""
    reach = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (reach / sigma) ** 2)
    matrix, bins = np.zeros((n, n)), np.arange(n)
    for shift, weight in zip(reach, weights / weights.sum(), strict=True):
        np.add.at(matrix, (bins, (bins + shift).clip(0, n - 1)), weight)
    return matrix.astype(np.float32)


def shifted(rate: np.ndarray, bins: int) -> np.ndarray:
    """The map moved right by some bins; the first column fills the gap."""
    return rate[:, :, np.maximum(np.arange(rate.shape[2]) - bins, 0)]


class Patch(NamedTuple):
    """A patch that waits for a prediction, or whose prediction waits."""

    number: int
    maps: tuple[np.ndarray, ...]


class Dealt:
    """Gives each patch the prediction of another, while patches pass by once.

    A buffer holds the predictions of some patches. Each further patch takes one of them at random
    and leaves its own in its place; the first patches wait, and take what the buffer holds at the
    end. So every prediction is used once and none by its own patch, and memory does not grow with
    the patches: predictions come from about as many patches before as the buffer holds. A buffer of
    one gives every patch the prediction of the one before, and the first that of the last.

    Parameters
    ----------
    size
        Patches in the buffer; by default up to 32, fewer where these were more than 128 MB.
    seed
        Of the draws.
    """

    def __init__(self, size: int | None = None, seed: int = 0) -> None:
        self.size, self.rng, self.n = size, np.random.default_rng(seed), 0
        self.waiting: list[Patch] = []  # counts and mask of the first patches
        self.held: list[Patch] = []  # predictions

    def push(
        self, counts: np.ndarray, rate: np.ndarray, mask: np.ndarray
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Take a patch; give counts, another's rate and mask, where there is one to give."""
        own = Patch(self.n, (rate.copy(),))  # whose memory may be that of a batch, written anew
        if self.size is None:
            patch_bytes = max(counts.nbytes + rate.nbytes, 1)
            self.size = int(np.clip(_HELD_BYTES // patch_bytes, 2, _HELD))
        self.n += 1
        if len(self.held) < self.size:
            self.held.append(own)
            self.waiting.append(Patch(own.number, (counts.copy(), mask.copy())))
            return
        slot = int(self.rng.integers(self.size))
        (other,) = self.held[slot].maps
        self.held[slot] = own
        yield counts, other, mask

    def rest(self) -> Iterator[tuple[np.ndarray, ...]]:
        """The first patches, at the end; nothing where there was only one."""
        if self.n < 2:
            return
        ids = np.array([patch.number for patch in self.held])
        order = self.rng.permutation(len(ids))
        while (ids[order] == [patch.number for patch in self.waiting]).any():
            order = self.rng.permutation(len(ids))
        for patch, slot in zip(self.waiting, order, strict=True):
            counts, mask = patch.maps
            yield counts, self.held[slot].maps[0], mask
