# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Rescued genes, seen on the tissue
#
# **Finding.** The gene that gains most, {val}`delta.best_gene`, gains {val}`delta.best_gain:+.2f` in PCC at 8 µm; the median gene gains {val}`delta.median_gain:+.2f`. That the genes which the publication shows gain more than others is {val}`verdict.rescued_genes`.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""
genes = ""  # such as MUC12,JCHAIN; empty: those of which the publication shows the rescue

# %%
import numpy as np
import pandas as pd

from sparsity_trap import runs
from sparsity_trap.analysis import published
from sparsity_trap.analysis.association import gene_table, mean_table
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.data.genes import in_panel
from sparsity_trap.data.patches import assemble
from sparsity_trap.settings import MSE_ARM, POISSON_ARM, UserError
from sparsity_trap.show import maps, style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
mse, poisson = runs.contrast(settings)  # a run of D and of E on the main patient
table = gene_table(mse.genes, poisson.genes).set_index("gene")  # scores of these two
scores = runs.long_table(settings, runs.load_all(settings))
means = mean_table(scores, settings.main_patient, MSE_ARM, POISSON_ARM).set_index("gene")
store = runs.store(settings, settings.main_patient)
ended = {r.run.arm: " collapsed" * runs.collapsed(r.genes) for r in (mse, poisson)}
columns = ("H&E", "counts", f"MSE (D){ended[MSE_ARM]}", f"Poisson (E){ended[POISSON_ARM]}")

# %% [markdown]
# Maps are of one run of each arm: seed {val}`maps.seed_mse` of arm D, seed {val}`maps.seed_poisson` of arm E. Another training of the same arms gives other maps; how far runs differ is in [](03_results.ipynb). The gene that gains most from D to E, mean over {val}`delta.n_runs` runs, is {val}`delta.best_gene` ({val}`delta.best_gain:+.3f` in PCC at 8 µm). All genes can be seen on the section in the [browser](05b_browser), with panels that move together and a slider between two of them.
#
# ## Whole sections
#
# Genes that the publication shows, where the panel has them. All maps of a row share the colour scale of the counts. A prediction is an expected count, so it is smoother than a count even where it is right.

# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-sections", "caption": "Four genes on the whole test section at 8 µm, in one run of each arm."}, "image": {"alt": "H&E, counts, MSE and Poisson predictions of four genes on the whole section"}}
shown = in_panel(["PIGR", "CEACAM5", "COL1A1", "CD74"], store.genes)
tissue = assemble(store, maps.tissue_bins(store).astype(np.float32), 4) > 0.5
height, width = tissue.shape
image = store.overview[:height, :width]
figure, axes = style.subplots(
    len(shown), 4, figsize=(9.4, 2.35 * len(shown)), tissue=True, squeeze=False
)
for row, gene in zip(axes, shown, strict=True):
    index = store.genes.index(gene)
    drawn = [
        assemble(store, maps.gene_map(values, index), 4)
        for values in (store.counts, mse.predictions, poisson.predictions)
    ]
    maps.panel_row(row, image, drawn, tissue, gene, pixel_um=8, length_um=500)
for axis, title in zip(axes[0], columns, strict=True):
    axis.set_title(title)
style.mark(figure, store.source)


# %% tags=["hide-input"]
def patches_of(genes):
    """Draw the patch richest in each gene at 8 µm, titled with its scores on the whole section."""
    figure, axes = style.subplots(
        len(genes), 4, figsize=(8.6, 2.25 * len(genes)), tissue=True, squeeze=False
    )
    data = []
    for row, gene in zip(axes, genes, strict=True):
        index = store.genes.index(gene)
        patch = maps.richest_patch(store, index)
        drawn = {
            name: bin_sum(values[patch, index].astype(np.float32), 4)
            for name, values in (
                ("counts", store.counts), ("mse", mse.predictions), ("poisson", poisson.predictions)
            )
        }  # fmt: skip
        tissue = bin_mask(store.mask[patch], 4)
        maps.panel_row(
            row, store.images[patch], list(drawn.values()), tissue, gene, 256 / 224, length_um=50
        )
        pcc = table.loc[gene, ["pcc_8um_mse", "pcc_8um_poisson"]]
        for axis, title, score in zip(row, columns, ["", "", *pcc], strict=True):
            axis.set_title(f"{title}  PCC {score:.2f}" if score != "" else title)
        rows, cols = np.nonzero(tissue)
        place = {"gene": gene, "patch": patch, "row": rows, "column": cols}
        data.append(pd.DataFrame(place | {name: m[tissue] for name, m in drawn.items()}))
    return style.mark(figure, store.source, pd.concat(data))


# %% tags=["remove-cell", "front-page"]
patches_of([means["delta_pcc_8um"].idxmax()])

# %% [markdown]
# ## Rescues
#
# The genes asked for: by default MUC12, JCHAIN, DES and FCGBP, where the panel has them, as the publication shows them. Each is drawn in the patch with most counts of it. The PCC is that of this run on the whole section, not of the patch shown.

# %%
rescued = ["MUC12", "JCHAIN", "DES", "FCGBP"]
asked = genes.split(",") if genes else in_panel(rescued, store.genes)
unknown = ", ".join(gene for gene in asked if gene not in store.genes)
if unknown:
    known = ", ".join(store.genes[:3])
    raise UserError(f"genes: the panel has no {unknown}; name some that it has, such as {known}")

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-rescue", "caption": "Genes whose rescue the publication shows, or those asked for, in one run of each arm."}, "image": {"alt": "H&E, counts, MSE and Poisson predictions of these genes in one patch each"}}
patches_of(asked)

# %% [markdown]
# ## The largest mean gains

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-largest", "caption": "The four genes with the largest gain in PCC at 8 µm, mean over runs; maps and scores of one run of each arm."}, "image": {"alt": "H&E, counts, MSE and Poisson predictions of the four genes with the largest gain"}}
largest = means["delta_pcc_8um"].fillna(-np.inf).nlargest(4).index.tolist()
patches_of(largest)

# %% [markdown]
# Scores of all genes drawn on this page, on the whole section; of the runs shown, and the mean gain over runs:

# %%
drawn = list(dict.fromkeys([*shown, *asked, *largest]))
columns = ["category", "sparsity", "pcc_8um_mse", "pcc_8um_poisson", "delta_pcc_8um"]
beside = table.loc[drawn, columns].assign(mean_delta=means["delta_pcc_8um"])
tables.show(beside, index=True, missing="undefined")

# %% [markdown]
# ## Beside the published values
#
# Of this build, means over runs. The published columns are of one run, and come from real sections and another encoder.

# %%
columns = ["pcc_8um_mse", "pcc_8um_poisson", "delta_ssim_2um"]
sides = {"published": published.RESCUES.set_index("gene"), "this build": means}
beside = pd.concat({name: side[columns] for name, side in sides.items()}, axis=1)
beside = beside.reindex(published.RESCUES["gene"]).swaplevel(axis=1)
tables.show(beside[columns], index=True, missing="undefined")
