# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""
patient = "P5"

# %% tags=["remove-input", "title"]
from IPython.display import Markdown

Markdown(f"# Patient {patient}")

# %% [markdown]
# The section is read from its Space Ranger folder in one streaming pass, and cut into patches of 128 × 128 bins of 2 µm. Each patch's H&E is resampled to
# 224 × 224 pixels through the map from array to image that is fitted to the positions of its own bins.

# %%
import hashlib

import numpy as np
import pandas as pd
import scanpy as sc
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from scipy.ndimage import correlate1d, gaussian_filter, uniform_filter

from sparsity_trap import runs
from sparsity_trap.bins import PATCH_BINS
from sparsity_trap.data import alignment, patches, spaceranger
from sparsity_trap.data.genes import in_panel
from sparsity_trap.data.geometry import coarse_fit, fit_grid_to_pixels, orientation_of
from sparsity_trap.data.image import open_image
from sparsity_trap.quotes import Quotes
from sparsity_trap.show import maps, style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = Quotes(settings, f"01_data_{patient}")
store = runs.store(settings, patient)  # patches and tokens are computed where they are missing
tokens = runs.tokens(settings, patient)

# %% [markdown]
# ## From array to image
#
# Space Ranger lists the pixel position of every bin. One affine map, fitted to every 16th bin in both directions, tells how the array lies in the image: rows of bins often run
# against rows of pixels. The array is turned until both run alike, never mirrored.

# %%
slide = runs.section(settings, patient).open()
positions = spaceranger.read_positions(slide.outs)
turn = orientation_of(coarse_fit(positions.y, positions.x))
tissue, y, x = (turn.apply(grid) for grid in positions)
turn

# %% [markdown]
# A whole section bends by some pixels, so each patch gets a map of its own. This is the middle one: its map, its picture, and the counts of one gene, read from the files.

# %%
patch = len(store) // 2
row, col = store.origin[patch]
window = patches.patch_window(row, col)
rows, cols = np.indices(y[window].shape).reshape(2, -1)
fit = fit_grid_to_pixels(rows + row, cols + col, y[window].ravel(), x[window].ravel())
with open_image(slide.image) as image:
    picture = patches.resample(image, fit, row, col, tissue.shape)
counts = spaceranger.read_counts(slide.outs, store.genes)  # bins of the array × genes
gene = turn.apply(counts[:, [0]].toarray().reshape(slide.array_shape))[window]
assert np.array_equal(picture, store.images[patch]) and np.array_equal(gene, store.counts[patch, 0])
Markdown(f"Patch {patch}: positions differ from its map by {fit.rms_px:.2f} px r.m.s.")

# %% tags=["hide-input"]
shift = alignment.count_image_shift(store.images, store.counts)
left_out = ", ".join(f"{bins} bins {why}" for why, bins in store.left_out.items() if bins)
Markdown(
    f"""
| | |
|---|---|
| patches kept | {len(store)} |
| array, in bins | {store.grid_shape[0]} × {store.grid_shape[1]} |
| image scale | {store.microns_per_pixel:.4f} µm per pixel |
| in tissue | {store.mask[:].mean():.0%} of the bins of these patches |
| left out of the tissue | {left_out or "no bin"} |
| registration, one map per patch | {store.registration["patch_rms_px"]:.3f} px r.m.s. |
| registration, one map for the section | {store.registration["section_max_px"]:.2f} px at most |
| counts against image | {shift.rows:+.1f} rows, {shift.columns:+.1f} columns of bins |
"""
)

# %% [markdown]
# The share of bins in tissue without a count is the sparsity of a gene.

# %%
digest = hashlib.sha256(" ".join(store.genes).encode())
bins, zeros = 0, np.zeros(len(store.genes))
for parts in zip(store.images, store.counts, store.mask, strict=True):
    for part in parts:
        digest.update(np.ascontiguousarray(part))
    bins += parts[2].sum()
    zeros += (parts[1][:, parts[2]] == 0).sum(axis=1)
quote("cohort.n_patches", **{patient: len(store)})
quote("cohort.sparsity", **{patient: (zeros / bins).mean()})
quote("cohort.sha256", **{patient: digest.hexdigest()})
Markdown(f"On average over genes, {(zeros / bins).mean():.1%} of the bins in tissue hold no count.")

# %% [markdown]
# ## Section
#
# Counts and image must show the same tissue at the same place.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "The section: H&E (**a**), total counts of the panel per 8 µm bin (**b**), and both overlaid with the patches that are kept (**c**)."}, "image": {"alt": "H&E, count map and overlay of one section"}}
overview, total = store.overview[:], store.total[:].astype(float)
top = np.percentile(total[total > 0], 99.5) if total.any() else 1
colours = {"cmap": style.COUNTS_MAP, "norm": PowerNorm(0.5, 0, top)}
figure, axes = style.subplots(1, 3, figsize=(9.4, 3.4), tissue=True)
axes[0].imshow(overview)
shown = axes[1].imshow(total, **colours)
figure.colorbar(shown, ax=axes[1], shrink=0.7, label="UMI per 8 µm")
axes[2].imshow(overview.mean(-1), cmap="gray", alpha=0.55)
axes[2].imshow(total, **colours, alpha=0.5)
side = PATCH_BINS // 4
for first_row, first_col in store.origin[:] / 4:
    corner = first_col - 0.5, first_row - 0.5
    axes[2].add_patch(Rectangle(corner, side, side, fill=False, ec="w", lw=0.7))
maps.scale_bar(axes[0], 8.0, 500 if overview.shape[1] * 8 > 1000 else 200)
titles = f"H&E, patient {patient}", "panel counts per 8 µm bin", f"overlay, {len(store)} patches"
for axis, title in zip(axes, titles, strict=True):
    axis.set_title(title)
    axis.set_axis_off()
style.letter(*axes)
style.mark(figure, store.source)

# %% tags=["remove-input"]
Markdown(
    f"**Warning:** {shift.warning}."
    if shift.warning
    else "Counts and image show no shift against each other."
)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Registration. **a** H&E. **b** Contours enclose bins with many counts; they must follow dark tissue. **c** Mean over patches of the correlation of optical density with counts at every offset; the cross marks its peak, which should lie at zero."}, "image": {"alt": "Close-up of H&E with count contours, and a correlation map"}}
# The window where tissue begins and ends most, so that edges can be compared.
side = min(64, *total.shape)
covered = uniform_filter((total > 0).astype(float), side)
middle = np.unravel_index(np.argmin(np.abs(covered - 0.6)), covered.shape)
near = tuple(
    slice(first, first + side)
    for first in (
        int(np.clip(m - side // 2, 0, n - side)) for m, n in zip(middle, total.shape, strict=True)
    )
)
smooth = gaussian_filter(total[near], 0.8)
levels = np.quantile(smooth[smooth > 0], (0.5, 0.8)) if (smooth > 0).any() else [0.5, 1]
figure, axes = style.subplots(1, 3, figsize=(9.4, 3.3), tissue=True, width_ratios=(1, 1, 1.15))
for axis, title in zip(axes[:2], ("H&E, close up", "contours of the counts"), strict=True):
    axis.imshow(overview[near])
    axis.set_title(title)
    axis.set_axis_off()
axes[1].contour(smooth, levels=levels, colors=["#00E5FF", "#FFE600"], linewidths=0.8)
maps.scale_bar(axes[0], 8.0, 100)
reach = alignment.REACH
extent = (-reach - 0.5, reach + 0.5, reach + 0.5, -reach - 0.5)
shown = axes[2].imshow(shift.correlation, cmap=style.SCORE_MAP, extent=extent)
axes[2].plot(shift.columns, shift.rows, "+", color="#D55E00", ms=9, mew=1.6)
axes[2].set_xlabel("offset in columns (2 µm bins)")
axes[2].set_ylabel("offset in rows")
axes[2].set_title("correlation of darkness and counts")
figure.colorbar(shown, ax=axes[2], shrink=0.8)
style.letter(*axes)
offsets = np.indices(shift.correlation.shape).reshape(2, -1) - reach
drawn = {"rows": offsets[0], "columns": offsets[1], "correlation": shift.correlation.ravel()}
style.mark(figure, store.source, pd.DataFrame(drawn), patches=len(store))

# %% [markdown]
# ## Quality of the bins
#
# All genes of the section, summed to bins of 8 µm as Space Ranger sums them, and what scanpy says of these bins. Few genes and many mitochondrial counts mark damaged or bare tissue.

# %%
table = spaceranger.read_8um_table(slide.outs)
table.var["mt"] = table.var_names.str.startswith("MT-")
sc.pp.calculate_qc_metrics(table, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)
quality = table.obs[["total_counts", "n_genes_by_counts", "pct_counts_mt"]]
names = ["total counts", "genes with a count", "mitochondrial counts, %"]
quantiles = quality.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).set_axis(names, axis=1)
tables.show(quantiles.rename_axis("share of bins below").reset_index(), digits=2)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Bins of 8 µm by their total counts, number of genes with a count, and share of mitochondrial counts. The line marks the median."}, "image": {"alt": "Three histograms of quality measures of 8 µm bins"}}
figure, axes = style.subplots(1, 3, figsize=(9.4, 2.4))
histograms = []
for axis, column, name in zip(axes, quality, names, strict=True):
    values = quality[column].dropna()
    top = np.ceil(max(values.quantile(0.995), 1))
    number, edges = np.histogram(values, int(min(50, top)), (0, top))
    axis.stairs(number, edges, fill=True, color="#888888")
    axis.axvline(values.median(), color="#D55E00", lw=1)
    axis.set_xlabel(name)
    drawn = {"measure": column, "from": edges[:-1], "to": edges[1:], "bins": number}
    histograms.append(pd.DataFrame(drawn))
axes[0].set_ylabel("bins of 8 µm")
style.mark(figure, store.source, pd.concat(histograms))

# %% [markdown]
# ## Patches
#
# What a model sees, and what it is asked to predict. At 2 µm most bins of most genes hold a zero.

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Patches from the section: H&E, tissue mask, and counts at 2 µm of four genes (colour scale from 0 to 3 UMI)."}, "image": {"alt": "Patches with H&E, mask and counts of four genes"}}
genes = in_panel(["MT-CO3", "CEACAM5", "COL1A1", "IGKC"], store.genes)
chosen = np.linspace(0, len(store) - 1, 3).astype(int)
size = 1.55 * (2 + len(genes)), 1.6 * len(chosen)
figure, axes = style.subplots(len(chosen), 2 + len(genes), figsize=size, tissue=True, squeeze=False)
for line, number in zip(axes, chosen, strict=True):
    line[0].imshow(store.images[number])
    line[0].set_ylabel(f"patch {number}")
    grey = {"cmap": "Greys", "vmin": -0.4, "vmax": 1.4, "interpolation": "nearest"}
    line[1].imshow(store.mask[number], **grey)
    for axis, name in zip(line[2:], genes, strict=True):
        values = store.counts[number, store.genes.index(name)]
        axis.imshow(np.minimum(values, 3), cmap="magma", vmin=0, vmax=3)
for axis in axes.flat:
    axis.set_xticks([])
    axis.set_yticks([])
for axis, title in zip(axes[0], ["H&E", "in tissue", *genes], strict=True):
    axis.set_title(title, style="italic" if title in genes else "normal")
maps.scale_bar(axes[0, 0], 256 / 224, 50)
style.mark(figure, store.source)

# %% [markdown]
# ## Stripes
#
# Capture efficiency alternates between neighbouring rows and columns of bins. No image can tell, so a model cannot predict it; at 8 µm most of it averages out.
#
# The factor of a line is its counts over those expected from the lines around, bins of the same columns (rows) alone, so that tissue that begins or ends along the way does not count as a
# stripe. Of the four lines on either side the outermost weigh half, so that an alternation averages out. Lines with fewer than 30 bins in tissue have no factor. Counts are never edited.

# %%
panel_counts = turn.apply(np.asarray(counts.sum(axis=1)).reshape(slide.array_shape))
weights = [0.5, 1, 1, 1, 1, 1, 1, 1, 0.5]


def line_factors(counts, tissue):
    bins, own = tissue.astype(np.float32), counts * tissue.astype(np.float32)
    near, bins_near = (correlate1d(z, weights, axis=0, mode="constant") for z in (own, bins))
    expected = np.divide(near, bins_near, out=np.zeros_like(near), where=tissue).sum(1)
    known = (bins.sum(1) >= 30) & (expected > 0)
    return np.divide(own.sum(1), expected, out=np.full(len(own), np.nan), where=known)


factors = {
    "row": line_factors(panel_counts, tissue),
    "column": line_factors(panel_counts.T, tissue.T),
}
strength = {
    name: float(np.nanmedian(np.abs(np.diff(np.log2(np.where(factor > 0, factor, np.nan))))))
    for name, factor in factors.items()
}
of = ", ".join(f"{key}s {value:.2f}" for key, value in strength.items())
Markdown(f"Median \\|log₂ ratio\\| of neighbouring {of}.")

# %% tags=["hide-input"] mystnb={"figure": {"caption": "Counts of single rows and columns of bins relative to the lines around them."}, "image": {"alt": "Row and column means with period two"}}
figure, axes = style.subplots(1, 2, figsize=(8, 2.2), sharey=True)
for axis, (name, factor) in zip(axes, factors.items(), strict=True):
    span = np.arange(len(factor) // 2 - 32, len(factor) // 2 + 32).clip(0, len(factor) - 1)
    axis.plot(span, factor[span], ".-", color="#444444", lw=0.7, ms=3)
    axis.axhline(1, color="#888888", lw=0.6)
    axis.set_xlabel(f"bin {name} (64 in the middle)")
    axis.set_title(f"median |log₂ ratio| of neighbours {strength[name]:.2f}")
axes[0].set_ylabel("counts / neighbourhood")
axes[0].set_ylim(bottom=0)
drawn = pd.concat(pd.DataFrame({"factor": v}).assign(line=k) for k, v in factors.items())
style.mark(figure, store.source, drawn.reset_index(names="bin"))
