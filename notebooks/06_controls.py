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

# %% tags=["remove-cell"]
import pandas as pd

from sparsity_trap import runs as results
from sparsity_trap.analysis import association as stats
from sparsity_trap.analysis import comparisons, controls
from sparsity_trap.data.sections import open_preset
from sparsity_trap.show import control_figures, interactive, tables
from sparsity_trap.training import training_mean

settings = open_preset(preset, source, cohort)
runs = results.load_all(settings)
mse, poisson = results.contrast(settings)
store = results.store(settings, settings.main_patient)
train_mean = training_mean(settings, poisson.run)

# %% [markdown]
# A score is worth as much as the nonsense that it turns down. Below, maps that know nothing of the image, and predictions of arm E that were spoilt by known amounts, are scored like a model ({numref}`fig-controls`). *Patch mean* cheats:
# it knows each gene's mean count in the patch and nothing within. *Shuffled* gives each patch the prediction of another one of the same section. *Oracle* is the true rate, where it is known, and *at 16 µm* the same averaged
# over tokens: what a decoder without any detail within a token could reach.

# %% tags=["hide-input"]
table = controls.control_table(store, poisson.predictions, train_mean, name=poisson.run.name)
table = table.rename(index={"model": "model: arm E"})
other = controls.score(store, mse.predictions, train_mean, mse.run.name).compute()
table.loc["model: arm D"] = pd.DataFrame(other).mean()
table = table.loc[["model: arm E", "model: arm D", *table.index[1:-1]]]

# %% tags=["remove-input"]
scores = {
    "pcc_2um": "PCC 2 µm",
    "pcc_8um": "PCC 8 µm",
    "pcc_8um_unmasked": "PCC 8 µm, unmasked",
    "ssim_2um": "SSIM 2 µm",
    "auprc": "AUPRC",
    "d2": "D²",
}

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-controls", "caption": "Mean over genes of each score for both arms (blue) and for controls (grey). D² below −1 is drawn at −1."}, "image": {"alt": "Scores of models and controls, one panel per metric"}}
shown = table[list(scores)].assign(d2=table["d2"].clip(lower=-1))
control_figures.control_dots(shown, scores, settings.source)

# %% [markdown]
# ## Which metrics can carry a claim
#
# A metric *discriminates* when the model leads its null and shuffled patches lose at least three quarters of the lead. It is *invariant* when a constant added to the rates, or a factor, moves it by no more than 1 % of the lead.
# Metrics of place ("where") must be both. D², deviance and MSE score the rates themselves: they must move with level and scale, and are read beside the calibration. SSIM at 2 µm of a map that is zero everywhere is {val}`ssim.zeros:.3f`.

# %% tags=["remove-input"]
audit = controls.metric_audit(table.rename(index={"model: arm E": "model"}))
tables.show(audit, index=True)

# %% [markdown]
# ## Ceilings
#
# A count is the rate and its Poisson noise, so no prediction correlates perfectly with counts. The ceiling of a gene is the correlation of its true rate with its counts: exact where the rate is known, else
# estimated by splitting the counts in two binomial halves.

# %% tags=["remove-input"]
best = comparisons.ceilings(settings)
genes = stats.gene_table(mse.genes, poisson.genes).merge(
    best.drop(columns="category").rename(
        columns={"pcc_2um": "ceiling_2um", "pcc_8um": "ceiling_8um"}
    ),
    on="gene",
)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-ceiling", "caption": "PCC at 8 µm of every gene against its ceiling. On the line nothing is left to gain."}, "image": {"alt": "Scatter of per-gene PCC against the ceiling for both arms"}}
control_figures.score_against_ceiling(
    genes,
    {"pcc_8um_mse": "arm D, MSE", "pcc_8um_poisson": "arm E, Poisson"},
    "ceiling_8um",
    settings.source,
)

# %% tags=["remove-input"]
across = {"ceiling at 8 µm": genes["ceiling_8um"], "ceiling at 2 µm": genes["ceiling_2um"]}
up = {
    f"PCC {width} µm of arm {arm}": genes[f"pcc_{width}um_{column}"]
    for width in (8, 2) for arm, column in (("E", "poisson"), ("D", "mse"))
}  # fmt: skip
plot, choices = interactive.gene_scatter(genes, across, up, settings.source, diagonal=True)
interactive.show(plot, "ceiling", gene_page="05b_browser.html", choices=choices)

# %% tags=["remove-input"]
rows = {}
for width in ("2um", "8um"):
    for arm, column in (("D", "mse"), ("E", "poisson")):
        score, ceiling = genes[f"pcc_{width}_{column}"], genes[f"ceiling_{width}"]
        rows[f"arm {arm}, {width.removesuffix('um')} µm"] = {
            "PCC": score.mean(),
            "ceiling": ceiling.mean(),
            "PCC / ceiling": (score / ceiling).mean(),
        }
tables.show(pd.DataFrame(rows).T, index=True, missing="undefined")

# %% [markdown]
# ## Spatial structure
#
# Moran's I at 8 µm of counts and predictions (squidpy, neighbours that share an edge). Predictions are expected counts without noise, so theirs is higher than that of counts even where they are right.

# %% tags=["remove-input", "output_scroll"]
moran = controls.morans_table(store, poisson.predictions).merge(
    controls.morans_table(store, mse.predictions).drop(columns="moran_truth"),
    on="gene",
    suffixes=("_E", "_D"),
)
tables.show(moran, missing="undefined", sortable=True)
