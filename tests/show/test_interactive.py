"""Plots that answer to a reader, in a real browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sparsity_trap.show import interactive

GENES = ["PIGR", "COL1A1", "A<B/&"]


@pytest.fixture
def table() -> pd.DataFrame:
    values = {"gene": GENES, "category": ["secretory", "stromal", "other"]}
    return pd.DataFrame(values | {"sparsity": [0.927, 0.974, 0.5]})


@pytest.fixture
def plot_page(tmp_path, table, monkeypatch) -> Path:
    """The scatter as the book shows it, beside the script that the book's extension makes."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "book" / "_ext")
    monkeypatch.setenv("SPARSITY_TRAP_BOOK", "1")
    from sparsity_trap_book import put_plotly

    folder = tmp_path / "book" / "executed"
    folder.mkdir(parents=True)
    (tmp_path / "_assets").mkdir()
    put_plotly(tmp_path / "_assets")
    genes = table.assign(delta_pcc_8um=[0.4, 0.85, 0.1])
    sparsity, gain = ({name: genes[name]} for name in ("sparsity", "delta_pcc_8um"))
    plot, _ = interactive.gene_scatter(genes, sparsity, gain, "simulated")
    shown = interactive.show(plot, "sparsity", gene_page="genes.html").data
    shown = f"<div>{shown}</div>"  # which a cell puts around it
    head = '<!doctype html><meta charset="utf8"><title>t</title>'
    (folder / "page.html").write_text(head + shown)
    (folder / "genes.html").write_text(head)
    return folder / "page.html"


def test_plot_is_drawn_and_a_click_opens_the_gene(driven, plot_page):
    driven.open(plot_page.as_uri())
    driven.wait("document.querySelectorAll('.points path').length === 3")
    assert "SIMULATED DATA" in driven.value("document.querySelector('.infolayer').textContent")
    assert not driven.value("document.querySelector('[data-title*=Share]') !== null")
    x, y = driven.middle(".points path")
    driven.mouse("mouseMoved", (x - 2, y))
    driven.mouse("mouseMoved", (x, y))
    driven.wait("document.querySelector('.hoverlayer').textContent.includes('PIGR')")
    driven.mouse("mousePressed", (x, y), button="left", clickCount=1)
    driven.mouse("mouseReleased", (x, y), button="left", clickCount=1)
    driven.wait("location.href.endsWith('genes.html#gene=PIGR')")


#: Whether the picture of the figure is seen, and whether the plot is.
SEEN = (
    "['figure img', '.interactive-plot']"
    ".map((place) => document.querySelector(place).checkVisibility())"
)
FETCHED = "document.querySelector('script[src$=\"plotly.js\"]') !== null"


def test_plot_takes_the_place_of_a_picture_when_it_comes_near(driven, plot_page):
    picture = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
    figure = f'<figure id="fig-s"><img alt="a" src="{picture}"><figcaption>F</figcaption></figure>'
    page = plot_page.read_text().replace('"figure_id":""', '"figure_id":"fig-s"')
    plot_page.write_text(f'{page}<div id="space" style="height: 4000px"></div>{figure}')
    driven.open(plot_page.as_uri())
    driven.wait(f"document.querySelector('figure') && {SEEN}.join() === 'true,false'")
    assert not driven.value(FETCHED)
    driven.value("document.querySelector('figure').scrollIntoView()")
    driven.wait("document.querySelectorAll('figure .points path').length === 3")
    assert driven.value(SEEN) == [False, True] and driven.value(FETCHED)
    assert driven.value("document.querySelector('figure').lastChild.textContent") == "F"
    driven("Emulation.setEmulatedMedia", media="print")
    assert driven.value(SEEN)[0]  # on paper, where custom.css hides the plot
    driven("Emulation.setEmulatedMedia", media="")


def test_upright_lines_end_where_they_should(table):
    gain, low, high = (pd.Series(values) for values in ([0.4, 0.8, 0.1], [0.3, 0.2, 0], [1, 1, 1]))
    across, up = {"sparsity": table["sparsity"]}, {"gain": gain, "other": gain}
    plot, choices = interactive.gene_scatter(
        table, across, up, "simulated", ends={"gain": (low, high), "other": (gain, gain)}
    )
    found = {
        t.name: (t.y[0] - t.error_y.arrayminus[0], t.y[0] + t.error_y.array[0]) for t in plot.data
    }
    assert found["stromal"] == pytest.approx((0.2, 1)) and found["other"] == pytest.approx((0, 1))
    traces, _ = choices["Vertical"]["other"]
    assert traces["error_y.array"] == traces["error_y.arrayminus"] == [[0.0], [0.0], [0.0]]


def test_choice_of_an_arm_moves_the_points_and_names_the_axis(driven, tmp_path, table):
    arms = {
        name: pd.Series(values)
        for name, values in {
            "D": [0.1, 0.2, 0.3],
            "E": [0.4, np.nan, 0.6],
            "A": [0.7, 0.8, 0.9],
        }.items()
    }
    up = {name: arms[name] for name in "EDA"}
    plot, choices = interactive.gene_scatter(table, arms, up, "simulated", diagonal=True)
    shown = interactive.show(plot, "arms", choices=choices).data
    (tmp_path / "page.html").write_text(
        f'<!doctype html><meta charset="utf8"><title>t</title>{shown}'
    )
    driven.open((tmp_path / "page.html").as_uri())
    driven.wait("document.querySelectorAll('.points path').length === 2")  # one is undefined
    lists = "[...document.querySelectorAll('.plot-choices label')]"
    heading = f"{lists}.map((l) => l.firstChild.textContent + l.lastChild.value).join()"
    assert driven.value(heading) == "HorizontalD,VerticalE"
    driven.value(
        f"{lists}[1].lastChild.value = 'A'; {lists}[1].lastChild.dispatchEvent(new Event('change'))"
    )
    driven.wait("document.querySelectorAll('.points path').length === 3")
    drawn = driven.value("document.getElementById('plot-arms').data.map((t) => t.y[0]).join()")
    by_category = arms["A"].set_axis(table["category"])
    assert drawn == ",".join(str(by_category[t.name]) for t in plot.data)
    title = "document.getElementById('plot-arms').layout.{}axis.title.text"
    assert [driven.value(title.format(axis)) for axis in "xy"] == ["D", "A"]


@pytest.mark.parametrize("kind", ["arms", "effects", "dials"])
def test_plot_shows_what_it_is_given(table, kind):
    draw = np.random.default_rng(0)
    if kind == "arms":
        arms = {name: pd.Series(draw.random(3)) for name in "ABC"}
        plot, choices = interactive.gene_scatter(table, arms, arms, "simulated")
    elif kind == "effects":
        low, effect, high = np.sort(draw.random((3, 2)), axis=0)
        terms = pd.DataFrame({"term": ["a", "a:b"], "order": [1, 2]})
        terms = terms.assign(ci_low=low, effect=effect, ci_high=high)
        other = terms.assign(effect=terms["effect"] / 2)
        plot, choices = interactive.effects_browser({"PCC": terms, "SSIM": other}, "simulated")
        assert plot.data[0].error_x.array == pytest.approx((high - effect)[::-1], abs=1e-6)
    else:
        rows = [(gene, keep, draw.random(), 0.1 * keep) for gene in GENES for keep in (0.5, 1)]
        gains = pd.DataFrame(rows, columns=["gene", "keep", "delta", "mean_count"])
        categories = table.set_index("gene")["category"]
        plot, choices = interactive.dial_browser({"thinned": gains}, categories, "simulated")
        assert not choices
        (line,) = (trace for trace in plot.data if trace.name == categories[GENES[1]])
        gains = gains[gains["gene"] == GENES[1]]
        assert line.y[:2] == pytest.approx(gains["delta"], abs=1e-6) and line.y[2] is None
        assert line.x[:2] == pytest.approx([0.05, 0.1])
    assert "SIMULATED DATA" in plot.layout.title.text
    assert all(len(entries) > 1 for entries in choices.values())
