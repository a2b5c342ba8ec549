"""One function per exhibit. Each returns a figure that carries the kind of data it shows."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter, uniform_filter

from sparsity_trap.data.alignment import Shift, stripe_strength
from sparsity_trap.data.patches import PATCH_BINS, PatchStore
from sparsity_trap.show.maps import scale_bar
from sparsity_trap.show.style import (
    COUNTS_MAP,
    mark,
    subplots,
)

# --- data -----------------------------------------------------------------------------------------


def section_overview(store: PatchStore) -> Figure:
    """H&E, counts per 8 µm bin, and both laid over each other with the patches outlined."""
    image, total = store.overview[:], store.total[:].astype(float)
    figure, axes = subplots(1, 3, figsize=(10, 3.6), tissue=True)
    top = np.percentile(total[total > 0], 99.5) if total.any() else 1
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(image)
    axes[0].set_title(f"H&E, patient {store.patient}")
    shown = axes[1].imshow(total, cmap=COUNTS_MAP, norm=PowerNorm(0.5, 0, top))
    axes[1].set_title("panel counts per 8 µm bin")
    figure.colorbar(shown, ax=axes[1], shrink=0.7, label="UMI")
    axes[2].imshow(image.mean(-1), cmap="gray", alpha=0.55)
    axes[2].imshow(total, cmap=COUNTS_MAP, norm=PowerNorm(0.5, 0, top), alpha=0.5)
    axes[2].set_title(f"overlay and the {len(store)} patches")
    side = PATCH_BINS // 4
    for row, column in store.origin[:] / 4:
        box = plt.Rectangle((column - 0.5, row - 0.5), side, side, fill=False, ec="w", lw=0.7)
        axes[2].add_patch(box)
    scale_bar(axes[0], 8.0, 500 if image.shape[1] * 8 > 1000 else 200)
    return mark(figure, store.source)


def patch_gallery(store: PatchStore, genes: Sequence[str], number: int = 3) -> Figure:
    """Patches spread over the section: image, tissue mask and counts of some genes at 2 µm."""
    chosen = np.linspace(0, len(store) - 1, number).astype(int)
    figure, axes = subplots(
        number,
        2 + len(genes),
        figsize=(1.75 * (2 + len(genes)), 1.8 * number),
        tissue=True,
        squeeze=False,
    )
    for row, patch in zip(axes, chosen, strict=True):
        row[0].imshow(store.images[patch])
        row[0].set_ylabel(f"patch {patch}")
        row[1].imshow(store.mask[patch], cmap="Greys", vmin=-0.4, vmax=1.4, interpolation="nearest")
        counts = store.counts[patch]
        for axis, gene in zip(row[2:], genes, strict=True):
            values = counts[store.genes.index(gene)]
            axis.imshow(np.minimum(values, 3), cmap="magma", vmin=0, vmax=3)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, title in zip(axes[0], ["H&E", "in tissue", *genes], strict=True):
        axis.set_title(title, style="italic" if title in genes else "normal")
    scale_bar(axes[0, 0], 256 / 224, 50)
    return mark(figure, store.source)


def registration_check(store: PatchStore, shift: Shift) -> Figure:
    """H&E with contours of the counts, close up, and the correlation of both at every offset."""
    total, image = store.total[:].astype(float), store.overview[:]
    side = min(64, *total.shape)
    # The window where tissue begins and ends most, so that edges can be compared.
    tissue = uniform_filter((total > 0).astype(float), side)
    row, col = np.unravel_index(np.argmin(np.abs(tissue - 0.6)), tissue.shape)
    row, col = (
        int(np.clip(v - side // 2, 0, n - side))
        for v, n in zip((row, col), total.shape, strict=True)
    )
    window = slice(row, row + side), slice(col, col + side)
    figure, axes = subplots(1, 3, figsize=(9.4, 3.3), tissue=True, width_ratios=(1, 1, 1.15))
    smooth = gaussian_filter(total[window], 0.8)
    levels = np.quantile(smooth[smooth > 0], (0.5, 0.8)) if (smooth > 0).any() else [0.5, 1]
    axes[0].imshow(image[window])
    axes[0].set_title("H&E, close up")
    axes[1].imshow(image[window])
    axes[1].contour(smooth, levels=levels, colors=["#00E5FF", "#FFE600"], linewidths=0.8)
    axes[1].set_title("contours of the counts")
    for axis in axes[:2]:
        axis.set_axis_off()
    scale_bar(axes[0], 8.0, 100)
    reach = shift.correlation.shape[0] // 2
    extent = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
    shown = axes[2].imshow(shift.correlation, cmap="cividis", extent=extent)
    axes[2].plot(shift.columns, shift.rows, "+", color="#D55E00", ms=9, mew=1.6)
    axes[2].set_xlabel("offset in columns (2 µm bins)")
    axes[2].set_ylabel("offset in rows")
    axes[2].set_title("correlation of darkness and counts")
    figure.colorbar(shown, ax=axes[2], shrink=0.8)
    rows, cols = np.indices(shift.correlation.shape).reshape(2, -1) - reach
    data = {"rows": rows, "columns": cols, "correlation": shift.correlation.ravel()}
    return mark(figure, store.source, pd.DataFrame(data))


def stripes(store: PatchStore) -> Figure:
    """Capture efficiency of single rows and columns of bins, and its distribution."""
    figure, axes = subplots(1, 2, figsize=(8, 2.2), sharey=True)
    for axis, factor, name in zip(
        axes, (store.row_factor[:], store.col_factor[:]), ("row", "column"), strict=True
    ):
        middle = len(factor) // 2
        span = np.arange(middle - 32, middle + 32).clip(0, len(factor) - 1)
        axis.plot(span, factor[span], ".-", color="#444444", lw=0.7, ms=3)
        axis.axhline(1, color="#888888", lw=0.6)
        axis.set_xlabel(f"bin {name} (64 in the middle)")
        axis.set_title(f"median |log₂ ratio| of neighbours {stripe_strength(factor):.2f}")
    axes[0].set_ylabel("counts / neighbourhood")
    axes[0].set_ylim(bottom=0)
    lines = {"row": store.row_factor[:], "column": store.col_factor[:]}
    data = pd.concat(pd.DataFrame({"factor": v}).assign(line=k) for k, v in lines.items())
    return mark(figure, store.source, data.reset_index(names="bin"))
