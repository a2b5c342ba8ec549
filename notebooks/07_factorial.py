# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Loss, link or bias?

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from IPython.display import Markdown, display
from patsy.contrasts import ContrastMatrix, Treatment

from sparsity_trap import runs
from sparsity_trap.analysis import controls, factorial, mechanism
from sparsity_trap.show import interactive, style, tables

settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "07_factorial")
results = runs.load_all(settings)
scores = runs.long_table(settings, results)  # one row per run and gene, with the arm's settings

# %% [markdown]
# Between arms D and E three things change at once: the loss, the link and the initial bias of the head. The factorial trains their combinations, everything else equal.
#
# Each gene of a test patient and a seed is a block that has a score in every cell. Levels are coded so that a coefficient is the level's mean over all cells of the other factors minus the reference's, and that of a product is a difference of such differences: treatment coding, each column less its mean over the levels.
# The reference is MSE with softplus and the published bias. The covariance is clustered by gene, so that a gene's patients and cells do not count as independent.


# %%
class Marginal(Treatment):
    """Each level against the reference, at the mean of the other factors' levels."""

    def code_without_intercept(self, levels):
        coded = super().code_without_intercept(levels)
        return ContrastMatrix(coded.matrix - 1 / len(levels), coded.column_suffixes)


formula = (
    "score ~ C(loss, Marginal('mse')) * C(link, Marginal('softplus'))"
    " * C(bias, Marginal('published'))"
)


# %%
def effects(score):
    """Main effects and interactions on a score, with 95 % intervals over genes."""
    blocks = factorial.complete_blocks(crossed, score)  # a row per block, a column per cell
    cells = blocks.melt(ignore_index=False, value_name="score").reset_index()
    clusters = {"groups": pd.factorize(cells["gene"])[0]}
    fit = smf.ols(formula, cells).fit(cov_type="cluster", cov_kwds=clusters, use_t=True)
    found = pd.concat([fit.params, fit.conf_int(), fit.pvalues], axis=1).drop("Intercept")
    found.columns = ["effect", "ci_low", "ci_high", "p_value"]
    # C(loss, Marginal('mse'))[T.nb]:C(link, …)[T.exp] becomes loss=nb x link=exp
    terms = found.index.str.replace(r"C\((\w+), \S+\)\[T\.(.+?)\]", r"\1=\2", regex=True)
    found.insert(0, "term", terms.str.replace(":", " x "))
    return found.assign(order=terms.str.count(":") + 1).reset_index(drop=True)


# %%
crossed = factorial.factorial_runs(scores)  # runs that differ in nothing but the three factors
blocks = factorial.complete_blocks(crossed, "pcc_8um")
trained = len(blocks) > 0
if trained:
    on_pcc = effects("pcc_8um")
    for row in on_pcc[on_pcc["order"] == 1].set_index("term").itertuples():
        numbers = {"effect": row.effect, "ci_low": row.ci_low, "ci_high": row.ci_high}
        quote(f"factorial.{row.Index.split('=')[1]}", **numbers, p_value=row.p_value)
    display(tables.show(on_pcc.assign(term=on_pcc["term"].map(style.term_name))))

# %% tags=["remove-input"]
n_genes, n_patients = (blocks.index.unique(name).size for name in ("gene", "patient"))
tested = "One test patient says" if n_patients == 1 else f"{n_patients} test patients say little or"
Markdown(
    f"Intervals are over {n_genes} genes. {tested} nothing about patients at large."
    if trained
    else "The preset of this build does not train the whole factorial."
)

# %% [markdown]
# :::{when} factorial.poisson.effect
# Over all links and biases, Poisson in place of MSE changes the mean per-gene PCC at 8 µm by {val}`factorial.poisson.effect:+.3f` (95 % interval {val}`factorial.poisson.ci_low:+.3f` to
# {val}`factorial.poisson.ci_high:+.3f`), the exp link in place of softplus by {val}`factorial.exp.effect:+.3f` ({val}`factorial.exp.ci_low:+.3f` to {val}`factorial.exp.ci_high:+.3f`), and a start at the
# gene means in place of the published bias by {val}`factorial.gene-mean.effect:+.3f` ({val}`factorial.gene-mean.ci_low:+.3f` to {val}`factorial.gene-mean.ci_high:+.3f`).
# :::

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-factorial", "caption": "Main effects (black) and two-way interactions (grey) of loss, link and bias on the per-gene PCC at 8 µm. The reference is MSE with softplus and the published bias."}, "image": {"alt": "Effects of the factorial with their intervals"}}
figure = style.not_trained("the factorial")
if trained:
    shown = on_pcc[on_pcc["order"] <= 2].iloc[::-1].reset_index(drop=True)
    figure, axis = style.subplots(figsize=(6.4, 0.9 + 0.24 * len(shown)))
    for order, colour in ((1, "#222222"), (2, "#8A8A8A")):
        rows = shown[shown["order"] == order]
        axis.hlines(rows.index, rows["ci_low"], rows["ci_high"], color=colour, lw=1.2)
        axis.plot(rows["effect"], rows.index, "o", ms=4, color=colour)
    axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
    axis.set_yticks(shown.index, [style.term_name(term) for term in shown["term"]])
    axis.set_ylim(-0.7, len(shown) - 0.3)
    axis.set_xlabel("effect on PCC at 8 µm (95 % interval over genes)")
    style.mark(figure, settings.source, on_pcc)
figure

# %% [markdown]
# :::{when} factorial.poisson.effect
# The same effects on other scores, with 95 % intervals over genes:
# :::

# %% tags=["remove-input"]
if trained:
    names = ("pcc_8um", "pcc_2um", "spearman_8um", "ssim_2um", "ssim_8um", "d2", "auprc")
    by_score = {
        tables.TITLES.get(name, name): effects(name)
        for name in names
        if len(factorial.complete_blocks(crossed, name))
    }
    figure, choices = interactive.effects_browser(by_score, settings.source)
    display(interactive.show(figure, "effects", choices=choices))

# %% [markdown]
# ## The published gap taken apart
#
# From D to E each factor is changed when it is its turn, in all six orders, and its contribution averaged (Shapley value). This takes the eight cells in which the bias is 0 or −3 with either link. Intervals are percentiles of 5,000 draws of genes, a gene bringing all its patients.

# %%
between = factorial.complete_blocks(factorial.gap_runs(scores), "pcc_8um")
if len(between):
    parts = factorial.contributions(between)  # of loss, link and bias in every gene's gap
    shares = factorial.share_of_gap(parts)
    for row in shares.itertuples():
        share = {"share": row.share, "ci_low": row.ci_low, "ci_high": row.ci_high}
        quote(f"gap.{row.factor}", contribution=row.contribution, **share)
    means = between.mean().rename("mean PCC 8 µm").reset_index()
    display(tables.show(means), tables.show(shares))

# %% [markdown]
# :::{when} gap.loss.share
# Of the gap, the loss explains {val}`gap.loss.share:.0%` ({val}`gap.loss.ci_low:.0%` to {val}`gap.loss.ci_high:.0%`), the link {val}`gap.link.share:.0%` and the bias {val}`gap.bias.share:.0%`.
# :::

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-gap", "caption": "Contribution of each factor to the difference E − D, with 95 % intervals over genes."}, "image": {"alt": "Bars of the contributions of loss, link and bias"}}
figure = style.not_trained("the eight cells between D and E")
if len(between):
    figure, axis = style.subplots(figsize=(5.2, 2.4))
    left = 0.0
    for row, part in enumerate(shares.itertuples()):
        whole = part.factor == "gap"
        left *= not whole
        colour = "#555555" if whole else "#9CC3CF"
        axis.barh(row, part.contribution, left=left, height=0.6, color=colour)
        span = [left + part.contribution_low, left + part.contribution_high]
        axis.plot(span, [row, row], color="#222222", lw=1.2)
        left += part.contribution
    axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
    axis.set_yticks(range(len(shares)), shares["factor"].replace("gap", "E − D"))
    axis.invert_yaxis()
    axis.set_xlabel("PCC at 8 µm, from arm D to arm E")
    style.mark(figure, settings.source, shares)
figure

# %% [markdown]
# ## Why the losses differ at all
#
# Both losses have the same minimiser. What differs is how much each bin pulls on the way: the gradient on η is a weight times λ − y. With $\lambda' = \partial\lambda/\partial\eta$, which is λ for the exp link and $1 - e^{-\lambda}$ for softplus, the weight is $2\lambda'$ under MSE and $\lambda'/\lambda$ under Poisson.
# Under MSE it grows with the rate, so frequent bins lead; under Poisson with the exp link every bin weighs the same.

# %%
rate = np.geomspace(1e-3, 10, 200)
slopes = {"exp": rate, "softplus": -np.expm1(-rate)}  # λ'
weights = {("MSE", link): 2 * slope for link, slope in slopes.items()}
weights |= {("Poisson", link): slope / rate for link, slope in slopes.items()}

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-weights", "caption": "Weight of a bin's residual in the gradient of the linear output. Computed, no data."}, "image": {"alt": "Curves of the weight against the rate for both losses and links"}}
figure, axes = style.subplots(1, 2, figsize=(6.6, 2.7), sharey=True)
for (loss, link), weight in weights.items():
    axis = axes[list(slopes).index(link)]
    colour = style.MSE_COLOUR if loss == "MSE" else style.POISSON_COLOUR
    axis.loglog(rate, weight, color=colour, label=loss)
    axis.set(title=f"link {link}", xlabel="predicted rate λ, counts per bin")
axes[0].set_ylabel("weight of λ − y in ∂loss/∂η")
axes[0].legend(loc="lower right")
figure.data = pd.DataFrame({f"{loss}, {link}": w for (loss, link), w in weights.items()})
figure.data.insert(0, "rate", rate)
figure

# %% [markdown]
# In the decoder that all genes share, this becomes a matter between genes. Below, the share of each gene in the squared gradient that reaches it, before training and at the chosen checkpoint; the horizontal line is an equal share.
# Near a solution residuals are count noise, of size √λ, so theory expects shares that grow as λ³ under MSE and as λ under Poisson, with the exp link. Far from it the residual is the error of the start: arm D begins at
# {val}`start.softplus:.2f` counts per bin for every gene, nearly all of it excess, and shares are nearly equal. Each panel's title gives the exponent fitted to its genes.

# %%
quote("start", softplus=controls.UNSUPERVISED_RATE)
looked_at = [*runs.contrast(settings), *runs.matched(settings, results)]
shares_of_genes = pd.concat(mechanism.gradient_shares(settings, result) for result in looked_at)
powers = {}
for panel, part in shares_of_genes.groupby("panel", sort=False):
    used = part[(part["share"] > 0) & (part["mean_count"] > 0)]
    powers[panel] = np.polyfit(np.log(used["mean_count"]), np.log(used["share"]), 1)[0]

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-gradient", "caption": "Share of each gene in the squared gradient of the shared decoder against its mean count, for the same tokens."}, "image": {"alt": "Scatter of gradient share against mean count, per arm and moment"}}
columns = len(powers) // 2  # start and end of each arm in turn
figure, axes = style.subplots(2, columns, figsize=(2.7 * columns, 4.8), sharex=True, sharey=True)
for axis, (panel, power) in zip(axes.T.flat, powers.items(), strict=True):
    part = shares_of_genes[shares_of_genes["panel"] == panel]
    colours = [style.CATEGORY_COLOURS[category] for category in part["category"]]
    axis.scatter(part["mean_count"], part["share"], s=14, c=colours)
    axis.axhline(1 / len(part), color="#9A9A9A", lw=0.8, zorder=0)
    axis.set(xscale="log", yscale="log")
    axis.set_title(f"{panel}: power {power:.1f}".replace(" -", " −"))
for axis in axes[1]:
    axis.set_xlabel("mean count per 2 µm bin")
for axis in axes[:, 0]:
    axis.set_ylabel("share of the squared gradient")
style.mark(figure, settings.source, shares_of_genes)

# %% [markdown]
# ## The same minimiser
#
# One free rate per group of simulated bins, fitted until gradient descent stands still. MSE and Poisson end at the mean count; MSE on log1p does not. They differ in the steps that the sparse groups take.

# %%
toy = mechanism.toy_minimisers()
toy["error"] = toy["relative_error"].round(3).add(0).map("{:.1%}".format).str.replace("-", "−")
toy["steps"] = toy["steps"].astype(str)
toy = toy.pivot(index=["loss", "link"], columns="rate", values=["error", "steps"])
tables.show(toy.rename(columns={"error": "minimiser against the mean count"}), index=True)
