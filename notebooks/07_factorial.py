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

# %% tags=["remove-cell"]
import pandas as pd
from IPython.display import HTML, Markdown

from sparsity_trap import runs as results
from sparsity_trap.analysis import comparisons, mechanism
from sparsity_trap.data.sections import open_preset
from sparsity_trap.show import control_figures, interactive, style, tables

settings = open_preset(preset, source, cohort)
runs = results.load_all(settings)
scores = comparisons.long_table(settings, runs)
table = scores.assign(score=scores["pcc_8um"])

# %% [markdown]
# Between arms D and E three things change at once: the loss, the link and the initial bias of the head. The factorial trains their combinations, everything else equal.
#
# :::{when} factorial.poisson.effect
# Over all links and biases, Poisson in place of MSE changes the mean per-gene PCC at 8 µm by {val}`factorial.poisson.effect:+.3f` (95 % interval {val}`factorial.poisson.ci_low:+.3f` to
# {val}`factorial.poisson.ci_high:+.3f`), the exp link in place of softplus by {val}`factorial.exp.effect:+.3f` ({val}`factorial.exp.ci_low:+.3f` to {val}`factorial.exp.ci_high:+.3f`), and a start at the
# gene means in place of the published bias by {val}`factorial.gene-mean.effect:+.3f` ({val}`factorial.gene-mean.ci_low:+.3f` to {val}`factorial.gene-mean.ci_high:+.3f`).
# :::

# %% tags=["remove-input"]
factorial = comparisons.factorial(table)
note = "This preset does not train the whole factorial."
if factorial:
    patients = (
        "one test patient" if factorial.n_patients == 1 else f"{factorial.n_patients} test patients"
    )
    note = f"{factorial.n_genes} genes, {patients}. {factorial.note}"
Markdown(note)

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-factorial", "caption": "Main effects (black) and two-way interactions (grey) of loss, link and bias on the per-gene PCC at 8 µm. The reference is MSE with softplus and the published bias."}, "image": {"alt": "Effects of the factorial with their intervals"}}
if factorial:
    figure = control_figures.effects_forest(factorial.effects, settings.source)
else:
    figure = style.not_trained("the factorial")
figure

# %% [markdown]
# :::{when} factorial.poisson.effect
# The same effects on other scores, with 95 % intervals over genes:
# :::

# %% tags=["remove-input"]
plot = HTML("<!-- not trained -->")
if factorial:
    names = ("pcc_8um", "pcc_2um", "spearman_8um", "ssim_2um", "ssim_8um", "d2", "auprc")
    effects = {
        tables.TITLES.get(name, name): comparisons.factorial(
            scores.assign(score=scores[name])
        ).effects
        for name in names
    }
    figure, choices = interactive.effects_browser(effects, settings.source)
    plot = interactive.show(figure, "effects", choices=choices)
plot

# %% [markdown]
# ## The published gap taken apart
#
# From D to E each factor is changed when it is its turn, in all six orders, and its contribution averaged (Shapley value). This takes the eight cells in which the bias is 0 or −3 with either link.
#
# :::{when} gap.loss.share
# Of the gap, the loss explains {val}`gap.loss.share:.0%` ({val}`gap.loss.ci_low:.0%` to {val}`gap.loss.ci_high:.0%`), the link {val}`gap.link.share:.0%` and the bias {val}`gap.bias.share:.0%`.
# :::

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-gap", "caption": "Contribution of each factor to the difference E − D, with 95 % intervals over genes."}, "image": {"alt": "Bars of the contributions of loss, link and bias"}}
shares = comparisons.shares_of_gap(table)
if shares is None:
    figure = style.not_trained("the eight cells between D and E")
else:
    figure = control_figures.gap_shares(shares, settings.source)
figure

# %% tags=["remove-input"]
tables.show(shares) if shares is not None else HTML("<!-- not trained -->")

# %% [markdown]
# ## Why the losses differ at all
#
# Both losses have the same minimiser. What differs is how much each bin pulls on the way: the gradient on η is a weight times λ − y. Under MSE the weight grows with the rate, so frequent bins lead; under Poisson with
# the exp link every bin weighs the same.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-weights", "caption": "Weight of a bin's residual in the gradient of the linear output. Computed, no data."}, "image": {"alt": "Curves of the weight against the rate for both losses and links"}}
control_figures.bin_weights()

# %% [markdown]
# In the decoder that all genes share, this becomes a matter between genes. Below, the share of each gene in the squared gradient that reaches it, before training and at the chosen checkpoint; the horizontal line is an equal share.
# Near a solution residuals are count noise, of size √λ, so theory expects shares that grow as λ³ under MSE and as λ under Poisson, with the exp link. Far from it the residual is the error of the start: arm D begins at
# 0.69 counts per bin for every gene, nearly all of it excess, and shares are nearly equal. Each panel's title gives the exponent fitted to its genes.

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-gradient", "caption": "Share of each gene in the squared gradient of the shared decoder against its mean count, for the same tokens."}, "image": {"alt": "Scatter of gradient share against mean count, per arm and moment"}}
shares_of_genes = pd.concat(
    comparisons.gradient_shares(settings, result)
    for result in results.contrast(settings) + results.matched(settings, runs)
)
control_figures.gradient_shares(shares_of_genes, settings.source)

# %% [markdown]
# ## The same minimiser
#
# One free rate per group of simulated bins, fitted until gradient descent stands still. MSE and Poisson end at the mean count; MSE on log1p does not. They differ in the steps that the sparse groups take.

# %% tags=["remove-input"]
toy = mechanism.toy_minimisers().assign(
    error=lambda t: t["relative_error"].round(3).add(0).map("{:.1%}".format).str.replace("-", "−"),
    steps=lambda t: t["steps"].map(str),
)
toy = toy.pivot(index=["loss", "link"], columns="rate", values=["error", "steps"])
tables.show(toy.rename(columns={"error": "minimiser against the mean count"}), index=True)
