# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A shelf of losses

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from sparsity_trap import runs
from sparsity_trap.analysis.effects import contrast
from sparsity_trap.analysis.factorial import as_published
from sparsity_trap.show import style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "08c_shelf")
results = runs.load_all(settings)
scores = runs.long_table(settings, results)
patches = {result.run.name: result.patches for result in results}
main = settings.main_patient

# %% [markdown]
# Every loss that this build trained with the link and bias of arm E, all else equal: one learning rate, one number of epochs, which are the same for all and best for none ([](07b_budget.ipynb)). The losses are described in [](../methods.md).
# A loss is taken on the test patient for what it may be wanted for: *where* a gene is expressed (PCC at 8 and 2 µm, SSIM), *whether* a bin holds a count at all (AUPRC), and *how much* there is: the share of the Poisson deviance that a map explains (D²), and the sum of the map over the sum of the counts (calibration, 1 at best). Each is a mean over genes and runs.

# %%
kept = as_published(scores, "decoder") & (scores["patient"] == main)
kept &= (scores["link"] == "exp") & (scores["bias"] == "published")
rows = scores[kept]
rows = rows[rows.groupby("decoder")["loss"].transform("nunique") > 1].copy()
rows["calibration"] = rows["calibration"].where(~rows["collapsed"])
rows["miscalibration"] = np.log(rows["calibration"].clip(1e-3)).abs()
shown = ["pcc_8um", "pcc_2um", "ssim_2um", "auprc", "d2", "calibration", "miscalibration"]
cost = pd.Series(dtype=float)
for r in results:  # seconds of an epoch, its check on the strips included, per step
    batch = settings.training.batch_size * settings.training.accumulate
    steps = np.ceil(r.provenance["training_patches"] / batch)
    cost[r.run.name] = r.log["seconds"].iloc[-1] / len(r.log) / steps

# %%
by_run = rows.groupby(["decoder", "arm", "run"]).agg(
    **{name: (name, "mean") for name in shown}, collapsed=("collapsed", "first")
)
by_run["seconds a step"] = cost[by_run.index.get_level_values("run")].to_numpy()
shelf = by_run.groupby(["decoder", "arm"]).mean().drop(columns="collapsed")
grouped = by_run.groupby(["decoder", "arm"])["collapsed"]
shelf = shelf.assign(runs=grouped.size(), collapsed=grouped.sum()).reset_index()
shelf.insert(1, "loss", [settings.arm(arm).title.split(",")[0] for arm in shelf["arm"]])
shelf = shelf.sort_values(["decoder", "pcc_8um"], ascending=[True, False], ignore_index=True)
columns = ["decoder", "loss", *shown[:-1], "seconds a step", "runs", "collapsed"]
tables.show(shelf[columns], sortable=True)

# %% tags=["remove-input"]
DECODERS = {"hist2st": "Hist2ST", "linear": "the linear decoder", "img2st": "Img2ST"}
counted = shelf.groupby("decoder")["loss"].nunique()
few = ", ".join(f"{n} with {DECODERS[decoder]}" for decoder, n in counted.items())
more = " The preset study trains more of it, with both decoders." * (settings.name != "study")
single = " Those with fewer than three runs take their run-to-run variance from other arms."
Markdown(
    f"Losses on the shelf of this build: {few}.{more}{single if (shelf['runs'] < 3).any() else ''}"
)

# %% [markdown]
# ## By goal
#
# For each goal the best loss by this build's numbers, and those that are not told apart from it: the 95 % interval of their difference to the best, over runs, genes and (for PCC at 8 µm) patches, includes 0. The best of many is best partly by luck; a loss that is not told apart is as good a choice, and the cheaper one the better. Collapsed runs count in no mean.
#
# For calibrated uncertainty only losses that are likelihoods of a count are taken, since the others say nothing of the spread around their maps. They are compared by D², which scores the rate as that of Poisson counts; a dispersion that NB, zero-inflated NB or the hurdle learn beside it is not scored.

# %%
LIKELIHOODS = ("Poisson", "NB", "Zero-inflated NB", "Hurdle", "Poisson with depth")
GOALS = {  # score, whether more is better, and of which losses
    "where, at 8 µm": ("pcc_8um", 1, None),
    "where, at 2 µm": ("pcc_2um", 1, None),
    "how much": ("miscalibration", -1, None),
    "present or not": ("auprc", 1, None),
    "calibrated uncertainty": ("d2", 1, LIKELIHOODS),
}


# %%
def choose(own, score, sign, among):
    """The best arm, and those that are not told apart from it."""
    own = own[own["loss"].isin(among)] if among else own
    own = own.dropna(subset=[score])
    if own.empty:
        return None, own
    best = own.loc[(sign * own[score]).idxmax()]
    alike = []
    for arm in own["arm"].drop(best.name):
        low, high = contrast(rows, {best["arm"]: 1, arm: -1}, score, moments=patches).interval
        if not (low > 0 or high < 0):  # nor is it told apart where there is no interval
            alike.append(arm)
    return best, own[own["arm"].isin(alike)]


# %%
chosen = []
for decoder, own in shelf.groupby("decoder"):
    usual = own.loc[own["loss"] == "Poisson", "seconds a step"].mean()
    for goal, (score, sign, among) in GOALS.items():
        best, alike = choose(own, score, sign, among)
        if best is not None and len(own) > 2:
            row = {"decoder": decoder, "goal": goal, "score": score, "best": best["loss"]}
            names = alike.sort_values("seconds a step")["loss"]
            row |= {"value": best[score], "not told apart": ", ".join(names) or "none"}
            quote(f"shelf.{decoder}.{score}", best=best["loss"], n_alike=len(alike))
            row["cost"] = f"{best['seconds a step'] / usual:.1f} ×"
            chosen.append(row)
columns = ["decoder", "goal", "score", "best", "value", "cost", "not told apart"]
chosen = pd.DataFrame(chosen, columns=columns)
words = {"miscalibration": "|log calibration|"}
if len(chosen):
    display(
        tables.show(chosen.replace({"score": words}).rename(columns={"cost": "cost of the best"}))
    )
else:
    display(style.not_trained("more losses than these"))

# %% [markdown]
# Cost is the time of a training step over that of Poisson with the same decoder, on the machine that trained; those not told apart stand in the order of theirs, cheapest first. Losses that compare the shape of a map alone, such as Pearson and the multinomial, leave its level free, so *how much* is not theirs to say.

# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-shelf", "caption": "Every loss with link exp and bias −3 on the test patient: where (PCC at 8 µm), present or not (AUPRC) and how much (D²). Large marks are means over runs, small ones the runs. A triangle marks a D² below −0.5: losses that leave the level of a map free."}, "image": {"alt": "Dot plot of all losses by three scores"}}
figure = style.not_trained("more losses than these")
if len(chosen):
    best = shelf.groupby("loss")["pcc_8um"].max().sort_values()
    place = {loss: number for number, loss in enumerate(best.index)}
    loss_of = shelf.set_index(["decoder", "arm"])["loss"]
    colours = {"MSE": style.MSE_COLOUR, "Poisson": style.POISSON_COLOUR}
    size = 8.2, 0.9 + 0.24 * len(place)
    figure, axes = style.subplots(1, 3, figsize=size, sharey=True)
    panels = {
        "pcc_8um": "where: PCC at 8 µm",
        "auprc": "present or not: AUPRC",
        "d2": "how much: D²",
    }
    for axis, (score, title) in zip(axes, panels.items(), strict=True):
        for (decoder, arm), own in by_run.groupby(["decoder", "arm"]):
            loss = loss_of[decoder, arm]
            y = place[loss] + {"hist2st": 0.17, "linear": -0.17}.get(decoder, 0)
            colour, marker = colours.get(loss, "#555555"), {"linear": "s"}.get(decoder, "o")
            mean = own[score].mean()
            axis.plot(own[score].clip(-0.5), [y] * len(own), marker, ms=2, color="#B5B5B5")
            axis.plot(max(mean, -0.5), y, "<" if mean < -0.5 else marker, ms=5, color=colour)
        axis.set_xlabel(title)
        axis.grid(axis="y", color="#E6E6E6", lw=0.6, zorder=0)
    axes[0].set_yticks(range(len(place)), place)
    axes[0].set_ylim(-0.6, len(place) - 0.4)
    for decoder, marker in (("Hist2ST", "o"), ("linear", "s")):
        axes[1].plot([], [], marker, ms=5, color="#555555", label=decoder)
    figure.legend(loc="outside upper center", ncols=2, fontsize=7, frameon=False)
    alive = by_run.groupby(["decoder", "arm"])["pcc_8um"].count()
    style.mark(figure, settings.source, shelf, runs=alive)
figure
