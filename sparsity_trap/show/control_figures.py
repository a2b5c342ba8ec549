"""Exhibits of the controls, the factorial, the dial and the mechanism."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sparsity_trap.analysis.factorial import DialCurve
from sparsity_trap.analysis.mechanism import bin_weight
from sparsity_trap.show.style import (
    CATEGORY_COLOURS,
    MSE_COLOUR,
    POISSON_COLOUR,
    Exhibit,
    category_legend,
    mark,
    term_name,
)

_NULL = dict(color="#9A9A9A", lw=0.8, zorder=0)
_LOSS_COLOURS = {"mse": MSE_COLOUR, "poisson": POISSON_COLOUR}
_LOSS_NAMES = {"mse": "MSE", "poisson": "Poisson"}


def effects_forest(effects: pd.DataFrame, source: str) -> Figure:
    """Main effects and two-way interactions with their 95 % intervals.

    Parameters
    ----------
    effects
        ``term``, ``order``, ``effect``, ``ci_low``, ``ci_high`` (`effects.factorial_effects`).
    source
        Kind of data, for the mark.
    """
    shown = effects[effects["order"] <= 2].iloc[::-1].reset_index(drop=True)
    figure = Exhibit(figsize=(6.4, 0.9 + 0.24 * len(shown)))
    axis = figure.subplots()
    main = shown["order"] == 1
    for rows, colour in ((shown[main], "#222222"), (shown[~main], "#8A8A8A")):
        spread = np.abs(rows[["ci_low", "ci_high"]].sub(rows["effect"], axis=0)).T.to_numpy()
        axis.errorbar(
            rows["effect"], rows.index, xerr=spread, fmt="o", ms=4, lw=1.2, color=colour, capsize=0
        )
    axis.axvline(0, **_NULL)
    axis.set_yticks(shown.index, [term_name(term) for term in shown["term"]])
    axis.set_ylim(-0.7, len(shown) - 0.3)
    axis.set_xlabel("effect on PCC at 8 µm (95 % interval over genes)")
    return mark(figure, source, effects)


def gap_shares(shares: pd.DataFrame, source: str) -> Figure:
    """Contribution of each factor to the gap between two arms, one after the other."""
    parts = shares[shares["factor"] != "gap"]
    gap = shares.loc[shares["factor"] == "gap"].iloc[0]
    figure = Exhibit(figsize=(5.2, 2.4))
    axis = figure.subplots()
    start = 0.0
    names = [*parts["factor"], "E − D"]
    for row, part in enumerate([*parts.itertuples(), None]):
        width = gap["contribution"] if part is None else part.contribution
        left = 0.0 if part is None else start
        axis.barh(row, width, left=left, height=0.6, color="#555555" if part is None else "#9CC3CF")
        low = gap["contribution_low"] if part is None else part.contribution_low
        high = gap["contribution_high"] if part is None else part.contribution_high
        axis.plot([left + low, left + high], [row, row], color="#222222", lw=1.2)
        start += 0 if part is None else width
    axis.axvline(0, **_NULL)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("PCC at 8 µm, from arm D to arm E")
    return mark(figure, source, shares)


def dial_curves(dials: Mapping[str, DialCurve], source: str) -> Figure:
    """Gain of Poisson over MSE against the mean count, one panel per dial.

    Parameters
    ----------
    dials
        Title of the panel -> curve. The mean count is that of the training bins that the loss sees.
    source
        Kind of data, for the mark.
    """
    figure = Exhibit(figsize=(3.6 * len(dials), 2.9))
    axes = figure.subplots(1, len(dials), sharey=True, squeeze=False)[0]
    for axis, (title, dial) in zip(axes, dials.items(), strict=True):
        curve = dial.curve
        axis.fill_between(
            curve["mean_count"], curve["ci_low"], curve["ci_high"], color=POISSON_COLOUR, alpha=0.18
        )
        axis.plot(curve["mean_count"], curve["delta"], "o-", ms=4, color=POISSON_COLOUR)
        for row in curve.itertuples():
            axis.annotate(
                _setting(curve.columns[0], row[1]), (row.mean_count, row.delta), (0, 6),
                textcoords="offset points", ha="center", fontsize=7,
            )  # fmt: skip
        axis.axhline(0, **_NULL)
        axis.set_xscale("log")
        axis.margins(x=0.12)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title)
        axis.set_xlabel("mean count of a gene per bin")
    axes[0].set_ylabel("gain in PCC, Poisson − MSE")
    data = pd.concat(dial.curve.assign(dial=title) for title, dial in dials.items())
    return mark(figure, source, data)


def bin_weights() -> Figure:
    """Weight of a bin's residual in the gradient, against its predicted rate: theory, no data."""
    figure = Exhibit(figsize=(6.6, 2.7))
    rate = np.geomspace(1e-3, 10, 200)
    figure.data = pd.DataFrame({"rate": rate})
    for axis, link in zip(figure.subplots(1, 2, sharey=True), ("exp", "softplus"), strict=True):
        for loss in ("mse", "poisson"):
            weight = bin_weight(rate, loss, link)
            axis.loglog(rate, weight, color=_LOSS_COLOURS[loss], label=_LOSS_NAMES[loss])
            figure.data[f"{loss}, {link}"] = weight
        axis.set_title(f"link {link}")
        axis.set_xlabel("predicted rate λ, counts per bin")
    figure.axes[0].set_ylabel("weight of λ − y in ∂loss/∂η")
    figure.axes[0].legend(loc="lower right")
    return figure


def gradient_shares(shares: pd.DataFrame, source: str) -> Figure:
    """Share of each gene in the gradient of the shared decoder, against its mean count.

    Titles give the slope of a least-squares line through the logarithms.

    Parameters
    ----------
    shares
        ``gene``, ``category``, ``mean_count``, ``panel`` (title) and ``share``.
    source
        Kind of data, for the mark.
    """
    titles = list(dict.fromkeys(shares["panel"]))  # start and end of each arm in turn
    columns = len(titles) // 2
    figure = Exhibit(figsize=(2.7 * columns, 4.8))
    axes = figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False)
    for axis, title in zip(axes.T.flat, titles, strict=True):
        part = shares[shares["panel"] == title]
        colours = [CATEGORY_COLOURS[c] for c in part["category"]]
        axis.scatter(part["mean_count"], part["share"], s=14, c=colours)
        axis.axhline(1 / len(part), **_NULL)
        axis.set_xscale("log")
        axis.set_yscale("log")
        used = part[(part["share"] > 0) & (part["mean_count"] > 0)]
        power = np.polyfit(np.log(used["mean_count"]), np.log(used["share"]), 1)[0]
        axis.set_title(f"{title}: power {power:.1f}".replace(" -", " −"))
    for axis in axes[1]:
        axis.set_xlabel("mean count per 2 µm bin")
    for axis in axes[:, 0]:
        axis.set_ylabel("share of the squared gradient")
    return mark(figure, source, shares)


def control_dots(table: pd.DataFrame, metrics: Mapping[str, str], source: str) -> Figure:
    """Every control's score, one panel per metric.

    Parameters
    ----------
    table
        Index: control, the models among them. Columns: metrics.
    metrics
        Column -> title of its panel.
    source
        Kind of data, for the mark.
    """
    figure = Exhibit(figsize=(2.0 + 1.55 * len(metrics), 0.9 + 0.23 * len(table)))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    rows = np.arange(len(table))[::-1]
    models = table.index.str.startswith("model")
    for axis, (column, title) in zip(axes, metrics.items(), strict=True):
        colours = np.where(models, POISSON_COLOUR, "#8A8A8A")
        axis.hlines(rows, 0, table[column], color=colours, lw=1)
        axis.scatter(table[column], rows, s=20, c=colours, zorder=3)
        for row, value in zip(rows, table[column], strict=True):
            if not np.isfinite(value):
                axis.text(0, row, " undefined", va="center", fontsize=6.5, color="#777777")
        axis.axvline(0, **_NULL)
        axis.set_title(title)
    axes[0].set_yticks(rows, table.index)
    return mark(figure, source, table[list(metrics)].rename_axis("map").reset_index())


def score_against_ceiling(
    genes: pd.DataFrame, scores: Mapping[str, str], ceiling: str, source: str
) -> Figure:
    """Per-gene PCC of the arms against the best attainable one.

    Parameters
    ----------
    genes
        One row per gene with ``category``, the columns in ``scores`` and ``ceiling``.
    scores
        Column -> title.
    ceiling
        Column of the ceiling.
    source
        Kind of data, for the mark.
    """
    figure = Exhibit(figsize=(2.9 * len(scores), 3.0))
    axes = figure.subplots(1, len(scores), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (column, title) in zip(axes, scores.items(), strict=True):
        axis.plot([0, 1], [0, 1], **_NULL)
        colours = [CATEGORY_COLOURS[c] for c in genes["category"]]
        axis.scatter(genes[ceiling], genes[column], s=14, c=colours)
        axis.set_title(title)
        axis.set_xlabel("ceiling of the PCC")
        axis.set_xlim(0, 1)
    axes[0].set_ylabel("PCC")
    category_legend(axes[-1], genes["category"])
    return mark(figure, source, genes[["gene", "category", *scores, ceiling]])


def _setting(name: str, value: float) -> str:
    if name == "keep":
        return "all" if value == 1 else f"1/{round(1 / value)}"
    return f"{value:g} µm"
