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
# The predictions of one run as AnnData, at 8 µm for all genes and at 2 µm for those shown below. The section is the run's test patient, or with `image` any H&E image whose µm per pixel are known; that needs no counts. scanpy and squidpy read both files.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""
arm = "E"
test_patient = "P5"
seed = 0
image = ""
microns_per_pixel = 0.0
output = ""

# %% tags=["remove-cell"]
from pathlib import Path

import numpy as np
from IPython.display import Markdown

from sparsity_trap import runs
from sparsity_trap.data.genes import in_panel
from sparsity_trap.data.sections import open_preset
from sparsity_trap.predict import predict_image, predict_section, write
from sparsity_trap.settings import ROOT, Run
from sparsity_trap.show import style

settings = open_preset(preset, source, cohort)
run = Run(arm=arm, test_patient=test_patient, seed=seed)

# %% tags=["hide-input"]
folder = runs.run(settings, run)


def predicted(**options):
    if image:
        return predict_image(folder, ROOT / image, microns_per_pixel, **options)
    store = runs.store(settings, test_patient)
    return predict_section(folder, store, runs.section(settings, test_patient).open(), **options)


section = predicted()
shown = in_panel(["PIGR", "CEACAM5", "COL1A1"], section.var_names)
small = predicted(bin_um=2, genes=shown)

# %% tags=["hide-input"]
(library,) = section.uns["spatial"]
target = ROOT / output if output else settings.folder / "predictions"
written = [
    write(table, target / f"{run.name}_{library}_{size}.h5ad")
    for table, size in ((section, "008um"), (small, "002um"))
]

# %% tags=["remove-input"]
origin = section.uns["sparsity_trap"]
Markdown(
    f"""
| | |
|---|---|
| run | {origin["run"]} of preset {origin["preset"]}, trained on {", ".join(origin["training_patients"])} |
| section | {library}{" (no counts)" if image else ""} |
| 8 µm | {section.n_obs:,} bins × {section.n_vars} genes |
| 2 µm | {small.n_obs:,} bins × {small.n_vars} genes |
| files | {", ".join(f"`{Path(path).name}`" for path in written)} |
"""
)

# %% tags=["hide-input"] mystnb={"figure": {"caption": "H&E and predicted counts per 8 µm bin, drawn from the table alone: positions in pixels of the full-resolution image, times the scale of the small one."}, "image": {"alt": "H&E of the section and predicted counts of three genes"}}
picture = section.uns["spatial"][library]
factors = picture["scalefactors"]
x, y = section.obsm["spatial"].T * factors["tissue_hires_scalef"]
width = factors["spot_diameter_fullres"] * factors["tissue_hires_scalef"]
figure = style.Exhibit(figsize=(9.4, 2.6))
axes = figure.subplots(1, len(shown) + 1)
for axis, gene in zip(axes, ["H&E", *shown], strict=True):
    axis.imshow(picture["images"]["hires"])
    axis.set_axis_off()
    axis.set_title(gene, style="italic" if gene in shown else "normal")
for axis, gene in zip(axes[1:], shown, strict=True):
    rate = np.asarray(section[:, gene].X).ravel()
    low, top = np.percentile(rate, [2, 99.5])
    dots = axis.scatter(x, y, c=rate, vmin=low, vmax=top, marker="s", cmap="magma", linewidths=0)
    figure.colorbar(dots, ax=axis, shrink=0.8)
figure.draw_without_rendering()  # the size of a bin in points is known only now
for axis in axes[1:]:
    left, right = axis.transData.transform([(0, 0), (width, 0)])[:, 0]
    axis.collections[0].set_sizes([(1.1 * (right - left) * 72 / figure.dpi) ** 2])
style.mark(figure, settings.source)
