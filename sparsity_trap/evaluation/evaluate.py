"""Score the maps of any model: `evaluate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sparsity_trap.bins import Maps
from sparsity_trap.evaluation.ceilings import KnownCeiling, SplitCeiling
from sparsity_trap.evaluation.map_scores import CountScores, ScaleFreeScores
from sparsity_trap.evaluation.nulls import (
    Dealt,
    blurred,
    constant,
    depth,
    patch_mean,
    shifted,
)
from sparsity_trap.evaluation.placement import Placement
from sparsity_trap.evaluation.result import (
    BLUR_UM,
    MODEL,
    ORACLE,
    SHIFT_UM,
    SPOILT,
    Evaluation,
    Example,
)
from sparsity_trap.evaluation.verdict import findings, verdict
from sparsity_trap.metrics import Moments, _array, _numbers

#: Unit of predictions -> whether it can be taken back to rates of counts.
UNITS = {"counts": True, "log1p counts": True, "log-normalised": False, "z-score": False}

#: Patches kept as examples, and bytes that they may take.
_EXAMPLES, _EXAMPLE_BYTES = 24, 2**26

#: Halves of octaves of the calibration curve, from 2^-16 to 2^12 counts per larger bin.
_LOWEST, _CURVE = -32, 57


def evaluate(
    counts: Maps | Iterable,
    rate: Maps | Iterable | None = None,
    mask: Maps | Iterable | None = None,
    train_mean: np.ndarray | None = None,
    genes: Sequence[str] | None = None,
    *,
    true_rate: Maps | Iterable | None = None,
    section_mean: np.ndarray | None = None,
    bin_um: float = 2.0,
    units: str = "counts",
    name: str = "prediction",
) -> Evaluation:
    """Score predicted maps beside nulls and ceilings, and under published protocols.

    Patches are read once, one at a time. Memory does not depend on their number, but for 48 bytes
    per patch and gene of each set of maps; about 4 MB per gene are histograms of all sets. What
    ranks need waits in temporary files. Nulls made of other patches' predictions come from a
    buffer, see `nulls.Dealt`.

    Parameters
    ----------
    counts, rate, mask
        Counts and predictions [N, G, H, W], tissue bool [N, H, W]; H and W are multiples of 8. Each
        may be an iterator of batches of these instead; or ``counts`` alone gives batches of all
        three, and of the true rate where it is known. Off tissue, predictions may be anything; bins
        without a prediction are left out by the mask.
    train_mean
        [G] mean count per bin in the training sections: the null *training mean*, what *depth only*
        scales, and what D² is held against. Without it D² is against each gene's own mean in the
        section, and both nulls are made of that where it is known, or left out.
    genes
        Names; numbers by default.
    true_rate
        [N, G, H, W], where it is known: the *oracle*, and exact ceilings.
    section_mean
        [G] mean count per bin in the section's own tissue, for iterators; of arrays it is taken.
    bin_um
        Width of the bins. Correlations compare 8 µm for bins of 2 µm, and wider bins as they are.
    units
        ``counts`` (expected counts per bin), ``log1p counts`` (taken back to counts),
        ``log-normalised`` or ``z-score`` (scale-free scores alone).
    name
        Whose predictions these are, for errors.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        Shapes do not fit, there is no patch, a unit is unknown, or a prediction on tissue is
        negative (as counts), infinite or not a number.

    Examples
    --------
    >>> import numpy as np, sparsity_trap as st
    >>> draw = np.random.default_rng(0)
    >>> rate = draw.gamma(1.0, size=(6, 2, 16, 16))
    >>> mask = np.ones((6, 16, 16), bool)
    >>> found = st.evaluate(draw.poisson(rate), rate, mask, genes=["PIGR", "CD74"])
    >>> model, shuffled = (found.scores[key]["pcc_8um"] for key in ("model", "shuffled patches"))
    >>> bool((model > shuffled).all())
    True
    """
    if units not in UNITS:
        raise ValueError(f"units are '{units}': choose among {', '.join(UNITS)}")
    maps = [x for x in (counts, rate, mask, true_rate) if x is not None]
    arrays = hasattr(counts, "shape")
    if (rate is None or mask is None) and (arrays or len(maps) > 1):
        raise ValueError("give counts, rate and mask, or one iterator of batches of all three")
    baseline = None if train_mean is None else np.asarray(train_mean)
    if arrays:
        _numbers(*maps[:2], mask=mask)
        if train_mean is None and section_mean is None:
            section_mean = _own_mean(counts, mask)
    mean = section_mean if train_mean is None else train_mean
    collector: _Collector | None = None
    for patch in _patches(
        [maps] if arrays else counts if rate is None else zip(*maps, strict=True)
    ):
        if collector is None:
            named = tuple(map(str, range(len(patch[0])))) if genes is None else tuple(genes)
            if len(named) != len(patch[0]):
                raise ValueError(f"{len(named)} genes are named, maps have {len(patch[0])}")
            collector = _Collector(named, mean, baseline, bin_um, units, name)
        collector.add(*patch)
    if collector is None:
        raise ValueError(f"{name}: no patches to score")
    return collector.result()


def _patches(
    batches: Iterable,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Counts, prediction, mask and, where known, true rate of each patch."""
    for y, p, m, *true in batches:
        for i in _numbers(y, p, *true, mask=m):
            rate = _array(p[i])
            if rate.dtype.kind != "f":
                rate = rate.astype(np.float32)
            known = _array(true[0][i]) if true else None
            yield _counts(_array(y[i])), rate, _array(m[i]).astype(bool), known


def _counts(values: np.ndarray) -> np.ndarray:
    """Counts as the compiled loops take them, whatever they were stored as."""
    if values.dtype == np.uint16 or not values.size:
        return values
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= 0) & (values == np.floor(values)))
    if wrong.any():
        raise ValueError(f"counts hold {values[wrong][0]:g}, which is not a count: give raw counts")
    return values.astype(np.uint16 if values.max() < 2**16 else np.float64)


def _own_mean(counts: Maps, mask: Maps) -> np.ndarray:
    """Mean count per bin in tissue of the section itself, [G]."""
    total, bins = 0.0, 0
    for i in range(counts.shape[0]):
        inside = _array(mask[i]).astype(bool)
        total = total + _array(counts[i])[:, inside].sum(1, dtype=np.float64)
        bins += int(inside.sum())
    return np.asarray(total) / max(bins, 1)


class _Collector:
    """Sums of the model and of every null, while patches pass by."""

    def __init__(
        self,
        genes: tuple[str, ...],
        mean: np.ndarray | None,
        baseline: np.ndarray | None,
        bin_um: float,
        units: str,
        name: str,
    ) -> None:
        self.genes, self.bin_um, self.units, self.name = genes, bin_um, units, name
        self.mean, self.baseline = None if mean is None else np.asarray(mean), baseline
        self.of_rates = UNITS[units]
        self.maps: dict[str, CountScores | ScaleFreeScores] = {MODEL: self._scores(MODEL)}
        self.wide = self.maps[MODEL].wide
        self.dealt = {"shuffled patches": Dealt(), "another patch": Dealt(1)}
        self.ceilings: dict[int, SplitCeiling | KnownCeiling] = {}
        self.placement, self.rng = Placement(), np.random.default_rng(0)
        self.moments: list[np.ndarray] = []
        self.curve = np.zeros((3, _CURVE))
        self.examples: list[Example] = []
        self.n = self.bins = 0

    def _scores(self, of: str) -> CountScores | ScaleFreeScores:
        name = self.name if of == MODEL else f"{self.name}, {of}"
        if self.of_rates:
            return CountScores(self.genes, self.baseline, name, self.bin_um)
        return ScaleFreeScores(self.genes, name, self.bin_um)

    def add(
        self, counts: np.ndarray, rate: np.ndarray, mask: np.ndarray, true_rate: np.ndarray | None
    ) -> None:
        """Score a patch, and the nulls that can be made now."""
        if self.units == "log1p counts":
            rate = np.expm1(rate.astype(np.float32))
        wide = self._score(MODEL, counts, rate, mask, true_rate)
        self._keep(*wide)
        rate = rate if mask.all() else np.where(mask, rate, rate.dtype.type(0))
        self.placement.update(counts, rate, mask)
        if self.n and (true_rate is not None) != (ORACLE in self.maps):
            raise ValueError(f"{self.name}: give the true rate of every patch, or of none")
        if not self.ceilings:
            ceiling = SplitCeiling if true_rate is None else KnownCeiling
            self.ceilings = {factor: ceiling(factor) for factor in sorted({1, self.wide})}
        for of_width in self.ceilings.values():
            of_width.update(counts if true_rate is None else true_rate, mask)
        made = {"all zeros": constant(counts, 0)}
        if self.mean is not None:
            made["section mean" if self.baseline is None else "training mean"] = constant(
                counts, self.mean
            )
        made["patch mean"] = patch_mean(counts, mask)
        if self.mean is not None and len(counts) > 1:
            made["depth only"] = depth(np.where(mask, counts, 0), self.mean)
        soft, moved = SPOILT
        made[soft] = blurred(rate, mask, BLUR_UM / self.bin_um)
        made[moved] = shifted(rate, max(round(SHIFT_UM / self.bin_um), 1))
        if true_rate is not None:
            made[ORACLE] = true_rate
        for of, maps in made.items():
            self._score(of, counts, maps, mask)
        for of, dealt in self.dealt.items():
            for other in dealt.push(counts, rate, mask):
                self._score(of, *other)
        self.n += 1
        self.bins += int(mask.sum())

    def _score(self, of: str, *patch: Any) -> tuple[np.ndarray, ...]:
        if of not in self.maps:
            self.maps[of] = self._scores(of)
        return self.maps[of].update(*patch)

    def _keep(self, counts: np.ndarray, rate: np.ndarray, mask: np.ndarray) -> None:
        """What the report shows of the model: sums of the patch, the curve, an example."""
        part = Moments.of(counts, rate, mask)
        self.moments.append(
            np.stack([part.n, part.mean_x, part.mean_y, part.xx, part.yy, part.xy], axis=1)
        )
        if self.of_rates:
            y, p = counts[:, mask].ravel(), rate[:, mask].ravel()
            with np.errstate(divide="ignore"):
                level = np.clip(np.floor(2 * np.log2(p)) - _LOWEST, 0, _CURVE - 1).astype(int)
            for into, weights in zip(self.curve, (None, p, y), strict=True):
                into += np.bincount(level, weights, _CURVE)
        example = Example(self.n, counts.astype(np.float32), rate.astype(np.float32), mask)
        limit = int(np.clip(_EXAMPLE_BYTES // max(2 * example.counts.nbytes, 1), 1, _EXAMPLES))
        if len(self.examples) < limit:
            self.examples.append(example)
        elif (slot := int(self.rng.integers(self.n + 1))) < limit:
            self.examples[slot] = example

    def result(self) -> Evaluation:
        """Scores of everything."""
        for of, dealt in self.dealt.items():
            for other in dealt.rest():
                self._score(of, *other)
        last = [ORACLE] if ORACLE in self.maps else []
        order = [of for of in self.maps if of not in last] + last
        found = Evaluation(
            genes=self.genes,
            scores={of: self.maps[of].columns() for of in order},
            ceilings={
                f"ceiling_{factor * self.bin_um:g}um": ceiling.compute()
                for factor, ceiling in self.ceilings.items()
            },
            protocols={of: self.maps[of].protocols() for of in order},
            moments=np.stack(self.moments),
            curve=self.curve,
            examples=self.examples,
            about={
                "name": self.name,
                "units": self.units,
                "bin_um": self.bin_um,
                "wide_um": self.wide * self.bin_um,
                "patches": self.n,
                "bins": self.bins,
                "baseline": "section mean" if self.baseline is None else "training mean",
                "ceilings": "known rate" if last else "count splitting",
            },
        )
        found.findings = findings(found, self.placement.best())
        found.verdict = verdict(found)
        return found
