"""Maps of tissue that several pages draw: a row of panels on one colour scale, and a scale bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib_scalebar.scalebar import ScaleBar

from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.data.patches import OVERVIEW_BINS, PatchStore
from sparsity_trap.show.style import COUNTS_MAP


def scale_bar(axis: Axes, pixel_um: float, length_um: float) -> None:
    """Draw a bar of a given length into the lower left corner.

    Parameters
    ----------
    axis
        With an image.
    pixel_um
        Width of the image's pixels in µm.
    length_um
        Length of the bar.
    """
    bar = ScaleBar(
        pixel_um, "um", fixed_value=length_um, fixed_units="um", location="lower left",
        scale_loc="top", width_fraction=0.012, box_alpha=0.75, pad=0.25, border_pad=0.4, sep=1.5,
        font_properties={"size": 7},
    )  # fmt: skip
    axis.add_artist(bar)


def panel_row(
    axes: Sequence[Axes],
    image: np.ndarray,
    maps: Sequence[np.ndarray],
    mask: np.ndarray,
    gene: str,
    pixel_um: float,
    length_um: float,
) -> None:
    """H&E with scale bar, then maps (counts first) on the counts' colour scale.

    Parameters
    ----------
    axes
        One for the image and one per map.
    image
        uint8 [H, W, 3].
    maps
        UMI per 8 µm bin, [h, w] each; those off tissue are not shown. The scale ends at the 99.5th
        percentile of the first map in tissue, and follows the square root.
    mask
        Bins in tissue, bool [h, w].
    gene
        Written beside the row.
    pixel_um, length_um
        Pixels of the image and length of its scale bar, in µm.
    """
    axes[0].imshow(image)
    scale_bar(axes[0], pixel_um, length_um)
    axes[0].set_xticks([])
    axes[0].set_yticks([])
    axes[0].spines[:].set_visible(False)
    map_row(axes[1:], maps, mask)
    axes[0].set_ylabel(gene, style="italic", size=10)


def map_row(
    axes: Sequence[Axes], maps: Sequence[np.ndarray], mask: np.ndarray, gene: str = ""
) -> None:
    """Maps alone, as `panel_row` draws them."""
    norm = PowerNorm(0.5, 0, max(1.0, np.percentile(maps[0][mask], 99.5)))
    for axis, values in zip(axes, maps, strict=True):
        shown = axis.imshow(
            np.where(mask, values, np.nan), cmap=COUNTS_MAP, norm=norm, interpolation="nearest"
        )
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel(gene, style="italic", size=10)
    axes[0].figure.colorbar(shown, ax=list(axes), shrink=0.85, pad=0.01, label="UMI per 8 µm")


def gene_map(values: Any, index: int) -> np.ndarray:
    """One gene of [N, G, 128, 128] counts or rates at 8 µm, float32 [N, 32, 32].

    Read patch by patch, since a stored chunk holds all genes of one patch.
    """
    patches = (np.asarray(values[i, index], np.float32) for i in range(values.shape[0]))
    return np.stack([bin_sum(patch, OVERVIEW_BINS) for patch in patches])


def tissue_bins(store: PatchStore) -> np.ndarray:
    """Bins of 8 µm in tissue, bool [N, 32, 32]."""
    return bin_mask(store.mask[:], OVERVIEW_BINS)


def richest_patch(store: PatchStore, index: int) -> int:
    """Patch with most counts of a gene."""
    return int(np.argmax([store.counts[i, index].sum() for i in range(len(store))]))
