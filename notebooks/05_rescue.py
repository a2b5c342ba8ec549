# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Rescued genes, seen on the tissue

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %% tags=["remove-cell"]
import pandas as pd

from sparsity_trap import runs as results
from sparsity_trap.analysis import association as stats
from sparsity_trap.analysis import published
from sparsity_trap.data.genes import in_panel
from sparsity_trap.data.sections import open_preset
from sparsity_trap.show import figures, tables

settings = open_preset(preset, source, cohort)
mse, poisson = results.contrast(settings)
genes = stats.gene_table(mse.genes, poisson.genes)
store = results.store(settings, settings.main_patient)

# %% [markdown]
# The gene that gains most from D to E in this run is {val}`delta.best_gene` ({val}`delta.best_gain:+.3f` in PCC at 8 µm). All genes can be seen on the section in the [browser](05b_browser), with panels that move together and a slider between two of them.
#
# ## Whole sections
#
# The four genes that the publication shows, where the panel has them. All maps of a row share the colour scale of the counts. A prediction is an expected count, so it is smoother than a count even where it is right.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-sections", "caption": "Four genes on the whole test section at 8 µm."}, "image": {"alt": "H&E, counts, MSE and Poisson predictions of four genes on the whole section"}}
shown = in_panel(["PIGR", "CEACAM5", "COL1A1", "CD74"], store.genes)
figures.section_panels(store, shown, mse.predictions, poisson.predictions)

# %% [markdown]
# ## The published rescues
#
# MUC12, JCHAIN, DES and FCGBP, where the panel has them, in the patch with most counts of the gene. The PCC is that of the whole section, not of the patch shown.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-rescue", "caption": "Genes whose rescue the publication shows, in this run."}, "image": {"alt": "H&E, counts, MSE and Poisson predictions of four genes in one patch each"}}
shown = in_panel(["MUC12", "JCHAIN", "DES", "FCGBP"], store.genes)
figures.rescue_panels(store, shown, mse.predictions, poisson.predictions, genes)

# %% [markdown]
# ## The largest gains of this run

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-largest", "caption": "The four genes with the largest gain in PCC at 8 µm in this run."}, "image": {"alt": "H&E, counts, MSE and Poisson predictions of the four genes with the largest gain"}}
largest = genes.nlargest(4, "delta_pcc_8um")["gene"].tolist()
figures.rescue_panels(store, largest, mse.predictions, poisson.predictions, genes)

# %% [markdown]
# ## Beside the published values
#
# The published columns come from real sections and another encoder.

# %% tags=["remove-input"]
columns = ["pcc_8um_mse", "pcc_8um_poisson", "delta_ssim_2um"]
sides = {"published": published.RESCUES, "this run": genes}
beside = pd.concat({k: t.set_index("gene")[columns] for k, t in sides.items()}, axis=1)
beside = beside.reindex(published.RESCUES["gene"]).swaplevel(axis=1)
tables.show(beside[columns], index=True, missing="undefined")
