# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Loss, link or bias?
#
# **Finding.** That the loss explains the gap between arms D and E is {val}`verdict.share_of_loss`; the start of the bias is part of it.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
from IPython.display import display
from patsy import dmatrix
from patsy.contrasts import ContrastMatrix, Treatment

from sparsity_trap import runs
from sparsity_trap.analysis import controls, factorial, mechanism
from sparsity_trap.analysis.effects import contrast
from sparsity_trap.show import interactive, style, tables

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "07_factorial")
results = runs.load_all(settings)
scores = runs.long_table(settings, results)  # one row per run and gene, with the arm's settings
patches = {result.run.name: result.patches for result in results}

# %% [markdown]
# Between arms D and E three things change at once: the loss, the link and the initial bias of the head. Here each is changed with the others held: eight cells, in which the bias is a number, 0 or −3, with either link. Means are over runs and genes; a run that [collapsed](03_results.ipynb) has no score, and is counted.

# %%
between = factorial.gap_runs(scores)  # the runs of the eight cells
cells = factorial.cells(between, "pcc_8um")
tables.show(cells) if len(cells) else style.not_trained("the eight cells between arms D and E")

# %% [markdown]
# An effect is a weighted sum of the cells' means. Levels are coded so that a coefficient is the level's mean over all cells of the other factors minus the reference's, and that of a product is a difference of such differences: treatment coding, each column less its mean over the levels. The pseudo-inverse of this design holds each cell's weight in each coefficient.
# The sum is taken run by run, and its interval holds what runs, genes and patches bring. Where all runs of a cell collapsed there is no effect to speak of, and a dash stands.


# %%
class Marginal(Treatment):
    """Each level against the reference, at the mean of the other factors' levels."""

    def code_without_intercept(self, levels):
        coded = super().code_without_intercept(levels)
        return ContrastMatrix(coded.matrix - 1 / len(levels), coded.column_suffixes)


formula = "C(loss, Marginal('mse')) * C(link, Marginal('softplus')) * C(bias, Marginal({}))"


# %%
def effects(rows, bias, score="pcc_8um"):
    """Main effects and interactions on a score; ``bias`` is the reference's."""
    table = factorial.cells(rows, score)
    design = dmatrix(formula.format(repr(bias)), table)
    weights = pd.DataFrame(np.linalg.pinv(design), design.design_info.column_names, table["arm"])
    found = []
    for term, of_arms in weights.drop("Intercept").iterrows():
        effect = contrast(rows, of_arms.to_dict(), score, moments=patches)
        found.append((term, effect.value, *effect.interval, effect.n))
    found = pd.DataFrame(found, columns=["term", "effect", "ci_low", "ci_high", "runs"])
    # C(loss, Marginal('mse'))[T.nb]:C(link, …)[T.exp] becomes loss=nb x link=exp
    terms = found["term"].str.replace(r"C\((\w+), \S+\)\[T\.(.+?)\]", r"\1=\2", regex=True)
    return found.assign(term=terms.str.replace(":", " x "), order=terms.str.count(":") + 1)


# %%
if len(between):
    on_gap = effects(between, 0.0)
    for row in on_gap.itertuples():
        name = row.term.replace(" x ", "-x-").replace("loss=", "").replace("link=", "")
        numbers = {"effect": row.effect, "ci_low": row.ci_low, "ci_high": row.ci_high}
        quote(f"between.{name.replace('bias=-3.0', 'minus3')}", **numbers)
    display(tables.show(on_gap.assign(term=on_gap["term"].map(style.term_name))))

# %% [markdown]
# :::{when} between.poisson.effect
# Over the four pairs of link and bias, Poisson in place of MSE changes the mean per-gene PCC at 8 µm by {val}`between.poisson.effect:+.3f` (95 % interval {val}`between.poisson.ci_low:+.3f` to {val}`between.poisson.ci_high:+.3f`), the exp link in place of softplus by
# {val}`between.exp.effect:+.3f` ({val}`between.exp.ci_low:+.3f` to {val}`between.exp.ci_high:+.3f`), and a start at −3 in place of 0 by {val}`between.minus3.effect:+.3f` ({val}`between.minus3.ci_low:+.3f` to {val}`between.minus3.ci_high:+.3f`).
# The loss's effect is larger at −3 than at 0 by {val}`between.poisson-x-minus3.effect:+.3f` ({val}`between.poisson-x-minus3.ci_low:+.3f` to {val}`between.poisson-x-minus3.ci_high:+.3f`): where that is not near 0, no single number is *the* effect of the loss.
# :::

# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-between", "caption": "Effect of the loss, Poisson − MSE, at each link and bias, with 95 % intervals over runs, genes and patches. Crosses: a cell whose runs all collapsed."}, "image": {"alt": "The loss's effect in the four pairs of link and bias"}}
figure = style.not_trained("the eight cells between arms D and E")
if len(between):
    pairs = cells.pivot(index=["link", "bias"], columns="loss", values="arm")
    of_loss = [contrast(between, {p: 1, m: -1}, moments=patches) for m, p in pairs.to_numpy()]
    drawn = pd.DataFrame([(e.value, *e.interval) for e in of_loss], pairs.index)
    drawn = drawn.set_axis(["effect", "ci_low", "ci_high"], axis=1).reset_index()
    figure, axis = style.subplots(figsize=(5.2, 2.1))
    axis.hlines(drawn.index, drawn["ci_low"], drawn["ci_high"], color="#222222", lw=1.2)
    axis.plot(drawn["effect"], drawn.index, "o", ms=4, color="#222222")
    gone = drawn.index[drawn["effect"].isna()]
    axis.plot(np.zeros(len(gone)), gone, "x", color=style.MSE_COLOUR)
    axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
    names = [f"{row.link}, bias {row.bias:.0f}".replace("-", "−") for row in drawn.itertuples()]
    axis.set_yticks(drawn.index, names)
    axis.set_ylim(-0.6, len(drawn) - 0.4)
    axis.set_xlabel("Poisson − MSE, PCC at 8 µm")
    behind = {"genes": between["gene"].nunique(), "runs": [effect.n for effect in of_loss]}
    style.mark(figure, settings.source, drawn, **behind)
figure

# %% [markdown]
# ## The published gap taken apart
#
# From D to E each factor is changed when it is its turn, in all six orders, and its contribution averaged (Shapley value). That, too, is a weighted sum of the eight cells, and the three add up to E − D:

# %%
weights = factorial.shapley_weights(scores)  # factor -> arm -> weight
parts = {factor: contrast(between, own, moments=patches) for factor, own in weights.items()}
if parts:
    # The same runs and patients as the parts, so that they add up.
    parts["gap"] = contrast(between, {"E": 1.0, "D": -1.0}, moments=patches)
rows = [(name, part.value, *part.interval, part.n) for name, part in parts.items()]
shares = pd.DataFrame(rows, columns=["factor", "contribution", "ci_low", "ci_high", "runs"])
for row in shares.itertuples():
    quote(f"gap.{row.factor}", contribution=row.contribution, low=row.ci_low, high=row.ci_high)
if len(shares):
    display(tables.show(shares.replace({"factor": {"gap": "E − D"}})))

# %% [markdown]
# :::{when} gap.loss.contribution
# To E − D the loss contributes {val}`gap.loss.contribution:+.3f` ({val}`gap.loss.low:+.3f` to {val}`gap.loss.high:+.3f`), the link {val}`gap.link.contribution:+.3f` ({val}`gap.link.low:+.3f` to {val}`gap.link.high:+.3f`) and the bias
# {val}`gap.bias.contribution:+.3f` ({val}`gap.bias.low:+.3f` to {val}`gap.bias.high:+.3f`).
# :::
#
# A contribution is no property of the loss. It averages the loss's effect in all four pairs of link and bias, among them the start at 0, where squared error has most to lose. The effect at the published Poisson arm's link and bias, E − D-matched, is one of the four; {numref}`fig-between` shows them all.
# So a loss that "explains much of the gap" and "changes little at equal link and bias" is no contradiction but an interaction: with a good start it matters less which loss is taken. Shares of the gap in per cent are left out. They divide by a difference that another training moves.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-gap", "caption": "Contribution of each factor to the difference E − D, with 95 % intervals over runs, genes and patches."}, "image": {"alt": "Bars of the contributions of loss, link and bias"}}
figure = style.not_trained("the eight cells between arms D and E")
if len(shares):
    figure, axis = style.subplots(figsize=(5.2, 2.2))
    colours = ["#9CC3CF"] * (len(shares) - 1) + ["#555555"]
    axis.barh(shares.index, shares["contribution"], height=0.6, color=colours)
    axis.hlines(shares.index, shares["ci_low"], shares["ci_high"], color="#222222", lw=1.2)
    axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
    axis.set_yticks(shares.index, shares["factor"].replace("gap", "E − D"))
    axis.invert_yaxis()
    axis.set_xlabel("PCC at 8 µm, from arm D to arm E")
    behind = {"genes": between["gene"].nunique(), "runs": shares["runs"]}
    style.mark(figure, settings.source, shares, **behind)
figure

# %% [markdown]
# ## More losses, and a start at the gene means
#
# The larger factorial crosses every loss that was trained with both links at two starts: the publication's bias of that link (0 with softplus, −3 with exp) and the gene's mean. Here the link takes its bias along, so its effect is that of both.

# %%
crossed = factorial.factorial_runs(scores)
trained = len(crossed) > 0
if trained:
    on_pcc = effects(crossed, "published")
    for row in on_pcc[on_pcc["order"] == 1].set_index("term").itertuples():
        numbers = {"effect": row.effect, "ci_low": row.ci_low, "ci_high": row.ci_high}
        quote(f"factorial.{row.Index.split('=')[1]}", **numbers)
    named = on_pcc.assign(term=on_pcc["term"].map(style.term_name))
    display(tables.show(factorial.cells(crossed, "pcc_8um")), tables.show(named))

# %% [markdown]
# :::{when} factorial.poisson.effect
# Over all links and starts, Poisson in place of MSE changes the PCC by {val}`factorial.poisson.effect:+.3f` ({val}`factorial.poisson.ci_low:+.3f` to {val}`factorial.poisson.ci_high:+.3f`), exp in place of softplus by {val}`factorial.exp.effect:+.3f` ({val}`factorial.exp.ci_low:+.3f` to {val}`factorial.exp.ci_high:+.3f`), and a start at the gene means in place of the published bias by
# {val}`factorial.gene-mean.effect:+.3f` ({val}`factorial.gene-mean.ci_low:+.3f` to {val}`factorial.gene-mean.ci_high:+.3f`).
# :::

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-factorial", "caption": "Main effects (coloured) and two-way interactions (grey) of loss, link and bias on the per-gene PCC at 8 µm. The reference is MSE with softplus and the published bias."}, "image": {"alt": "Effects of the factorial with their intervals"}}
figure = style.not_trained("the larger factorial; the preset paper does")
if trained:
    shown = on_pcc[on_pcc["order"] <= 2].iloc[::-1].reset_index(drop=True)
    figure, axis = style.subplots(figsize=(6.4, 0.9 + 0.24 * len(shown)))
    for order, colour in ((1, style.POISSON_COLOUR), (2, "#8A8A8A")):
        rows = shown[shown["order"] == order]
        axis.hlines(rows.index, rows["ci_low"], rows["ci_high"], color=colour, lw=1.2)
        axis.plot(rows["effect"], rows.index, "o", ms=4, color=colour)
    axis.axvline(0, color="#9A9A9A", lw=0.8, zorder=0)
    axis.set_yticks(shown.index, [style.term_name(term) for term in shown["term"]])
    axis.set_ylim(-0.7, len(shown) - 0.3)
    axis.set_xlabel("effect on PCC at 8 µm, with 95 % interval")
    alive = crossed.dropna(subset=["pcc_8um"])
    behind = {"genes": alive["gene"].nunique(), "runs": alive["run"].nunique()}
    style.mark(figure, settings.source, on_pcc, **behind)
figure

# %% [markdown]
# :::{when} between.poisson.effect
# Effects on other scores are a choice away: in the figure of the larger factorial where it was trained, else here, of the eight cells.
# :::

# %% tags=["remove-input"]
if trained or len(between):
    rows, reference = (crossed, "published") if trained else (between, 0.0)
    names = ("pcc_8um", "pcc_2um", "spearman_8um", "ssim_2um", "ssim_8um", "d2", "auprc")
    by_score = {tables.TITLES.get(name, name): effects(rows, reference, name) for name in names}
    figure, choices = interactive.effects_browser(by_score, settings.source)
    place = "fig-factorial" * trained  # of the eight cells there is no picture
    display(interactive.show(figure, "effects", choices=choices, in_place_of=place))

# %% [markdown]
# ## Why the losses differ at all
#
# Both losses have the same minimiser. What differs is the way there. Look at one bin that holds one count, y = 1, from a linear output η far too low:

# %%
eta = np.linspace(-6, 2.5, 200)
links = {"exp": np.exp(eta), "softplus": np.logaddexp(0, eta)}  # λ
curves = {("MSE", link): (1 - seen) ** 2 for link, seen in links.items()}
curves |= {("Poisson", link): seen - np.log(seen) - 1 for link, seen in links.items()}

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-plateau", "caption": "Loss of a bin with one count against the linear output η. Computed, no data."}, "image": {"alt": "Squared error flattens out at low rates, the Poisson loss does not"}}
figure, axes = style.subplots(1, 2, figsize=(6.6, 2.6), sharey=True)
for (loss, link), curve in curves.items():
    axis = axes[list(links).index(link)]
    colour = style.MSE_COLOUR if loss == "MSE" else style.POISSON_COLOUR
    axis.plot(eta, curve, color=colour, label=loss)
    axis.set(title=f"link {link}", xlabel="η", ylim=(-0.1, 5))
axes[0].set_ylabel("loss above its minimum")
axes[0].legend(loc="upper center")
figure.data = pd.DataFrame({f"{loss}, {link}": curve for (loss, link), curve in curves.items()})
figure.data.insert(0, "eta", eta)
figure

# %% [markdown]
# The Poisson loss with the exp link is convex in η: wherever it stands, the slope points to the minimum, and at low rates it stays near −y. Squared error is not convex in η. Through either link its slope, 2λ′(λ − y), fades with λ, so a rate near zero is a plateau: a run that overshoots to it finds no way back. That is where [collapsed](03_results.ipynb) runs stand. The optimum is the conditional mean all the same.
#
# In general the gradient on η is a weight times λ − y. With $\lambda' = \partial\lambda/\partial\eta$, which is λ for the exp link and $1 - e^{-\lambda}$ for softplus, the weight is $2\lambda'$ under MSE and $\lambda'/\lambda$ under Poisson.
# Under MSE it grows with the rate, so rich bins, and above all rich genes, lead; under Poisson with the exp link every bin weighs the same.

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
# AdamW divides the gradient of each weight by that weight's own recent size. A weight that serves one gene alone, in the head, thereby loses the gene's scale: nothing is left of the imbalance. A linear decoder is such weights throughout, and theory expects little effect of the loss there (E-linear − D-linear, [](03_results.ipynb)).
# A weight that genes share, in the trunk of Hist2ST, gets one sum of all their gradients, and in it the rich genes lead. How much of the effect lies there is measured in [](08b_weight.ipynb).
#
# Below, the share of each gene in the squared gradient that reaches the shared decoder, before training and at the chosen checkpoint; the horizontal line is an equal share.
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
style.mark(figure, settings.source, shares_of_genes, genes=shares_of_genes["gene"].nunique())

# %% [markdown]
# ## The same minimiser
#
# One free rate per group of simulated bins, fitted by plain gradient descent until it stands still, with the largest step that the loss bears; and by AdamW as the arms are trained, at a learning rate of 0.006. MSE and Poisson end at the mean count either way; MSE on log1p does not.

# %%
plain, adam = mechanism.toy_minimisers(), mechanism.toy_minimisers(lr=6e-3)
plain["error"] = plain["relative_error"].round(3).add(0).map("{:.1%}".format).str.replace("-", "−")
plain["steps, gradient descent"] = plain["steps"].astype(str)
plain["steps, AdamW"] = adam["steps"].astype(str)  # rows in the same order
columns = ["error", "steps, gradient descent", "steps, AdamW"]
toy = plain.pivot(index=["loss", "link"], columns="rate", values=columns)
tables.show(toy.rename(columns={"error": "minimiser against the mean count"}), index=True)

# %%
steps = adam.assign(plain=plain["steps"]).set_index(["loss", "link", "rate"])
for loss in ("mse", "poisson"):
    for name, at in {
        "poor": ("exp", 0.03),
        "rich": ("exp", 1.0),
        "far": ("softplus", 0.03),
    }.items():
        row = steps.loc[(loss, *at)]
        quote(f"toy.{loss}.{name}", plain=row["plain"], adamw=row["steps"])

# %% [markdown]
# Plain gradient descent has one step size for all groups, which the richest sets. With the exp link, squared error then takes {val}`toy.mse.poor.plain:,.0f` steps for the poorest, Poisson {val}`toy.poisson.poor.plain:,.0f`. AdamW gives every free rate a scale of its own: {val}`toy.mse.poor.adamw:,.0f` against {val}`toy.poisson.poor.adamw:,.0f`, and for the richest {val}`toy.mse.rich.adamw:,.0f` against {val}`toy.poisson.rich.adamw:,.0f`.
# So from a start near the mean, slowness of poor genes is not what squared error costs under AdamW. What stays is what genes share, and the start: with softplus from 0, the poorest group takes {val}`toy.mse.far.adamw:,.0f` and {val}`toy.poisson.far.adamw:,.0f` steps.
#
# For counts of 0 and 1, which most bins hold, MSE on log1p ends near λ log 2: too low by a constant factor, which a correlation ignores. It is squared error on a scale that evens out the variance.
#
# A start is not walked away from. AdamW moves a weight by about the learning rate a step, so in {val}`training.epochs` epochs a bias covers a short way in η, and from 0 to the −3 and below of a sparse gene is a long one. Where the start is wrong, features must carry the rate down, bin by bin.
