# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does sparsity predict the rescue?
#
# **Finding.** Sparser genes gain more: {val}`verdict.sparser_genes` (ρ = {val}`sparsity.rho:+.2f`, {val}`sparsity.ci_low:+.2f` to {val}`sparsity.ci_high:+.2f`); without the mitochondrial genes, {val}`verdict.sparser_genes_without_mitochondrial`.
#
# The unit of this page is the gene. Its gain in a run is its score in arm E (Poisson) minus that in arm D (MSE), on the main test patient and from the same seed. Its gain is the mean over runs. Intervals hold what other trainings and other genes like these would change ([](03_results.ipynb) takes one apart); they do not speak of other patients.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis import published
from sparsity_trap.analysis.association import LEAST_GENES, dealt, mean_table, rho
from sparsity_trap.analysis.effects import LEAST_PAIRS, contrast, crossed_draws, gains
from sparsity_trap.settings import LOSS_PAIRS, MSE_ARM, POISSON_ARM
from sparsity_trap.show import interactive, recompute, style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "04_sparsity")

# %% [markdown]
# ## The gain of every gene
#
# A row per run, a column per gene. Runs that [collapsed](03_results.ipynb) have no scores, and no row. A gene without a defined score in every run is left out of what follows.

# %%
results = runs.load_all(settings)
scores = runs.long_table(settings, results)
home = scores[scores["patient"] == settings.main_patient]
weights = {POISSON_ARM: 1, MSE_ARM: -1}
by_run = gains(home, weights).dropna(axis=1)
gain = by_run.mean()

# %% [markdown]
# Table S1, [below](table-s1), has the same gains, and beside them every score of both arms as its mean over these runs.

# %%
genes = mean_table(scores, settings.main_patient, MSE_ARM, POISSON_ARM)
scored = genes[genes["gene"].isin(gain.dropna().index)]
gain = gain[scored["gene"]].to_numpy()
sparsity = scored["sparsity"]

# %% [markdown]
# ## Sparsity and gain
#
# Spearman's ρ of sparsity with gain, run by run. *p* is of this run's genes: the sparsities are dealt anew among them, 9,999 times, and *p* is twice the share of orders whose ρ lies as far from 0 as the observed one, or farther, on the same side. It takes the genes as independent, which they are not: all share the run.

# %%
single = [
    {"seed": seed, "rho": rho(sparsity, row), "p_value": dealt(sparsity, row)}
    for (_, seed), row in by_run[scored["gene"]].iterrows()
    if len(scored) >= LEAST_GENES and row.nunique() > 1 < sparsity.nunique()
]
single = pd.DataFrame(single, columns=["seed", "rho", "p_value"])
tables.show(single)

# %% [markdown]
# Of the mean gain: ρ with an interval from 2,000 draws of runs and of genes, both with replacement. The few runs are spread so that they would give a t interval for a mean.


# %%
def of_ranks(x, y):
    """ρ, as the correlation of ranks: the same, and quicker."""
    return np.corrcoef(stats.rankdata([x, y], axis=1))[0, 1]


def association(by_run, table):
    """ρ of the mean gain with its interval; undefined for a side that is constant, or few genes."""
    found = dict.fromkeys(("rho", "ci_low", "ci_high"), np.nan)
    x, own = table["sparsity"].to_numpy(), by_run[table["gene"]]
    if len(x) < LEAST_GENES or min(len(np.unique(x)), own.mean().nunique()) < 2:
        return found
    drawn = crossed_draws(own, lambda gain, chosen: of_ranks(x[chosen], gain))
    low, high = drawn.interval
    return {"rho": drawn.value, "ci_low": low, "ci_high": high}


over_genes = association(by_run, scored)
quote("sparsity", n_genes=len(scored), n_runs=len(by_run), **over_genes)
quote("sparsity", least_run=single["rho"].min(), largest_run=single["rho"].max())
tables.show(pd.DataFrame([{"runs": len(by_run), "n_genes": len(scored), **over_genes}]))

# %% [markdown]
# Over {val}`sparsity.n_genes` genes, sparsity and the mean gain from D to E over {val}`sparsity.n_runs` runs have the Spearman correlation {val}`sparsity.rho:+.2f` (95 % interval {val}`sparsity.ci_low:+.2f` to {val}`sparsity.ci_high:+.2f`). In single runs it lies between {val}`sparsity.least_run:+.2f` and {val}`sparsity.largest_run:+.2f`. {numref}`fig-sparsity` shows every gene; on the screen a click opens its maps, and the axes can be chosen.


# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-sparsity", "caption": "Gain in PCC at 8 µm against sparsity. Points: genes, mean over runs; upright lines: from the least to the largest gain of a run. In print, also lines of least squares: grey, of each run; black, of the mean gain."}, "image": {"alt": "Scatter of gain against sparsity, coloured by category, with a line for each run"}}
def name_farthest(axis, x, y, names):
    """Name the six points farthest from the median, but for names that would cover something."""
    taken = []  # left, right and height of a name
    gap, letter = 0.035 * np.ptp(y), 0.02 * np.ptp(x)
    for i in np.argsort(-np.abs(y - np.median(y)))[:6]:
        width = letter * (len(names[i]) + 1)
        for side, shift, left in (("left", 5, x[i]), ("right", -5, x[i] - width)):
            right = left + width
            covered = (x > left) & (x < right) & (np.abs(y - y[i]) < gap / 2) & (x != x[i])
            apart = (left > r or right < a or abs(y[i] - at) > gap for a, r, at in taken)
            inside = right < x.max() + 2 * letter  # of the axes, beside which the legend stands
            if inside and not covered.any() and all(apart):
                axis.annotate(
                    names[i], (x[i], y[i]), xytext=(shift, 0), textcoords="offset points",
                    ha=side, va="center", fontsize=7, style="italic",
                )  # fmt: skip
                taken.append((left, right, y[i]))
                break


figure, axis = style.subplots(figsize=(6.6, 4.2))
percent = 100 * sparsity.to_numpy()
least, largest = by_run[scored["gene"]].min().to_numpy(), by_run[scored["gene"]].max().to_numpy()
if len(scored) >= LEAST_GENES and sparsity.nunique() > 1:
    ends = np.array([percent.min(), percent.max()])
    lines = [(row, {"color": "#BBBBBB", "lw": 0.8}) for row in by_run[scored["gene"]].to_numpy()]
    for y, look in [*lines, (gain, {"color": "black", "lw": 1.4})]:
        fit = stats.linregress(percent, y)
        axis.plot(ends, fit.intercept + fit.slope * ends, zorder=0.5, **look)
    axis.plot([], [], color="#BBBBBB", lw=0.8, label="least squares, one run")
    axis.plot([], [], color="black", lw=1.4, label="least squares, mean gain")
    name_farthest(axis, percent, gain, scored["gene"].to_list())
for category, colour in style.CATEGORY_COLOURS.items():
    own = (scored["category"] == category).to_numpy()
    if own.any():
        axis.vlines(percent[own], least[own], largest[own], color=colour, lw=0.6, alpha=0.5)
        axis.scatter(percent[own], gain[own], s=26, color=colour, ec="w", lw=0.5, label=category)
axis.axhline(0, color="#888888", lw=0.6)
axis.set_xlabel("sparsity (% of in-tissue 2 µm bins with count 0)")
axis.set_ylabel("gain in PCC at 8 µm, Poisson (E) − MSE (D)")
known = bool(np.isfinite(over_genes["ci_low"]))
title = "Spearman ρ = {rho:.2f}" + " [{ci_low:.2f}, {ci_high:.2f}]" * known
title = title.format(**over_genes)
title = f"{title}, {len(scored)} genes, {len(by_run)} runs".replace("-", "−")
axis.set_title(title, loc="left")
if len(scored):
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
drawn = scored[["gene", "category", "sparsity", "delta_pcc_8um"]]
style.mark(figure, settings.source, drawn.assign(least=least, largest=largest))

# %% tags=["remove-input"]
across = {
    "sparsity (% of bins with count 0)": 100 * genes["sparsity"],
    "mean count per 2 µm bin": genes["mean_count"],
    "PCC 8 µm of arm D": genes["pcc_8um_mse"],
}
up, ends = {}, {}
for name in ("pcc_8um", "pcc_2um", "ssim_2um", "d2"):
    title = f"gain in {tables.TITLES[name]}, E − D"
    up[title] = genes[f"{name}_poisson"] - genes[f"{name}_mse"]
    of_runs = gains(home, weights, name).reindex(columns=genes["gene"])
    ends[title] = tuple(end.reset_index(drop=True) for end in (of_runs.min(), of_runs.max()))
plot, choices = interactive.gene_scatter(genes, across, up, settings.source, ends=ends)
interactive.show(
    plot, "sparsity", gene_page="05b_browser.html", choices=choices, in_place_of="fig-sparsity"
)

# %% [markdown]
# The mitochondrial genes are, on average, the least sparse of the panel. Without them:

# %%
rest = scored[scored["category"] != "mitochondrial"]
without = association(by_run, rest)
quote("sparsity.without_mitochondrial", **without)
tables.show(pd.DataFrame([{"runs": len(by_run), "n_genes": len(rest), **without}]))

# %% [markdown]
# ρ of the mean gain is then {val}`sparsity.without_mitochondrial.rho:+.2f` ({val}`sparsity.without_mitochondrial.ci_low:+.2f` to {val}`sparsity.without_mitochondrial.ci_high:+.2f`).
#
# The publication printed ρ = {val}`published.rho` for 50 genes, at first with p < {val}`published.p_at_first`; its author has since corrected p to {val}`published.p_corrected`. What p that correlation has over so many genes follows from Student's t with n − 2 degrees of freedom:

# %%
printed, n = published.SUMMARY["rho"], published.SUMMARY["n_genes"]
t = printed * np.sqrt((n - 2) / (1 - printed**2))
quote("published", **published.SUMMARY, p_value=2 * stats.t.sf(abs(t), n - 2))

# %% [markdown]
# It is {val}`published.p_value:.2g`, if genes are taken as independent.
#
# ## By category
#
# The mean gain of each category's genes over runs, with its [95 % interval](03_results.ipynb): runs, these genes and patches. A few genes leave a wide one.

# %%
alone = home["arm"].isin(list(weights)) & ~home["seed"].isin(by_run.index.unique("seed"))
paired = home[~alone]  # of both arms the same seeds
patches = {r.run.name: r.patches for r in results if r.run.name in set(paired["run"])}
panel = results[0].genes["gene"]


def effect(names, score="pcc_8um"):
    """Mean gain of some genes over runs, with its t interval."""
    moments = {run: sums[:, panel.isin(names)] for run, sums in patches.items()}
    return contrast(paired[paired["gene"].isin(names)], weights, score, moments=moments)


# %%
def summary(group):
    """Scores and gain of a group of genes."""
    group = group[group["gene"].isin(scored["gene"])]
    found, delta = effect(group["gene"]), group["delta_pcc_8um"]
    low, high = found.interval
    means = group[["sparsity", "pcc_8um_mse", "pcc_8um_poisson"]].mean().to_list()
    return {
        "n_genes": len(group),
        **dict(zip(("mean_sparsity", "mean_pcc_mse", "mean_pcc_poisson"), means, strict=True)),
        "mean_delta": delta.mean(), "ci_low": low, "ci_high": high,
        "n_wins": int((delta > 0).sum()),
    }  # fmt: skip


def grouped(by):
    """A row per group of genes."""
    rows = {name: summary(group) for name, group in genes.groupby(by)}
    return pd.DataFrame.from_dict(rows, orient="index")


# %%
categories = grouped("category").sort_values("mean_delta", ascending=False, kind="stable")
overall = pd.DataFrame.from_dict({"overall": summary(genes)}, orient="index")
categories = pd.concat([categories, overall]).rename_axis("category").reset_index()
quote("sparsity", n_wins=overall["n_wins"].item())

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-categories", "caption": "Mean gain per category over genes and runs, with its 95 % interval. Diamonds: published means for patient P5."}, "image": {"alt": "Bars of mean gain per gene category"}}
bars = categories.iloc[:-1].dropna(subset=["mean_delta"]).iloc[::-1]
y = np.arange(len(bars))
known = published.CATEGORIES.set_index("category")["mean_delta"].reindex(bars["category"])
figure, axis = style.subplots(figsize=(6.6, 3))
colours = [style.CATEGORY_COLOURS[c] for c in bars["category"]]
axis.barh(y, bars["mean_delta"], color=colours, height=0.62)
axis.hlines(y, bars["ci_low"], bars["ci_high"], color="#333333", lw=0.9)
axis.plot(known, y, "D", ms=5, mfc="none", mec="black", label="published (P5, real data)")
axis.set_yticks(y, [f"{c}  ({w:.0f}/{n:.0f})" for c, w, n in
                    bars[["category", "n_wins", "n_genes"]].itertuples(index=False)])  # fmt: skip
axis.axvline(0, color="#888888", lw=0.6)
axis.set_xlabel("mean gain in PCC at 8 µm, Poisson (E) − MSE (D); in brackets, genes gained")
axis.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1))
style.mark(figure, settings.source, bars.iloc[::-1].assign(published=known.to_numpy()[::-1]),
           runs=len(by_run))  # fmt: skip

# %% [markdown]
# One category at a time left out:

# %%
left_out = {}
for category in scored["category"].unique():
    rest = scored[scored["category"] != category]
    left_out[category] = {"n_genes": len(rest), **association(by_run, rest)}
left_out = pd.DataFrame.from_dict(left_out, orient="index")
tables.show(left_out.rename_axis("category left out").reset_index())

# %% [markdown]
# (recompute-sparsity)=
# ### Choose for yourself
#
# Leave out categories, take another score or other arms, or set what counts as worth the name; the page computes ρ, mean gain, intervals and verdicts anew. The mean gain has the interval of the table of categories, ρ that of this page, with other random draws.
# The verdict is that of [the claims](10_claims.ipynb), of one test alone: supported if the effect is worth the name and above 0, not supported if it is below what is worth the name; tested one-sided at 2.5 %.
#
# A table of your own is a CSV with a row per gene and the headings `gene`, `sparsity` and two scores: `score_1` and `score_2`, or any two of one name with the endings `_mse` and `_poisson`, as table S1 has them. `category` is used if it is there, and with `run` a gene may have a row for each run.
# Its gain is the second score minus the first. The table is read by this page and sent nowhere. An interval over genes alone, such as that of a table of one run, speaks of those runs and not of the loss: runs of the same arms differ.

# %%
compared = {"E − D": weights}
compared |= {f"{second} − {first}": {second: 1, first: -1} for first, second in LOSS_PAIRS.values()}
recompute.recompute(paired, compared, patches)

# %% [markdown]
# ## Is it sparsity?
#
# Sparse genes are also weakly expressed genes. How closely the two go together, over these genes:

# %%
with_mean = rho(sparsity, scored["mean_count"]) if len(scored) >= LEAST_GENES else np.nan
quote("sparsity", with_mean_count=with_mean)

# %% [markdown]
# Sparsity and mean count have the rank correlation {val}`sparsity.with_mean_count:+.3f`. Over genes the two cannot be told apart: whatever goes with the one goes with the other. [](08_dial.ipynb) changes the counts of the same genes instead.
#
# Of {val}`sparsity.n_genes` genes {val}`sparsity.n_wins` have a mean gain above 0. The same association for other scores, with the mean gain and its interval:

# %%
by_score = []
for score in ("pcc_8um", "ssim_2um", "d2"):
    own = gains(home, weights, score).dropna(axis=1)
    table = genes[genes["gene"].isin(own.columns)] if len(own) else genes[:0]
    found = effect(table["gene"], score)
    low, high = found.interval
    row = {"metric": score, "n_genes": len(table), "n_wins": int((own.mean() > 0).sum())}
    row |= {"mean gain": found.value, "gain from": low, "gain to": high}
    by_score.append(row | association(own, table))
tables.show(pd.DataFrame(by_score))

# %% [markdown]
# ### All patients and seeds
#
# The figures above are of one test patient. Here the gain is regressed on sparsity in every run of every patient, by least squares; the slope is the change of the gain for ten percentage points of sparsity more. The arms of a matched or linear pair differ in the loss alone.
#
# The slopes of the runs are averaged, each patient counting alike. The 95 % interval is Student's t over runs within patients. It speaks of other trainings, for these genes on these patients.


# %%
def slope_of_run(patient, gain):
    """Slope of one run's gains, per ten percentage points of sparsity."""
    facts = scores[scores["patient"] == patient].drop_duplicates("gene").set_index("gene")
    table = pd.DataFrame({"tens": 10 * facts["sparsity"], "gain": gain}).dropna()
    if len(table) < LEAST_GENES or table["tens"].nunique() < 2:
        return np.nan
    return smf.ols("gain ~ tens", table).fit().params["tens"]


def slope(weights):
    """Slope of every run, and their mean with its t interval."""
    slopes = [(*run, slope_of_run(run[0], gain)) for run, gain in gains(scores, weights).iterrows()]
    slopes = pd.DataFrame(slopes, columns=["patient", "seed", "slope"]).dropna()
    found = {"slope": slopes.groupby("patient")["slope"].mean().mean()}
    if len(slopes) - slopes["patient"].nunique() < LEAST_PAIRS - 1:
        return slopes, found | {"ci_low": np.nan, "ci_high": np.nan}
    fit = smf.ols("slope ~ 0 + C(patient)", slopes).fit()
    low, high = fit.t_test(np.full((1, len(fit.params)), 1 / len(fit.params))).conf_int()[0]
    return slopes, found | {"ci_low": low, "ci_high": high}


# %%
slopes = []
for key, (first, second) in {"slope": (MSE_ARM, POISSON_ARM), **LOSS_PAIRS}.items():
    if {first, second} <= set(scores["arm"]):
        of_runs, found = slope({second: 1, first: -1})
        many = {"patients": of_runs["patient"].nunique(), "runs": len(of_runs)}
        ends = {"least run": of_runs["slope"].min(), "largest run": of_runs["slope"].max()}
        slopes.append({"arms": f"{second} − {first}", **many, **found, **ends})
        quote(
            "sparsity" if key == "slope" else f"sparsity.{key}", slope_runs=len(of_runs),
            slope=found["slope"], slope_low=found["ci_low"], slope_high=found["ci_high"],
        )  # fmt: skip
tables.show(pd.DataFrame(slopes))

# %% [markdown]
# From D to E the gain changes by {val}`sparsity.slope:+.3f` for ten percentage points of sparsity ({val}`sparsity.slope_low:+.3f` to {val}`sparsity.slope_high:+.3f`, {val}`sparsity.slope_runs` runs).
#
# :::{when} sparsity.matched.slope
# With link and bias held equal (E − D-matched) it changes by {val}`sparsity.matched.slope:+.3f` ({val}`sparsity.matched.slope_low:+.3f` to {val}`sparsity.matched.slope_high:+.3f`, {val}`sparsity.matched.slope_runs` runs).
# :::
#
# :::{when} sparsity.linear.slope
# With the linear decoder (E-linear − D-linear) by {val}`sparsity.linear.slope:+.3f` ({val}`sparsity.linear.slope_low:+.3f` to {val}`sparsity.linear.slope_high:+.3f`, {val}`sparsity.linear.slope_runs` runs).
# :::

# %% [markdown]
# ## All genes

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-heatmap", "caption": "PCC and SSIM of every gene under both losses, means over runs. Gene names are coloured by category."}, "image": {"alt": "Heatmap of scores, genes by metric and loss"}}
order = list(style.CATEGORY_COLOURS)
drawn = genes.sort_values(
    ["category", "pcc_8um_poisson"],
    key=lambda s: s.map(order.index) if s.name == "category" else -s,
)
columns = ["pcc_2um", "pcc_8um", "ssim_2um", "ssim_8um"]
figure, axes = style.subplots(len(columns), 1, figsize=(7, 3.9), sharex=True)
for axis, column in zip(axes, columns, strict=True):
    values = drawn[[f"{column}_mse", f"{column}_poisson"]].to_numpy().T
    top = np.nanmax(values, initial=0.1)
    shown = axis.imshow(values, cmap=style.SCORE_MAP, vmin=0, vmax=top, aspect="auto")
    axis.set_yticks([0, 1], ["MSE", "Poisson"], fontsize=7)
    axis.set_ylabel(tables.TITLES[column], rotation=0, ha="right", va="center", labelpad=6)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(shown, ax=axis, aspect=5, pad=0.01, shrink=0.9)
for label, category in style.name_genes(axes[-1], drawn, fontsize=7):
    label.set_color(style.CATEGORY_COLOURS[category])
both = [f"{column}_{loss}" for column in columns for loss in ("mse", "poisson")]
style.mark(figure, settings.source, drawn[["gene", "category", *both]], runs=len(by_run))

# %% [markdown]
# ## Tables S1 to S3
#
# (table-s1)=
# ### Table S1
#
# One row per gene, means over runs (also as {download}`CSV <tables/S1_genes.csv>`, with more scores). A press on a heading sorts.

# %% tags=["output_scroll"]
folder = settings.folder / "tables"
folder.mkdir(exist_ok=True)
genes.to_csv(folder / "S1_genes.csv", index=False)
columns = [
    "gene", "category", "sparsity", "pcc_8um_mse", "pcc_8um_poisson", "delta_pcc_8um",
    "ssim_2um_mse", "ssim_2um_poisson", "delta_ssim_2um",
]  # fmt: skip
tables.show(genes[columns], missing="undefined", sortable=True)

# %% [markdown]
# ### Table S2
#
# By category ({download}`CSV <tables/S2_categories.csv>`); mean gain over genes and runs with its 95 % interval:

# %%
categories.to_csv(folder / "S2_categories.csv", index=False)
tables.show(categories, sortable=True)

# %% [markdown]
# ### Table S3
#
# By quartile of sparsity ({download}`CSV <tables/S3_quartiles.csv>`), Q1 holding the least sparse genes. Ties are split by the order of the panel, so quartiles differ by at most one gene in size:

# %%
rank = genes["sparsity"].rank(method="first")
quartiles = grouped(pd.qcut(rank, 4, labels=["Q1", "Q2", "Q3", "Q4"]).astype(str))
quartiles = quartiles.rename_axis("quartile").reset_index()
quartiles.to_csv(folder / "S3_quartiles.csv", index=False)
tables.show(quartiles, sortable=True)
