# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Controls: what can a score say?

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd

from sparsity_trap import runs
from sparsity_trap.analysis import controls
from sparsity_trap.analysis.association import gene_table
from sparsity_trap.show import interactive, style, tables
from sparsity_trap.training import training_mean

settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "06_controls")
mse, poisson = runs.contrast(settings)
store = runs.store(settings, settings.main_patient)
train_mean = training_mean(settings, poisson.run)  # counts per bin of each gene, training sections

# %% [markdown]
# A score is worth as much as the nonsense that it turns down. Below, maps that know nothing of the image, and predictions of arm E that were spoilt by known amounts, are scored like a model ({numref}`fig-controls`). *Patch mean* cheats:
# it knows each gene's mean count in the patch and nothing within. *Shuffled* gives each patch the prediction of another one of the same section. *Oracle* is the true rate, where it is known, and *at 16 µm* the same averaged
# over tokens: what a decoder without any detail within a token could reach.
#
# A control is one array of rates per patch. Two of them written out; the others are functions of `sparsity_trap.analysis.controls`:

# %%
patches = len(store)
zeros = (np.zeros(store.counts.shape[1:], np.float32) for _ in range(patches))
order = np.random.default_rng(0).permutation(patches)
other = np.empty(patches, int)
other[order] = np.roll(order, 1)  # one cycle through all patches: none keeps its own
shuffled = (np.asarray(poisson.predictions[i], np.float32) for i in other)

# %%
maps = {
    "model: arm E": controls.of_model(poisson.predictions),
    "model: arm D": controls.of_model(mse.predictions),
    "zeros": zeros,
    **({"shuffled": shuffled} if patches > 1 else {}),
    **controls.known_nothing(store, train_mean),
    **controls.spoilt(store, poisson.predictions, train_mean),
}
per_gene = {
    name: pd.DataFrame(controls.score(store, rates, train_mean, name).compute(), store.genes)
    for name, rates in maps.items()
}
table = pd.DataFrame({name: scores.mean() for name, scores in per_gene.items()}).T

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-controls", "caption": "Mean over genes of each score for both arms (blue) and for controls (grey). D² below −1 is drawn at −1."}, "image": {"alt": "Scores of models and controls, one panel per metric"}}
panels = {
    "pcc_2um": "PCC 2 µm", "pcc_8um": "PCC 8 µm", "pcc_8um_unmasked": "PCC 8 µm, unmasked",
    "ssim_2um": "SSIM 2 µm", "auprc": "AUPRC", "d2": "D²",
}  # fmt: skip
shown = table[list(panels)].assign(d2=table["d2"].clip(lower=-1))
size = (2.0 + 1.55 * len(panels), 0.9 + 0.23 * len(shown))
figure, axes = style.subplots(1, len(panels), figsize=size, sharey=True)
rows = np.arange(len(shown))[::-1]
colours = np.where(shown.index.str.startswith("model"), style.POISSON_COLOUR, "#8A8A8A")
for axis, (column, title) in zip(axes, panels.items(), strict=True):
    axis.hlines(rows, 0, shown[column], color=colours, lw=1)
    axis.scatter(shown[column], rows, s=20, c=colours, zorder=3)
    for row in rows[shown[column].isna()]:
        axis.text(0, row, " undefined", va="center", fontsize=6.5, color="#777777")
    axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
    axis.set_title(title)
axes[0].set_yticks(rows, shown.index)
style.mark(figure, settings.source, shown.rename_axis("map").reset_index())

# %% [markdown]
# SSIM at 2 µm of a map that is zero everywhere is {val}`ssim.zeros:.3f`; off the tissue, where no loss is taken, arm D starts at {val}`softplus.of_zero:.2f` counts per bin, which *offset off tissue* adds.

# %%
quote("ssim", zeros=table.loc["zeros", "ssim_2um"])
quote("softplus", of_zero=controls.UNSUPERVISED_RATE)

# %% [markdown]
# ## Which metrics can carry a claim
#
# The *null* of a metric is what it is read to mean "nothing learned": 0 for correlations, SSIM and D², the share of bins with a count for AUPRC, the training mean's value for deviance and MSE; the *lead* of a model is its distance from the null, in the direction of better.
# A metric *discriminates* when the model leads and shuffled patches lose at least three quarters of the lead. It is *invariant* when a constant added to the rates, or a factor, moves it by no more than 1 % of the lead.
# Metrics of place ("where") must be both. D², deviance and MSE score the rates themselves ("rates"): they must move with level and scale, must ignore what lies off the tissue, and are read beside the calibration.

# %%
model = table.loc["model: arm E"].drop(["sparsity", "mean_count", "auprc_base", "calibration"])
lower_is_better = model.index.isin(["deviance", "mse"])
null = pd.Series(0.0, model.index)
null["auprc"] = table.loc["model: arm E", "auprc_base"]
null[lower_is_better] = table.loc["training mean", model.index[lower_is_better]]
lead = (model - null).where(~lower_is_better, null - model)

# %%
score_of = table.reindex(columns=model.index).reindex(
    ["shuffled", "zeros", "offset", "scaled by 2", "offset off tissue"]
)
kept = (score_of.loc["shuffled"] - null).where(~lower_is_better, null - score_of.loc["shuffled"])
audit = pd.DataFrame(
    {
        "model": model,
        "shuffled": score_of.loc["shuffled"],
        "zeros": score_of.loc["zeros"],
        "null": null,
    }
)
audit["discriminates"] = (lead > 0) & (kept <= 0.25 * lead)
unmoved = (score_of.iloc[2:] - model).abs() <= 0.01 * lead.abs()
audit[["invariant_to_offset", "invariant_to_scale", "ignores_off_tissue"]] = unmoved.T.to_numpy()

# %%
where = audit["discriminates"] & unmoved.all()
rates = (
    audit["discriminates"]
    & audit["ignores_off_tissue"]
    & audit.index.isin(["deviance", "mse", "d2"])
)
audit["claim"] = np.select([where, rates], ["where", "rates"], "none")
tables.show(audit.dropna(subset="model"), index=True, missing="undefined")

# %% [markdown]
# ## Ceilings
#
# A count is the rate and its Poisson noise, so no prediction correlates perfectly with counts. The ceiling of a gene is the correlation of its true rate λ with its counts,
#
# $$\sqrt{\frac{\operatorname{Var} \lambda}{\operatorname{Var} \lambda + \operatorname{E} \lambda}} ,$$
#
# exact where the rate is known. Elsewhere the counts are split into two binomial halves: the correlation $r$ of the halves gives the ceiling $\sqrt{2r/(1+r)}$ of the whole. Splitting takes any variance beyond the Poisson one for signal.

# %%
mask = store.mask[:]
ceiling = {}
for width, factor in (("2um", 1), ("8um", 4)):
    if store.truth is None:
        ceiling[f"ceiling_{width}"] = controls.split_ceiling(store.counts, mask, factor)
    else:
        ceiling[f"ceiling_{width}"] = controls.poisson_ceiling(store.truth, mask, factor)
genes = gene_table(mse.genes, poisson.genes)
genes = genes.merge(pd.DataFrame(ceiling).assign(gene=store.genes), on="gene")

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-ceiling", "caption": "PCC at 8 µm of every gene against its ceiling. On the line nothing is left to gain."}, "image": {"alt": "Scatter of per-gene PCC against the ceiling for both arms"}}
figure, axes = style.subplots(1, 2, figsize=(5.8, 3.0), sharex=True, sharey=True)
columns = {"pcc_8um_mse": "arm D, MSE", "pcc_8um_poisson": "arm E, Poisson"}
for axis, (column, title) in zip(axes, columns.items(), strict=True):
    axis.plot([0, 1], [0, 1], color="#9A9A9A", lw=0.8, zorder=0)
    colours = [style.CATEGORY_COLOURS[category] for category in genes["category"]]
    axis.scatter(genes["ceiling_8um"], genes[column], s=14, c=colours)
    axis.set(title=title, xlabel="ceiling of the PCC", xlim=(0, 1))
axes[0].set_ylabel("PCC")
style.category_legend(axes[-1], genes["category"])
style.mark(figure, settings.source, genes[["gene", "category", *columns, "ceiling_8um"]])

# %% tags=["remove-input"]
across = {"ceiling at 8 µm": genes["ceiling_8um"], "ceiling at 2 µm": genes["ceiling_2um"]}
up = {
    f"PCC {width} µm of arm {arm}": genes[f"pcc_{width}um_{column}"]
    for width in (8, 2) for arm, column in (("E", "poisson"), ("D", "mse"))
}  # fmt: skip
plot, choices = interactive.gene_scatter(genes, across, up, settings.source, diagonal=True)
interactive.show(plot, "ceiling", gene_page="05b_browser.html", choices=choices)

# %%
reached = {}
for width in ("2um", "8um"):
    for arm, column in (("D", "mse"), ("E", "poisson")):
        both = genes[[f"pcc_{width}_{column}", f"ceiling_{width}"]].set_axis(
            ["PCC", "ceiling"], axis=1
        )
        both["PCC / ceiling"] = both["PCC"] / both["ceiling"]
        reached[f"arm {arm}, {width.removesuffix('um')} µm"] = both.mean()
tables.show(pd.DataFrame(reached).T, index=True, missing="undefined")

# %% [markdown]
# ## Spatial structure
#
# Moran's I at 8 µm of counts and predictions (squidpy, neighbours that share an edge). Predictions are expected counts without noise, so theirs is higher than that of counts even where they are right.

# %%
moran = controls.morans_table(store, poisson.predictions).merge(
    controls.morans_table(store, mse.predictions).drop(columns="moran_truth"),
    on="gene",
    suffixes=("_E", "_D"),
)

# %% tags=["remove-input", "output_scroll"]
tables.show(moran, missing="undefined", sortable=True)
