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
import pandas as pd
from IPython.display import Markdown, display

from sparsity_trap import runs
from sparsity_trap.analysis import effects
from sparsity_trap.analysis.worlds import facts
from sparsity_trap.presets import other_worlds
from sparsity_trap.settings import LOSS_PAIRS
from sparsity_trap.show import style, tables

settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "08d_worlds")
main = settings.main_patient
worlds = {"at home": settings} | other_worlds(settings)  # none where sections are real
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
# Each effect is a mean over paired runs, genes and patches, with an interval that holds the variance of all three ([](03_results.ipynb)). In a world whose seeds are fewer than three, run-to-run variance is that of the arms which are repeated there.
# :::

# %%
by_seed, gains = [], []
for name, world in worlds.items() if elsewhere else ():
    results = runs.load_all(world)
    scores = runs.long_table(world, results)
    patches = {result.run.name: result.patches for result in results}
    for pair, (mse, poisson) in LOSS_PAIRS.items():
        weights = {poisson: 1, mse: -1}
        if set(weights) <= set(scores["arm"]):
            found = effects.contrast(scores, weights, patients=[main], moments=patches)
            low, high = found.interval
            row = {"pair": pair, "world": name, "gain": found.value}
            gains.append(row | {"ci_low": low, "ci_high": high, "n_seeds": found.n})
            seeds = effects.gains(scores, weights).loc[[main]].mean(axis=1).rename("gain")
            by_seed.append(seeds.reset_index().assign(world=name, pair=pair))

# %%
gains = pd.DataFrame(gains)
for row in gains.itertuples():
    numbers = {"ci_low": row.ci_low, "ci_high": row.ci_high, "n_seeds": row.n_seeds}
    quote(f"worlds.{row.world.replace(' ', '-')}.{row.pair}", gain=row.gain, **numbers)
if len(gains):
    by_seed = pd.concat(by_seed, ignore_index=True)
    display(tables.show(gains.replace({"pair": labels})))

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-worlds", "caption": "Gain of Poisson over MSE in PCC at 8 µm where arms differ in nothing but the loss, in each world. Small dots are seeds, large ones their means, with 95 % intervals that hold runs, genes and patches."}, "image": {"alt": "Gain of Poisson over MSE per world and seed, for each pair of arms"}}
figure = style.not_trained("other worlds")
if len(gains):
    pairs = gains["pair"].unique()
    size = 1.8 + 2.7 * len(pairs), 0.9 + 0.4 * len(worlds)
    figure, axes = style.subplots(1, len(pairs), figsize=size, sharey=True, squeeze=False)
    places = {name: place for place, name in enumerate(worlds)}
    for axis, pair in zip(axes[0], pairs, strict=True):
        rows, seeds = (table[table["pair"] == pair] for table in (gains, by_seed))
        y = rows["world"].map(places)
        axis.hlines(y, rows["ci_low"], rows["ci_high"], color=style.POISSON_COLOUR, lw=1.4)
        axis.plot(rows["gain"], y, "o", ms=5.5, color=style.POISSON_COLOUR)
        axis.plot(seeds["gain"], seeds["world"].map(places) + 0.22, "o", ms=2.5, color="#8A8A8A")
        axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
        axis.set(title=labels[pair], xlabel="gain in PCC, Poisson − MSE")
    axes[0][0].set_yticks(list(places.values()), list(places))
    axes[0][0].set_ylim(len(places) - 0.5, -0.5)
    drawn = by_seed.merge(gains, on=["pair", "world"], suffixes=("", "_mean"))
    style.mark(figure, settings.source, drawn)
figure

# %% tags=["remove-input"]
sentences = []
if len(gains):
    others = gains[gains["world"] != "at home"]
    for pair, rows in others.groupby("pair", sort=False):
        above, below = int((rows["ci_low"] > 0).sum()), int((rows["ci_high"] < 0).sum())
        sentences.append(
            f"Between arms {labels[pair]}, the interval lies above 0 in {above} of {len(rows)} "
            f"other worlds and below 0 in {below}."
        )
Markdown(" ".join(sentences)) if sentences else None
