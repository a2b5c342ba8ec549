# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Controls: what can a score say?
#
# **Finding.** A correlation within tissue falls to nothing when patches are shuffled ({val}`verdict.shuffled_is_null`); SSIM does not know a model from emptiness: zeros score {val}`ssim.zeros:.2f` at 2 µm, arm E {val}`arm.E.ssim_2um:.2f`.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
from scipy import stats

import sparsity_trap as st
from sparsity_trap import runs
from sparsity_trap.analysis import ceilings, controls
from sparsity_trap.analysis.association import gene_table
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.score.recalibrate import recalibration, recalibration_table
from sparsity_trap.show import interactive, style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "06_controls")
mse, poisson = runs.contrast(settings)  # arms D and E on the main patient
store = runs.store(settings, settings.main_patient)
genes = gene_table(mse.genes, poisson.genes)

# %% [markdown]
# A score is worth as much as the nonsense that it turns down. A *control* is a set of maps that need no training and are scored like those of a model.
#
# Two of them written out, for the gene with most counts: a map that is zero everywhere, and the maps of arm E dealt anew among the patches of the section, so that none keeps its own.

# %%
gene = int(genes["mean_count"].argmax())
counts, mask = store.counts.oindex[:, [gene]], store.mask[:]  # [patches, 1, 128, 128]
model = poisson.predictions.oindex[:, [gene]]
zeros = np.zeros_like(model)
order = np.random.default_rng(0).permutation(len(model))
other = np.empty_like(order)
other[order] = np.roll(order, 1)  # one cycle through all patches
shuffled = model[other]

# %%
maps = {"model: arm E": model, "zeros": zeros, "shuffled": shuffled}
by_hand = {
    name: {
        "PCC 8 µm": st.pcc(counts, rate, mask, 4)[0],
        "SSIM 2 µm": np.nanmean(st.ssim(counts, rate, mask)),
    }
    for name, rate in maps.items()
}
tables.show(pd.DataFrame(by_hand).T, index=True, missing="undefined")

# %% [markdown]
# All controls, with every score and gene, are computed once by `controls.control_scores` ({numref}`fig-controls`). *Patch mean* cheats: it knows each gene's mean count in the patch and nothing within. Others are predictions of arm E that were spoilt by known amounts; *next tile* is a shuffle by one patch.
# *Oracle* is the true rate, where it is known, and *at 16 µm* the same averaged over tokens: what a decoder without any detail within a token could reach.
# *Offset* adds to the prediction each gene's mean count in training; *offset off tissue* adds there the {val}`start.softplus:.2f` counts per bin at which arm D starts, and where it stays without a loss.

# %%
scored = pd.concat(
    [
        poisson.genes.assign(control="model: arm E"),
        mse.genes.assign(control="model: arm D"),
        controls.control_scores(settings, poisson),
    ]
)
table = scored.groupby("control", sort=False).mean(numeric_only=True)  # over genes
quote("ssim", zeros=table.loc["zeros", "ssim_2um"])

# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-controls", "caption": "Mean over genes of each score for both arms (blue) and for controls (grey). D² below −1 is drawn at −1."}, "image": {"alt": "Scores of models and controls, one panel per metric"}}
panels = {
    "pcc_2um": "PCC 2 µm", "pcc_8um": "PCC 8 µm", "pcc_8um_unmasked": "PCC 8 µm,\nunmasked",
    "ssim_2um": "SSIM 2 µm", "auprc": "AUPRC", "d2": "D²",
}  # fmt: skip
shown = table[list(panels)].assign(d2=table["d2"].clip(lower=-1))
size = (1.8 + len(panels), 0.9 + 0.23 * len(shown))
figure, axes = style.subplots(1, len(panels), figsize=size, sharey=True)
rows = np.arange(len(shown))[::-1]
colours = np.where(shown.index.str.startswith("model"), style.POISSON_COLOUR, "#8A8A8A")
for axis, (column, title) in zip(axes, panels.items(), strict=True):
    axis.hlines(rows, 0, shown[column], color=colours, lw=1)
    axis.scatter(shown[column], rows, s=20, c=colours, zorder=3)
    for row in rows[shown[column].isna()]:
        axis.text(0, row, " undefined", va="center", fontsize=7, color="#777777")
    axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
    axis.set_title(title)
axes[0].set_yticks(rows, shown.index)
behind = {"genes": scored["gene"].nunique(), "patches": len(store)}
style.mark(figure, settings.source, shown.rename_axis("map").reset_index(), **behind)

# %% [markdown]
# SSIM at 2 µm of a map that is zero everywhere is {val}`ssim.zeros:.3f`.
#
# ## Which metrics can carry a claim
#
# The *null* of a metric is what it is read to mean "nothing learned": 0 for correlations, SSIM and D², the share of bins with a count for AUPRC, the training mean's value for deviance and MSE; the *lead* of a model is its distance from the null, in the direction of better.
# A metric *discriminates* when the model leads and shuffled patches lose at least three quarters of the lead. It is *invariant* when a constant added to the rates, or a factor, moves it by no more than 1 % of the lead; calibration, which has no null, by 1 % of itself.
# Metrics of place ("where") must be both. D², deviance and MSE score the rates themselves ("rates"): they must move with level and scale, must ignore what lies off the tissue, and are read beside the calibration.

# %%
at = table.drop(columns=["sparsity", "mean_count"]).T  # a row per metric, a column per control
at = at.reindex(columns=at.columns.union(["shuffled"]))  # which a section of one patch has not
at["null"] = 0.0
at.loc["auprc", "null"] = at.loc["auprc_base", "model: arm E"]
at.loc["calibration", "null"] = np.nan  # it has none
at.loc[["deviance", "mse"], "null"] = at.loc[["deviance", "mse"], "training mean"]
at = at.drop("auprc_base")

better = np.where(at.index.isin(["deviance", "mse"]), -1, 1)
lead, kept = (better * (at[name] - at["null"]) for name in ("model: arm E", "shuffled"))

# %%
audit = at[["model: arm E", "shuffled", "zeros", "null"]].rename(columns={"model: arm E": "model"})
audit["discriminates"] = (lead > 0) & (kept <= 0.25 * lead)
for what, control in {
    "invariant_to_offset": "offset",
    "invariant_to_scale": "scaled by 2",
    "ignores_off_tissue": "offset off tissue",
}.items():
    audit[what] = (at[control] - audit["model"]).abs() <= 0.01 * lead.fillna(audit["model"]).abs()

# %%
of_rates = audit.index.isin(["deviance", "d2", "mse"])
where = audit.loc[:, "discriminates":"ignores_off_tissue"].all(axis=1)
rates = audit["discriminates"] & audit["ignores_off_tissue"] & of_rates
audit["claim"] = np.select([where, rates], ["where", "rates"], "none")
tables.show(audit.rename_axis("metric"), index=True, missing="undefined")

# %% [markdown]
# ## Ceilings
#
# A count is the rate and its Poisson noise, so no prediction correlates perfectly with counts. The ceiling of a gene is the correlation of its true rate λ with its counts,
#
# $$\sqrt{\frac{\operatorname{Var} \lambda}{\operatorname{Var} \lambda + \operatorname{E} \lambda}} ,$$
#
# exact where the rate is known. Elsewhere the counts are split into two binomial halves (count splitting {cite:p}`neufeld2024inference`), which are independent given the rate if the counts are Poisson: the correlation $r$ of the halves gives the reliability $2r/(1+r)$ of the whole (Spearman and Brown), of which the ceiling is the square root. Splitting takes any variance beyond the Poisson one for signal; negative binomial counts can be split into independent parts too, but only with their dispersion known (data thinning {cite:p}`neufeld2024data`).
#
# Both for the gene above, at 8 µm:

# %%
inside = bin_mask(mask, 4)  # 8 µm bins in tissue
whole = bin_sum(np.where(mask, counts[:, 0], 0), 4)[inside]
half = np.random.default_rng(0).binomial(whole, 0.5)
r = stats.pearsonr(half, whole - half).statistic
of_gene = {"one split": np.sqrt(2 * r / (1 + r)) if r > 0 else np.nan}
if store.truth is not None:
    rate = bin_sum(np.where(mask, store.truth.oindex[:, gene], 0), 4)[inside]
    of_gene["known rate"] = np.sqrt(rate.var() / (rate.var() + rate.mean()))
tables.show(pd.DataFrame([of_gene]), missing="undefined")

# %% [markdown]
# For all genes, from the known rate or from the mean correlation over ten splits:

# %%
genes = genes.merge(ceilings.best_pcc(settings, settings.main_patient), on="gene")

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
style.mark(figure, settings.source, genes[["gene", "category", *columns, "ceiling_8um"]],
           genes=len(genes))  # fmt: skip

# %% tags=["remove-input"]
across = {"ceiling at 8 µm": genes["ceiling_8um"], "ceiling at 2 µm": genes["ceiling_2um"]}
up = {
    f"PCC {width} µm of arm {arm}": genes[f"pcc_{width}um_{column}"]
    for width in (8, 2) for arm, column in (("E", "poisson"), ("D", "mse"))
}  # fmt: skip
plot, choices = interactive.gene_scatter(genes, across, up, settings.source, diagonal=True)
interactive.show(
    plot, "ceiling", gene_page="05b_browser.html", choices=choices, in_place_of="fig-ceiling"
)

# %%
reached = {}
for width in ("2um", "8um"):
    for arm, column in (("D", "mse"), ("E", "poisson")):
        score, ceiling = genes[f"pcc_{width}_{column}"], genes[f"ceiling_{width}"]
        means = score.mean(), ceiling.mean(), (score / ceiling).mean()
        reached[f"arm {arm}, {width.removesuffix('um')} µm"] = means
reached = pd.DataFrame(reached, index=["PCC", "ceiling", "PCC / ceiling"]).T
tables.show(reached, index=True, missing="undefined")

# %% [markdown]
# ## What is only level
#
# A prediction may have the right places and the wrong level. Rescaled on every other patch of the section, each gene by a factor or by an increasing map (isotonic regression), and scored on the other patches, it shows what of a score was only that. Neither changes what a map says of place: a factor leaves the PCC as it is, an increasing map can straighten a curve.


# %%
def patches(result):
    """Counts, rates and tissue of each patch, anew at every call."""
    return lambda: (
        (store.counts[i], result.predictions[i], store.mask[i]) for i in range(len(store))
    )


rescaled = {
    arm: recalibration_table(recalibration(patches(result), store.genes))
    for arm, result in (("D", mse), ("E", poisson))
}
rescaled = pd.concat(rescaled, names=["arm"])
tables.show(rescaled.rename_axis(index=[None, None]), index=True, missing="undefined")

# %%
gap = rescaled.loc["E"] - rescaled.loc["D"]
for score in ("ssim_2um", "d2", "pcc_8um"):
    before, factor, increasing = gap[score]
    quote(f"level.{score}", before=before, factor=factor, increasing=increasing)
tables.show(gap[["pcc_8um", "ssim_2um", "d2"]], index=True, missing="undefined")

# %% [markdown]
# E leads D by {val}`level.ssim_2um.before:+.3f` in SSIM and {val}`level.d2.before:+.3f` in D² as predicted, by {val}`level.ssim_2um.factor:+.3f` and {val}`level.d2.factor:+.3f` after a factor per gene, by {val}`level.ssim_2um.increasing:+.3f` and {val}`level.d2.increasing:+.3f` after an increasing map: what disappears was level.
#
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
