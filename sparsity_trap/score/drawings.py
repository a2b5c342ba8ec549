"""The drawings of a report card: maps of three genes, and levels."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sparsity_trap.evaluation.result import MODEL, Evaluation
from sparsity_trap.show import maps, style
from sparsity_trap.show.style import Exhibit

_PATCH_UM = 256


class Picture(NamedTuple):
    """A drawing in the page itself."""

    uri: str
    alt: str
    caption: str


def map_rows(
    found: Evaluation,
    picture: Callable[[int], np.ndarray] | None,
    upright: Callable[[np.ndarray], np.ndarray],
    mark: str,
) -> Picture | None:
    """Best, median and worst gene, each in the kept patch with most of its counts."""
    score = found.scores[MODEL][found.main]
    order = [g for g in np.argsort(-score) if not np.isnan(score[g])]
    if not order or not found.examples:
        return None
    chosen = list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]]))
    columns = 3 if picture else 2
    figure, axes = style.subplots(
        len(chosen), columns, figsize=(2.6 * columns, 2.4 * len(chosen)), tissue=True, squeeze=False
    )
    for row, g in zip(axes, chosen, strict=True):
        example = max(found.examples, key=lambda own: own.counts[g].sum())
        counts, rate, mask = (
            upright(x) for x in (example.counts[g], example.rate[g], example.mask)
        )
        if found.about["units"] not in ("counts", "log1p counts"):
            rate = _on_scale(rate, counts, mask)
        if picture:
            image = picture(example.number)
            pixel = _PATCH_UM / image.shape[0]
            maps.panel_row(row, image, [counts, rate], mask, found.genes[g], pixel, 50)
        else:
            maps.map_row(row, [counts, rate], mask, found.genes[g])
        row[-1].set_xlabel(f"PCC {score[g]:.3f}", fontsize=8)
    titles = (["H&E"] if picture else []) + ["counts", "prediction"]
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    names = ", ".join(found.genes[g] for g in chosen)
    caption = (
        f"Best, median and worst gene by PCC ({names}), each in that of "
        f"{len(found.examples)} patches, drawn at random, which holds most of its counts."
    )
    if found.about["units"] not in ("counts", "log1p counts"):
        caption += " Predictions are stretched to the range of the counts."
    if mark:
        style.stamp(figure, mark)
    return _drawn(figure, f"H&E, counts and prediction of {names}", caption)


def _on_scale(rate: np.ndarray, counts: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A map of another unit, stretched to the range of the counts."""
    if not mask.any():
        return rate
    low, high = np.percentile(rate[mask], [0.5, 99.5])
    top = max(1.0, np.percentile(counts[mask], 99.5))
    return (rate - low) / (high - low if high > low else 1) * top


def curve(found: Evaluation, mark: str) -> Picture | None:
    """Mean count against mean rate of larger bins, by half octaves of the rate."""
    bins, rates, counts = found.curve
    enough = (bins >= 50) & (rates > 0)
    if not enough.any():
        return None
    x, y, n = rates[enough] / bins[enough], counts[enough] / bins[enough], bins[enough]
    figure, axis = style.subplots(figsize=(4.4, 3.4))
    seen = y > 0
    # Two standard errors of a mean of Poisson counts, at least.
    error = 2 * np.sqrt(y[seen] / n[seen])
    axis.errorbar(x[seen], y[seen], error.clip(max=0.99 * y[seen]), fmt="o", ms=3.5, lw=0.8,
                  color=style.POISSON_COLOUR)  # fmt: skip
    ends = [min(x.min(), y[seen].min(initial=np.inf)), max(x.max(), y.max())]
    axis.plot(ends, ends, color="#9A9A9A", lw=0.8, zorder=0)
    wide = f"{found.about['wide_um']:g} µm"
    axis.set(xscale="log", yscale="log", xlabel=f"predicted per {wide} bin",
             ylabel=f"counted per {wide} bin")  # fmt: skip
    if mark:
        style.stamp(figure, mark)
    return _drawn(
        figure,
        "Mean count against mean prediction, on logarithmic axes, with the diagonal",
        "Calibration: bins of all genes by their prediction, and what was counted in them. On the "
        "grey line levels are right. Bars: two Poisson standard errors.",
    )


def _drawn(figure: Exhibit, alt: str, caption: str) -> Picture:
    kind, data = ("jpeg", figure._repr_jpeg_()) if figure.tissue else ("png", figure._repr_png_())
    return Picture(
        f"data:image/{kind};base64,{base64.b64encode(data or b'').decode()}", alt, caption
    )
