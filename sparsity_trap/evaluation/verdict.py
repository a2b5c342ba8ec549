"""Sentences: what the scores of an evaluation say, and what looks like a mistake."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from sparsity_trap.evaluation.protocols import PROTOCOLS, mean_of
from sparsity_trap.evaluation.result import INFORMED, MODEL, ORACLE, SPOILT, Evaluation

if TYPE_CHECKING:
    from sparsity_trap.evaluation.placement import Found

#: Total predicted over observed that is no longer called the right scale.
_SCALE = 2.0

#: Ratios that a wrong unit leaves, and what they point to.
_USUAL = {
    16: "near that of the areas of 8 µm and 2 µm bins",
    1 / 16: "near that of the areas of 2 µm and 8 µm bins",
}

#: What a blurred map must lose, of the score at the maps' own bins, for detail to count.
_DETAIL = 0.02

_NAMED = 8  # genes in a sentence


def verdict(found: Evaluation) -> list[str]:
    """Is it better than nothing, how far from the ceiling, where does it fail."""
    column, model = found.main, found.scores[MODEL]
    return [
        *_against_nulls(found, column, model[column]),
        *_against_ceiling(found, column, model[column]),
        *_detail(found),
        *_level(found),
        *_by_protocol(found),
    ]


def findings(found: Evaluation, placed: Found | None) -> list[str]:
    """What looks like a mistake in the predictions."""
    said = [] if placed is None else [placed.sentence(found.about["bin_um"]) + "."]
    moments = found.moments
    spread = moments[..., 4].sum(0) + np.ptp(moments[..., 2], axis=0)
    flat = [gene for gene, s in zip(found.genes, spread, strict=True) if s == 0]
    if flat:
        said.append(f"The prediction is the same in every bin for {listed(flat)}.")
    counted = found.scores[MODEL]["mean_count"]
    silent = [gene for gene, mean in zip(found.genes, counted, strict=True) if not mean]
    if silent:
        said.append(f"No count was measured of {listed(silent)}: nothing can be said of it.")
    if found.about["units"] in ("counts", "log1p counts"):
        said += _scale(found)
    return said


def _scale(found: Evaluation) -> list[str]:
    n, x, y = (found.moments[..., i] for i in range(3))
    observed, predicted = (n * x).sum(), (n * y).sum()
    if not observed or not predicted:
        return []
    ratio = predicted / observed
    if 1 / _SCALE <= ratio <= _SCALE:
        return []
    near = [why for usual, why in _USUAL.items() if abs(np.log2(ratio / usual)) < 0.3]
    why = f", {near[0]}: is the width of the bins right?" if near else "."
    return [f"The prediction's total is {ratio:.3g} times the observed{why}"]


def _against_nulls(found: Evaluation, column: str, score: np.ndarray) -> list[str]:
    wide = f"{found.about['wide_um']:g} µm"
    if np.isnan(score).all():
        return [
            f"The PCC at {wide} is undefined for every gene: a map without spread says nothing."
        ]
    said = f"Over genes, the mean PCC at {wide} in tissue is {np.nanmean(score):.3f}"
    own = {name: columns[column] for name, columns in found.scores.items() if _is_null(name)}
    means = {name: mean_of(values) for name, values in own.items()}
    known = {name: mean for name, mean in means.items() if not np.isnan(mean)}
    blind = {name: known[name] for name in blind_nulls(known)}
    sentences = [f"{said}; no null that sees nothing of the counts has a defined one."]
    if blind:
        best = max(blind, key=lambda name: blind[name])
        ahead = _ahead(score, [own[name] for name in blind])
        better = "better" if np.nanmean(score) > blind[best] else "not better"
        sentences = [
            f"{said}; the best null that sees nothing of the counts, {best}, has "
            f"{blind[best]:.3f}: {better} than nothing, and ahead of every such null in "
            f"{ahead.sum()} of {len(ahead)} genes."
        ]
        if not ahead.all():
            behind = [gene for gene, ok in zip(found.genes, ahead, strict=True) if not ok]
            sentences.append(f"It fails, against such a null, for {listed(behind)}.")
    for name in INFORMED:
        if name in known:
            ahead = _ahead(score, [own[name]])
            what = {
                "patch mean": "which knows each patch's mean and nothing within it",
                "depth only": "which knows each bin's total of the other genes",
            }[name]
            sentences.append(
                f"The null {name}, {what}, has {known[name]:.3f}; the model is ahead of it in "
                f"{ahead.sum()} of {len(ahead)} genes."
            )
    return sentences


def _ahead(score: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Genes in which a score is above all others; an undefined one is below every other."""
    low = [np.nan_to_num(values, nan=-2) for values in others]
    return np.nan_to_num(score, nan=-2) > np.max(low, axis=0)


def _against_ceiling(found: Evaluation, column: str, score: np.ndarray) -> list[str]:
    ceiling = found.ceilings[column.replace("pcc", "ceiling")]
    both = ~np.isnan(score) & ~np.isnan(ceiling)
    if not both.any():
        return ["No ceiling could be estimated: counts are too few."]
    how = {
        "known rate": "that of the known rate",
        "count splitting": "by splitting counts, so an upper bound where these vary more than "
        "Poisson",
    }[found.about["ceilings"]]
    share = score[both].mean() / ceiling[both].mean()
    said = (
        f"The ceiling of that PCC is {ceiling[both].mean():.3f} ({how}); the model reaches "
        f"{share:.0%} of it."
    )
    if both.sum() < len(both):
        said += f" {len(both) - both.sum()} genes have none."
    return [said]


def _detail(found: Evaluation) -> list[str]:
    own = f"pcc_{found.about['bin_um']:g}um"
    name = SPOILT[0]
    sharp, soft = (mean_of(found.scores[of][own]) for of in (MODEL, name))
    if np.isnan(sharp) or np.isnan(soft):
        return []
    at = f"{found.about['bin_um']:g} µm"
    said = f"At {at} the PCC is {sharp:.3f}, and {soft:.3f} for the map {name}"
    if soft >= sharp:
        return [f"{said}: detail finer than that costs more than it brings."]
    if sharp - soft < _DETAIL * abs(sharp):
        return [f"{said}: detail finer than that brings next to nothing."]
    return [f"{said}: detail finer than that is worth {sharp - soft:.3f}."]


def _level(found: Evaluation) -> list[str]:
    model = found.scores[MODEL]
    if "calibration" not in model:
        return [
            f"In units of {found.about['units']} nothing is said of levels: D², deviance, "
            "calibration, SSIM and pooled PCC need counts."
        ]
    ratio, d2 = model["calibration"], model["d2"]
    known = ratio[~np.isnan(ratio)]
    if not len(known):
        return []
    return [
        f"The median gene's total is {np.median(known):.2f} times the observed; the prediction "
        f"explains more deviance than the gene's {found.about['baseline']} in "
        f"{(np.nan_to_num(d2, nan=-1) > 0).sum()} of {len(d2)} genes."
    ]


def _by_protocol(found: Evaluation) -> list[str]:
    beaten = beaten_under(found.protocols)
    blind = [name for name, nulls in beaten.items() if set(nulls) - set(INFORMED)]
    informed = [name for name, nulls in beaten.items() if nulls and name not in blind]
    if not blind + informed:
        return [f"Under none of {len(beaten)} protocols does a null score as high."]
    said = []
    only = f"only a null that knows part of the answer ({' or '.join(INFORMED)})"
    for names, which in ((blind, "a null"), (informed, only)):
        if names:
            titles = "; ".join(PROTOCOLS[name].title for name in names)
            said.append(
                f"Under {len(names)} of {len(beaten)} protocols {which} scores as high or higher "
                f"({titles})."
            )
    return said


def beaten_under(protocols: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """Protocol -> nulls that score as high as the model or higher, best first.

    The oracle and the model's own maps, spoilt, are no nulls here.
    """
    beaten = {}
    for name, value in protocols[MODEL].items():
        found = {of: own[name] for of, own in protocols.items() if _is_null(of)}
        above = [of for of, own in found.items() if own >= value or np.isnan(value) > np.isnan(own)]
        beaten[name] = sorted(above, key=lambda of: -found[of])
    return beaten


def blind_nulls(names: Iterable[str]) -> list[str]:
    """Names of the nulls that see nothing of the counts."""
    return [name for name in names if _is_null(name) and name not in INFORMED]


def _is_null(name: str) -> bool:
    """Whether maps of this name are nulls that know nothing of the model's place and detail."""
    return name not in (MODEL, ORACLE, *SPOILT)


def listed(genes: list[str]) -> str:
    """Some names, and how many more."""
    more = len(genes) - _NAMED
    return ", ".join(genes[:_NAMED]) + (f" and {more} more" if more > 0 else "")
