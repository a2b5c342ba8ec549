"""Plots that answer to a reader: a name on every point, a click that opens the gene, choices.

Drawn by plotly in the page itself. Each repeats a static figure of its page, which stands in for it
where scripts are off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sparsity_trap.analysis.factorial import DialCurve
from sparsity_trap.show.style import CATEGORY_COLOURS, MARKS, term_name

if TYPE_CHECKING:
    from IPython.display import HTML
    from plotly.graph_objects import Figure

#: Choices below a heading: name -> what it sets in the traces, and in the layout.
Choices = Mapping[str, Mapping[str, tuple[dict[str, Any], dict[str, Any]]]]


def gene_scatter(
    genes: pd.DataFrame,
    across: Mapping[str, pd.Series],
    up: Mapping[str, pd.Series],
    source: str,
    diagonal: bool = False,
) -> tuple[Figure, Choices]:
    """One point per gene, with choices of what the axes are where there are several.

    Parameters
    ----------
    genes
        ``gene`` and ``category``.
    across, up
        Title of the axis -> a value for each row of ``genes``; the first is shown before a reader
        chooses.
    source
        Kind of data, for the mark.
    diagonal
        Draw the line on which both are equal, in place of that where the vertical one is 0.

    Returns
    -------
    figure, choices
        For `show`.
    """
    axes = {"x": across, "y": up}
    first = {axis: next(iter(values)) for axis, values in axes.items()}
    present = [c for c in CATEGORY_COLOURS if (genes["category"] == c).any()]

    def parts(values: pd.Series) -> list[list]:
        return [_plain(values[(genes["category"] == c).to_numpy()]) for c in present]

    figure = _figure(source, first["x"], first["y"])
    for category, x, y in zip(
        present, parts(across[first["x"]]), parts(up[first["y"]]), strict=True
    ):
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            name=category,
            marker={
                "color": CATEGORY_COLOURS[category],
                "size": 9,
                "line": {"color": "white", "width": 0.7},
            },
            customdata=genes.loc[genes["category"] == category, ["gene"]].to_numpy().tolist(),
            hovertemplate="<b>%{customdata[0]}</b><br>%{xaxis.title.text}: %{x:.4g}<br>"
            "%{yaxis.title.text}: %{y:.4g}<extra></extra>",
        )
    line = {"color": "#888888", "width": 1}
    if diagonal:
        # Where both axes have values, so that the line widens neither.
        every = [np.concatenate(list(values.values())) for values in axes.values()]
        low, high = max(map(np.nanmin, every)), min(map(np.nanmax, every))
        figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=line)
    else:
        figure.add_hline(y=0, line=line)
    headings = {"x": "Horizontal", "y": "Vertical"}
    return figure, {
        headings[axis]: {
            title: ({axis: parts(value)}, {f"{axis}axis.title.text": title})
            for title, value in values.items()
        }
        for axis, values in axes.items()
        if len(values) > 1
    }


def effects_browser(effects: Mapping[str, pd.DataFrame], source: str) -> tuple[Figure, Choices]:
    """Effects of the factorial, as `control_figures.effects_forest` draws them, for several scores.

    Parameters
    ----------
    effects
        Name of the score -> ``term``, ``order``, ``effect``, ``ci_low``, ``ci_high`` and
        ``p_value``, terms in one order; the first is shown before a reader chooses.
    source
        Kind of data, for the mark.

    Returns
    -------
    figure, choices
        For `show`.
    """
    shown = {name: table[table["order"] <= 2].iloc[::-1] for name, table in effects.items()}

    def points(table: pd.DataFrame) -> dict[str, Any]:
        return {
            "x": _plain(table["effect"]),
            "error_x.array": _plain(table["ci_high"] - table["effect"]),
            "error_x.arrayminus": _plain(table["effect"] - table["ci_low"]),
            "customdata": table[["ci_low", "ci_high", "p_value"]].to_numpy().tolist(),
        }

    name, table = next(iter(shown.items()))
    figure = _figure(source, f"effect on {name}", "")
    first = points(table)
    figure.add_scatter(
        x=first["x"],
        y=[term_name(term) for term in table["term"]],
        mode="markers",
        showlegend=False,
        marker={"color": np.where(table["order"] == 1, "#1F6F8B", "#8A8A8A").tolist(), "size": 9},
        error_x={
            "type": "data",
            "array": first["error_x.array"],
            "arrayminus": first["error_x.arrayminus"],
            "color": "#8A8A8A",
            "width": 0,
        },
        customdata=first["customdata"],
        hovertemplate="<b>%{y}</b><br>%{x:+.4f} (%{customdata[0]:+.4f} to %{customdata[1]:+.4f})<br>"
        "p = %{customdata[2]:.2g}<extra></extra>",
    )
    figure.add_vline(x=0, line={"color": "#888888", "width": 1})
    figure.update_xaxes(nticks=5)
    figure.update_yaxes(automargin=True)
    figure.update_layout(height=130 + 24 * len(table))
    return figure, {
        "Score": {
            name: (
                {key: [value] for key, value in points(table).items()},
                {"xaxis.title.text": f"effect on {name}"},
            )
            for name, table in shown.items()
        }
    }


def dial_browser(
    dials: Mapping[str, DialCurve], categories: pd.Series, source: str
) -> tuple[Figure, Choices]:
    """Gain of every gene along the dials, a line for each.

    Parameters
    ----------
    dials
        Name of the dial -> its curve; the first is shown before a reader chooses.
    categories
        Category of each gene, by gene.
    source
        Kind of data, for the mark.

    Returns
    -------
    figure, choices
        For `show`.
    """

    def lines(dial: DialCurve, category: str) -> dict[str, list]:
        """Points of all genes of a category, a gap after each gene."""
        x, y, custom = [], [], []
        own = dial.gains[dial.gains["gene"].map(categories) == category]
        for gene, part in own.groupby("gene", sort=False):
            x += [*_plain(part["mean_count"]), None]
            y += [*_plain(part["delta"]), None]
            custom += [[gene, value] for value in part[dial.curve.columns[0]]] + [[gene, None]]
        return {"x": x, "y": y, "customdata": custom}

    first = next(iter(dials.values()))
    figure = _figure(
        source, "mean count of the gene per bin that the loss sees", "gain in PCC, Poisson − MSE"
    )
    figure.update_xaxes(type="log")
    present = [c for c in CATEGORY_COLOURS if (categories == c).any()]
    for category in present:
        own = lines(first, category)
        figure.add_scatter(
            x=own["x"],
            y=own["y"],
            customdata=own["customdata"],
            mode="lines+markers",
            name=category,
            line={"color": CATEGORY_COLOURS[category], "width": 1},
            marker={"size": 6},
            opacity=0.7,
            hovertemplate="<b>%{customdata[0]}</b>, %{customdata[1]:g}<br>mean count %{x:.3g}<br>"
            "gain %{y:+.3f}<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": "#888888", "width": 1})
    return figure, {
        "Dial": {
            name: (
                {
                    key: [lines(dial, category)[key] for category in present]
                    for key in ("x", "y", "customdata")
                },
                {},
            )
            for name, dial in dials.items()
        }
    }


def show(figure: Figure, name: str, gene_page: str = "", choices: Choices | None = None) -> HTML:
    """Display a plotly figure: in the book from one shared script, elsewhere self-contained.

    Parameters
    ----------
    figure
        The plotly figure.
    name
        Tells the figures of a page apart.
    gene_page
        Page with the gene browser, such as ``05b_browser.html``; a click on a point, whose custom
        data begin with the gene, opens the gene there.
    choices
        Lists above the plot, of which a reader chooses one entry each; the first is what the
        figure shows.
    """
    from IPython.display import HTML
    from plotly.offline import get_plotlyjs

    plot = {
        "id": f"plot-{name}",
        "figure": json.loads(figure.to_json()),
        "config": {
            "displaylogo": False,
            "responsive": True,
            # The first would send the plot to another host.
            "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d"],
        },
        "gene_page": gene_page,
        "choices": {heading: list(entries.items()) for heading, entries in (choices or {}).items()},
    }
    if "SPARSITY_TRAP_BOOK" in os.environ:
        # The book's extension makes this file; it draws what is queued.
        library = '<script defer src="../../_assets/plotly.js"></script>'
    else:
        draw = asset("plots.js")
        library = f"<script>{get_plotlyjs()}</script><script>{draw}drawSparsityPlots();</script>"
    content = json.dumps(plot).replace("</", "<\\/")
    height = figure.layout.height or 450
    return HTML(
        f"<style>{asset('plots.css')}</style>"
        f'<div id="plot-{name}" class="interactive-plot" style="min-height: {height}px">'
        "<noscript>This plot needs scripts; a picture on this page shows the same data.</noscript>"
        f"</div><script>(window.sparsityPlots = window.sparsityPlots || []).push({content});"
        f"</script>{library}"
    )


def asset(name: str) -> str:
    """Text of a script or style sheet of the module."""
    return files("sparsity_trap.show").joinpath("assets", name).read_text(encoding="utf8")


# --- details --------------------------------------------------------------------------------------


def _figure(source: str, across: str, up: str) -> Figure:
    """An empty plot with its axes named, and marked where its data are not measured."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=430,
        margin={"l": 60, "r": 30, "t": 30, "b": 60},
        xaxis_title=across,
        yaxis_title=up,
        legend={"orientation": "h", "y": -0.2},
    )
    if source in MARKS:
        # At the left edge, where the buttons of a narrow plot do not cover it.
        font = {"size": 10, "color": "#D64545"}  # on a light ground and on a dark one
        figure.update_layout(title={"text": MARKS[source], "font": font, "x": 0, "y": 0.99})
    return figure


def _plain(values: pd.Series) -> list[float | None]:
    """Numbers as JSON holds them."""
    return [None if np.isnan(value) else round(float(value), 6) for value in values]
