"""One function per exhibit. Each returns a figure that carries the kind of data it shows."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter, uniform_filter

from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.data.alignment import Shift, stripe_strength
from sparsity_trap.data.patches import PATCH_BINS, PatchStore, assemble
from sparsity_trap.show.maps import gene_map, panel_row, richest_patch, scale_bar
from sparsity_trap.show.style import (
    COUNTS_MAP,
    MSE_COLOUR,
    POISSON_COLOUR,
    Exhibit,
    arm_style,
    mark,
    name_genes,
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


# --- training -------------------------------------------------------------------------------------


def training_dynamics(logs: dict[str, pd.DataFrame], source: str) -> Figure:
    """Loss and PCC at 8 µm on the held-out blocks of the training patients, by epoch.

    Losses of different arms have different units, and some are negative, so each is shown as the
    share of its fall, from the first epoch to the lowest value, that is still to come.
    """
    figure, axes = subplots(1, 2, figsize=(9.4, 3))
    for name, log in logs.items():
        colour, line = arm_style(name)
        loss = log["validation_loss"]
        best, fall = loss.idxmin(), loss.iloc[0] - loss.min()
        left = (loss - loss.min()) / fall if fall > 0 else loss - loss.min()
        for axis, values in zip(axes, (left, log["validation_pcc_8um"]), strict=True):
            axis.plot(log["epoch"], values, line, color=colour, lw=1.4, label=name)
            axis.plot(log["epoch"][best], values[best], "o", color=colour, ms=4.5)
    axes[0].set_ylabel("held-out loss, first epoch 1, lowest 0")
    axes[1].set_ylabel("held-out PCC at 8 µm (mean over genes)")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].legend(
        title="arm (dot: epoch kept)", fontsize=7.5, title_fontsize=7.5,
        loc="center left", bbox_to_anchor=(1, 0.5),
    )  # fmt: skip
    drawn = pd.concat(log.assign(arm=name) for name, log in logs.items())
    return mark(figure, source, drawn.drop(columns="seconds"))  # which no two runs share


# --- results --------------------------------------------------------------------------------------


def collapse_and_recovery(
    table: pd.DataFrame, store: PatchStore, mse: np.ndarray, poisson: np.ndarray, gene: str
) -> Figure:
    """The combined figure: one gene's patch under both losses, and every gene's PCC at 8 µm.

    Parameters
    ----------
    table
        Table S1 (`stats.gene_table`).
    store
        Patches of the test patient.
    mse, poisson
        Predicted rates [N, G, 128, 128] (any array type).
    gene
        Gene of the upper row.
    """
    figure = Exhibit(figsize=(9.4, 6.4))
    figure.tissue = True
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    index = store.genes.index(gene)
    patch = richest_patch(store, index)
    axes = upper.subplots(1, 4)
    panel_row(
        axes, store.images[patch],
        [bin_sum(x[patch, index].astype(np.float32), 4) for x in (store.counts, mse, poisson)],
        bin_mask(store.mask[patch], 4), gene, pixel_um=256 / 224, length_um=50,
    )  # fmt: skip
    for axis, title in zip(axes, ("H&E", "counts", "MSE (D)", "Poisson (E)"), strict=True):
        axis.set_title(title)
    upper.suptitle(f"a   {gene}, one patch at 8 µm", x=0.01, ha="left", weight="bold")
    left, right = lower.subplots(1, 2, width_ratios=(2.6, 1))
    _gene_dumbbells(left, table)
    left.set_title("b   per-gene PCC at 8 µm, within tissue", loc="left", weight="bold")
    _score_bars(right, table)
    right.set_title("c   mean over genes", loc="left", weight="bold")
    return mark(figure, store.source, table[_both(table, *_BAR_SCORES)])


def _gene_dumbbells(axis: Axes, table: pd.DataFrame) -> None:
    table = table.sort_values("pcc_8um_poisson", ascending=False).reset_index(drop=True)
    x = np.arange(len(table))
    low, high = table["pcc_8um_mse"], table["pcc_8um_poisson"]
    axis.vlines(x, low, high, color="#BBBBBB", lw=1.2)
    axis.plot(x, low, "o", color=MSE_COLOUR, ms=3.5, label="MSE (D)")
    axis.plot(x, high, "o", color=POISSON_COLOUR, ms=3.5, label="Poisson (E)")
    axis.axhline(0, color="#888888", lw=0.6)
    name_genes(axis, table, fontsize=5.8, style="italic")
    axis.set_xlim(-1, len(table))
    axis.set_ylabel("PCC")
    axis.legend(fontsize=7.5)


_BAR_SCORES = {"pcc_2um": "PCC\n2 µm", "pcc_8um": "PCC\n8 µm", "ssim_2um": "SSIM\n2 µm"}


def _both(table: pd.DataFrame, *scores: str) -> list[str]:
    """Columns of table S1 with some scores of both losses."""
    return ["gene", "category", *(f"{s}_{loss}" for s in scores for loss in ("mse", "poisson"))]


def _score_bars(axis: Axes, table: pd.DataFrame) -> None:
    scores = _BAR_SCORES
    x = np.arange(len(scores))
    for shift, name, colour in ((-0.2, "mse", MSE_COLOUR), (0.2, "poisson", POISSON_COLOUR)):
        values = [table[f"{score}_{name}"].mean() for score in scores]
        axis.bar(x + shift, values, 0.38, color=colour)
        for i, value in enumerate(values):
            axis.text(i + shift, max(value, 0), f"{value:.2f}", ha="center", va="bottom", size=7)
    axis.axhline(0, color="#888888", lw=0.6)
    axis.set_xticks(x, scores.values())


# --- maps -----------------------------------------------------------------------------------------


def section_panels(
    store: PatchStore, genes: Sequence[str], mse: np.ndarray, poisson: np.ndarray
) -> Figure:
    """Whole section at 8 µm: H&E, counts, MSE and Poisson, one colour scale per gene."""
    figure, axes = subplots(
        len(genes), 4, figsize=(9.4, 2.35 * len(genes)), tissue=True, squeeze=False
    )
    image = store.overview[:]
    mask = assemble(store, bin_mask(store.mask[:], 4).astype(np.float32), 4) > 0.5
    for row, gene in zip(axes, genes, strict=True):
        index = store.genes.index(gene)
        maps = [assemble(store, gene_map(x, index), 4) for x in (store.counts, mse, poisson)]
        height, width = mask.shape
        panel_row(row, image[:height, :width], maps, mask, gene, pixel_um=8, length_um=500)
    for axis, title in zip(axes[0], ("H&E", "counts", "MSE (D)", "Poisson (E)"), strict=True):
        axis.set_title(title)
    return mark(figure, store.source)


def rescue_panels(
    store: PatchStore,
    genes: Sequence[str],
    mse: np.ndarray,
    poisson: np.ndarray,
    table: pd.DataFrame,
) -> Figure:
    """The patch richest in each gene at 8 µm, titled with the gene's scores on the whole section."""
    figure, axes = subplots(
        len(genes), 4, figsize=(8.6, 2.25 * len(genes)), tissue=True, squeeze=False
    )
    scores = table.set_index("gene")
    data = []
    for row, gene in zip(axes, genes, strict=True):
        index = store.genes.index(gene)
        patch = richest_patch(store, index)
        maps = [
            bin_sum(x[patch, index].astype(np.float32), 4) for x in (store.counts, mse, poisson)
        ]
        mask = bin_mask(store.mask[patch], 4)
        panel_row(row, store.images[patch], maps, mask, gene, pixel_um=256 / 224, length_um=50)
        own = scores.loc[gene]
        row[0].set_title("H&E")
        row[1].set_title("counts")
        row[2].set_title(f"MSE (D)  PCC {own['pcc_8um_mse']:.2f}")
        row[3].set_title(f"Poisson (E)  PCC {own['pcc_8um_poisson']:.2f}")
        values = dict(zip(("counts", "mse", "poisson"), (m[mask] for m in maps), strict=True))
        rows, cols = np.nonzero(mask)
        place = {"gene": gene, "patch": patch, "row": rows, "column": cols}
        data.append(pd.DataFrame(place | values))
    return mark(figure, store.source, pd.concat(data) if data else None)
