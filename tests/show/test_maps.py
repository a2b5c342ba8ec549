"""Maps of tissue: what is read, where colours end, and how long a scale bar is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sparsity_trap.show import maps, style


@pytest.fixture(scope="module")
def store() -> SimpleNamespace:
    """Three patches of two genes, a quarter of each without tissue."""
    counts = np.random.default_rng(3).poisson([[[[0.2]], [[3.0]]]], (3, 2, 128, 128))
    counts[1, 0] += 1
    mask = np.ones((3, 128, 128), bool)
    mask[:, :64, :64] = False
    return SimpleNamespace(counts=counts.astype(np.uint16), mask=mask)


def test_gene_map_sums_counts_to_8um(store):
    expected = store.counts[:, 1].reshape(3, 32, 4, 32, 4).sum((2, 4))
    np.testing.assert_array_equal(maps.gene_map(store.counts, 1), expected)
    assert maps.tissue_bins(store).sum() == 3 * (32**2 - 16**2)


def test_row_shows_tissue_alone_on_the_scale_of_the_counts(store):
    counts, tissue = maps.gene_map(store.counts, 1)[0], maps.tissue_bins(store)[0]
    figure, axes = style.subplots(1, 3, figsize=(6, 2))
    image = np.zeros((224, 224, 3), np.uint8)
    maps.panel_row(axes, image, [counts, counts / 3], tissue, "PIGR", 256 / 224, 50)
    for axis, values in zip(axes[1:], (counts, counts / 3), strict=True):
        shown = axis.images[0]
        np.testing.assert_array_equal(shown.get_array().mask, ~tissue)
        np.testing.assert_allclose(shown.get_array()[tissue], values[tissue])
        assert shown.norm.vmax == pytest.approx(np.percentile(counts[tissue], 99.5))


def test_scale_bar_is_as_long_as_it_says():
    figure, axis = style.subplots(figsize=(4, 4))
    axis.imshow(np.ones((100, 100, 3)))
    axis.set_axis_off()
    maps.scale_bar(axis, pixel_um=8, length_um=400)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].max(-1)
    longest = (pixels < 60).sum(1).max()
    assert longest == pytest.approx(axis.get_window_extent().width / 2, rel=0.02)
