"""Gene browser: its pictures, its HTML, and the page in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import zarr
from fragment import Strict, stands_alone
from PIL import ExifTags, Image
from scipy.spatial import cKDTree

from sparsity_trap.data.patches import PatchStore
from sparsity_trap.settings import MARKS
from sparsity_trap.show import browser, pictures

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
        fragment = browser.gene_browser(simulated, predictions, table, folder / "viewer")
    page = folder / "page.html"
    head = '<!doctype html><meta charset="utf8"><title>t</title><body style="height:3000px">'
    page.write_text(head + fragment)
    return page


def colours(path: Path) -> np.ndarray:
    """RGB [H, W, 3] of a picture."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def sums_8um(values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape[:-2], 32, 4, 32, 4).sum((-3, -1))


# --- pictures -------------------------------------------------------------------------------------


def test_genes_of_like_names_have_pictures_of_their_own():
    assert browser._file_names(["PIGR", "A/B", "A_B", "Actb", "ACTB"]) == [
        "PIGR", "A_B-1", "A_B-2", "Actb-3", "ACTB-4",
    ]  # fmt: skip


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
            shown = colours(folder / f"{stem}-{key}.webp")
            # Bins of the patches' bounding box, which begins at the second row of patches.
            for patch, (row, column) in enumerate(ORIGIN):
                window = np.s_[row // 4 - 32 : row // 4, column // 4 : column // 4 + 32]
                expected = np.array(magma(np.sqrt(np.minimum(values[patch, g] / top, 1))))[..., :3]
                expected = np.where(inside[patch][..., None], 255 * expected, 0xED)
                difference = np.abs(shown[window].astype(float) - expected)
                assert difference.max() < 3, (stem, key, patch)
            # No patch lies there.
            assert (shown[32:64, :32] == 0xED).all()


@pytest.mark.parametrize("source", ["simulated", "tissue-map", "spaceranger"])
def test_pictures_say_in_their_pixels_what_is_not_measured(tmp_path, table, source):
    store = write_store(tmp_path / "P5.zarr", source)
    html = browser.gene_browser(store, {}, table, tmp_path / "viewer")
    note = MARKS.get(source)
    for path in (tmp_path / "viewer").iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), int)
            scale = image.width // 64
            about = image.getexif().get(ExifTags.Base.ImageDescription, "")
        below = pixels[64 * scale :]
        red = (below[..., 0] - below[..., 1] > 60).mean() if len(below) else 0
        assert red > 0.05 if note else len(below) == 0, path
        if path.suffix == ".webp":
            assert about.endswith(f"UMI per 8 um bin; patient P5, {note or 'measured'}")
    assert html.count('class="gb-mark"') == (0 if note is None else 4)
    assert len(list((tmp_path / "viewer").glob("*-rate.webp"))) == (0 if note is None else 3)


def test_map_of_a_full_section_stays_small_and_keeps_its_order(tmp_path):
    rng = np.random.default_rng(1)
    coarse = rng.gamma(1.0, 1.0, (100, 100)).repeat(8, 0).repeat(8, 1)
    values = coarse * rng.gamma(60, 1 / 60, (800, 800))
    pictures.write_map(tmp_path / "map.webp", values, np.ones(values.shape, bool), 4.0)
    assert (tmp_path / "map.webp").stat().st_size <= 200_000
    palette = 255 * matplotlib.colormaps["magma"](np.linspace(0, 1, 256))[:, :3]
    distance, level = cKDTree(palette).query(colours(tmp_path / "map.webp"))
    assert distance.max() < 2
    assert np.abs(level / 255 - np.sqrt(np.minimum(values / 4, 1))).max() < 0.1


def test_picture_of_the_tissue_covers_the_same_bins_and_is_finer(browser_page, simulated):
    with Image.open(browser_page.parent / "viewer" / "he.jpg") as image:
        assert image.width == 4 * 64
        pixels = np.asarray(image, float)
    # The overview shows where no patch lies, the patches' own images elsewhere.
    assert abs(pixels[4 * 36 : 4 * 60, 4 * 4 : 4 * 28].mean() - 200) < 2
    patch = simulated.images[0].mean()
    assert abs(pixels[: 4 * 32, : 4 * 32].mean() - patch) < 3


# --- HTML -----------------------------------------------------------------------------------------


def test_html_is_well_formed_and_needs_nothing_from_elsewhere(browser_page):
    stands_alone(
        re.search(r"<div class=\"gene-browser\".*", browser_page.read_text(), re.DOTALL)[0]
    )


def test_pictures_of_the_page_exist_and_names_are_escaped(browser_page):
    text = browser_page.read_text()
    shown = [a["src"] for tag, a in Strict(text[text.index("<div") :]).attributes if tag == "img"]
    assert shown and all((browser_page.parent / address).is_file() for address in shown)
    assert "A&lt;B/&amp;" in text
    data = json.loads(re.search(r'class="gb-data">(.*?)</script>', text, re.DOTALL)[1])
    assert [gene["name"] for gene in data["genes"]] == GENES
    for gene in data["genes"]:
        for panel in data["panels"][1:]:
            assert (
                browser_page.parent / "viewer" / f"{gene['file']}-{panel['key']}.webp"
            ).is_file()
    assert data["genes"][1]["scores"]["mse"] == ["PCC −0.25"]
    assert data["genes"][2]["scores"]["mse"] == ["PCC undefined"]


def test_outside_the_book_pictures_are_found_from_the_working_folder(
    simulated, table, tmp_path, monkeypatch
):
    monkeypatch.delenv("SPARSITY_TRAP_BOOK", raising=False)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    text = browser.gene_browser(simulated, {}, table, tmp_path / "results" / "viewer")
    assert 'src="../results/viewer/he.jpg"' in text


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
        "viewer/he.jpg", "viewer/COL1A1-counts.webp", "viewer/COL1A1-rate.webp",
        "viewer/COL1A1-mse.webp", "viewer/COL1A1-poisson.webp",
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
    assert driven.value(picture) == "viewer/PIGR-counts.webp"
    assert driven.value("document.querySelector('.gb-tag').textContent") == "Counts"


def test_browser_of_a_large_panel_holds_the_largest_changes(table, monkeypatch):
    genes = table.assign(delta_pcc_8um=[0.1, -0.6, 0.3])
    assert browser.browsable(genes) is genes
    monkeypatch.setattr(browser, "MOST_GENES", 2)
    assert browser.browsable(genes)["gene"].tolist() == GENES[1:]
