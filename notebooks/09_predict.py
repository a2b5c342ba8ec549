# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Predictions for other tools
#
# The predictions of one run as AnnData, at 8 µm for all genes and at 2 µm for those shown below. The section is the run's test patient, or with `image` any H&E image whose µm per pixel are known; that needs no counts. scanpy and squidpy read both files; the table at 8 µm is written as SpatialData too.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""
arm = "E"
test_patient = "P5"
seed = 0
image = ""
microns_per_pixel = 0.0
cells = ""
cell_types = ""
output = ""

# %% tags=["remove-stderr"]
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import shapely
import squidpy as sq
from IPython.display import Markdown, display
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Scale

from sparsity_trap import runs
from sparsity_trap.cells import ALL_CELLS, score_cells, score_genes
from sparsity_trap.data.cells import has_cells, read_cells
from sparsity_trap.data.genes import in_panel
from sparsity_trap.files import building
from sparsity_trap.predict import predict_image, predict_section, write
from sparsity_trap.settings import ROOT, Run
from sparsity_trap.show import style, tables

# %%
style.use()
settings = runs.open_preset(preset, source, cohort)
run = Run(arm=arm, test_patient=test_patient, seed=seed)
folder = runs.run(settings, run)


# %%
def predicted(**options):
    if image:
        return predict_image(folder, ROOT / image, microns_per_pixel, **options)
    store = runs.store(settings, test_patient)
    return predict_section(folder, store, runs.section(settings, test_patient).open(), **options)


section = predicted()
shown = in_panel(["PIGR", "CEACAM5", "COL1A1"], section.var_names)
small = predicted(bin_um=2, genes=shown)
print(section)

# %% [markdown]
# `X` holds the expected UMI count per bin, `layers["counts"]` what was measured in the same bins, `obsm["spatial"]` pixels of the full-resolution image, and `uns["sparsity_trap"]` where the table comes from.

# %%
(library,) = section.uns["spatial"]
target = ROOT / output if output else settings.folder / "predictions"
written = [
    write(table, target / f"{run.name}_{library}_{size}.h5ad")
    for table, size in ((section, "008um"), (small, "002um"))
]
spatial_path = target / f"{run.name}_{library}_008um.zarr"

# %% [markdown]
# Drawn by squidpy, from the table alone:

# %% mystnb={"figure": {"caption": "H&E and predicted counts per 8 µm bin, drawn by squidpy from the table alone: positions in pixels of the full-resolution image, times the scale of the small one."}, "image": {"alt": "H&E of the section and predicted counts of three genes"}}
figure, axes = style.subplots(1, len(shown) + 1, figsize=(9.4, 2.6), tissue=True)
options = {"library_id": library, "frameon": False, "colorbar": False, "fig": figure}
sq.pl.spatial_scatter(section[:1], ax=axes[0], title="H&E", **options)  # no colour: the image
frame = {"xlim": axes[0].get_xlim(), "ylim": axes[0].get_ylim()}
options |= {"shape": None, "size": 1.2, "cmap": "magma"}  # dots that touch: squares take seconds
for axis, gene in zip(axes[1:], shown, strict=True):
    low, high = np.percentile(section[:, gene].X, [2, 99.5])
    sq.pl.spatial_scatter(section, color=gene, vmin=low, vmax=high, ax=axis, **options)
    axis.set(**frame)
    axis.set_title(gene, style="italic")
    figure.colorbar(axis.collections[0], ax=axis, shrink=0.8)
style.mark(figure, settings.source)

# %% [markdown]
# The same bins as SpatialData: the table, a square per bin, and the H&E. Its system `global` is that of full-resolution pixels, counted from the image's corner and so half a pixel more than in `obsm`. Squares are drawn parallel to the image; in real sections bins lie turned by a degree or two.

# %%
picture = section.uns["spatial"][library]
factors = picture["scalefactors"]
centre, half = section.obsm["spatial"] + 0.5, factors["spot_diameter_fullres"] / 2
squares = shapely.box(*(centre - half).T, *(centre + half).T)
bins = ShapesModel.parse(geopandas.GeoDataFrame(geometry=squares, index=section.obs_names))
zoom = 1 / factors["tissue_hires_scalef"]
hires = Image2DModel.parse(
    picture["images"]["hires"], dims=("y", "x", "c"), c_coords=["r", "g", "b"],
    transformations={"global": Scale([zoom, zoom], axes=("y", "x"))},
)  # fmt: skip

# %% tags=["remove-stderr"]
table = section.copy()
del table.uns["spatial"]  # the image is an element of its own
table.obs["region"], table.obs["bin"] = pd.Categorical(["bins"] * table.n_obs), table.obs_names
predictions = TableModel.parse(table, "bins", "region", "bin")
spatial = SpatialData(
    images={"hires": hires}, shapes={"bins": bins}, tables={"predictions": predictions}
)
print(spatial)
with building(spatial_path) as partial:  # the folder appears only when complete
    spatial.write(partial)

# %% [markdown]
# ## Cells
#
# Where Space Ranger 4 has segmented nuclei, or `cells` names a table of bin and cell, the same predictions are summed to cells, and so are the counts. A cell is kept when more than half of its bins are in tissue and in a patch; its place is the centre of its polygon. A large cell has more of everything, so each correlation over cells stands beside that of the counts with the number of the cell's bins.

# %%
by_cell = None
if not image:
    outs = runs.section(settings, test_patient).outs
    if cells or has_cells(outs):
        bins, kinds = (ROOT / path if path else None for path in (cells, cell_types))
        by_cell = predicted(cells=read_cells(outs, bins, types=kinds))
        written.append(write(by_cell, target / f"{run.name}_{library}_cells.h5ad"))
print("The cells of this section are not known." if by_cell is None else by_cell)

# %% [markdown]
# Each gene over cells, as means over genes: for all cells, and within each type, where it is no help to tell types apart. D² is beyond a prediction that gives every bin of the group's cells the same.

# %%
if by_cell is not None:
    over_cells = score_genes(by_cell).groupby("cell_type", sort=False)
    shown_scores = ["cells", "mean_count", "pcc", "pcc_bins", "spearman", "d2", "calibration"]
    display(tables.show(over_cells[shown_scores].mean(), index=True))

# %% [markdown]
# Each cell over genes, as means over cells, beside a prediction that gives every cell the genes' mean counts:

# %%
if by_cell is not None:
    each = score_cells(by_cell)
    each["cell_type"] = each.get("cell_type", ALL_CELLS)
    over_genes = each.groupby("cell_type", observed=True)
    display(
        tables.show(over_genes[["bins", "count", "rate", "pcc", "pcc_mean"]].mean(), index=True)
    )

# %% tags=["remove-input"]
origin = section.uns["sparsity_trap"]
files = ", ".join(f"`{Path(path).name}`" for path in [*written, spatial_path])
Markdown(
    f"""
| | |
|---|---|
| run | {origin["run"]} of preset {origin["preset"]}, trained on {", ".join(origin["training_patients"])} |
| section | {library}{" (no counts)" if image else ""} |
| 8 µm | {section.n_obs:,} bins × {section.n_vars} genes |
| 2 µm | {small.n_obs:,} bins × {small.n_vars} genes |
| cells | {"not known" if by_cell is None else f"{by_cell.n_obs:,} cells × {by_cell.n_vars} genes"} |
| files | {files} |
"""
)
