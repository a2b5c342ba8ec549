"""Tiles read out of a figure that is drawn here, as the published ones were."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from sparsity_trap.settings import UserError
from sparsity_trap.tiles import FILE, read_tiles

COLUMNS = 3
MODELS = ("mse", "poisson")


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "workflow"))
    import download
    import figure_tiles

    monkeypatch.setattr(download, "_CURL", ["curl", "--silent", "--fail", "--location"])
    return figure_tiles, download


def tissue(seed: int) -> list[dict]:
    draw = np.random.default_rng(seed)
    found = []
    for column in range(COLUMNS):
        mask = np.ones((128, 128), bool)
        mask[: 10 * column, :50] = False
        rate = draw.gamma(1, 0.3, (128, 128))
        found.append({
            "he": draw.integers(0, 256, (128, 128, 3), dtype=np.uint8),
            "mask": mask,
            "counts": draw.poisson(rate * 4**column),
            "mse": 0.2 + 0.003 * rate,
            "poisson": 0.02 * rate,
        })  # fmt: skip
    return found


def drawn(tiles: list[dict], power: float = 0.4) -> bytes:
    """A PDF of the published layout; the colour bars come after all panels."""
    figure = Figure(figsize=(4.5 * COLUMNS, 16))
    FigureCanvasPdf(figure)
    axes = figure.subplots(4, COLUMNS)
    colours = matplotlib.colormaps["magma"].with_extremes(bad="#e8e8e8")
    for column, tile in enumerate(tiles):
        axes[0, column].imshow(tile["he"] / 255.0)
        axes[0, column].text(0.5, 1.08, f"Tile {column + 1}", transform=axes[0, column].transAxes)
        for row, name in enumerate(("counts", *MODELS), 1):
            shown = np.where(tile["mask"], tile[name], np.nan)
            ends = np.nanpercentile(shown, (2, 98))
            scale = {"vmin": ends[0], "vmax": ends[1]}
            if name == "counts":
                scale = {"norm": PowerNorm(power, vmin=0, vmax=np.nanpercentile(shown, 99))}
            image = axes[row, column].imshow(shown, cmap=colours, interpolation="nearest", **scale)
            axes[row, column].set_title("SSIM=0.50", fontsize=10)
            bar = figure.colorbar(
                image, ax=axes[row, column], orientation="horizontal", fraction=0.08, pad=0.02
            )
            bar.ax.tick_params(labelsize=8)
        for axis in axes[:, column]:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle("GENE", fontsize=16)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf", dpi=300, bbox_inches="tight", pad_inches=0.2)
    return buffer.getvalue()


@pytest.mark.parametrize("power", [0.4, 1])
def test_what_was_drawn_is_read_back(modules, power):
    expected = tissue(0)
    found = list(modules[0].tiles("GENE", drawn(expected, power)))
    assert len(found) == COLUMNS
    for tile, true in zip(found, expected, strict=True):
        assert tile["gene"] == "GENE"
        assert tile["id"] == hashlib.md5(true["he"].tobytes()).hexdigest()[:8]
        np.testing.assert_array_equal(tile["he"], true["he"])
        np.testing.assert_array_equal(tile["mask"], true["mask"])
        inside = true["mask"]
        clip = np.percentile(true["counts"][inside], 99)
        expected_counts = np.where(inside, np.minimum(true["counts"], clip), 0)
        np.testing.assert_array_equal(tile["counts"], expected_counts.astype(int))
        for name in MODELS:
            low, high = np.percentile(true[name][inside], (2, 98))
            rate = true[name][inside].clip(low, high)
            # Half a step, and what half precision rounds off.
            error = (high - low) / 512 * 1.05 + 2**-11 * high
            np.testing.assert_allclose(tile[name][inside], rate, atol=error, rtol=0)
            assert np.isnan(tile[name][~inside]).all()


def test_other_files_are_refused(modules):
    figures = modules[0]
    with pytest.raises(ValueError, match="no PDF"):
        figures.Figure(b"GIF89a")
    plain = Figure()
    FigureCanvasPdf(plain)
    plain.subplots().imshow(np.zeros((128, 128, 3)))
    buffer = io.BytesIO()
    plain.savefig(buffer, format="pdf")
    with pytest.raises(ValueError, match="0 panels and 1 colour bars"):
        list(figures.tiles("GENE", buffer.getvalue()))
    with pytest.raises(ValueError, match="none of the map's"):
        figures.steps(np.full((128, 128, 3), 7, np.uint8))


def test_downloaded_figures_become_the_file_of_tiles(modules, monkeypatch, tmp_path):
    _, download = modules
    tiles = tissue(1)
    served, places = tmp_path / "server", tmp_path / "places.csv"
    served.mkdir()
    monkeypatch.setattr(download, "FIGURE_GENES", ("B", "A"))
    monkeypatch.setattr(download, "PLACES", places)
    ids = [hashlib.md5(tile["he"].tobytes()).hexdigest()[:8] for tile in tiles]
    places.write_text(
        "tile,row,column\n" + "".join(f"{t},{i},{2 * i}\n" for i, t in enumerate(ids))
    )
    figure = drawn(tiles)
    for gene in "AB":
        (served / f"{gene}_tile_comparison.pdf").write_bytes(figure)
    path = download.download_tiles(tmp_path / "data", served.as_uri())
    assert path == tmp_path / "data" / FILE
    assert [p.name for p in path.parent.iterdir()] == [FILE]
    read = read_tiles(path.parent)
    assert read.genes == ("A", "B")
    assert list(read.ids) == sorted(ids)
    assert [tuple(p) for p in read.place] == [(ids.index(i), 2 * ids.index(i)) for i in sorted(ids)]
    assert read.tile.tolist() == [0, 0, 1, 1, 2, 2]
    assert read.gene.tolist() == [0, 1] * COLUMNS
    assert read.counts.shape == (6, 128, 128)
    assert set(read.printed) == set(MODELS)

    (served / "A_tile_comparison.pdf").write_bytes(b"%PDF-1.4 of something else")
    with pytest.raises(UserError, match="A_tile_comparison.pdf is not the figure that it was"):
        download.download_tiles(tmp_path / "data", served.as_uri())
    (served / "A_tile_comparison.pdf").unlink()
    with pytest.raises(UserError, match="A_tile_comparison.pdf"):
        download.download_tiles(tmp_path / "data", served.as_uri())
    places.write_text("tile,row,column\n")
    assert Path(path).is_file()
