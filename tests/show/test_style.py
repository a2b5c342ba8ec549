"""Exhibits: how they are stored, and what they leave alone."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from sparsity_trap.settings import ROOT
from sparsity_trap.show import style

IMPORT = """
import matplotlib
before = dict(matplotlib.rcParams)
from sparsity_trap.show import interactive, maps, style, tables
style.subplots(figsize=(2, 2))[1].legend()
assert dict(matplotlib.rcParams) == before
"""


def test_style_stays_with_the_exhibits():
    subprocess.run([sys.executable, "-c", IMPORT], check=True)


def test_what_is_made_later_has_the_style():
    # As at the start of a program, whatever cells of notebooks asked for in this one.
    matplotlib.rcdefaults()
    with style.used():
        figure, axis = style.subplots(figsize=(2, 2))
        axis.plot([0, 1], label="a")
        axis.set_xticks([0, 1], ["a", "b"])
        texts = [axis.text(0, 0, "a"), axis.annotate("a", (0, 0)), *axis.get_xticklabels()]
        assert {text.get_fontsize() for text in texts} == {8.5}
        assert axis.set_title("a").get_fontsize() == 9
        assert not axis.legend().get_frame_on()
        assert figure.colorbar(axis.scatter([0], [0], c=[0])).ax.yaxis.label.get_fontsize() == 8.5
    assert matplotlib.rcParams["legend.frameon"]


def test_axes_are_those_of_matplotlib():
    _, axes = style.subplots(1, 2, figsize=(2, 2), sharey=True)
    axes[0].set_box_aspect(1)
    assert {type(axis) for axis in axes} == {matplotlib.axes.Axes}


@pytest.mark.parametrize("script", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda p: p.stem)
def test_notebooks_that_draw_ask_for_the_style(script):
    lines = script.read_text().splitlines()
    drawn = [i for i, line in enumerate(lines) if re.search(r"\b(style|curves)\.\w+\(", line)]
    assert not drawn or lines[drawn[0]] == "style.use()"


#: What a reader may have in a matplotlibrc.
READERS = {
    "text.usetex": True, "image.origin": "lower", "figure.facecolor": "black", "axes.grid": True,
    "lines.linewidth": 9, "axes.formatter.use_locale": True, "hist.bins": 3, "savefig.dpi": 40,
    "figure.autolayout": True, "patch.force_edgecolor": True, "font.size": 20,
}  # fmt: skip


def test_settings_of_the_reader_do_not_show():
    def drawn() -> bytes:
        style.use()
        figure, (left, right) = style.subplots(1, 2, figsize=(3, 1.5))
        figure.colorbar(left.imshow(np.arange(12).reshape(3, 4)), ax=left, label="UMI (%)")
        right.hist([1, 2, 4])
        right.plot([0.5, 1.5], "o-", label="gain")
        right.boxplot([1, 2, 3])
        right.legend(title="arm")
        figure.suptitle("of all runs")
        buffer = io.BytesIO()
        style.mark(figure, "simulated").savefig(buffer, format="png")
        return buffer.getvalue()

    with matplotlib.rc_context():
        plain = drawn()
    with matplotlib.rc_context(READERS):
        assert drawn() == plain


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("simulated", ["SIMULATED DATA"]),
        ("printed", ["PRINTED NUMBERS, REAL TISSUE"]),
        ("spaceranger", []),
        ("build", []),
    ],
)
def test_a_figure_says_what_its_data_are(source, said):
    figure = style.mark(style.subplots(figsize=(2, 2))[0], source)
    assert [text.get_text() for text in figure.texts] == said


@pytest.mark.parametrize(("width", "least"), [(5, 7), (9.4, 9.4)])
def test_no_letter_prints_below_7_points(width, least):
    figure, (axis, other) = style.subplots(1, 2, figsize=(width, 2))
    axis.plot([0, 1], label="a")
    axis.legend(fontsize=5, title="b", title_fontsize=5)
    axis.text(0, 0, "c", fontsize=6)
    axis.set_xticks([0, 1], ["d", "e"], fontsize=4)
    figure.colorbar(axis.scatter([0], [0], c=[0]))
    style.letter(axis, other)
    style.mark(figure, "simulated")
    figure.draw_without_rendering()
    sizes = {text.get_text(): text.get_fontsize() for text in figure.findobj(Text)}
    assert {"a", "b", "c", "d", "e", "SIMULATED DATA"} <= set(sizes)
    assert min(sizes.values()) == pytest.approx(least)
    assert [axis.get_title("left") for axis in (axis, other)] == ["a", "b"]


def test_n_is_written_below_the_axes():
    figure, _ = style.subplots(figsize=(4, 2))
    style.mark(figure, "spaceranger", genes=50, runs=[5, 3, 3], seeds=[1, 1])
    figure.draw_without_rendering()
    (text,) = figure.texts
    assert text.get_text() == "n = 50 genes, 3 to 5 runs, 1 seed"
    letters, axes = text.get_window_extent(), figure.axes[0].get_tightbbox()
    assert letters.y0 >= 0 and letters.y1 <= axes.y0


@pytest.mark.parametrize("tissue", [True, False])
def test_figures_of_tissue_are_jpegs_and_others_pngs_with_a_white_ground(tissue):
    figure = style.Exhibit(figsize=(3, 2))
    axis = figure.subplots()
    axis.imshow(np.linspace(0, 1, 900).reshape(30, 30), cmap="cividis")
    for x, colour in enumerate(style.CATEGORY_COLOURS.values()):
        axis.plot(x, x, "o", ms=3, color=colour)
    figure.tissue = tissue
    png, jpeg = figure._repr_png_(), figure._repr_jpeg_()
    assert (png is None, jpeg is None) == (tissue, not tissue)
    with Image.open(io.BytesIO(png or jpeg)) as image:
        assert image.format == ("JPEG" if tissue else "PNG")
        assert image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
        # Of the size and the colours that matplotlib draws.
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        with Image.open(drawn) as whole:
            assert image.size == whole.size
            far = np.abs(np.subtract(image.convert("RGB"), whole.convert("RGB"), dtype=float))
        assert far.mean() < 2 and (far.max() < 10 or tissue)
