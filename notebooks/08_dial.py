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
# The gain of a gene at a setting is its PCC under Poisson minus that under MSE, within a patient and seed that were tested at every setting of the dial, then averaged. It is followed along the mean count of the bins that the loss sees.

# %%
titles = {"keep": "training counts thinned", "bin_um": "bins summed"}
dials = {setting: dial.gains(scores, setting) for setting in titles}  # one row per gene and setting
dials = {setting: gains for setting, gains in dials.items() if len(gains)}  # that were turned

# %% [markdown]
# The slope of a gene is the change of its gain per doubling of the setting, by least squares. The interval of the mean slope is a bootstrap over genes, its *p* that of Wilcoxon's signed rank test:

# %%
for setting, gains in dials.items():
    wide = gains.pivot(index="gene", columns=setting, values="delta")
    slopes = np.polyfit(np.log2(wide.columns.astype(float)), wide.T, 1)[0]
    low, high = mean_interval(slopes)  # stats.bootstrap, percentiles of 5,000 draws
    p_value = stats.wilcoxon(slopes).pvalue
    quote(f"dial.{setting}", slope=slopes.mean(), ci_low=low, ci_high=high, p_value=p_value)
    if setting == "keep":  # prose speaks of halving the counts
        quote("dial.keep", per_halving=-slopes.mean(), per_halving_low=-high, per_halving_high=-low)

# %% [markdown]
# The mean over genes at each setting, with its interval:

# %%
curves = {}
for setting, gains in dials.items():
    by_setting = gains.groupby(setting)
    curve = by_setting[["mean_count", "delta"]].mean()
    curve[["ci_low", "ci_high"]] = by_setting["delta"].agg(mean_interval).to_list()
    curves[setting] = curve.assign(n_genes=by_setting.size()).reset_index()
    display(tables.show(curves[setting], digits=4))

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
figure = style.not_trained("the dial")
if dials:
    size = 3.6 * len(dials), 2.9
    figure, axes = style.subplots(1, len(dials), figsize=size, sharey=True, squeeze=False)
    for axis, (setting, curve) in zip(axes[0], curves.items(), strict=True):
        counts, colour = curve["mean_count"], style.POISSON_COLOUR
        axis.fill_between(counts, curve["ci_low"], curve["ci_high"], color=colour, alpha=0.18)
        axis.plot(counts, curve["delta"], "o-", ms=4, color=colour)
        for value, x, y in zip(curve[setting], counts, curve["delta"], strict=True):
            share = f"1/{1 / value:.0f}" if value < 1 else "all"
            name = share if setting == "keep" else f"{value:g} µm"
            axis.annotate(name, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        axis.axhline(0, color="#9A9A9A", lw=0.8, zorder=0)
        axis.set(xscale="log", title=titles[setting], xlabel="mean count of a gene per bin")
        axis.margins(x=0.12)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("gain in PCC, Poisson − MSE")
    drawn = pd.concat(curve.assign(dial=titles[setting]) for setting, curve in curves.items())
    style.mark(figure, settings.source, drawn)
figure

# %% [markdown]
# :::{when} dial.keep.slope
# Gene by gene; a click opens the gene in the [browser](05b_browser).
# :::

# %% tags=["remove-input"]
if dials:
    categories = scores.groupby("gene")["category"].first()
    turned = {titles[setting]: gains for setting, gains in dials.items()}
    plot, choices = interactive.dial_browser(turned, categories, settings.source)
    display(interactive.show(plot, "dial", gene_page="05b_browser.html", choices=choices))
