# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The sparsity dial
#
# **Finding.** That sparsity causes the gain, so that it grows when counts are thinned and shrinks when bins are summed, is {val}`verdict.sparsity_causes_gain`.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib.ticker import LogLocator, NullFormatter

from sparsity_trap import losses, runs
from sparsity_trap.analysis import dial
from sparsity_trap.analysis.effects import contrast
from sparsity_trap.bins import BIN_UM, bin_mask, bin_sum
from sparsity_trap.show import interactive, style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "08_dial")
results = runs.load_all(settings)
scores = runs.long_table(settings, results)
patches = {result.run.name: result.patches for result in results}

# %% [markdown]
# Genes differ in more than sparsity, so an association over genes cannot show a cause. Here the same genes are made sparser, in two ways.
# The first dial thins: UMIs of the training sections are kept with a probability below 1, images unchanged. Every model is scored at 8 µm against the untouched counts of the test patient, whose section is never thinned and takes no part in training.
# That models learn less from sparser and noisier counts is known from ablations of real sections {cite:p}`hallinan2026impact`; asked here is whether one loss suffers more.
# The second dial is the width of the bins that the loss compares: summed to wider bins, the same counts are less sparse. Each model is scored at the width it was trained at.
#
# Both losses have link exp, and every gene starts at its mean in the training counts that the arm sees. A fixed start would lie nearer to the mean at some settings than at others.
#
# The gain at a setting is the PCC under Poisson minus that under MSE, within the test patient and seed, averaged over runs and genes. Its interval holds the variance of runs and genes.

# %%
titles = {"keep": "training counts thinned", "bin_um": "bins summed"}
turned = {setting: dial.dial_runs(scores, setting) for setting in titles}
pairs = {setting: dial.arms(rows, setting) for setting, rows in turned.items()}
pairs = {setting: own for setting, own in pairs.items() if len(own)}  # dials that were turned

# %%
curves = {}
for setting, arms in pairs.items():
    rows, found = turned[setting], []
    count = rows.groupby(setting)["mean_count"].mean()  # of a gene, per bin that the loss sees
    for value, (mse, poisson) in arms.iterrows():
        effect = contrast(rows, {poisson: 1, mse: -1}, "score")
        at_8um = contrast(rows, {poisson: 1, mse: -1}, "pcc_8um")
        numbers = (count[value], effect.value, *effect.interval, at_8um.value, effect.n)
        found.append((value, *numbers))
    names = ["mean_count", "delta", "ci_low", "ci_high", "at 8 µm", "runs"]
    curves[setting] = pd.DataFrame(found, columns=[setting, *names])
    display(tables.show(curves[setting]))

# %% tags=["remove-input"]
gone = {
    f"{arm}: {own['collapsed'].sum()} of {len(own)}"
    for rows in turned.values()
    for arm, own in rows.drop_duplicates("run").groupby("arm")
    if own["collapsed"].any()
}
display(Markdown(f"Runs that collapsed, and have no score: {', '.join(sorted(gone)) or 'none'}."))

# %% [markdown]
# The slope is a weighted sum of the same arms: least squares over the settings, per halving, towards sparser counts in both dials.

# %%
slopes = {}
for setting in pairs:
    slopes[setting] = contrast(turned[setting], dial.slope_weights(scores, setting), "score")
    low, high = slopes[setting].interval
    quote(f"dial.{setting}", per_halving=slopes[setting].value, low=low, high=high)

# %% [markdown]
# :::{when} dial.keep.per_halving
# Per halving of the counts kept, the gain changes by {val}`dial.keep.per_halving:+.4f` (95 % interval {val}`dial.keep.low:+.4f` to {val}`dial.keep.high:+.4f`).
# :::
#
# :::{when} dial.bin_um.per_halving
# Per halving of the bins' width it changes by {val}`dial.bin_um.per_halving:+.4f` ({val}`dial.bin_um.low:+.4f` to {val}`dial.bin_um.high:+.4f`).
# :::

# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-dial", "caption": "Gain of Poisson over MSE at equal link and start against the mean count of the bins that the loss sees, with 95 % intervals over runs and genes. Left: training counts thinned. Right: bins summed."}, "image": {"alt": "Curves of the gain against mean count for thinning and for bin width"}}
figure = style.not_trained("the dial")
if curves:
    size = 3.6 * len(curves), 2.9
    figure, axes = style.subplots(1, len(curves), figsize=size, sharey=True, squeeze=False)
    for axis, (setting, curve) in zip(axes[0], curves.items(), strict=True):
        counts, colour = curve["mean_count"], style.POISSON_COLOUR
        axis.fill_between(counts, curve["ci_low"], curve["ci_high"], color=colour, alpha=0.18)
        axis.plot(counts, curve["delta"], "o-", ms=4, color=colour)
        for value, x, y in zip(curve[setting], counts, curve["delta"], strict=True):
            if np.isfinite(y):
                share = f"1/{1 / value:.0f}" if value < 1 else "all"
                name = share if setting == "keep" else f"{value:g} µm"
                axis.annotate(
                    name, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7
                )
        axis.axhline(0, color="#9A9A9A", lw=0.8, zorder=0)
        axis.set(xscale="log", title=titles[setting], xlabel="mean count of a gene per bin")
        axis.margins(x=0.12)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("gain in PCC, Poisson − MSE")
    drawn = pd.concat(curve.assign(dial=titles[setting]) for setting, curve in curves.items())
    style.mark(figure, settings.source, drawn, runs=drawn["runs"])
figure

# %% [markdown]
# ## What else each dial moves
#
# Neither dial turns sparsity alone. Below, for patches of a training section: the mean count per bin; the noise of a bin at the gene's mean, as the coefficient of variation of Poisson counts (median over genes); the number of tissue bins; the spread of the genes' means (s.d. of their logarithms); the distance that the model has to go from its start (s.d. of the log rate within tissue, mean over genes, where the true rate is known);
# and the norm of the loss's gradient on η at the start.

# %%
patient = settings.training_patients(settings.main_patient)[0]
store = runs.store(settings, patient)
some = np.unique(np.linspace(0, len(store) - 1, 8).astype(int))
seen, tissue = store.counts.oindex[some], store.mask.oindex[some]
truth = None if store.truth is None else store.truth.oindex[some].astype(np.float32)


# %%
def gradient_norm(loss, counts, width):
    """Norm of d loss / d η where every gene stands at its mean."""
    counts, mask = torch.from_numpy(counts.astype(np.float32)), torch.from_numpy(tissue)
    mean = (counts * mask[:, None]).sum((0, 2, 3)) / mask.sum()
    start = losses.initial_eta(mean, "exp")[:, None, None].expand(counts.shape).requires_grad_()
    objective = losses.Objective(loss, "exp", len(mean), (width,))
    return torch.autograd.grad(objective(start, counts, mask), start)[0].norm().item()


# %%
def moved(keep, width):
    """What the loss sees at a setting."""
    factor = round(width / BIN_UM)
    counts = np.random.default_rng(0).binomial(seen, keep) * tissue[:, None]
    inside = bin_mask(tissue, factor)
    mean = bin_sum(counts.astype(np.float32), factor).swapaxes(0, 1)[:, inside].mean(axis=1)
    mean = mean[mean > 0]
    distance = np.nan
    if truth is not None:
        rate = bin_sum(truth * tissue[:, None], factor).swapaxes(0, 1)[:, inside]
        distance = np.log(rate.clip(1e-6)).std(axis=1).mean()
    return {
        "counts kept": f"1/{1 / keep:.0f}" if keep < 1 else "all", "bin, µm": width,
        "mean count": mean.mean(), "noise": np.median(mean**-0.5), "bins": inside.sum(),
        "spread of genes": np.log(mean).std(), "distance": distance,
        "gradient, MSE": f"{gradient_norm('mse', counts, width):.1e}".replace("-", "−"),
        "gradient, Poisson": f"{gradient_norm('poisson', counts, width):.1e}".replace("-", "−"),
    }  # fmt: skip


# %%
at = [(keep, BIN_UM) for keep in pairs.get("keep", pd.DataFrame()).index]
at += [(1.0, int(width)) for width in pairs.get("bin_um", pd.DataFrame()).index if width > BIN_UM]
both = pd.DataFrame([moved(keep, width) for keep, width in at])
tables.show(both) if len(both) else style.not_trained("the dials")

# %% [markdown]
# Thinning adds noise and leaves the tissue, the bins and the distance to go. Summing takes noise away, but also bins, and detail: within wide bins rates are evened out. Gradients shrink with the counts, those of squared error as their square. AdamW divides that out as long as it stays far above its ε, here 1e-15; at torch's default of 1e-8, squared error on thinned counts stands still.
# The genes' means keep their spread at every setting, and this spread is what the two losses weigh differently ([](../problem.md)).
#
# ## The same mean count, by either dial
#
# If the mean count per bin were what matters, a factor of two in it would change the gain alike by either dial. Halving a bin's width quarters its count, so the comparison is per halving of the mean count, all scored at 8 µm:

# %%
per_count = {}
for setting in pairs:
    halvings = {"keep": 1, "bin_um": 2}[setting]  # of the mean count, per halving of the setting
    weights = dial.slope_weights(scores, setting)
    per_count[setting] = {arm: weight / halvings for arm, weight in weights.items()}
if len(per_count) == 2:
    summed = pd.Series(per_count["keep"]).sub(pd.Series(per_count["bin_um"]), fill_value=0)
    per_count["difference"] = summed[summed.abs() > 1e-9].to_dict()
either = []
for name, weights in per_count.items():
    effect = contrast(scores, weights, moments=patches)
    low, high = effect.interval
    quote(f"dial.per_count.{name}", value=effect.value, low=low, high=high)
    either.append((titles.get(name, name), effect.value, low, high, effect.n))
either = pd.DataFrame(
    either, columns=["dial", "gain per halving of the count", "ci_low", "ci_high", "runs"]
)
tables.show(either, digits=4) if len(either) else style.not_trained("the dials")

# %% [markdown]
# And at one mean count: in each setting only genes whose mean count per bin lies within a factor of two of the panel's median at 2 µm with all counts. Thinned, these are richer genes; summed, poorer ones. So count and noise per bin are alike, and bins, detail and genes are not.

# %%
window = []
for setting, arms in pairs.items():
    rows, usual = turned[setting], {"keep": 1.0, "bin_um": float(BIN_UM)}[setting]
    middle = rows.loc[rows[setting] == usual].groupby("gene")["mean_count"].mean().median()
    for value, (mse, poisson) in arms.iterrows():
        alike = rows[rows["mean_count"].between(middle / 2, middle * 2)]
        genes = alike.loc[alike["arm"] == poisson, "gene"].nunique()
        if genes > 3:
            alike = alike[alike[setting] == value]
            effect = contrast(alike, {poisson: 1, mse: -1}, "pcc_8um")
            name = f"1/{1 / value:.0f}" if value < 1 else f"{value:g}"
            window.append((titles[setting], name, genes, effect.value, *effect.interval))
columns = ["dial", "setting", "n_genes", "gain at 8 µm", "ci_low", "ci_high"]
window = pd.DataFrame(window, columns=columns)
tables.show(window) if len(window) else style.not_trained("the dials")

# %% [markdown]
# ## What must hold under both
#
# The claim that sparsity itself causes the gain must hold under both dials: the gain grows when counts are thinned, *and* when bins are made smaller. Whatever else moves, it moves differently in the two. It is judged in [](10_claims.ipynb).

# %% tags=["remove-input"]
words = {"keep": "thinned", "bin_um": "cut into smaller bins"}
directions = {
    setting: "grows" if slope.interval[0] > 0 else "shrinks" if slope.interval[1] < 0 else ""
    for setting, slope in slopes.items()
}
found = [
    f"the gain {directions[s]} as counts are {words[s]}"
    if directions[s]
    else f"no change of the gain is shown as counts are {words[s]}"
    for s in slopes
]
verdict = "The preset of this build turns fewer than two dials, so it cannot tell."
if len(slopes) == 2:
    verdict = "In this build " + ", and ".join(found) + ". "
    if set(directions.values()) == {"grows"}:
        verdict += "That is what sparsity as a cause would do."
    elif set(directions.values()) == {"grows", "shrinks"}:
        verdict += "Sparsity cannot be the cause of both."
    else:
        verdict += "So it is not shown that sparsity causes the gain."
Markdown(verdict)

# %% [markdown]
# For a pathologist: a map can be poor in molecules because few were sequenced, or because its squares are small; the first takes information away, the second only spreads it out, and neither by itself says which way of training to prefer.
#
# :::{when} dial.keep.per_halving
# Gene by gene; a click opens the gene in the [browser](05b_browser).
# :::

# %% tags=["remove-input"]
of_genes = {titles[setting]: dial.gains(scores, setting) for setting in pairs}
of_genes = {title: gains for title, gains in of_genes.items() if len(gains)}
if of_genes:
    categories = scores.groupby("gene")["category"].first()
    plot, choices = interactive.dial_browser(of_genes, categories, settings.source)
    display(interactive.show(plot, "dial", gene_page="05b_browser.html", choices=choices))
