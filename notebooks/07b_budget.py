# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Rate and budget
#
# **Finding.** That Poisson gains with each loss at its own best learning rate is {val}`verdict.rescue_best_rate`.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from sparsity_trap import runs
from sparsity_trap.analysis.effects import Effect, contrast
from sparsity_trap.analysis.factorial import as_published
from sparsity_trap.show import style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "07b_budget")
results = runs.load_all(settings)
scores = runs.long_table(settings, results)
patches = {result.run.name: result.patches for result in results}
main = settings.main_patient


def effect(weights):
    """Weighted sum of arms' PCC at 8 µm on the main patient."""
    return contrast(scores, weights, patients=[main], moments=patches)


# %% [markdown]
# Two losses that are compared at one learning rate and after so many epochs are compared at that rate and at that moment. Either may favour one of them. Here both are factors, with link and bias equal: exp and −3.
#
# ## Each loss at its own best rate
#
# Rates differ by factors of two. The rate of each loss is chosen on the training patients' held-out strips, by the PCC at 8 µm of the checkpoint that was kept, mean over seeds. The test patient takes no part in the choice.

# %%
pair = (scores["link"] == "exp") & (scores["bias"] == "published")
pair &= scores["loss"].isin(["mse", "poisson"]) & (scores["patient"] == main)
grid = scores[as_published(scores, "lr_times") & pair]
kept = {r.run.name: r.log.loc[r.log["validation_loss"].idxmin()] for r in results}
per_run = grid.groupby(["loss", "lr_times", "arm", "run"]).agg(
    test=("pcc_8um", "mean"), collapsed=("collapsed", "first")
)
per_run["strips"] = [kept[run]["validation_pcc_8um"] for *_, run in per_run.index]

# %%
rates = per_run.groupby(["loss", "lr_times", "arm"]).agg(
    strips=("strips", "mean"), test=("test", "mean"), runs=("test", "size"),
    collapsed=("collapsed", "sum"),
).reset_index()  # fmt: skip
rates.insert(1, "learning rate", rates["lr_times"] * settings.training.lr)
searched = set(rates["loss"]) == {"mse", "poisson"} and rates["loss"].value_counts().min() > 1
heads = {"strips": "PCC 8 µm, strips", "test": "PCC 8 µm, test", "lr_times": "multiple"}
if searched:
    shown = rates.assign(lr_times=rates["lr_times"].map("{:g}".format))
    display(tables.show(shown.rename(columns=heads), digits=4))

# %%
compared = []
if searched:
    best = rates.loc[rates.groupby("loss")["strips"].idxmax()].set_index("loss")
    own = effect({best.loc["poisson", "arm"]: 1, best.loc["mse", "arm"]: -1})
    quote("rate.own", value=own.value, low=own.interval[0], high=own.interval[1])
    quote("rate.best", mse=best.loc["mse", "lr_times"], poisson=best.loc["poisson", "lr_times"])
    compared.append(("each at its own best", own.value, *own.interval, own.n))
    for times, arms in (
        rates.pivot(index="lr_times", columns="loss", values="arm").dropna().iterrows()
    ):
        same = effect({arms["poisson"]: 1, arms["mse"]: -1})
        compared.append((f"both at {times:g} × the preset's", same.value, *same.interval, same.n))
        if times == 1:
            quote("rate.same", value=same.value, low=same.interval[0], high=same.interval[1])
compared = pd.DataFrame(compared, columns=["rate", "Poisson − MSE", "ci_low", "ci_high", "runs"])
tables.show(compared) if searched else style.not_trained("more than one learning rate")

# %% [markdown]
# :::{when} rate.own.value
# With each loss at its own best rate, {val}`rate.best.mse:g` × the preset's for squared error and {val}`rate.best.poisson:g` × for Poisson, Poisson gains {val}`rate.own.value:+.3f` (95 % interval {val}`rate.own.low:+.3f` to {val}`rate.own.high:+.3f`); with both at the preset's, {val}`rate.same.value:+.3f` ({val}`rate.same.low:+.3f` to {val}`rate.same.high:+.3f`).
# The interval of the first takes the choice as given. Where two rates are nearly as good, other seeds would choose the other.
# :::

# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-rate", "caption": "PCC at 8 µm against the learning rate at equal link, bias and epochs; lines are means, dots runs. Left: on the training patients' held-out strips, by which the rate is chosen (ring). Right: on the test patient."}, "image": {"alt": "Scores of both losses against the learning rate, on strips and on the test patient"}}
figure = style.not_trained("more than one learning rate")
if searched:
    figure, axes = style.subplots(1, 2, figsize=(7, 2.8))
    colours = {"mse": style.MSE_COLOUR, "poisson": style.POISSON_COLOUR}
    dots = per_run.reset_index()
    for axis, score in zip(axes, ("strips", "test"), strict=True):
        for loss, colour in colours.items():
            line, own = rates[rates["loss"] == loss], dots[dots["loss"] == loss]
            rate = own["lr_times"] * settings.training.lr
            axis.plot(rate, own[score], "o", ms=3, color=colour, alpha=0.4)
            axis.plot(
                line["learning rate"], line[score], "-", color=colour, label=tables.TITLES[loss]
            )
            ring = best.loc[loss]
            axis.plot(ring["learning rate"], ring[score], "o", ms=9, mfc="none", color=colour)
        axis.set(xscale="log", xlabel="learning rate", title=heads[score])
        axis.set_xticks(rates["learning rate"].unique(), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:g}")
    axes[0].legend()
    alive = dots.groupby(["loss", "lr_times"])["test"].count()
    style.mark(figure, settings.source, rates, runs=alive)
figure

# %% [markdown]
# ## How long is long enough?
#
# Each point is a training of its own, with a schedule of that length, not a moment of a longer one.

# %%
long = scores[as_published(scores, "epochs_times", "decoder") & (scores["patient"] == main)]
arms = long.drop_duplicates("arm").sort_values("epochs_times")
per_run = long.groupby(["arm", "run"])["pcc_8um"].mean()
points = []
for _, own in arms.groupby(["decoder", "loss", "link", "bias"]):
    usual = own.loc[own["epochs_times"] == 1, "arm"].tolist()
    for arm, times in zip(own["arm"], own["epochs_times"], strict=True) if usual else ():
        change = effect({arm: 1, usual[0]: -1}) if times != 1 else Effect()
        row = {"line": usual[0], "arm": arm, "multiple": times, "pcc_8um": per_run[arm].mean()}
        row |= {"epochs": settings.arm(arm).training(settings.training).epochs}
        low, high = change.interval
        row |= {"change": change.value, "ci_low": low, "ci_high": high, "runs": len(per_run[arm])}
        points.append(row)
columns = ["line", "arm", "multiple", "epochs", "pcc_8um", "change", "ci_low", "ci_high", "runs"]
points = pd.DataFrame(points, columns=columns)
points = points[points.groupby("line")["multiple"].transform("nunique") > 1]
shown = points.drop(columns="line").assign(multiple=points["multiple"].map("{:g}".format))
tables.show(shown) if len(points) else style.not_trained("other budgets")

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-epochs", "caption": "PCC at 8 µm against the epochs of training, each point with a schedule of its own; lines are means, dots runs."}, "image": {"alt": "Scores of arms against epochs"}}
figure = style.not_trained("other budgets")
if len(points):
    figure, axis = style.subplots(figsize=(5.4, 3.1))
    for usual, line in points.groupby("line"):
        colour, dash = style.arm_style(usual)
        for _, row in line.iterrows():
            own = per_run[row["arm"]]
            axis.plot(np.full(len(own), row["epochs"]), own, "o", ms=3, color=colour, alpha=0.4)
        axis.plot(line["epochs"], line["pcc_8um"], dash, color=colour, label=usual)
    axis.set(xscale="log", xlabel="epochs", ylabel="PCC at 8 µm")
    axis.set_xticks(sorted(points["epochs"].unique()), minor=False)
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=7)
    alive = per_run.groupby("arm").count()[points["arm"]]
    style.mark(figure, settings.source, points, runs=alive)
figure

# %% [markdown]
# An arm has trained long enough for the claims when twice the epochs move its mean by 0.01 or less. The gains, which carry the claims, are looked at as well:

# %%
doubled = points[points["multiple"] == 2].set_index("line")
moves = {arm: effect({row["arm"]: 1, arm: -1}) for arm, row in doubled.iterrows()}
for poisson, mse in (("E", "D"), ("E", "D-matched"), ("E-linear", "D-linear")):
    if {poisson, mse} <= set(moves):
        longer = doubled.loc[[poisson, mse], "arm"]
        weights = {longer[poisson]: 1, longer[mse]: -1, poisson: -1, mse: 1}
        moves[f"{poisson} − {mse}"] = effect(weights)
found = [(name, e.value, *e.interval, e.n) for name, e in moves.items()]
found = pd.DataFrame(found, columns=["mean", "change", "ci_low", "ci_high", "runs"])
if len(found):
    quote("epochs", moved=(found["change"].abs() > 0.01).sum(), n=len(found))
    display(tables.show(found, digits=4))

# %% tags=["remove-input"]
moved = found.loc[found["change"].abs() > 0.01, "mean"]
still = f"No mean moves by more than 0.01 when the epochs of this build ({settings.training.epochs}) are doubled: it stands on a plateau."
if len(moved):
    still = (
        f"Doubling the epochs of this build ({settings.training.epochs}) moves {len(moved)} of"
        f" {len(found)} means by more than 0.01: {', '.join(moved)}. They are compared on the way."
    )
absent = "The preset of this build trains no arm for twice its epochs, so whether it stands on a plateau is not known; the preset study does."
Markdown(still if len(found) else absent)
