# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does sparsity predict the rescue?

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %% tags=["remove-cell"]
import pandas as pd

from sparsity_trap import runs as results
from sparsity_trap.analysis import association as stats
from sparsity_trap.analysis import comparisons, published
from sparsity_trap.data.sections import open_preset
from sparsity_trap.settings import LOSS_PAIRS, MSE_ARM, POISSON_ARM
from sparsity_trap.show import figures, interactive, tables

settings = open_preset(preset, source, cohort)
mse, poisson = results.contrast(settings)
genes = stats.gene_table(mse.genes, poisson.genes)
association = stats.sparsity_association(genes)

# %% [markdown]
# Over {val}`sparsity.n_genes` genes, sparsity and the gain from D to E have the Spearman correlation {val}`sparsity.rho:+.2f` (95 % interval {val}`sparsity.ci_low:+.2f` to
# {val}`sparsity.ci_high:+.2f`, p = {val}`sparsity.p_value:.2g`). The publication printed ρ = {val}`published.rho` for 50 genes with p < 0.001; that correlation over 50 genes has p = {val}`published.p_value:.2g`.
# Without the mitochondrial genes, on average the least sparse of the panel, this run's ρ is {val}`sparsity.without_mitochondrial.rho:+.2f` (p = {val}`sparsity.without_mitochondrial.p_value:.2g`). {numref}`fig-sparsity` shows every gene; its interactive copy opens a gene's maps at a click.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-sparsity", "caption": "Gain in PCC at 8 µm against sparsity, one point per gene. Line: least squares, with a bootstrap band over genes."}, "image": {"alt": "Scatter of gain against sparsity, coloured by category"}}
figures.sparsity_scatter(genes, association, settings.source)

# %% tags=["remove-input"]
across = {
    "sparsity (% of in-tissue 2 µm bins with count 0)": 100 * genes["sparsity"],
    "mean count per 2 µm bin": genes["mean_count"],
    "PCC 8 µm of arm D": genes["pcc_8um_mse"],
}
up = {
    f"gain in {tables.TITLES[name]}, E − D": genes[f"{name}_poisson"] - genes[f"{name}_mse"]
    for name in ("pcc_8um", "pcc_2um", "ssim_2um", "d2")
}
plot, choices = interactive.gene_scatter(genes, across, up, settings.source)
interactive.show(plot, "sparsity", gene_page="05b_browser.html", choices=choices)

# %% [markdown]
# ## By category

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-categories", "caption": "Mean gain per category with a 95 % bootstrap interval over genes. Diamonds: published means for patient P5."}, "image": {"alt": "Bars of mean gain per gene category"}}
figures.category_bars(association.by_category, published.CATEGORIES, settings.source)

# %% [markdown]
# One category at a time left out:

# %% tags=["remove-input"]
tables.show(association.without_category)

# %% [markdown]
# ## Is it sparsity?
#
# Sparse genes are also weakly expressed genes. With mean expression held fixed the correlation is {val}`sparsity.partial_rho:+.2f` (partial Spearman, p = {val}`sparsity.partial_p_value:.2g`).
# Gains are positive on {val}`delta.n_wins` of {val}`delta.n_genes` genes (sign test, p = {val}`sparsity.sign_p_value:.2g`).
#
# The same association for other scores:

# %% tags=["remove-input"]
tables.show(association.by_metric)

# %% [markdown]
# ### All patients and seeds
#
# The figures above are of one test patient. This regression of the gain on sparsity (restricted maximum likelihood) takes every patient and seed that the preset ran, with random intercepts for categories and for
# the genes within them. A slope is the change of the gain from a gene with no empty bins to one with nothing else. The arms of a matched or linear pair differ in the loss alone.

# %% tags=["remove-input"]
scores = comparisons.long_table(settings, results.load_all(settings)).assign(
    score=lambda t: t["pcc_8um"]
)
models = []
for mse_arm, poisson_arm in ((MSE_ARM, POISSON_ARM), *LOSS_PAIRS.values()):
    fit = stats.mixed_model(comparisons.gains(scores, (mse_arm, poisson_arm)))
    row = {"arms": f"{poisson_arm} − {mse_arm}", "slope": fit.coefficient}
    row |= {key: getattr(fit, key) for key in ("ci_low", "ci_high", "p_value", "n_genes")}
    row |= {"patients": fit.n_patients, "seeds": fit.n_seeds, "note": fit.problem}
    models.append(row)
tables.show(pd.DataFrame(models))

# %% [markdown]
# ## All genes

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-heatmap", "caption": "PCC and SSIM of every gene under both losses. Gene names are coloured by category."}, "image": {"alt": "Heatmap of scores, genes by metric and loss"}}
figures.gene_heatmap(genes, settings.source)

# %% [markdown]
# ## Tables S1 to S3
#
# A press on a heading sorts. Table S1, one row per gene (also as {download}`CSV <tables/S1_genes.csv>`):

# %% tags=["remove-input", "output_scroll"]
columns = [
    "gene", "category", "sparsity", "pcc_8um_mse", "pcc_8um_poisson", "delta_pcc_8um",
    "ssim_2um_mse", "ssim_2um_poisson", "delta_ssim_2um",
]  # fmt: skip
tables.show(genes[columns], missing="undefined", sortable=True)

# %% [markdown]
# Table S2, by category ({download}`CSV <tables/S2_categories.csv>`). *p* is of a paired Wilcoxon test, *q* after Benjamini–Hochberg over the categories:

# %% tags=["remove-input"]
tables.show(association.by_category, sortable=True)

# %% [markdown]
# Table S3, by quartile of sparsity ({download}`CSV <tables/S3_quartiles.csv>`):

# %% tags=["remove-input"]
tables.show(association.by_quartile, sortable=True)
