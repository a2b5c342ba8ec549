# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The sparsity dial

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis import dial
from sparsity_trap.analysis.association import mean_interval
from sparsity_trap.show import interactive, style, tables

settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "08_dial")
scores = runs.long_table(settings, runs.load_all(settings))

# %% [markdown]
# Genes differ in more than sparsity, so an association over genes cannot show a cause. Here the same genes are made sparser: UMIs of the training sections are kept with a probability from 1 down to 1/16, images
# unchanged, and both losses are trained with link exp and bias −3. Every model is scored against the untouched counts of the test patient: its section is never thinned and takes no part in training, so no half of the counts has to be set aside.
#
# The second dial is the width of the bins that the loss compares: summed to wider bins, the same counts are less sparse. Each model is scored at the width it was trained at.
#
# The gain of a gene at a setting is its PCC under Poisson minus that under MSE, within a patient and seed, then averaged:

# %%
titles = {"keep": "training counts thinned", "bin_um": "bins summed"}
gains = {}
for setting in titles:
    rows = dial.dial_runs(scores, setting)
    pairs = rows.pivot_table(
        index=["gene", setting, "patient", "seed"], columns="loss", values="score"
    )
    if {"mse", "poisson"} <= set(pairs) and pairs.index.get_level_values(setting).nunique() > 1:
        gain = (pairs["poisson"] - pairs["mse"]).groupby(["gene", setting]).mean()
        gains[setting] = gain.unstack(setting).dropna(axis=1, how="all")

# %% [markdown]
# The slope of a gene is the change of its gain per doubling of the setting, by least squares; the interval of the mean slope is a bootstrap over genes, its p-value Wilcoxon's signed rank test over genes:

# %%
for setting, gain in gains.items():
    whole = gain.dropna()
    slopes = np.polyfit(np.log2(whole.columns.astype(float)), whole.T, 1)[0]
    low, high = mean_interval(slopes)
    p_value = stats.wilcoxon(slopes).pvalue if slopes.any() else np.nan
    quote(f"dial.{setting}", slope=slopes.mean(), ci_low=low, ci_high=high, p_value=p_value)
    if setting == "keep":  # prose speaks of halving the counts
        quote("dial.keep", per_halving=-slopes.mean(), per_halving_low=-high, per_halving_high=-low)

# %% [markdown]
# :::{when} dial.keep.slope
# Per halving of the counts, the gain of Poisson over MSE in PCC at 8 µm changes by {val}`dial.keep.per_halving:+.4f` on average over genes (95 % interval {val}`dial.keep.per_halving_low:+.4f` to
# {val}`dial.keep.per_halving_high:+.4f`, p = {val}`dial.keep.p_value:.2g`).
# :::
#
# :::{when} dial.bin_um.slope
# Per doubling of the width, the gain changes by {val}`dial.bin_um.slope:+.4f` ({val}`dial.bin_um.ci_low:+.4f` to {val}`dial.bin_um.ci_high:+.4f`).
# :::

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-dial", "caption": "Gain of Poisson over MSE at matched link and bias against the mean count of the bins that the loss sees, with 95 % intervals over genes. Left: training counts thinned. Right: bins summed."}, "image": {"alt": "Curves of the gain against mean count for thinning and for bin width"}}
dials = {titles[setting]: dial.turn(scores, setting) for setting in gains}
figure = style.not_trained("the dial")
if dials:
    figure, axes = style.subplots(
        1, len(dials), figsize=(3.6 * len(dials), 2.9), sharey=True, squeeze=False
    )
    for axis, (title, turned) in zip(axes[0], dials.items(), strict=True):
        curve = turned.curve
        counts = curve["mean_count"]
        axis.fill_between(
            counts, curve["ci_low"], curve["ci_high"], color=style.POISSON_COLOUR, alpha=0.18
        )
        axis.plot(counts, curve["delta"], "o-", ms=4, color=style.POISSON_COLOUR)
        for value, x, y in zip(curve.iloc[:, 0], counts, curve["delta"], strict=True):
            name = (
                f"{value:g} µm"
                if "bin_um" in curve
                else f"1/{1 / value:.0f}"
                if value < 1
                else "all"
            )
            axis.annotate(name, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        axis.axhline(0, color="#9A9A9A", lw=0.8, zorder=0)
        axis.set(xscale="log", title=title, xlabel="mean count of a gene per bin")
        axis.margins(x=0.12)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("gain in PCC, Poisson − MSE")
    data = pd.concat(turned.curve.assign(dial=title) for title, turned in dials.items())
    style.mark(figure, settings.source, data)
figure

# %% [markdown]
# :::{when} dial.keep.slope
# Gene by gene; a click opens the gene in the [browser](05b_browser).
# :::

# %% tags=["remove-input"]
if dials:
    categories = scores.groupby("gene")["category"].first()
    plot, choices = interactive.dial_browser(dials, categories, settings.source)
    display(interactive.show(plot, "dial", gene_page="05b_browser.html", choices=choices))

# %% tags=["remove-input"]
for turned in dials.values():
    display(tables.show(turned.curve, digits=4))
