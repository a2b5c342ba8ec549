# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Browse all genes

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""
genes = ""  # such as MUC12,JCHAIN; empty: all of the panel

# %%
from IPython.display import HTML

from sparsity_trap import runs
from sparsity_trap.analysis.association import gene_table
from sparsity_trap.settings import UserError
from sparsity_trap.show import browser

settings = runs.open_preset(preset, source, cohort)
mse, poisson = runs.contrast(settings)  # arms D and E on the main patient
table = gene_table(mse.genes, poisson.genes)
store = runs.store(settings, settings.main_patient)

# %% [markdown]
# The genes of the panel on the section of patient {val}`preset.main_patient`: H&E, counts, and the predictions of arms D (MSE) and E (Poisson) on the counts' colour scale, at 8 µm. Panels pan and zoom together.
# *Swipe* lays one panel over another. Of a panel too large for a page, the genes whose PCC at 8 µm differs most between the arms are held.

# %%
asked = genes.split(",") if genes else browser.browsable(table)["gene"].tolist()
unknown = ", ".join(gene for gene in asked if gene not in store.genes)
if unknown:
    known = ", ".join(store.genes[:3])
    raise UserError(f"genes: the panel has no {unknown}; name some that it has, such as {known}")
print(f"{len(asked)} of {len(table)} genes")

# %% tags=["remove-input"]
HTML(
    browser.gene_browser(
        store,
        {"MSE": mse.predictions, "Poisson": poisson.predictions},
        table[table["gene"].isin(asked)],
        settings.folder / "viewer",
    )
)
