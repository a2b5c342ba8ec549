# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Another world

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis.worlds import facts
from sparsity_trap.settings import LOSS_PAIRS
from sparsity_trap.show import style, tables

settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "08d_worlds")
main = settings.main_patient
worlds = {"at home": settings} | settings.other_worlds()  # none where sections are real
titles = {"at home": "the preset's own sections"}
titles |= {name: settings.worlds[name].title for name in worlds if name in settings.worlds}
elsewhere = len(worlds) > 1
labels = {pair: " and ".join(arms) for pair, arms in LOSS_PAIRS.items()}  # MSE and Poisson

# %% [markdown]
# The simulation is kind to a Poisson loss. Given the rate, its counts are Poisson; each lies where the image says; none is lost; and what a cell expresses can be seen. (Given the image, counts vary more than that: stripes, library size and the RNA content of a cell cannot be seen.) A gain that exists in such a world only would be a property of the simulation.
#
# Each world changes one of these and nothing else: tissue, image, encoder, training and the mean of every gene stay (lost counts lower it). In each, the arms that differ in nothing but the loss are trained anew and scored on the counts of that world.

# %% tags=["remove-input"]
Markdown(
    "\n".join(f"* **{name}**: {title}" for name, title in titles.items())
    if elsewhere
    else "Other worlds are simulated ones; the sections of this build are real."
    if settings.source == "spaceranger"
    else "The preset of this build has no other worlds."
)

# %% [markdown]
# :::{when} worlds.n
# ## What changes
#
# Means over genes on the main patient, for bins of 2 µm in tissue. The Fano factor is the variance of the counts over their mean; taken around the true rate it is 1 for Poisson counts. The last column compares the true rate with that at home, bin by bin.
# :::

# %%
if elsewhere:
    quote("worlds", n=len(worlds) - 1)
    home = runs.store(settings, main)
    found = {name: facts(runs.store(world, main), home) for name, world in worlds.items()}
    counts = pd.DataFrame(
        {name: table.drop(columns="gene").mean() for name, table in found.items()}
    )
    display(tables.show(counts.T.rename_axis("world").reset_index()))

# %% [markdown]
# :::{when} worlds.n
# ## The effect of the loss
#
# The gain of a seed is the mean over genes of the PCC at 8 µm under Poisson minus that under MSE, both runs with this seed. Genes share the run, so seeds and not genes are the sample: intervals are Student's *t* over seeds.
# :::


# %%
def over_seeds(gain):
    """Mean over seeds with its 95 % t interval, which one seed cannot have."""
    low, high = np.nan, np.nan
    if len(gain) > 1:
        low, high = stats.t.interval(0.95, len(gain) - 1, gain.mean(), stats.sem(gain))
    return pd.Series({"gain": gain.mean(), "ci_low": low, "ci_high": high, "n_seeds": len(gain)})


# %%
by_seed, effects = pd.DataFrame(), pd.DataFrame()
if elsewhere:
    parts = []
    for name, world in worlds.items():
        scores = runs.long_table(world, runs.load_all(world))
        scores = scores[scores["patient"] == main].assign(score=lambda rows: rows["pcc_8um"])
        for pair, arms in LOSS_PAIRS.items():
            gain = runs.gains(scores, arms).groupby("seed")["delta"].mean().rename("gain")
            parts.append(gain.reset_index().assign(world=name, pair=pair))
    by_seed = pd.concat(parts, ignore_index=True)
    effects = by_seed.groupby(["pair", "world"], sort=False)["gain"].apply(over_seeds).unstack()
    effects = effects.reset_index().astype({"n_seeds": int})
    for row in effects.itertuples():
        numbers = {"ci_low": row.ci_low, "ci_high": row.ci_high, "n_seeds": row.n_seeds}
        quote(f"worlds.{row.world.replace(' ', '-')}.{row.pair}", gain=row.gain, **numbers)
    display(tables.show(effects.replace({"pair": labels})))

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-worlds", "caption": "Gain of Poisson over MSE in PCC at 8 µm where arms differ in nothing but the loss, in each world. Small dots are seeds, large ones their means, with 95 % t intervals over seeds."}, "image": {"alt": "Gain of Poisson over MSE per world and seed, for each pair of arms"}}
figure = style.not_trained("other worlds")
if len(effects):
    pairs = effects["pair"].unique()
    size = 1.8 + 2.7 * len(pairs), 0.9 + 0.4 * len(worlds)
    figure, axes = style.subplots(1, len(pairs), figsize=size, sharey=True, squeeze=False)
    places = {name: place for place, name in enumerate(worlds)}
    for axis, pair in zip(axes[0], pairs, strict=True):
        rows, seeds = (table[table["pair"] == pair] for table in (effects, by_seed))
        y = rows["world"].map(places)
        axis.hlines(y, rows["ci_low"], rows["ci_high"], color=style.POISSON_COLOUR, lw=1.4)
        axis.plot(rows["gain"], y, "o", ms=5.5, color=style.POISSON_COLOUR)
        axis.plot(seeds["gain"], seeds["world"].map(places) + 0.22, "o", ms=2.5, color="#8A8A8A")
        axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
        axis.set(title=labels[pair], xlabel="gain in PCC, Poisson − MSE")
    axes[0][0].set_yticks(list(places.values()), list(places))
    axes[0][0].set_ylim(len(places) - 0.5, -0.5)
    drawn = by_seed.merge(effects, on=["pair", "world"], suffixes=("", "_mean"))
    style.mark(figure, settings.source, drawn)
figure

# %% tags=["remove-input"]
sentences = []
if len(effects):
    others = effects[effects["world"] != "at home"]
    for pair, rows in others.groupby("pair", sort=False):
        above, below = int((rows["ci_low"] > 0).sum()), int((rows["ci_high"] < 0).sum())
        sentences.append(
            f"Between arms {labels[pair]}, the interval lies above 0 in {above} of {len(rows)} "
            f"other worlds and below 0 in {below}."
        )
Markdown(" ".join(sentences)) if sentences else None
