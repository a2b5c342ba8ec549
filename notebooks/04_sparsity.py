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
from sparsity_trap import figures, published, results, stats
from sparsity_trap.cohort import open_preset

settings = open_preset(preset, source, cohort)
mse, poisson = results.contrast(settings)
genes = stats.gene_table(mse.genes, poisson.genes)
association = stats.sparsity_association(genes)

# %% [markdown]
# Over {val}`sparsity.n_genes` genes, sparsity and the gain from D to E have the Spearman correlation {val}`sparsity.rho:+.2f` (95 % interval {val}`sparsity.ci_low:+.2f` to
# {val}`sparsity.ci_high:+.2f`, p = {val}`sparsity.p_value:.2g`). The publication printed ρ = {val}`published.rho` for 50 genes with p < 0.001; that correlation over 50 genes has p = {val}`published.p_value:.2g`.
# Without the mitochondrial genes, on average the least sparse of the panel, this run's ρ is {val}`sparsity.without_mitochondrial.rho:+.2f` (p = {val}`sparsity.without_mitochondrial.p_value:.2g`).

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-sparsity", "caption": "Gain in PCC at 8 µm against sparsity, one point per gene. Line: least squares, with a bootstrap band over genes."}, "image": {"alt": "Scatter of gain against sparsity, coloured by category"}}
figures.sparsity_scatter(genes, association, settings.source)

# %% tags=["remove-input"]
figures.show(
    figures.sparsity_browser(genes, settings.source), "sparsity", gene_page="05b_browser.html"
)

# %% [markdown]
# ## By category

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-categories", "caption": "Mean gain per category with a 95 % bootstrap interval over genes. Diamonds: published means for patient P5."}, "image": {"alt": "Bars of mean gain per gene category"}}
figures.category_bars(association.by_category, published.CATEGORIES, settings.source)

# %% [markdown]
# One category at a time left out:

# %% tags=["remove-input"]
association.without_category.style.format({"rho": "{:+.3f}", "p_value": "{:.3g}"}).hide(
    axis="index"
)

# %% [markdown]
# ## All genes

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-heatmap", "caption": "PCC and SSIM of every gene under both losses. Gene names are coloured by category."}, "image": {"alt": "Heatmap of scores, genes by metric and loss"}}
figures.gene_heatmap(genes, settings.source)

# %% [markdown]
# ## Tables S1 to S3
#
# Table S1, one row per gene (also as {download}`CSV <tables/S1_genes.csv>`):

# %% tags=["remove-input", "output_scroll"]
columns = [
    "gene", "category", "sparsity", "pcc_8um_mse", "pcc_8um_poisson", "delta_pcc_8um",
    "ssim_2um_mse", "ssim_2um_poisson", "delta_ssim_2um",
]  # fmt: skip
genes[columns].style.format(precision=3, na_rep="undefined").hide(axis="index")

# %% [markdown]
# Table S2, by category ({download}`CSV <tables/S2_categories.csv>`). *p* is of a paired Wilcoxon test, *q* after Benjamini–Hochberg over the categories:

# %% tags=["remove-input"]
association.by_category.style.format(precision=3, na_rep="–").hide(axis="index")

# %% [markdown]
# Table S3, by quartile of sparsity ({download}`CSV <tables/S3_quartiles.csv>`):

# %% tags=["remove-input"]
association.by_quartile.style.format(precision=3, na_rep="–").hide(axis="index")
