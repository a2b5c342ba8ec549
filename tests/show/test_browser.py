"""Gene browser and loss explorer: their pictures, their HTML, and both in a real browser."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from PIL import Image

from sparsity_trap.analysis.factorial import dial_curve
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.show import browser as viewers
from sparsity_trap.show import interactive, style, tables

GENES = ["PIGR", "COL1A1", "A<B/&"]
ORIGIN = [(128, 0), (128, 128), (256, 128)]  # the first row of patches has no tissue


def write_store(path: Path, source: str) -> PatchStore:
    """Three patches of a section of 3 x 2, with a hole in the first."""
    rng = np.random.default_rng(5)
    rate = rng.gamma(0.5, 0.4, (3, len(GENES), 128, 128))
    group = zarr.create_group(path)
    mask = np.ones((3, 128, 128), bool)
    mask[0, :64, :64] = False
    arrays = {
        "images": rng.integers(0, 255, (3, 224, 224, 3), np.uint8),
        "counts": rng.poisson(rate).astype(np.uint16),
        "mask": mask,
        "origin": np.array(ORIGIN, np.int32),
        "overview": np.full((97, 65, 3), 200, np.uint8),
        "total": np.zeros((97, 65), np.uint32),
        "row_factor": np.ones(390, np.float32),
        "col_factor": np.ones(262, np.float32),
    }
    if source != "spaceranger":
        arrays["truth"] = rate.astype(np.float16)
    for name, data in arrays.items():
        group.create_array(name, data=data)
    group.attrs.update(
        genes=GENES, patient="P5", source=source, bin_um=2.0, grid_shape=[390, 262],
        microns_per_pixel=0.5, registration={},
    )  # fmt: skip
    return PatchStore(path)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> PatchStore:
    return write_store(tmp_path_factory.mktemp("store") / "P5.zarr", "simulated")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "gene": GENES,
            "category": ["secretory", "stromal", "other"],
            "sparsity": [0.927, 0.974, 0.5],
            "mean_count": [0.2, 0.2, 0.2],
            "pcc_8um_mse": [0.1, -0.25, np.nan],
            "pcc_8um_poisson": [0.5, 0.6, 0.7],
        }
    )


@pytest.fixture(scope="module")
def predictions(simulated) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    shape = simulated.counts.shape
    return {"MSE": rng.gamma(2, 0.1, shape), "Poisson": rng.gamma(4, 0.1, shape)}


@pytest.fixture(scope="module")
def browser_page(simulated, table, predictions, tmp_path_factory) -> Path:
    """Page with the gene browser, as the book shows it, and its pictures beside it."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSITY_TRAP_BOOK", "1")
        fragment = viewers.gene_browser(simulated, predictions, table, folder / "viewer")
    page = folder / "page.html"
    page.write_text(
        f'<!doctype html><meta charset="utf8"><title>t</title><body style="height:3000px">{fragment}'
    )
    return page


def palette_colours(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """RGB [H, W, 3] of a picture, and its palette."""
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image.convert("RGB")), np.asarray(image.getpalette())


def sums_8um(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape[:-2], 32, 4, 32, 4).sum((-3, -1))


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_show_counts_and_predictions_on_the_scale_of_the_counts(
    browser_page, simulated, predictions
):
    folder = browser_page.parent / "viewer"
    counts = sums_8um(simulated.counts[:].astype(float))
    inside = sums_8um(simulated.mask[:].astype(float)) > 8
    magma = matplotlib.colormaps["magma"]
    maps = {"counts": counts, "rate": sums_8um(simulated.truth[:].astype(np.float32))}
    maps |= {key.lower(): sums_8um(values) for key, values in predictions.items()}
    for g, stem in enumerate(["PIGR", "COL1A1", "A_B__"]):
        top = np.percentile(counts[:, g][inside], 99.5)
        for key, values in maps.items():
            shown, _ = palette_colours(folder / f"{stem}-{key}.png")
            # Bins of the patches' bounding box, which begins at the second row of patches.
            for patch, (row, column) in enumerate(ORIGIN):
                window = np.s_[row // 4 - 32 : row // 4, column // 4 : column // 4 + 32]
                expected = np.array(magma(np.sqrt(np.minimum(values[patch, g] / top, 1))))[..., :3]
                expected = np.where(inside[patch][..., None], 255 * expected, 0xED)
                difference = np.abs(shown[window].astype(float) - expected)
                assert difference.max() < 3, (stem, key, patch)
            # No patch lies there.
            assert (shown[32:64, :32] == 0xED).all()


def test_all_maps_have_one_palette(browser_page):
    paths = sorted((browser_page.parent / "viewer").glob("*.png"))
    assert len(paths) == len(GENES) * 4
    palettes = {tuple(palette_colours(path)[1]) for path in paths}
    assert len(palettes) == 1
    assert len(set(zip(*[iter(palettes.pop())] * 3, strict=True))) > 240


@pytest.mark.parametrize("source", ["simulated", "tissue-map", "spaceranger"])
def test_pictures_say_in_their_pixels_what_is_not_measured(tmp_path, table, source):
    store = write_store(tmp_path / "P5.zarr", source)
    html = viewers.gene_browser(store, {}, table, tmp_path / "viewer")
    note = style.MARKS.get(source)
    for path in (tmp_path / "viewer").iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), int)
            scale = image.width // 64
            text = getattr(image, "text", {})
        below = pixels[64 * scale :]
        red = (below[..., 0] - below[..., 1] > 60).mean() if len(below) else 0
        assert red > 0.05 if note else len(below) == 0, path
        if path.suffix == ".png":
            assert text["Source"] == f"patient P5, {note or 'measured'}"
            assert text["Title"].endswith("UMI per 8 µm bin")
    assert html.count('class="gb-mark"') == (0 if note is None else 4)
    assert len(list((tmp_path / "viewer").glob("*-rate.png"))) == (0 if note is None else 3)


def test_map_of_a_full_section_stays_small_and_keeps_its_order(tmp_path):
    rng = np.random.default_rng(1)
    coarse = rng.gamma(1.0, 1.0, (100, 100)).repeat(8, 0).repeat(8, 1)
    values = coarse * rng.gamma(60, 1 / 60, (800, 800))
    viewers.write_map(tmp_path / "map.png", values, np.ones(values.shape, bool), 4.0)
    assert (tmp_path / "map.png").stat().st_size <= 200_000
    with Image.open(tmp_path / "map.png") as image:
        level = np.asarray(image, float)
    assert np.abs(level / 253 - np.sqrt(np.minimum(values / 4, 1))).max() < 0.1


def test_picture_of_the_tissue_covers_the_same_bins_and_is_finer(browser_page, simulated):
    with Image.open(browser_page.parent / "viewer" / "he.jpg") as image:
        assert image.width == 4 * 64
        pixels = np.asarray(image, float)
    # The overview shows where no patch lies, the patches' own images elsewhere.
    assert abs(pixels[4 * 36 : 4 * 60, 4 * 4 : 4 * 28].mean() - 200) < 2
    patch = simulated.images[0].mean()
    assert abs(pixels[: 4 * 32, : 4 * 32].mean() - patch) < 3


# --- HTML -----------------------------------------------------------------------------------------


class Strict(HTMLParser):
    """Refuses elements that are left open or closed out of order."""

    void = {"img", "input", "meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute is repeated in <{tag}>"
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(params=["gene browser", "loss explorer"])
def fragment(request, browser_page) -> str:
    if request.param == "loss explorer":
        return viewers.loss_explorer()
    return re.search(r"<div class=\"gene-browser\".*", browser_page.read_text(), re.DOTALL)[0]


def test_html_is_well_formed_and_needs_nothing_from_elsewhere(fragment):
    tags = Strict(fragment).attributes
    for tag, attributes in tags:
        address = attributes.get("src") or attributes.get("href") or ""
        assert not re.match(r"(?:https?:)?//", address)
        if tag == "img":
            assert attributes["alt"]
        if tag == "button":
            assert attributes["type"] == "button"
    script = re.sub(r"http://www\.w3\.org/2000/svg", "", fragment)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|getImageData|import ", script)
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_pictures_of_the_page_exist_and_names_are_escaped(browser_page):
    text = browser_page.read_text()
    shown = [a["src"] for tag, a in Strict(text[text.index("<div") :]).attributes if tag == "img"]
    assert shown and all((browser_page.parent / address).is_file() for address in shown)
    assert "A&lt;B/&amp;" in text
    data = json.loads(re.search(r'class="gb-data">(.*?)</script>', text, re.DOTALL)[1])
    assert [gene["name"] for gene in data["genes"]] == GENES
    for gene in data["genes"]:
        for panel in data["panels"][1:]:
            assert (browser_page.parent / "viewer" / f"{gene['file']}-{panel['key']}.png").is_file()
    assert data["genes"][1]["scores"]["mse"] == ["PCC −0.25"]
    assert data["genes"][2]["scores"]["mse"] == ["PCC undefined"]


def test_outside_the_book_pictures_are_found_from_the_working_folder(
    simulated, table, tmp_path, monkeypatch
):
    monkeypatch.delenv("SPARSITY_TRAP_BOOK", raising=False)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    text = viewers.gene_browser(simulated, {}, table, tmp_path / "results" / "viewer")
    assert 'src="../results/viewer/he.jpg"' in text


# --- losses ---------------------------------------------------------------------------------------


def reference(name: str, link: str, rate: float, count: int) -> tuple[float, float]:
    """Loss above its minimum and its derivative by η, from torch.distributions and autograd."""

    def loss(of: torch.Tensor) -> torch.Tensor:
        y = torch.tensor(float(count), dtype=torch.float64)
        if name == "mse":
            return (y - of) ** 2
        if name == "poisson":
            return -torch.distributions.Poisson(of).log_prob(y)
        one = torch.ones((), dtype=torch.float64)
        return -torch.distributions.NegativeBinomial(one, logits=of.log()).log_prob(y)

    given = torch.tensor(rate, dtype=torch.float64)
    eta = (given.log() if link == "exp" else given.expm1().log()).requires_grad_()
    value = loss(eta.exp() if link == "exp" else torch.nn.functional.softplus(eta))
    (gradient,) = torch.autograd.grad(value, eta)
    least = loss(torch.tensor(max(count, 1e-12), dtype=torch.float64))
    return (value - least).item(), gradient.item()


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("name", ["mse", "poisson", "nb"])
def test_losses_and_gradients_agree_with_autograd(name, count):
    rates = np.array([0.005, 0.05, 1.0, 3.0, 15.0])
    for link in ("exp", "softplus"):
        expected = [reference(name, link, float(rate), count) for rate in rates]
        excess, gradient = map(np.array, zip(*expected, strict=True))
        np.testing.assert_allclose(viewers.excess_loss(name, rates, count), excess, atol=1e-9)
        own = viewers.loss_gradient(name, link, rates, count)
        np.testing.assert_allclose(own, gradient, rtol=1e-9, atol=1e-9)


# --- in a browser ---------------------------------------------------------------------------------


ZOOM = (
    "Number(getComputedStyle(document.querySelector('.gene-browser')).getPropertyValue('--gb-z'))"
)
SHOWN = "document.querySelector('.gb-name').textContent"


def test_browser_opens_the_gene_of_the_address(driven, browser_page):
    driven.open(f"{browser_page.as_uri()}#gene=COL1A1")
    driven.wait(f"{SHOWN} === 'COL1A1'")
    sources = driven.value(
        "Array.from(document.querySelectorAll('.gb-panels img'), i => i.getAttribute('src'))"
    )
    assert sources == [
        "viewer/he.jpg", "viewer/COL1A1-counts.png", "viewer/COL1A1-rate.png",
        "viewer/COL1A1-mse.png", "viewer/COL1A1-poisson.png",
    ]  # fmt: skip
    assert (
        driven.value("document.querySelector('.gb-scores[data-panel=mse]').innerText")
        == "PCC −0.25"
    )
    assert driven.value("document.querySelector('.gb-facts').innerText").startswith("stromal")
    assert driven.value("Array.from(document.images).every(i => i.naturalWidth > 0 && i.alt)")
    driven.value("location.hash = '#gene=' + encodeURIComponent('A<B/&')")
    driven.wait(f"{SHOWN} === 'A<B/&'")
    assert driven.value("document.querySelector('.gb-gene').value") == "A<B/&"


def test_browser_follows_keyboard_and_pointer(driven, browser_page):
    driven.open(browser_page.as_uri())
    assert driven.value(SHOWN) == "PIGR"
    driven.value("document.querySelector('.gb-panels').focus()")
    driven.key("n")
    driven.wait(f"{SHOWN} === 'COL1A1'")
    assert driven.value("location.hash") == "#gene=COL1A1"
    driven.key("+")
    driven.key("+")
    assert driven.value(ZOOM) == pytest.approx(2.25)
    left = "document.querySelectorAll('.gb-panels img')[3].offsetLeft"
    before = driven.value(left)
    driven.key("ArrowRight")
    assert driven.value(left) < before

    # Drag by 30 pixels: every picture follows, the scale bar keeps its meaning.
    view = ".gb-panels figure:nth-child(2) .gb-view"
    before = driven.value(left)
    x, y = driven.middle(view)
    driven.mouse("mouseMoved", (x, y))
    driven.mouse("mousePressed", (x, y), button="left", clickCount=1)
    driven.mouse("mouseMoved", (x + 30, y), button="left", buttons=1)
    driven.mouse("mouseReleased", (x + 30, y), button="left", clickCount=1)
    assert driven.value(left) == pytest.approx(before + 30, abs=1)
    um = float(
        driven.value("document.querySelector('.gb-panels .gb-scale').textContent").split()[0]
    )
    width = driven.value("document.querySelector('.gb-panels .gb-scale').offsetWidth")
    bins = driven.value("document.querySelectorAll('.gb-panels img')[3].offsetWidth") / 64
    assert um == pytest.approx(8 * width / bins, rel=0.02)

    # The wheel zooms about the pointer: what lies under it stays.
    old = driven.value(ZOOM)
    driven.mouse("mouseMoved", (x + 5, y))
    driven.mouse("mouseWheel", (x + 5, y), deltaX=0, deltaY=-120)
    driven.wait(f"{ZOOM} > {old}")
    driven.key("0")
    assert driven.value(ZOOM) == 1
    # Zooming out of the whole section scrolls the page.
    driven.mouse("mouseWheel", (x + 5, y), deltaX=0, deltaY=200)
    driven.wait("scrollY > 0")


def test_swipe_is_usable_by_keyboard_and_pointer(driven, browser_page):
    driven.open(f"{browser_page.as_uri()}#gene=PIGR&view=swipe")
    driven.wait("!document.querySelector('.gb-swipe').hidden")
    driven.value("document.querySelector('.gb-split').focus()")
    clip = "getComputedStyle(document.querySelector('.gb-over')).clipPath"
    assert driven.value(clip) == "inset(0px 0px 0px 50%)"
    driven.key("ArrowRight")
    assert driven.value(clip) == "inset(0px 0px 0px 51%)"
    x, y = driven.middle(".gb-divider")
    width = driven.value("document.querySelector('.gb-swipe .gb-view').offsetWidth")
    driven.mouse("mouseMoved", (x, y))
    driven.mouse("mousePressed", (x, y), button="left", clickCount=1)
    driven.mouse("mouseMoved", (x - width / 4, y), button="left", buttons=1)
    driven.mouse("mouseReleased", (x - width / 4, y), button="left", clickCount=1)
    assert driven.value("Number(document.querySelector('.gb-split').value)") == pytest.approx(
        26, abs=1
    )
    driven.value(
        "(s => { s.value = 'counts'; s.dispatchEvent(new Event('change')); })"
        "(document.querySelector('.gb-side[data-side=left]'))"
    )
    picture = "document.querySelector('.gb-swipe img[data-side=left]').getAttribute('src')"
    assert driven.value(picture) == "viewer/PIGR-counts.png"
    assert driven.value("document.querySelector('.gb-tag').textContent") == "Counts"


def test_loss_explorer_prints_the_losses_of_its_sliders(driven, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        f'<!doctype html><meta charset="utf8"><title>t</title>{viewers.loss_explorer()}'
    )
    driven.open(page.as_uri())
    driven.value("document.querySelector('.le-count-input').focus()")
    driven.key("ArrowRight")
    driven.value("document.querySelector('.le-rate').focus()")
    for _ in range(3):
        driven.key("ArrowRight")
    assert driven.value("document.querySelector('.le-count-value').textContent") == "2"
    rate = 10 ** driven.value("Number(document.querySelector('.le-rate').value)")
    assert rate == pytest.approx(10**-1.15)
    for name in ("mse", "poisson", "nb"):
        cells = driven.value(
            f"Array.from(document.querySelectorAll('tr[data-loss={name}] td'), c => c.textContent)"
        )
        printed = [float(cell.replace("−", "-")) for cell in cells]
        (excess, exp), (_, softplus) = (reference(name, k, rate, 2) for k in ("exp", "softplus"))
        np.testing.assert_allclose(printed, [excess, exp, softplus], atol=6e-4)
    drawn = "document.querySelectorAll('.le-plots svg:nth-child({}) {}').length"
    assert driven.value(drawn.format(1, "path")) == 3
    assert driven.value(drawn.format(2, "path")) == 6


def test_table_sorts_by_the_heading_that_is_pressed(driven, tmp_path):
    table = pd.DataFrame({"gene": ["B", "C", "A"], "gain": [-0.5, np.nan, 0.25]})
    page = tmp_path / "table.html"
    shown = tables.show(table, 2, missing="undefined", sortable=True).data
    page.write_text(f'<!doctype html><meta charset="utf8"><title>t</title>{shown}')
    driven.open(page.as_uri())
    order = "[...document.querySelectorAll('tbody tr')].map((r) => r.cells[0].textContent).join('')"

    def press(column: int) -> str:
        driven.value(f"document.querySelectorAll('th button')[{column}].click()")
        return driven.value(order)

    assert driven.value(order) == "BCA"
    assert press(1) == "ABC"  # largest first, undefined last
    assert press(1) == "BAC"
    assert driven.value("document.querySelectorAll('th')[1].ariaSort") == "ascending"
    assert press(0) == "CBA"


@pytest.fixture
def plot_page(tmp_path, table, monkeypatch) -> Path:
    """The scatter as the book shows it, beside the script that the book's extension makes."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "book" / "_ext")
    monkeypatch.setenv("SPARSITY_TRAP_BOOK", "1")
    from sparsity_trap_book import plotly_script

    folder = tmp_path / "book" / "executed"
    folder.mkdir(parents=True)
    (tmp_path / "_assets").mkdir()
    (tmp_path / "_assets" / "plotly.js").write_text(plotly_script(), encoding="utf8")
    genes = table.assign(delta_pcc_8um=[0.4, 0.85, 0.1])
    sparsity, gain = ({name: genes[name]} for name in ("sparsity", "delta_pcc_8um"))
    plot, _ = interactive.gene_scatter(genes, sparsity, gain, "simulated")
    shown = interactive.show(plot, "sparsity", gene_page="genes.html").data
    head = '<!doctype html><meta charset="utf8"><title>t</title>'
    (folder / "page.html").write_text(head + shown)
    (folder / "genes.html").write_text(head)
    (folder / "old.html").write_text(
        f"{head}<script>delete window.DecompressionStream</script>{shown}"
    )
    return folder / "page.html"


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
def test_first_choices_are_what_the_plot_shows(table, kind):
    draw = np.random.default_rng(0)
    if kind == "arms":
        arms = {name: pd.Series(draw.random(3)) for name in "ABC"}
        plot, choices = interactive.gene_scatter(table, arms, arms, "simulated")
    elif kind == "effects":
        low, effect, high = np.sort(draw.random((3, 2)), axis=0)
        terms = pd.DataFrame({"term": ["a", "a:b"], "order": [1, 2], "p_value": 0.5})
        terms = terms.assign(ci_low=low, effect=effect, ci_high=high)
        other = terms.assign(effect=terms["effect"] / 2)
        plot, choices = interactive.effects_browser({"PCC": terms, "SSIM": other}, "simulated")
        assert plot.data[0].error_x.array == pytest.approx((high - effect)[::-1], abs=1e-6)
    else:
        rows = [
            (keep, loss, gene, draw.random(), 0.1 * keep)
            for keep in (1, 0.5) for loss in ("mse", "poisson") for gene in GENES
        ]  # fmt: skip
        columns = ["keep", "loss", "gene", "score", "mean_count"]
        curve = dial_curve(pd.DataFrame(rows, columns=columns), n_boot=10)
        categories = table.set_index("gene")["category"]
        plot, choices = interactive.dial_browser({"thinned": curve}, categories, "simulated")
        (line,) = (trace for trace in plot.data if trace.name == categories[GENES[1]])
        gains = curve.gains[curve.gains["gene"] == GENES[1]].sort_values("keep")
        assert line.y[:2] == pytest.approx(gains["delta"], abs=1e-6) and line.y[2] is None
        assert line.x[:2] == pytest.approx([0.05, 0.1])
    assert "SIMULATED DATA" in plot.layout.title.text
    for entries in choices.values():
        traces, layout = next(iter(entries.values()))
        now = plot.to_dict()
        for key, values in traces.items():
            for trace, value in zip(now["data"], values, strict=True):
                for part in key.split("."):
                    trace = trace[part]
                np.testing.assert_array_equal(
                    np.array(trace, object), np.array(value, object), strict=False
                )
        for key, value in layout.items():
            axis, _, _ = key.split(".")
            assert now["layout"][axis]["title"]["text"] == value


def test_browser_of_a_large_panel_holds_the_largest_changes(table, monkeypatch):
    genes = table.assign(delta_pcc_8um=[0.1, -0.6, 0.3])
    assert viewers.browsable(genes) is genes
    monkeypatch.setattr(viewers, "MOST_GENES", 2)
    assert viewers.browsable(genes)["gene"].tolist() == GENES[1:]


def test_plot_says_so_where_the_browser_is_too_old(driven, plot_page):
    driven.open(plot_page.with_name("old.html").as_uri())
    driven.wait("document.querySelector('.interactive-plot').textContent.includes('2023')")
