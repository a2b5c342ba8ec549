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
# The unit of this page is the gene. Its gain is its score in arm E (Poisson) minus that in arm D (MSE), both of one run on the main test patient. Intervals draw genes with replacement. They speak of other draws of genes; they do not speak of other patients, nor of another training of the same two arms.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import warnings

import numpy as np
import pandas as pd
import pingouin
import seaborn
import statsmodels.formula.api as smf
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis import published
from sparsity_trap.analysis.association import LEAST_GENES, mean_interval
from sparsity_trap.settings import LOSS_PAIRS, MSE_ARM, POISSON_ARM
from sparsity_trap.show import interactive, style, tables

settings = runs.open_preset(preset, source, cohort)
mse, poisson = runs.contrast(settings)
quote = runs.Quotes(settings, "04_sparsity")

# %% [markdown]
# ## The gain of every gene
#
# Both runs have a table of scores per gene. Laid side by side they are table S1; the gain is a subtraction. A gene without a defined score in either arm has no gain and is left out of what follows.

# %%
of_gene = ["category", "sparsity", "mean_count", "auprc_base"]  # whichever arm predicted it
genes = mse.genes.merge(
    poisson.genes.drop(columns=of_gene), on="gene", suffixes=("_mse", "_poisson")
).drop(columns="auprc_base")
for score in ("pcc_8um", "ssim_2um"):
    genes[f"delta_{score}"] = genes[f"{score}_poisson"] - genes[f"{score}_mse"]
genes["improved"] = genes["delta_pcc_8um"] > 0
scored = genes.dropna(subset=["delta_pcc_8um"])
sparsity, gain = scored["sparsity"], scored["delta_pcc_8um"]

# %% [markdown]
# ## Sparsity and gain
#
# Spearman's ρ of sparsity with gain over genes. For its *p* the sparsities are dealt anew among the genes, 9,999 times: *p* is twice the share of orders whose ρ lies as far from 0 as the observed one, or farther, on the same side. Its 95 % interval holds the middle 95 % of ρ over 5,000 draws of genes with replacement.


# %%
def rho(x, y, axis=-1):
    return stats.spearmanrho(x, y, axis=axis).statistic


def association(x, y):
    """ρ with its p and interval; undefined for a side that is constant, or too few genes."""
    found = dict.fromkeys(("rho", "p_value", "ci_low", "ci_high"), np.nan)
    if len(x) < LEAST_GENES or min(x.nunique(), y.nunique()) < 2:
        return found
    orders = {"permutation_type": "pairings", "n_resamples": 9999, "batch": 500, "rng": 0}
    dealt = stats.permutation_test((x,), lambda x, axis: rho(x, y.to_numpy(), axis), **orders)
    draws = {"paired": True, "n_resamples": 5000, "batch": 500, "method": "percentile", "rng": 0}
    low, high = stats.bootstrap((x, y), rho, **draws).confidence_interval
    return {"rho": rho(x, y), "p_value": dealt.pvalue, "ci_low": low, "ci_high": high}


# %%
over_genes = association(sparsity, gain)
quote("sparsity", n_genes=len(scored), **over_genes)
tables.show(pd.DataFrame([over_genes]))

# %% [markdown]
# Over {val}`sparsity.n_genes` genes, sparsity and the gain from D to E have the Spearman correlation {val}`sparsity.rho:+.2f` (95 % interval {val}`sparsity.ci_low:+.2f` to {val}`sparsity.ci_high:+.2f`, p = {val}`sparsity.p_value:.2g`). {numref}`fig-sparsity` shows every gene; its interactive copy opens a gene's maps at a click.


# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-sparsity", "caption": "Gain in PCC at 8 µm against sparsity, one point per gene. Line: least squares, with a 95 % bootstrap band over genes."}, "image": {"alt": "Scatter of gain against sparsity, coloured by category"}}
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
            if not covered.any() and all(apart):
                axis.annotate(
                    names[i], (x[i], y[i]), xytext=(shift, 0), textcoords="offset points",
                    ha=side, va="center", fontsize=6.5, style="italic",
                )  # fmt: skip
                taken.append((left, right, y[i]))
                break


figure, axis = style.subplots(figsize=(6.6, 4.2))
percent = 100 * sparsity.to_numpy()
if len(scored) >= LEAST_GENES:
    seaborn.regplot(
        x=percent, y=gain.to_numpy(), n_boot=2000, seed=0, scatter=False, ax=axis,
        color="#777777", line_kws={"lw": 1}, label="least squares, 95 % band",
    )  # fmt: skip
    name_farthest(axis, percent, gain.to_numpy(), scored["gene"].to_list())
for category, colour in style.CATEGORY_COLOURS.items():
    own = (scored["category"] == category).to_numpy()
    if own.any():
        axis.scatter(percent[own], gain[own], s=26, color=colour, ec="w", lw=0.5, label=category)
axis.axhline(0, color="#888888", lw=0.6)
axis.set_xlabel("sparsity (% of in-tissue 2 µm bins with count 0)")
axis.set_ylabel("gain in PCC at 8 µm, Poisson (E) − MSE (D)")
title = "Spearman ρ = {rho:.2f} [{ci_low:.2f}, {ci_high:.2f}], p = {p_value:.2g}"
title = f"{title.format(**over_genes)}, {len(scored)} genes".replace("-", "−")
axis.set_title(title, loc="left")
axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
style.mark(figure, settings.source, scored[["gene", "category", "sparsity", "delta_pcc_8um"]])

# %% tags=["hide-input"]
across = {
    "sparsity (% of in-tissue 2 µm bins with count 0)": 100 * genes["sparsity"],
    "mean count per 2 µm bin": genes["mean_count"],
    "PCC 8 µm of arm D": genes["pcc_8um_mse"],
}
up = {
    f"gain in {tables.TITLES[name]}, E − D": genes[f"{name}_poisson"] - genes[f"{name}_mse"]
    for name in ("pcc_8um", "pcc_2um", "ssim_2um", "d2")
}
plot, choices = interactive.gene_scatter(genes, across, up, settings.source)
interactive.show(plot, "sparsity", gene_page="05b_browser.html", choices=choices)

# %% [markdown]
# The mitochondrial genes are, on average, the least sparse of the panel. Without them:

# %%
rest = scored[scored["category"] != "mitochondrial"]
without = association(rest["sparsity"], rest["delta_pcc_8um"])
quote("sparsity.without_mitochondrial", rho=without["rho"], p_value=without["p_value"])

# %% [markdown]
# This run's ρ is then {val}`sparsity.without_mitochondrial.rho:+.2f` (p = {val}`sparsity.without_mitochondrial.p_value:.2g`).
#
# The publication printed ρ = {val}`published.rho` for 50 genes with p < 0.001. What p that correlation has over so many genes follows from Student's t with n − 2 degrees of freedom:

# %%
printed, n = published.SUMMARY["rho"], published.SUMMARY["n_genes"]
t = printed * np.sqrt((n - 2) / (1 - printed**2))
quote("published", **published.SUMMARY, p_value=2 * stats.t.sf(abs(t), n - 2))

# %% [markdown]
# It is {val}`published.p_value:.2g`.
#
# ## By category
#
# The mean gain of each category with its bootstrap interval, and Wilcoxon's signed-rank test of its genes' gains; *q* corrects the tests for their number after Benjamini and Hochberg.


# %%
def summary(group):
    """Scores and gain of a group of genes."""
    group = group.dropna(subset=["delta_pcc_8um"])
    delta = group["delta_pcc_8um"]
    low, high = mean_interval(delta)  # stats.bootstrap, percentiles of 5,000 draws
    means = group[["sparsity", "pcc_8um_mse", "pcc_8um_poisson"]].mean().to_list()
    return {
        "n_genes": len(group),
        **dict(zip(("mean_sparsity", "mean_pcc_mse", "mean_pcc_poisson"), means, strict=True)),
        "mean_delta": delta.mean(), "ci_low": low, "ci_high": high,
        "n_wins": int((delta > 0).sum()), "p_value": stats.wilcoxon(delta).pvalue,
    }  # fmt: skip


def grouped(by):
    """A row per group, with q-values over the groups that have a test."""
    rows = {name: summary(group) for name, group in genes.groupby(by)}
    rows = pd.DataFrame.from_dict(rows, orient="index")
    p = rows["p_value"].dropna()
    return rows.assign(q_value=pd.Series(stats.false_discovery_control(p, method="bh"), p.index))


# %%
categories = grouped("category").sort_values("mean_delta", ascending=False, kind="stable")
overall = pd.DataFrame.from_dict({"overall": summary(genes)}, orient="index")
categories = pd.concat([categories, overall]).rename_axis("category").reset_index()

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-categories", "caption": "Mean gain per category with a 95 % bootstrap interval over genes. Diamonds: published means for patient P5."}, "image": {"alt": "Bars of mean gain per gene category"}}
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
style.mark(figure, settings.source, bars.iloc[::-1].assign(published=known.to_numpy()[::-1]))

# %% [markdown]
# One category at a time left out:

# %%
left_out = {}
for category in scored["category"].unique():
    rest = scored[scored["category"] != category]
    found = association(rest["sparsity"], rest["delta_pcc_8um"])
    left_out[category] = {"n_genes": len(rest), **found}
left_out = pd.DataFrame.from_dict(left_out, orient="index")
tables.show(left_out.rename_axis("category left out").reset_index())

# %% [markdown]
# ## Is it sparsity?
#
# Sparse genes are also weakly expressed genes. The partial correlation holds mean expression fixed: it is the correlation of what is left of the ranks of sparsity and gain after regression on those of the mean count.

# %%
partial = pd.DataFrame({"r": [np.nan], "p_val": [np.nan]})
# Where both have the same order of genes, nothing of sparsity is left.
if abs(rho(sparsity, scored["mean_count"])) < 1 - 1e-9:
    partial = pingouin.partial_corr(
        scored, x="sparsity", y="delta_pcc_8um", covar="mean_count", method="spearman"
    )
quote("sparsity", partial_rho=partial["r"].item(), partial_p_value=partial["p_val"].item())

# %%
wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
sign_p_value = stats.binomtest(wins, wins + losses).pvalue if wins + losses else np.nan
quote("sparsity", n_wins=wins, sign_p_value=sign_p_value)

# %% [markdown]
# With mean expression held fixed the correlation is {val}`sparsity.partial_rho:+.2f` (partial Spearman, p = {val}`sparsity.partial_p_value:.2g`).
# Gains are positive on {val}`sparsity.n_wins` of {val}`sparsity.n_genes` genes (sign test, p = {val}`sparsity.sign_p_value:.2g`).
#
# The same association for other scores:

# %%
by_score = []
for score in ("pcc_8um", "ssim_2um", "d2"):
    delta = (genes[f"{score}_poisson"] - genes[f"{score}_mse"]).dropna()
    row = {"metric": score, "n_genes": len(delta), "n_wins": int((delta > 0).sum())}
    row |= {"mean_delta": delta.mean()}
    by_score.append(row | association(genes["sparsity"][delta.index], delta))
tables.show(pd.DataFrame(by_score))

# %% [markdown]
# ### All patients and seeds
#
# The figures above are of one test patient. This regression of the gain on sparsity (restricted maximum likelihood) takes every patient and seed that the preset ran, with random intercepts for categories and for
# the genes within them. Patients and seeds have random intercepts too where there are at least five of them, and fixed ones where there are fewer, because a variance cannot be told from three values. From one patient the slope cannot be had: a gene's own gain and the noise of its section are then the same thing.
# A slope is the change of the gain from a gene with no empty bins to one with nothing else. The arms of a matched or linear pair differ in the loss alone.


# %%
def mixed_model(gains):
    """The fitted model of ``delta`` on ``sparsity``, of genes in several patients."""
    levels = gains[["patient", "seed"]].nunique()
    fixed = [name for name in levels.index if 1 < levels[name] < 5]
    random = ["category", "gene", *(name for name in levels.index if levels[name] >= 5)]
    # All effects are crossed or nested in one group that holds every row.
    model = smf.mixedlm(
        " + ".join(["delta ~ sparsity", *(f"C({name})" for name in fixed)]),
        gains.assign(everything=1),
        groups="everything",
        vc_formula={name: f"0 + C({name})" for name in random if gains[name].nunique() > 1},
    )
    # A variance of zero is an ordinary answer, about which statsmodels warns. Powell's method finds
    # that boundary where the gradient methods stop short of it.
    with warnings.catch_warnings(action="ignore"):
        return model.fit(reml=True, method=["bfgs", "lbfgs", "powell"])


def slope(gains):
    """Slope with its Wald interval and test, or a note that says why there is none."""
    levels = gains[["gene", "patient", "seed"]].nunique()
    found = dict.fromkeys(("slope", "ci_low", "ci_high", "p_value"), np.nan)
    found |= {"n_genes": levels["gene"], "patients": levels["patient"], "seeds": levels["seed"]}
    if levels["gene"] < LEAST_GENES or levels["patient"] < 2 or gains["sparsity"].nunique() < 2:
        return found | {"note": "needs four genes of differing sparsity and two test patients"}
    try:
        fit = mixed_model(gains)
    except np.linalg.LinAlgError:
        return found | {"note": "no estimate: the covariance is singular"}
    low, high = fit.conf_int().loc["sparsity"]
    if not (fit.converged and np.isfinite([low, high]).all()):
        return found | {"note": "no estimate: the optimiser did not converge"}
    estimate = {"slope": fit.params["sparsity"], "ci_low": low, "ci_high": high}
    return found | estimate | {"p_value": fit.pvalues["sparsity"], "note": ""}


# %%
scores = runs.long_table(settings, runs.load_all(settings))
scores["score"] = scores["pcc_8um"]
slopes = [
    {"arms": f"{second} − {first}", **slope(runs.gains(scores, (first, second)))}
    for first, second in ((MSE_ARM, POISSON_ARM), *LOSS_PAIRS.values())
]
tables.show(pd.DataFrame(slopes))

# %% [markdown]
# ## All genes

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-heatmap", "caption": "PCC and SSIM of every gene under both losses. Gene names are coloured by category."}, "image": {"alt": "Heatmap of scores, genes by metric and loss"}}
order = list(style.CATEGORY_COLOURS)
drawn = genes.sort_values(
    ["category", "pcc_8um_poisson"],
    key=lambda s: s.map(order.index) if s.name == "category" else -s,
)
columns = ["pcc_2um", "pcc_8um", "ssim_2um", "ssim_8um"]
figure, axes = style.subplots(len(columns), 1, figsize=(9.6, 3.9), sharex=True)
for axis, column in zip(axes, columns, strict=True):
    values = drawn[[f"{column}_mse", f"{column}_poisson"]].to_numpy().T
    top = np.nanmax(values, initial=0.1)
    shown = axis.imshow(values, cmap=style.SCORE_MAP, vmin=0, vmax=top, aspect="auto")
    axis.set_yticks([0, 1], ["MSE", "Poisson"], fontsize=7)
    axis.set_ylabel(tables.TITLES[column], rotation=0, ha="right", va="center", labelpad=38)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    figure.colorbar(shown, ax=axis, aspect=5, pad=0.01, shrink=0.9)
for label, category in style.name_genes(axes[-1], drawn, fontsize=6.3):
    label.set_color(style.CATEGORY_COLOURS[category])
both = [f"{column}_{loss}" for column in columns for loss in ("mse", "poisson")]
style.mark(figure, settings.source, drawn[["gene", "category", *both]])

# %% [markdown]
# ## Tables S1 to S3
#
# A press on a heading sorts. Table S1, one row per gene (also as {download}`CSV <tables/S1_genes.csv>`):

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
# Table S2, by category ({download}`CSV <tables/S2_categories.csv>`). *p* is of a paired Wilcoxon test, *q* after Benjamini–Hochberg over the categories:

# %%
categories.to_csv(folder / "S2_categories.csv", index=False)
tables.show(categories, sortable=True)

# %% [markdown]
# Table S3, by quartile of sparsity ({download}`CSV <tables/S3_quartiles.csv>`), Q1 holding the least sparse genes. Ties are split by the order of the panel, so quartiles differ by at most one gene in size:

# %%
rank = genes["sparsity"].rank(method="first")
quartiles = grouped(pd.qcut(rank, 4, labels=["Q1", "Q2", "Q3", "Q4"]).astype(str))
quartiles = quartiles.rename_axis("quartile").reset_index()
quartiles.to_csv(folder / "S3_quartiles.csv", index=False)
tables.show(quartiles, sortable=True)
