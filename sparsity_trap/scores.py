"""Every score of a run at once, from patches that arrive in batches.

The scores are those of `metrics`; here they are summed in one pass over each patch, by the compiled
loops of ``_loops``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from sparsity_trap.bins import Maps, bin_mask
from sparsity_trap.metrics import (
    LEAST_RATE,
    MIN_TISSUE,
    Moments,
    PoissonSums,
    _loadable,
    _numbers,
    _packed,
    _patch,
    _ratio,
    _spearman,
    average_precision,
)

#: 2 µm bins along one side of a 2, 4, 8 and 16 µm bin.
FACTORS = (1, 2, 4, 8)

#: Levels on which AUPRC ranks predictions: the float16 numbers from 0, by their bits. Predictions
#: are stored in float16, so these are all there are.
N_LEVELS = 2**15

#: Pairs of maps that are correlated, in the order of the loops.
_MOMENTS = (
    *("pcc_2um", "pcc_4um", "pcc_8um", "pcc_16um"),
    *("pcc_2um_unmasked", "pcc_8um_unmasked", "pcc_2um_rate", "pcc_8um_rate"),
)
_SPOOL_BYTES = 2**25  # kept in memory before a temporary file takes over


class PatchSums(NamedTuple):
    """What one patch adds; float64 arrays, but for the 8 µm maps in float32."""

    moments: np.ndarray  # [G, 8, 6], in the order of _MOMENTS and of the fields of Moments
    poisson: np.ndarray  # [G, 6], the fields of PoissonSums
    ssim: np.ndarray  # [G, 2], at 2 and 8 µm
    truth8: np.ndarray  # [G, H / 4, W / 4], 0 off the tissue at 8 µm
    pred8: np.ndarray


class RankFile:
    """8 µm bins of all patches in a temporary file, ranked exactly, gene by gene.

    Ranks need all values of a gene at once; the file keeps them out of memory, in single precision
    (about 0.4 MB per patch of 50 genes).
    """

    def __init__(self) -> None:
        self.file = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115
        self.bins: list[int] = []  # of each patch

    def add(self, counts: np.ndarray, rate: np.ndarray) -> None:
        """Keep a patch's bins [G, bins]."""
        packed = _packed(counts, rate)
        self.file.seek(0, 2)
        self.file.write(packed.tobytes())
        self.bins.append(packed.shape[1])

    def spearman(self, genes: int) -> np.ndarray:
        """Rank correlation of counts and rates, float64 [G]."""
        starts = np.cumsum([0, *(genes * n for n in self.bins)])

        def gene(g: int) -> np.ndarray:
            parts = []
            for start, n in zip(starts, self.bins, strict=False):
                self.file.seek(8 * (start + g * n))
                parts.append(np.frombuffer(self.file.read(8 * n), np.uint64))
            return np.concatenate(parts)

        scores: list[float] = []
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, genes, threads):  # a gene a thread in memory
                part = map(gene, range(first, min(first + threads, genes)))
                scores.extend(pool.map(_spearman, part))
        return np.array(scores)


class GeneScores:
    """Every per-gene score of a run, from patches that arrive in batches.

    Memory grows with the patches by 48 bytes a gene; what ranks need waits in a `RankFile`. AUPRC
    ranks predictions in half precision, in which they are stored; see ``N_LEVELS``.

    Parameters
    ----------
    genes
        Names for errors; numbers by default.
    train_mean
        [G] mean count per bin of each gene in the training sections, for ``d2``.
    name
        Whose predictions these are, for errors.

    Examples
    --------
    >>> import numpy as np, sparsity_trap as st
    >>> draw = np.random.default_rng(0)
    >>> scores = st.GeneScores(["PIGR", "CD74"])
    >>> for batch in range(3):
    ...     rate = draw.gamma(1.0, size=(4, 2, 16, 16))
    ...     scores.update(draw.poisson(rate), rate, np.ones((4, 16, 16), bool))
    >>> table = scores.compute()  # column -> float64 [G]
    >>> bool((table["pcc_2um"] > 0.5).all())
    True
    """

    def __init__(
        self,
        genes: Sequence[str] | None = None,
        *,
        train_mean: np.ndarray | None = None,
        name: str = "prediction",
    ) -> None:
        self.genes, self.train_mean, self.name = genes, train_mean, name
        self._moments: Moments  # of each gene and of each of _MOMENTS, [G, 8]
        self._poisson: PoissonSums
        self._ssim: np.ndarray  # [G, 2 resolutions, 3]: sum, defined, undefined
        self._histogram: np.ndarray  # [G, 2, N_LEVELS]: bins without and with a count
        self._ranks = RankFile()
        self._patches: list[np.ndarray] = []  # moments of each patch at 8 µm, [G, 6]
        self._rate_known: bool | None = None
        self._columns: dict[str, np.ndarray] | None = None

    def update(self, counts: Maps, rate: Maps, mask: Maps, true_rate: Maps | None = None) -> None:
        """Add patches.

        Parameters
        ----------
        counts, rate
            Counts and predicted rates at 2 µm [B, G, H, W]; H and W are multiples of 8.
        mask
            bool [B, H, W], tissue.
        true_rate
            [B, G, H, W], known only in simulated sections; for every patch or for none.

        Raises
        ------
        ValueError
            A prediction on tissue is negative, infinite or not a number (off tissue it may be: only
            the unmasked scores are then undefined); shapes differ; or the true rate is given for
            some patches only.
        """
        known = true_rate is not None
        if self._rate_known not in (None, known):
            raise ValueError(f"{self.name}: give the true rate of every patch, or of none")
        self._rate_known, self._columns = known, None
        maps = (counts, rate, true_rate) if known else (counts, rate)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for i in _numbers(*maps, mask=mask):
                y, p, *true, m = _patch(i, *maps, mask=mask)
                if not self._ranks.bins:
                    self._histogram = np.zeros((len(y), 2, N_LEVELS), np.int32)
                self._add(m, _sums(y, p, true[0] if true else y[:0], m, self._histogram, pool))

    def _add(self, mask: np.ndarray, sums: PatchSums) -> None:
        moments = Moments(*np.moveaxis(sums.moments, -1, 0))
        poisson = PoissonSums(*sums.poisson.T)
        wrong = np.flatnonzero(~np.isfinite(poisson.rate))
        if len(wrong):
            gene = f"number {wrong[0]}" if self.genes is None else self.genes[wrong[0]]
            raise ValueError(
                f"{self.name}: gene {gene} has a rate in patch {len(self._ranks.bins)} that is "
                "negative, infinite or not a number: train again, with a lower learning rate where "
                "it recurs"
            )
        defined = ~np.isnan(sums.ssim)
        undefined = ~defined & (mask.mean() >= MIN_TISSUE)
        ssim = np.stack([np.nan_to_num(sums.ssim), defined, undefined], axis=-1)
        if self._ranks.bins:
            moments, poisson = self._moments + moments, self._poisson + poisson
            ssim += self._ssim
        self._moments, self._poisson, self._ssim = moments, poisson, ssim
        self._patches.append(sums.moments[:, _MOMENTS.index("pcc_8um")].copy())
        inside = bin_mask(mask, 4)
        self._ranks.add(sums.truth8[:, inside], sums.pred8[:, inside])

    def compute(self) -> dict[str, np.ndarray]:
        """Scores of all patches so far.

        Returns
        -------
        dict
            Column of the per-gene table -> float64 [G]; undefined values are NaN. ``auprc`` ranks
            the 2 µm bins that hold a count before those that do not; ``auprc_base`` is its value
            for a prediction without information.

        Raises
        ------
        ValueError
            There were no patches.
        """
        if not self._ranks.bins:
            raise ValueError("no patches to score: call update first")
        if self._columns is not None:
            return self._columns
        counts = self._poisson
        ssim = _ratio(self._ssim[..., 0], self._ssim[..., 1])
        unknown = np.full(len(counts.n), np.nan)
        d2 = unknown if self.train_mean is None else counts.d2(np.asarray(self.train_mean))
        correlations = dict(zip(_MOMENTS, self._moments.pcc().T, strict=True))
        known = {name: correlations.pop(name) for name in ("pcc_2um_rate", "pcc_8um_rate")}
        self._columns = {
            "sparsity": counts.sparsity(),
            "mean_count": _ratio(counts.count, counts.n),
            **correlations,
            "spearman_8um": self._ranks.spearman(len(counts.n)),
            "ssim_2um": ssim[:, 0],
            "ssim_8um": ssim[:, 1],
            "deviance": counts.deviance(),
            "d2": d2,
            # A gene at a time: the levels of all genes of a large panel are gigabytes.
            "auprc": np.array([average_precision(h) for h in self._histogram]),
            "auprc_base": 1 - counts.sparsity(),
            "mse": self._moments[:, 0].mse(),
            "calibration": self._moments[:, 0].calibration(),
            "rate_cv": self._moments[:, 0].cv(),
            **known,
        }
        return self._columns

    def patches(self) -> np.ndarray:
        """Sums of each patch at 8 µm, float64 [N, G, 6], the last axis as the fields of `Moments`.

        From them the PCC over any part of the patches follows.
        """
        return np.stack(self._patches)

    def pooled(self) -> dict[str, float]:
        """Pooled PCC over all genes, named apart from the per-gene columns."""
        self.compute()
        keys = ("2um", "8um", "2um_unmasked", "8um_unmasked")
        moments = (self._moments[:, _MOMENTS.index(f"pcc_{key}")] for key in keys)
        return {
            f"pooled_pcc_{key}": m.pooled().pcc().item()
            for key, m in zip(keys, moments, strict=True)
        }

    def undefined(self) -> dict[str, int]:
        """Undefined values per score: genes for most, maps (patch x gene) for SSIM."""
        numbers = {name: int(np.isnan(column).sum()) for name, column in self.compute().items()}
        maps = self._ssim[..., 2].sum(0)
        return numbers | {"ssim_2um": int(maps[0]), "ssim_8um": int(maps[1])}


def _sums(
    truth: np.ndarray,
    pred: np.ndarray,
    rate: np.ndarray,
    mask: np.ndarray,
    histogram: np.ndarray,
    pool: ThreadPoolExecutor,
) -> PatchSums:
    """Sums of one patch by the compiled loops, each thread with a share of the genes."""
    from sparsity_trap import _loops

    genes, height, width = truth.shape
    masks = tuple(bin_mask(mask, factor) for factor in FACTORS)
    scored = bool(mask.mean() >= MIN_TISSUE)
    sums = PatchSums(
        moments=np.zeros((genes, len(_MOMENTS), 6)),
        poisson=np.zeros((genes, 6)),
        ssim=np.full((genes, 2), np.nan),
        truth8=np.empty((genes, height // 4, width // 4), np.float32),
        pred8=np.empty((genes, height // 4, width // 4), np.float32),
    )

    def score(part: slice) -> None:
        t, p, level = _loadable(truth[part], pred[part])
        if len(p):
            level = p.astype(np.float16).view(np.int16) & 0x7FFF  # without the sign: -0 is 0
        r = np.ascontiguousarray(rate[part], dtype=p.dtype)
        out = tuple(array[part] for array in sums)
        _loops.score(t, p, level, r, masks, LEAST_RATE, scored, out, histogram[part])

    size = -(-genes // torch.get_num_threads())  # genes of each thread
    list(pool.map(score, (slice(start, start + size) for start in range(0, genes, size))))
    return sums
