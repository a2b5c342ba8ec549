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

# %% tags=["remove-cell"]
from IPython.display import HTML, Markdown

from sparsity_trap import runs as results
from sparsity_trap.analysis import association as stats
from sparsity_trap.data.sections import open_preset
from sparsity_trap.show import browser

settings = open_preset(preset, source, cohort)
mse, poisson = results.contrast(settings)
genes = stats.gene_table(mse.genes, poisson.genes)
store = results.store(settings, settings.main_patient)

# %% [markdown]
# The genes of the panel on the section of patient {val}`preset.main_patient`: H&E, counts, and the predictions of arms D (MSE) and E (Poisson) on the counts' colour scale, at 8 µm. Panels pan and zoom together.
# *Swipe* lays one panel over another.

# %% tags=["remove-input"]
shown = browser.browsable(genes)
Markdown(
    f"Of {len(genes)} genes the browser holds the {len(shown)} whose scores differ most between the "
    "arms; tables and figures hold all."
    if len(shown) < len(genes)
    else ""
)

# %% tags=["remove-input"]
HTML(
    browser.gene_browser(
        store,
        {"MSE": mse.predictions, "Poisson": poisson.predictions},
        shown,
        settings.folder / "viewer",
    )
)
