# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Collapse and recovery
#
# **Finding.** Over {val}`delta.n_runs` runs Poisson as published (arm E) gains {val}`delta.pcc_8um:+.3f` in PCC at 8 µm over squared error as published (arm D), {val}`delta.ci_low:+.3f` to {val}`delta.ci_high:+.3f`; that it remains with link and bias equal is {val}`verdict.rescue_matched`.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import itertools

import numpy as np
import pandas as pd
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis import published
from sparsity_trap.analysis.association import mean_table
from sparsity_trap.analysis.effects import contrast, gains, pcc_without_each
from sparsity_trap.bins import bin_mask, bin_sum
from sparsity_trap.settings import LOSS_PAIRS, MSE_ARM, POISSON_ARM, PUBLISHED_ARMS
from sparsity_trap.show import curves, interactive, maps, style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "03_results")
main = settings.main_patient

# %% [markdown]
# An arm is trained anew for every test patient and seed, and each training is a *run*. Its table holds a score per gene. A run that [collapsed](collapse) has no scores; it is counted instead.

# %%
results = runs.load_all(settings)
scores = runs.long_table(settings, results)  # a row per run and gene
by_arm = scores.groupby(["patient", "seed", "arm"])[["pcc_8um", "collapsed"]].mean().unstack()

# %% [markdown]
# ## Run by run
#
# The gain of a run is the difference of two arms' mean PCC at 8 µm, on the same test patient and from the same seed, so from the same initial weights, order of patches and held-out strips. E and D differ in loss, link and initial bias at once. E and D-matched, and E-linear and D-linear, differ in nothing but the loss. E and E-linear differ in the decoder alone.

# %%
trained = set(scores["arm"])
pairs = {"delta": (MSE_ARM, POISSON_ARM)}
pairs |= {f"delta.{name}": pair for name, pair in LOSS_PAIRS.items()}
pairs["delta.depth"] = ("E-linear", "E")
pairs = {key: pair for key, pair in pairs.items() if trained >= set(pair)}
titles = {key: f"{second} − {first}" for key, (first, second) in pairs.items()}

# %%
pcc, dead = by_arm["pcc_8um"], by_arm["collapsed"]
by_run = pd.DataFrame(
    {titles[key]: pcc[second] - pcc[first] for key, (first, second) in pairs.items()}
)
failed = {
    titles[key]: dead[list(pair)].max(axis=1, skipna=False) > 0 for key, pair in pairs.items()
}
shown = by_run.astype(object).mask(pd.DataFrame(failed), "collapsed").dropna(how="all")
tables.show(shown.reset_index())

# %% [markdown]
# (estimator)=
# ## How an effect is estimated
#
# An effect is the mean gain over runs. Its error has three parts. *Runs*: trained again from another seed the same arms differ by another amount, in all genes at once. *Genes*: other genes like these would gain more or less. *Patches*: so would other patches of the section.
# The 95 % interval adds the three variances and takes Student's t with the degrees of freedom of the sum (Satterthwaite). For E − D on patient {val}`preset.main_patient`, by hand:

# %%
weights = {POISSON_ARM: 1, MSE_ARM: -1}
patches = {result.run.name: result.patches for result in results}  # sums per patch and gene
gain = gains(scores[scores["patient"] == main], weights)  # a row per run, a column per gene
n, k = gain.shape
of_runs = gain.mean(axis=1).var() / n
of_genes = gain.mean(axis=0).var() / k

# %% [markdown]
# The variance that patches bring is a jackknife: each patch is left out in turn, in all runs alike.


# %%
def without_each(arm):
    """Mean PCC over genes and runs, with each patch left out in turn."""
    names = [f"{arm}-{main}-s{seed}" for seed in gain.index.unique("seed")]
    return np.mean([np.nanmean(pcc_without_each(patches[name]), axis=1) for name in names], axis=0)


# %%
by_hand = {"gain": gain.mean(axis=1).mean()} | dict.fromkeys(("ci_low", "ci_high"), np.nan)
if n > 1:
    left_out = without_each(POISSON_ARM) - without_each(MSE_ARM)
    m = len(left_out)
    of_patches = (m - 1) ** 2 / m * left_out.var(ddof=1)
    variance = of_runs + of_genes + of_patches
    df = variance**2 / (of_runs**2 / (n - 1) + of_genes**2 / (k - 1) + of_patches**2 / (m - 1))
    half = stats.t.ppf(0.975, df) * np.sqrt(variance)
    by_hand |= {"ci_low": by_hand["gain"] - half, "ci_high": by_hand["gain"] + half}

# %% [markdown]
# The function that all pages use for this is `contrast`:


# %%
def effect(weights, patients=()):
    """Mean over patients and runs, with its interval."""
    return contrast(scores, weights, patients=patients, moments=patches)


found = effect(weights, [main])
low, high = found.interval
by_function = {"gain": found.value, "ci_low": low, "ci_high": high}
tables.show(pd.DataFrame({"by hand": by_hand, "contrast": by_function}).T, index=True)

# %% [markdown]
# Both agree where at least three runs of each arm are paired. With fewer, the difference between runs cannot be estimated from them: `contrast` then takes each arm's mean over all its runs, and the variance of a run over all arms of that decoder which are repeated, pooled within arm and patient, with its degrees of freedom. Without any repeated arm there is no interval.
# Over several patients, each counts alike, and the variance between runs is the one within patients.
#
# The interval speaks of other trainings of these arms, of genes like these and of patches like these. It does not speak of other patients, nor of other tissue drawn by the simulation.
#
# ## Effects
#
# Every pair of arms that the preset trains, on the main patient and over all patients that both arms have. *Genes gained* counts genes whose mean gain over runs is above 0. The last three columns are the standard errors of each part.

# %%
rows = []
for key, (first, second) in pairs.items():
    weights = {second: 1, first: -1}
    every = gains(scores, weights)
    here = every[every.index.get_level_values("patient") == main]
    for patients, table in {(main,): here, tuple(every.index.unique("patient")): every}.items():
        found, of_gene = effect(weights, patients), table.groupby("patient").mean().mean()
        low, high = found.interval
        rows.append({
            "pair": titles[key], "patients": ", ".join(patients), "runs": len(table),
            "gain": found.value, "ci_low": low, "ci_high": high, "n_wins": (of_gene > 0).sum(),
            "n_genes": of_gene.count(), "runs s.e.": found.runs, "genes s.e.": found.genes,
            "patches s.e.": found.patches, "key": key,
        })  # fmt: skip
pairs_table = pd.DataFrame(rows)
tables.show(pairs_table.drop(columns="key"))

# %%
for key, rows in pairs_table.groupby("key"):
    on_main, over_all = rows.iloc[0], rows.iloc[-1]
    of_runs = by_run[titles[key]].dropna()
    of_runs = of_runs[of_runs.index.get_level_values("patient") == main]
    quote(
        key, pcc_8um=on_main["gain"], ci_low=on_main["ci_low"], ci_high=on_main["ci_high"],
        n_runs=on_main["runs"], n_wins=on_main["n_wins"], n_genes=on_main["n_genes"],
        least_run=of_runs.min(), largest_run=of_runs.max(), n_patients=over_all["patients"].count(",") + 1,
        over_patients=over_all["gain"], over_patients_low=over_all["ci_low"],
        over_patients_high=over_all["ci_high"], over_patients_runs=over_all["runs"],
    )  # fmt: skip

# %% [markdown]
# Over {val}`delta.n_runs` runs on patient {val}`preset.main_patient`, arm E differs from arm D by {val}`delta.pcc_8um:+.3f` in mean per-gene PCC at 8 µm (95 % interval {val}`delta.ci_low:+.3f` to {val}`delta.ci_high:+.3f`); single runs lie between {val}`delta.least_run:+.3f` and {val}`delta.largest_run:+.3f`. Over these runs it is higher on
# {val}`delta.n_wins` of {val}`delta.n_genes` genes. The published difference, of one run on patient P5, is {val}`published.mean_delta:+.3f`, on {val}`published.n_wins` of {val}`published.n_genes` genes.
#
# :::{when} delta.matched.pcc_8um
# With link and bias held equal the effect of the loss, E − D-matched, is {val}`delta.matched.pcc_8um:+.3f` ({val}`delta.matched.ci_low:+.3f` to {val}`delta.matched.ci_high:+.3f`, {val}`delta.matched.n_runs` runs).
# :::
#
# :::{when} delta.linear.pcc_8um
# With the linear decoder it is {val}`delta.linear.pcc_8um:+.3f` ({val}`delta.linear.ci_low:+.3f` to {val}`delta.linear.ci_high:+.3f`, {val}`delta.linear.n_runs` runs).
# :::

# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-gains", "caption": "Gains in PCC at 8 µm. Coloured points: single runs. Black: mean over runs with its 95 % interval."}, "image": {"alt": "Gain of every run for each pair of arms, with mean and interval"}}
palette = itertools.cycle(style.CATEGORY_COLOURS.values())
colours = dict(zip(settings.patients, palette, strict=False))
rows = pairs_table.drop_duplicates(["pair", "patients"])
figure, axis = style.subplots(figsize=(6.8, 0.9 + 0.42 * len(rows)))
drawn = []
for y, row in enumerate(rows.itertuples()):
    of_pair = by_run[row.pair].dropna().rename("gain").reset_index()
    of_pair = of_pair[of_pair["patient"].isin(row.patients.split(", "))]
    for patient, own in of_pair.groupby("patient"):
        places = y - 0.12 + 0.06 * np.linspace(-1, 1, len(own))
        axis.scatter(own["gain"], places, s=18, color=colours[patient])
    axis.hlines(y + 0.16, row.ci_low, row.ci_high, color="black", lw=1.4)
    axis.plot(row.gain, y + 0.16, "D", color="black", ms=5)
    drawn.append(of_pair.assign(pair=row.pair, patients=row.patients))
axis.set_yticks(range(len(rows)), [f"{row.pair}\n{row.patients}" for row in rows.itertuples()])
axis.axvline(0, color="#888888", lw=0.6)
axis.set_ylim(len(rows) - 0.5, -0.5)
axis.set_xlabel("gain in PCC at 8 µm")
drawn = pd.concat(drawn)
for patient in drawn["patient"].drop_duplicates().sort_values():
    axis.scatter([], [], s=18, color=colours[patient], label=patient)
axis.legend(title="test patient", fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
style.mark(figure, settings.source, drawn, genes=rows["n_genes"], runs=rows["runs"])

# %% [markdown]
# ## Gene by gene
#
# Scores of a gene under arms D and E, each the mean over the paired runs on patient {val}`preset.main_patient`. The eight largest mean gains:

# %%
genes = mean_table(scores, main, MSE_ARM, POISSON_ARM)
shown = ["gene", "category", "sparsity", "mean_count", "pcc_8um_mse", "pcc_8um_poisson"]
tables.show(genes[[*shown, "delta_pcc_8um"]].nlargest(8, "delta_pcc_8um"))

# %%
mse, poisson = runs.contrast(settings)  # one run of D and E, for maps
store = runs.store(settings, main)
best = genes.loc[genes["delta_pcc_8um"].fillna(-np.inf).idxmax()]
quote("delta", best_gene=best["gene"], best_gain=best["delta_pcc_8um"])
quote("delta", median_gain=genes["delta_pcc_8um"].median())
quote("maps", seed_mse=mse.run.seed, seed_poisson=poisson.run.seed)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-collapse", "caption": "Collapse and recovery. **a** One patch and gene at 8 µm, of one run of each arm: H&E, counts, and both predictions on the counts' colour scale. **b** Every gene's PCC at 8 µm within tissue, mean over runs. **c** Means over genes and runs; dots are runs."}, "image": {"alt": "Maps of one gene under both losses, and per-gene PCC of all genes"}}
figure = style.Exhibit(figsize=(7, 6.9))
figure.tissue = True
rows = figure.add_gridspec(3, 1, height_ratios=(1, 1.25, 0.85))

gene = best["gene"]
index = store.genes.index(gene)
patch = maps.richest_patch(store, index)
panels = rows[0].subgridspec(1, 4).subplots()
drawn = [
    bin_sum(values[patch, index].astype(np.float32), 4)
    for values in (store.counts, mse.predictions, poisson.predictions)
]
tissue = bin_mask(store.mask[patch], 4)
maps.panel_row(panels, store.images[patch], drawn, tissue, gene, pixel_um=256 / 224, length_um=50)
ended = [f"seed {r.run.seed}{' collapsed' * runs.collapsed(r.genes)}" for r in (mse, poisson)]
of_run = [f"MSE (D)\n{ended[0]}", f"Poisson (E)\n{ended[1]}"]
for axis, title in zip(panels, ("H&E", "counts", *of_run), strict=True):
    axis.set_title(title)
figure.suptitle(f"a   {gene}, one patch at 8 µm, one run", x=0.01, ha="left", weight="bold", size=9)

dumbbells = figure.add_subplot(rows[1])
bars = figure.add_subplot(rows[2].subgridspec(1, 2)[0])
ordered = genes.sort_values("pcc_8um_poisson", ascending=False).reset_index(drop=True)
low, high = ordered["pcc_8um_mse"], ordered["pcc_8um_poisson"]
dumbbells.vlines(ordered.index, low, high, color="#BBBBBB", lw=1.2)
dumbbells.plot(low, "o", color=style.MSE_COLOUR, ms=3.5, label="MSE (D)")
dumbbells.plot(high, "o", color=style.POISSON_COLOUR, ms=3.5, label="Poisson (E)")
dumbbells.set_xlim(-1, len(ordered))
dumbbells.set_ylabel("PCC")
dumbbells.set_title("b   per-gene PCC at 8 µm, mean over runs", loc="left", weight="bold")
dumbbells.legend(fontsize=7.5)
style.name_genes(dumbbells, ordered, fontsize=7, style="italic")

names = {"pcc_2um": "PCC\n2 µm", "pcc_8um": "PCC\n8 µm", "ssim_2um": "SSIM\n2 µm"}
of_runs = scores[scores["patient"] == main].groupby(["arm", "seed"])[list(names)].mean()
sides = (-0.2, MSE_ARM, style.MSE_COLOUR), (0.2, POISSON_ARM, style.POISSON_COLOUR)
for shift, arm, colour in sides:
    own = of_runs.loc[arm]
    means = own.mean()
    bars.bar(np.arange(len(names)) + shift, means, 0.38, color=colour, alpha=0.75)
    for i, name in enumerate(names):
        bars.plot(np.full(len(own), i + shift), own[name], "o", ms=2.5, color="black", mew=0)
        top = max(own[name].max(), 0) + 0.006
        bars.text(
            i + shift,
            top,
            f"{means[name]:z.2f}".replace("-", "−"),
            ha="center",
            va="bottom",
            size=7,
        )
bars.set_xticks(range(len(names)), names.values())
bars.set_title("c   mean over genes", loc="left", weight="bold")
bars.margins(y=0.15)
bars.set_ylabel("score")
for axis in (dumbbells, bars):
    axis.axhline(0, color="#888888", lw=0.6)
drawn = genes.drop(columns=["sparsity", "mean_count", "delta_pcc_8um"])
alive = of_runs["pcc_8um"].groupby("arm").count()[[MSE_ARM, POISSON_ARM]]
style.mark(figure, settings.source, drawn, genes=len(genes), runs=alive)

# %% [markdown]
# In {numref}`fig-collapse`, panel a shows the gene with the largest mean gain, so it is the most favourable case, not a typical one. It is of one run; the seed stands above it. Panel b shows all genes.
#
# PCC at 8 µm of every gene under any two arms, each the mean over the arm's runs on the main patient; genes above the line are predicted better by the arm on the vertical axis. A click opens the gene in the [browser](05b_browser).

# %% tags=["hide-input"]
order = (*PUBLISHED_ARMS, "D-matched", "D-linear", "E-linear", "E-img2st")
home = scores[(scores["patient"] == main) & scores["arm"].isin(order)]
of_arm = home.groupby(["gene", "arm"])["pcc_8um"].mean().unstack().reindex(genes["gene"])
arms = {f"arm {arm}": of_arm[arm].reset_index(drop=True) for arm in home["arm"].unique()}
across, up = ({first: arms[first], **arms} for first in ("arm D", "arm E"))
plot, choices = interactive.gene_scatter(genes, across, up, settings.source, diagonal=True)
interactive.show(plot, "arms", gene_page="05b_browser.html", choices=choices)

# %% [markdown]
# (collapse)=
# ## Collapse
#
# Some runs end in maps without information. A gene's map is without information when it is flat, that is when the rate varies over 2 µm tissue bins by less than {val}`collapse.flat` of its mean; or when it is empty, its total below {val}`collapse.empty` of what is expected, and what is left does not correlate (PCC at 8 µm below {val}`collapse.null_pcc`). A run has *collapsed* when that is so for more than half of its genes.
# Its scores would be those of dust, or of a constant. So it has none in the means and effects of this book.
#
# Collapse is an event, and its rate is what can be estimated: here over all patients, seeds and arms that start alike, at the preset's learning rate and budget and with all counts. Intervals are exact for independent runs (Clopper and Pearson). *Start* is link and initial bias. Arm B is left out: it is arm A, interpolated.

# %%
alike = (scores["keep"] == 1) & (scores["lr_times"] == 1) & (scores["epochs_times"] == 1)
each = scores[alike & (scores["arm"] != "B")].drop_duplicates("run")


def rate(dead):
    """Runs that collapsed among some, with the exact interval of their rate."""
    low, high = stats.binomtest(int(dead.sum()), len(dead)).proportion_ci(method="exact")
    count = {"runs": len(dead), "collapsed": dead.sum(), "rate": dead.mean()}
    return count | {"ci_low": low, "ci_high": high}


# %%
bias = each["bias_value"].map(lambda b: b if isinstance(b, str) else f"{b:g}".replace("-", "−"))
starts = {
    start: {"arms": ", ".join(own["arm"].unique()), **rate(own["collapsed"])}
    for start, own in each.groupby(["loss", each["link"] + ", " + bias])
}
starts = pd.DataFrame.from_dict(starts, orient="index").rename_axis(["loss", "start"])
tables.show(starts.reset_index())

# %%
quote("collapse", flat=runs.FLAT, empty=runs.EMPTY, null_pcc=runs.NULL_PCC)
quote("collapse", **rate(each["collapsed"]))
for loss in ("mse", "poisson"):
    quote(f"collapse.{loss}", **rate(each.loc[each["loss"] == loss, "collapsed"]))
quote("collapse.D", **rate(each.loc[each["arm"] == MSE_ARM, "collapsed"]))

# %% [markdown]
# Of {val}`collapse.runs` runs {val}`collapse.collapsed` collapsed: {val}`collapse.mse.collapsed` of {val}`collapse.mse.runs` with squared error, {val}`collapse.poisson.collapsed` of {val}`collapse.poisson.runs` with Poisson. Arm D, squared error from the published start, collapsed in {val}`collapse.D.collapsed` of {val}`collapse.D.runs` runs (rate {val}`collapse.D.rate:.0%`, 95 % interval {val}`collapse.D.ci_low:.0%` to {val}`collapse.D.ci_high:.0%`).
#
# ## All runs
#
# Arms of the factorial and the dial have pages of their own; all arms are in [](../methods.md). Per-gene scores are means over the genes with a defined score; the others are counted for PCC at 8 µm. *Pooled* is one correlation over all genes and bins, as the publication reports at 2 µm; differences between genes dominate it.
# *Unmasked* follows the published protocol, which scores bins off the tissue too. *Rate* compares with the true rate where it is known. A collapsed run stands here with the numbers of its maps, which enter nothing else.

# %% tags=["output_scroll"]
every = runs.run_table(settings, results)  # a row per run: means of its per-gene scores
columns = [
    "arm", "test_patient", "seed", "collapsed", "pcc_2um", "pcc_8um", "pcc_8um_unmasked",
    "pooled_pcc_2um", "ssim_2um", "ssim_8um", "pcc_8um_rate", "undefined_pcc_8um", "epochs", "seconds",
]  # fmt: skip
table = every.loc[every["arm"].isin(order), columns].dropna(axis=1, how="all")
tables.show(table.astype({"seconds": int}), missing="undefined", sortable=True)

# %% [markdown]
# By arm and patient: means over the runs that did not collapse, and the standard deviation of PCC at 8 µm between them.

# %%
scored = [*runs.SCORES, *(c for c in every if c.startswith("pooled")), "seconds"]
alive = every.assign(**every[scored].mask(every["collapsed"]))
groups = alive.groupby(["arm", "test_patient"], sort=False)
by_arm = groups[scored].mean().assign(
    title=groups["title"].first(), runs=groups.size(), collapsed=groups["collapsed"].sum(),
    sd=groups["pcc_8um"].std(),
).reset_index()  # fmt: skip
columns = [
    "arm", "title", "test_patient", "runs", "collapsed", "pcc_2um", "pcc_8um", "sd",
    "pcc_8um_unmasked", "pooled_pcc_2um", "ssim_2um", "ssim_8um", "pcc_8um_rate",
]  # fmt: skip
table = by_arm.loc[by_arm["arm"].isin(order), columns].dropna(axis=1, how="all")
tables.show(table.rename(columns={"sd": "s.d."}), missing="undefined", sortable=True)

# %%
described = every.drop_duplicates("arm").set_index("arm")[["decoder", "loss", "link", "bias"]]
for row in by_arm[by_arm["test_patient"] == main].to_dict("records"):
    quote(f"arm.{row['arm']}", **row, **described.loc[row["arm"]])
quote("collapse", best_ssim_2um=every.loc[every["collapsed"], "ssim_2um"].max())
quote(
    "training",
    n_train=poisson.provenance["training_patches"],
    n_validation=poisson.provenance["validation_patches"],
)

# %% [markdown]
# :::{when} arm.E-linear.pcc_8um
# The linear decoder is one matrix from a token to its bins. With the loss, link and bias of arm E it has a mean PCC at 8 µm of {val}`arm.E-linear.pcc_8um:.3f` over {val}`arm.E-linear.runs` runs, against {val}`arm.E.pcc_8um:.3f` over {val}`arm.E.runs` for Hist2ST: a difference E − E-linear of {val}`delta.depth.pcc_8um:+.3f` ({val}`delta.depth.ci_low:+.3f` to {val}`delta.depth.ci_high:+.3f`).
# A deep decoder that does not pass it has not been worth its depth on these data.
# :::
#
# ## Published values
#
# For comparison: patient P5, real sections, Virchow2. PCC is pooled over genes and, at 8 µm, includes bins off the tissue. The publication quotes Img2ST-Net with
# {val}`published.img2st_pcc_8um:.3f` at 8 µm; its own per-gene means at 8 µm are {val}`published.pcc_8um_mse:.3f` (D) and {val}`published.pcc_8um_poisson:.3f` (E).

# %%
tables.show(published.ARMS)

# %% [markdown]
# ## Training dynamics
#
# Each arm is selected by its own loss. Losses of different arms have different units, so panel a of {numref}`fig-dynamics` shows for each how much of its fall is still to come; panel b is comparable. Each curve is one run, that of the arm's lowest seed. Arm B is arm A, interpolated, so their curves are one.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-dynamics", "caption": "Training dynamics of one run of each of these arms, on the held-out blocks of the main patient's training sections."}, "image": {"alt": "Held-out loss and PCC by epoch"}}
logs = {arm: runs.pick(results, arm, main).log for arm in home["arm"].unique()}
curves.training_dynamics(logs, settings.source)

# %% [markdown]
# ## What an empty map scores
#
# A map that is zero everywhere, scored like the prediction of an arm ([](06_controls.ipynb)), has SSIM {val}`ssim.zeros:.3f` at 2 µm on these patches. Arm D has {val}`arm.D.ssim_2um:.3f` and arm E {val}`arm.E.ssim_2um:.3f`, means over runs that did not collapse.
#
# :::{when} collapse.best_ssim_2um
# The best SSIM of a run that did collapse is {val}`collapse.best_ssim_2um:.3f`.
# :::
#
# A score that rewards emptiness cannot carry the claim by itself; see [](../problem.md).
