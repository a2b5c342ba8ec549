"""What every exhibit shares: colours, the mark of simulated data, and a figure that shows itself.

Still pictures are matplotlib, interactive ones plotly. Categories and arms keep their colours
everywhere (Okabe-Ito palette, safe for colour-blind readers). Importing this module leaves
matplotlib's settings as they are; a notebook asks for the style with `use`.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import ArrayLike
from PIL import Image

from sparsity_trap.analysis.families import FAMILIES
from sparsity_trap.settings import MARKS

CATEGORY_COLOURS = {
    "mitochondrial": "#D55E00",
    "secretory": "#009E73",
    "epithelial": "#0072B2",
    "stromal": "#CC79A7",
    "immune": "#E69F00",
    "housekeeping": "#56B4E9",
    "other": "#7F7F7F",
}
MSE_COLOUR, POISSON_COLOUR = "#B5642B", "#1F6F8B"
ARM_COLOURS = {
    "A": "#E69F00",
    "B": "#56B4E9",
    "C": "#CC79A7",
    "D": MSE_COLOUR,
    "E": POISSON_COLOUR,
    "V7": "#009E73",
}
COUNTS_MAP = matplotlib.colormaps["magma"].with_extremes(bad="#EDEDED")
SCORE_MAP = matplotlib.colormaps["cividis"].with_extremes(bad="#EDEDED")

#: Gene names that fit below an axis.
_NAMES = 80
#: Letters have at least so many points in print, where a figure is as wide as the text, in inches:
#: A4 without the margins that ``book/_static/custom.css`` has.
LEAST_POINTS, PRINT_WIDTH = 7, 7.0

#: What exhibits look like, for `matplotlib.style`: its own settings, none of the reader's
#: matplotlibrc, and ours.
STYLE: list[Any] = [
    "default",
    {
        "figure.dpi": 110,
        "savefig.dpi": 160,
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "xtick.major.width": 0.8,
        "ytick.major.width": 0.8,
        "legend.frameon": False,
    },
]


def use() -> None:
    """Draw as exhibits do from here on, whatever a matplotlibrc says: once in each notebook."""
    matplotlib.style.use(STYLE)


def used() -> AbstractContextManager[None]:
    """The same within a ``with`` alone, where a figure is drawn in somebody else's program."""
    return matplotlib.style.context(STYLE)


class Exhibit(Figure):
    """A figure that notebooks show by itself, whatever the backend, and once.

    Attributes
    ----------
    data
        The numbers that are drawn, kept in the notebook beside the picture; None for maps.
    tissue
        Whether it shows tissue. It is then a JPEG, else a PNG of 256 colours: each the smaller one.
    """

    data: pd.DataFrame | None = None
    tissue: bool = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"layout": "constrained"} | options))

    def _repr_png_(self) -> bytes | None:
        if self.tissue:
            return None
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png")
        with Image.open(drawn) as image:
            # The method that keeps the colours of small things, such as letters.
            palette = image.convert("RGB").quantize(
                method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
            )
        palette.save(small, format="png", optimize=True)
        return small.getvalue()

    def _repr_jpeg_(self) -> bytes | None:
        if not self.tissue:
            return None
        buffer = io.BytesIO()
        # Colours at full resolution, or letters would blur.
        options = {"quality": 85, "subsampling": 0, "optimize": True}
        self.savefig(buffer, format="jpeg", pil_kwargs=options)
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_options: object) -> dict[str, str]:
        if self.data is None:
            return {}
        return {"text/csv": self.data.to_csv(index=False, float_format="%.6g")}


def subplots(
    rows: int = 1,
    columns: int = 1,
    *,
    figsize: tuple[float, float],
    tissue: bool = False,
    **options: Any,
) -> tuple[Exhibit, Any]:
    """An exhibit and its axes, as `matplotlib.pyplot.subplots` gives them.

    Parameters
    ----------
    rows, columns
        Number of axes.
    figsize
        Width and height in inches.
    tissue
        Whether it shows tissue (see `Exhibit`).
    options
        For `matplotlib.figure.Figure.subplots`: ``sharex``, ``width_ratios``, ``squeeze`` …
    """
    figure = Exhibit(figsize=figsize)
    figure.tissue = tissue
    return figure, figure.subplots(rows, columns, **options)


def mark(
    figure: Exhibit, source: str, data: pd.DataFrame | None = None, **number: ArrayLike
) -> Exhibit:
    """Write the kind of data and n into the figure; keep the numbers drawn; make letters legible.

    Parameters
    ----------
    figure
        A figure that is otherwise finished.
    source
        That of the sections, nothing being written where they were measured, or a family of
        `families.FAMILIES`.
    data
        The numbers drawn, for readers to take along; None for maps.
    number
        How many of what stand behind a point, such as ``genes=50, runs=[3, 5]``; where points
        differ, the least and the most are written.
    """
    figure.data = data
    if number:
        note = ", ".join(_counted(name, np.unique(np.asarray(n))) for name, n in number.items())
        stamp(figure, f"n = {note}", "#555555", left=True)
    others = {name: family.mark.upper() for name, family in FAMILIES.items() if family.mark}
    if note := (others | MARKS).get(source):
        stamp(figure, note, "#A32020" if source in MARKS else "#1B6B4A")
    _legible(figure)
    return figure


def _counted(name: str, numbers: np.ndarray) -> str:
    """A number, or the range of several, with the name of what is counted in the plural."""
    if list(numbers) == [1]:
        return f"1 {name.removesuffix('s')}"
    return f"{' to '.join(f'{n:.0f}' for n in dict.fromkeys(numbers[[0, -1]]))} {name}"


def stamp(figure: Exhibit, note: str, colour: str = "#A32020", left: bool = False) -> None:
    """Write a note into the lower right corner, or the left one, below what is drawn."""
    size = _least(figure)
    x, side, weight = (0.005, "left", "normal") if left else (0.995, "right", "bold")
    figure.text(
        x, 0.002, note, ha=side, va="bottom", fontsize=size, weight=weight, color=colour,
        in_layout=False,
    )  # fmt: skip
    below = 1.3 * size / 72 / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))


def not_trained(what: str) -> Exhibit:
    """In place of an exhibit whose arms the preset does not train."""
    figure = Exhibit(figsize=(6.4, 0.8))
    text = f"The preset of this build does not train {what}."
    figure.text(0.5, 0.5, text, ha="center", va="center", color="#777777", style="italic")
    return figure


def letter(*axes: Axes) -> None:
    """Name panels of different kinds a, b, c …, for captions and text to refer to."""
    for axis, name in zip(axes, "abcdefgh", strict=False):
        axis.set_title(name, loc="left", weight="bold")


def _least(figure: Exhibit) -> float:
    """Points that a letter of a figure needs to have `LEAST_POINTS` in print."""
    return LEAST_POINTS * max(1.0, figure.get_figwidth() / PRINT_WIDTH)


def _legible(figure: Exhibit) -> None:
    """Raise letters that a wide figure would print below `LEAST_POINTS`."""
    least = _least(figure)
    if least > STYLE[1]["font.size"]:
        for axis in figure.axes:
            axis.tick_params(labelsize=least)
    for text in figure.findobj(Text):
        text.set_fontsize(max(text.get_fontsize(), least))


def name_genes(axis: Axes, table: pd.DataFrame, **style: Any) -> list[tuple[Text, str]]:
    """Name the genes below the axis, of a large panel as many as can be read: label, category."""
    places = np.arange(0, len(table), -(-len(table) // _NAMES))
    shown = table.iloc[places]
    axis.set_xticks(places, shown["gene"], rotation=90, **style)
    return list(zip(axis.get_xticklabels(), shown["category"], strict=True))


def category_legend(axis: Axes, categories: pd.Series) -> None:
    """Legend of the gene categories that occur."""
    for name in dict.fromkeys(categories):
        axis.scatter([], [], s=14, color=CATEGORY_COLOURS[name], label=name)
    axis.legend(loc="upper left", fontsize=LEAST_POINTS, handletextpad=0.2)


def arm_style(name: str) -> tuple[str, str]:
    """Colour of the arm that a name begins with, and line of what sets it apart from that arm."""
    arm, _, variant = name.partition("-")
    line = {"": "-", "matched": "--", "linear": ":", "img2st": "-."}.get(variant, "-")
    # B is A with its predictions interpolated: their curves are one.
    return ARM_COLOURS.get(arm, "#7F7F7F"), "--" if name == "B" else line


def term_name(term: str) -> str:
    """A term of the factorial in words."""
    names = {
        "loss=mse-log1p": "MSE on log1p",
        "loss=poisson": "Poisson",
        "loss=nb": "NB",
        "link=exp": "exp",
        "bias=gene-mean": "gene means",
        "bias=-3.0": "bias −3",
    }
    return " × ".join(names.get(part, part) for part in term.split(" x "))
