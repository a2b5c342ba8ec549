"""Plots that answer to a reader: a name on every point, a click that opens the gene, choices.

Drawn by plotly in the page itself. One that shows what a static figure of its page does takes the
place of its picture on the screen; the picture is printed, and seen where scripts are off.

Choices are lists above the plot, not plotly's own menus (``updatemenus``): those are drawn as SVG,
without a role or a name, and no key reaches them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sparsity_trap.settings import MARKS
from sparsity_trap.show.page import render
from sparsity_trap.show.style import CATEGORY_COLOURS, POISSON_COLOUR, term_name

if TYPE_CHECKING:
    from IPython.display import HTML
    from plotly.graph_objects import Figure

#: Choices below a heading: name -> what it sets, by path, in each trace, and in the layout.
Choices = Mapping[str, Mapping[str, tuple[dict[str, list], dict[str, Any]]]]

_GREY_LINE = {"color": "#888888", "width": 1}


def gene_scatter(
    genes: pd.DataFrame,
    across: Mapping[str, pd.Series],
    up: Mapping[str, pd.Series],
    source: str,
    diagonal: bool = False,
    ends: Mapping[str, tuple[pd.Series, pd.Series]] | None = None,
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
    ends
        Title of an upright axis -> lower and upper end of a line through each point.

    Returns
    -------
    figure, choices
        For `show`.
    """
    axes = {"x": across, "y": up}
    figure = _figure(source)
    members = _by_category(figure, genes["category"], mode="markers", marker_size=9)
    figure.update_traces(
        marker_line={"color": "white", "width": 0.7},
        hovertemplate="<b>%{customdata[0]}</b><br>%{xaxis.title.text}: %{x:.4g}<br>"
        "%{yaxis.title.text}: %{y:.4g}<extra></extra>",
    )
    for trace, own in zip(figure.data, members, strict=True):
        trace.customdata = genes.loc[own, ["gene"]].to_numpy().tolist()
    if diagonal:
        # Where both axes have values, so that the line widens neither.
        every = [np.concatenate(list(values.values())) for values in axes.values()]
        low, high = max(map(np.nanmin, every)), min(map(np.nanmax, every))
        figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line=_GREY_LINE)
    else:
        figure.add_hline(y=0, line=_GREY_LINE)
    choices = {
        heading: {
            title: ({axis: [_plain(v[own]) for own in members]}, {f"{axis}axis.title.text": title})
            for title, v in axes[axis].items()
        }
        for heading, axis in (("Horizontal", "x"), ("Vertical", "y"))
    }
    if ends:
        figure.update_traces(error_y={"type": "data", "width": 0, "thickness": 0.8})
    for title, (low, high) in (ends or {}).items():
        traces, _ = choices["Vertical"][title]
        traces["error_y.arrayminus"] = [_plain((up[title] - low)[own]) for own in members]
        traces["error_y.array"] = [_plain((high - up[title])[own]) for own in members]
    return figure, _offered(figure, choices)


def effects_browser(effects: Mapping[str, pd.DataFrame], source: str) -> tuple[Figure, Choices]:
    """Main effects and two-way interactions of the factorial, for several scores.

    Parameters
    ----------
    effects
        Name of the score -> ``term``, ``order``, ``effect``, ``ci_low`` and ``ci_high``, terms in
        one order; the first is shown before a reader chooses.
    source
        Kind of data, for the mark.

    Returns
    -------
    figure, choices
        For `show`.
    """
    shown = {name: table[table["order"] <= 2].iloc[::-1] for name, table in effects.items()}
    table = next(iter(shown.values()))
    figure = _figure(source, height=130 + 24 * len(table))
    figure.add_scatter(
        y=[term_name(term) for term in table["term"]],
        mode="markers",
        showlegend=False,
        marker={"color": np.where(table["order"] == 1, POISSON_COLOUR, "#8A8A8A"), "size": 9},
        error_x={"type": "data", "color": "#8A8A8A", "width": 0},
        hovertemplate="<b>%{y}</b><br>%{x:+.4f} (%{customdata[0]:+.4f} to %{customdata[1]:+.4f})"
        "<extra></extra>",
    )
    figure.add_vline(x=0, line=_GREY_LINE)
    figure.update_xaxes(nticks=5)
    figure.update_yaxes(automargin=True)

    def points(table: pd.DataFrame) -> dict[str, list]:
        return {
            "x": [_plain(table["effect"])],
            "error_x.array": [_plain(table["ci_high"] - table["effect"])],
            "error_x.arrayminus": [_plain(table["effect"] - table["ci_low"])],
            "customdata": [table[["ci_low", "ci_high"]].to_numpy().tolist()],
        }

    scores = {
        name: (points(table), {"xaxis.title.text": f"effect on {name}"})
        for name, table in shown.items()
    }
    return figure, _offered(figure, {"Score": scores})


def dial_browser(
    dials: Mapping[str, pd.DataFrame], categories: pd.Series, source: str
) -> tuple[Figure, Choices]:
    """Gain of every gene along the dials, a line for each.

    Parameters
    ----------
    dials
        Name of the dial -> ``gene``, the setting, ``delta`` and ``mean_count`` (`dial.gains`); the
        first is shown before a reader chooses.
    categories
        Category of each gene, by gene.
    source
        Kind of data, for the mark.

    Returns
    -------
    figure, choices
        For `show`.
    """
    figure = _figure(source)
    figure.update_xaxes(type="log", title="mean count of the gene per bin that the loss sees")
    figure.update_yaxes(title="gain in PCC, Poisson − MSE")
    members = _by_category(figure, categories, mode="lines+markers", marker_size=6)
    figure.update_traces(
        line_width=1,
        opacity=0.7,
        hovertemplate="<b>%{customdata[0]}</b>, %{customdata[1]:g}<br>mean count %{x:.3g}<br>"
        "gain %{y:+.3f}<extra></extra>",
    )
    figure.add_hline(y=0, line=_GREY_LINE)

    def lines(gains: pd.DataFrame) -> dict[str, list]:
        """Points of all genes of each category, a gap after each gene."""
        found: dict[str, list] = {"x": [], "y": [], "customdata": []}
        for own in members:
            x, y, custom = [], [], []
            chosen = gains[gains["gene"].isin(categories.index[own])]
            for gene, part in chosen.groupby("gene", sort=False):
                x += [*_plain(part["mean_count"]), None]
                y += [*_plain(part["delta"]), None]
                custom += [[gene, value] for value in part.iloc[:, 1]] + [[gene, None]]
            for key, values in zip(found, (x, y, custom), strict=True):
                found[key].append(values)
        return found

    return figure, _offered(figure, {"Dial": {n: (lines(d), {}) for n, d in dials.items()}})


def show(
    figure: Figure,
    name: str,
    gene_page: str = "",
    choices: Choices | None = None,
    in_place_of: str = "",
) -> HTML:
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
    in_place_of
        Name of the figure of the page whose picture this one replaces, such as ``fig-sparsity``.
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
        "figure_id": in_place_of,
        "choices": {heading: list(entries.items()) for heading, entries in (choices or {}).items()},
    }
    # In the book, one file of all pages; a script fetches it when a plot is about to be seen.
    library = "" if "SPARSITY_TRAP_BOOK" in os.environ else get_plotlyjs()
    height = figure.layout.height
    return HTML(render("plot.html", plot=plot, height=height, library=library))


# --- details --------------------------------------------------------------------------------------


def _figure(source: str, height: int = 430) -> Figure:
    """An empty plot, marked where its data are not measured."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 30, "t": 30, "b": 60},
        legend={"orientation": "h", "y": -0.2},
    )
    if source in MARKS:
        # At the left edge, where the buttons of a narrow plot do not cover it.
        font = {"size": 10, "color": "#D64545"}  # on a light ground and on a dark one
        figure.update_layout(title={"text": MARKS[source], "font": font, "x": 0, "y": 0.99})
    return figure


def _by_category(figure: Figure, categories: pd.Series, **style: Any) -> list[np.ndarray]:
    """Add a trace per category that occurs; return which genes are in each, bool [G]."""
    present = [c for c in CATEGORY_COLOURS if (categories == c).any()]
    for category in present:
        figure.add_scatter(name=category, marker_color=CATEGORY_COLOURS[category], **style)
    return [(categories == category).to_numpy() for category in present]


def _offered(figure: Figure, choices: Choices) -> Choices:
    """Show the first of each choice, and return those that have a second."""
    for entries in choices.values():
        traces, layout = next(iter(entries.values()))
        for path, values in traces.items():
            for trace, value in zip(figure.data, values, strict=True):
                trace[path] = value
        for path, value in layout.items():
            figure.layout[path] = value
    return {heading: entries for heading, entries in choices.items() if len(entries) > 1}


def _plain(values: pd.Series) -> list[float | None]:
    """Numbers as JSON holds them."""
    return [None if np.isnan(value) else round(float(value), 6) for value in values]
