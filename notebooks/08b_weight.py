# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The weight dial
#
# **Finding.** That the loss acts between genes is {val}`verdict.between_genes`; that the score rises all the way from squared error to Poisson is {val}`verdict.dose`.

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm

from sparsity_trap import runs
from sparsity_trap.analysis import mechanism
from sparsity_trap.analysis.effects import contrast
from sparsity_trap.analysis.factorial import as_published
from sparsity_trap.show import style, tables
from sparsity_trap.training import training_mean

style.use()
settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "08b_weight")
results = runs.load_all(settings)
scores = runs.long_table(settings, results)
patches = {result.run.name: result.patches for result in results}

# %% [markdown]
# Squared error and the Poisson likelihood are two points on a road. A quasi-likelihood for counts of variance $\lambda^p$ has the gradient $(\lambda - y)/\lambda^p$: p = 0 is squared error, p = 1 Poisson, p = 2 the gamma likelihood. The minimiser is the conditional mean for every p. So p turns one thing alone, the weight $1/\lambda^p$ of a bin's residual. Link and start are those of arm E throughout.
#
# Weights have been put on squared error before: in models of gene perturbation, unweighted error rewards collapse to a mean profile where the signal is sparse, and weights that favour the genes which change lessen it {cite:p}`mejia2025diversity`. Here they favour bins and genes of low rate.

# %%
powers = {"mse": 0, "poisson": 1} | {f"power-{p:g}": p for p in (0, 0.5, 1, 1.5, 2)}
alike = as_published(scores, "decoder", "gene_weight")
alike &= (scores["link"] == "exp") & (scores["bias"] == "published")
rows = scores[alike & (scores["patient"] == settings.main_patient)]
rows = rows.assign(p=rows["loss"].map(powers))
dial = rows[rows["p"].notna() & (rows["gene_weight"] == "none")]
dial = dial[dial.groupby("decoder")["p"].transform("nunique") > 1]


# %%
def effect(weights):
    """Weighted sum of arms' scores on the main patient."""
    return contrast(scores, weights, patients=[settings.main_patient], moments=patches)


# %%
found = []
for decoder, own in dial.groupby("decoder"):
    arms = own.drop_duplicates("arm").sort_values("p")
    usual = arms.loc[arms["p"] == 1, "arm"].tolist()[:1]  # Poisson, which others are compared with
    for p, arm in zip(arms["p"], arms["arm"], strict=True):
        per_run = (
            own[own["arm"] == arm].groupby("run").agg({"pcc_8um": "mean", "collapsed": "first"})
        )
        row = {"decoder": decoder, "p": p, "arm": arm, "pcc_8um": per_run["pcc_8um"].mean()}
        row |= {"runs": len(per_run), "collapsed": per_run["collapsed"].sum()}
        if usual and arm not in usual:
            against = effect({arm: 1, usual[0]: -1})
            low, high = against.interval
            row |= {"minus Poisson": against.value, "ci_low": low, "ci_high": high}
        found.append(row)
columns = ["decoder", "p", "arm", "pcc_8um", "minus Poisson", "ci_low", "ci_high", "runs"]
curve = pd.DataFrame(found, columns=[*columns, "collapsed"])
trained = curve["p"].nunique() > 2
if len(curve):
    display(tables.show(curve))

# %% tags=["remove-input"]
missing = [f"{p:g}" for p in (0, 0.5, 1, 1.5, 2) if p not in set(curve["p"])]
lacking = f"This build has no arm with p = {', '.join(missing)}; the preset study has all. "
Markdown(
    f"{lacking if missing else ''}Means are over runs and genes on patient {settings.main_patient}."
    " Intervals of differences hold the variance of runs, genes and patches."
)

# %% tags=["hide-input", "lead"] mystnb={"figure": {"name": "fig-weight", "caption": "PCC at 8 µm against p, the power of the rate in the assumed variance, for Hist2ST. **a** The mean over genes, a small dot for each run. **b** Each gene's difference to Poisson, mean over runs, coloured by its mean count; black, the mean over genes with its 95 % interval."}, "image": {"alt": "The score along the weight dial, on average and per gene"}}
figure = style.not_trained("the weight dial")
if trained:
    figure, (left, right) = style.subplots(1, 2, figsize=(7.4, 3))
    own = dial[dial["decoder"] == "hist2st"]
    shown = curve[curve["decoder"] == "hist2st"]
    per_run = own.groupby(["p", "run"])["pcc_8um"].mean().reset_index()
    alive = per_run.groupby("p")["pcc_8um"].count()
    left.plot(per_run["p"], per_run["pcc_8um"], "o", ms=3, color="#B5B5B5")
    left.plot(shown["p"], shown["pcc_8um"], "o-", ms=5, color=style.POISSON_COLOUR)
    left.set(xlabel="p", ylabel="PCC at 8 µm")
    of_genes = own.groupby(["gene", "p"])["pcc_8um"].mean().unstack("p")
    of_genes = of_genes.sub(of_genes[1.0], axis=0)
    counts = own.groupby("gene")["mean_count"].mean()[of_genes.index]
    norm = LogNorm(counts[counts > 0].min(), counts.max())
    for gene, line in of_genes.iterrows():
        right.plot(line.index, line, lw=0.6, color=style.SCORE_MAP(norm(counts[gene])))
    errors = (shown["minus Poisson"] - shown["ci_low"]).fillna(0)
    right.errorbar(shown["p"], shown["minus Poisson"].fillna(0), errors, color="#222222", capsize=2)
    right.axhline(0, color="#9A9A9A", lw=0.8, zorder=0)
    right.set(xlabel="p", ylabel="difference to Poisson")
    image = figure.colorbar(ScalarMappable(norm, style.SCORE_MAP), ax=right)
    image.set_label("mean count of the gene")
    style.letter(left, right)
    style.mark(figure, settings.source, curve, genes=len(of_genes), runs=alive)
figure

# %% [markdown]
# ## Between genes or between bins?
#
# The weight acts between the bins of a gene, and between genes. The second can be had alone: squared error divided by each gene's mean, a constant, or by the variance of its counts, gives the genes Poisson's balance and leaves the bins that of squared error. Poisson times the gene's mean does the opposite.

# %%
WEIGHED = {
    ("mse", "none"): "MSE",
    ("mse", "1/mean"): "MSE / mean",
    ("mse", "1/variance"): "MSE / variance",
    ("poisson", "mean"): "Poisson × mean",
    ("poisson", "none"): "Poisson",
}
arms = rows.drop_duplicates("arm")
names = [WEIGHED.get(kind) for kind in zip(arms["loss"], arms["gene_weight"], strict=True)]
weighed = {
    (decoder, name): arm
    for decoder, name, arm in zip(arms["decoder"], names, arms["arm"], strict=True)
    if name
}


# %%
questions = {
    "whole": ("Poisson − MSE", {"Poisson": 1, "MSE": -1}),
    "closed_from_mse": ("MSE / mean − MSE", {"MSE / mean": 1, "MSE": -1}),
    "by_variance": ("MSE / variance − MSE", {"MSE / variance": 1, "MSE": -1}),
    "closed_from_poisson": ("Poisson − Poisson × mean", {"Poisson": 1, "Poisson × mean": -1}),
    "left": ("Poisson − MSE / mean", {"Poisson": 1, "MSE / mean": -1}),
    "beyond_half": (
        "MSE / mean − half way from MSE to Poisson",
        {"MSE / mean": 1, "MSE": -0.5, "Poisson": -0.5},
    ),
}

# %%
answers = []
for decoder in sorted({decoder for decoder, _ in weighed}):
    for question, (text, weights) in questions.items():
        arms = {weighed.get((decoder, name)): weight for name, weight in weights.items()}
        if None not in arms:
            found = effect(arms)
            low, high = found.interval
            answers.append((decoder, text, found.value, low, high, found.n))
            quote(f"weight.{decoder}.{question}", value=found.value, low=low, high=high)
columns = ["decoder", "contrast", "pcc_8um", "ci_low", "ci_high", "runs"]
answers = pd.DataFrame(answers, columns=columns)
if len(answers):
    display(tables.show(answers))

# %% [markdown]
# :::{when} weight.hist2st.closed_from_mse.value
# With Hist2ST the loss makes {val}`weight.hist2st.whole.value:+.3f` ({val}`weight.hist2st.whole.low:+.3f` to {val}`weight.hist2st.whole.high:+.3f`) at equal link and bias. Dividing squared error by the gene means, which changes nothing within a gene, makes {val}`weight.hist2st.closed_from_mse.value:+.3f` ({val}`weight.hist2st.closed_from_mse.low:+.3f` to {val}`weight.hist2st.closed_from_mse.high:+.3f`),
# and leaves {val}`weight.hist2st.left.value:+.3f` ({val}`weight.hist2st.left.low:+.3f` to {val}`weight.hist2st.left.high:+.3f`).
# :::
#
# :::{when} weight.hist2st.closed_from_poisson.value
# From the other side, multiplying each gene's Poisson loss by its mean gives it the weights of squared error; Poisson − Poisson × mean is {val}`weight.hist2st.closed_from_poisson.value:+.3f` ({val}`weight.hist2st.closed_from_poisson.low:+.3f` to {val}`weight.hist2st.closed_from_poisson.high:+.3f`).
# :::
#
# :::{when} weight.linear.whole.value
# With the linear decoder, in which every weight is one gene's own and AdamW removes its scale, the loss makes {val}`weight.linear.whole.value:+.3f` ({val}`weight.linear.whole.low:+.3f` to {val}`weight.linear.whole.high:+.3f`).
# :::

# %% tags=["hide-input"] mystnb={"figure": {"name": "fig-between-genes", "caption": "PCC at 8 µm with the genes' weights exchanged between the losses. Small dots are runs, large ones their means."}, "image": {"alt": "Scores of squared error and Poisson with their own and each other's weights of genes"}}
figure = style.not_trained("arms with exchanged weights of genes")
names = [n for n in WEIGHED.values() if ("hist2st", n) in weighed]
if len(names) > 2:
    figure, axis = style.subplots(figsize=(5.4, 0.7 + 0.34 * len(names)))
    drawn = []
    for y, name in enumerate(names):
        own = rows[rows["arm"] == weighed["hist2st", name]]
        per_run = own.groupby("run")["pcc_8um"].mean().dropna()
        colour = style.MSE_COLOUR if name.startswith("MSE") else style.POISSON_COLOUR
        axis.plot(per_run, np.full(len(per_run), y), "o", ms=3, color="#B5B5B5")
        axis.plot(per_run.mean(), y, "o", ms=6, color=colour)
        drawn.append(per_run.reset_index().assign(loss=name))
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("PCC at 8 µm")
    behind = [len(own) for own in drawn]
    style.mark(figure, settings.source, pd.concat(drawn), runs=behind)
figure

# %% [markdown]
# ## What theory expects of the genes
#
# Near a solution the curvature of a gene's loss in η, its pull on what genes share, is Σλ² under squared error and Σλ under Poisson, over the gene's bins; weights of genes multiply it. With every bin at its gene's mean in training, the share of the ten richest genes follows.
# Beside it stands their share of the squared gradient that reaches the shared decoder, measured before training and at the chosen checkpoint ([](07_factorial.ipynb)). Noise makes squared gradients near a solution: they are expected to grow as Σλ³ and Σλ, and weights enter as squares.

# %%
first = {
    arm: runs.pick(results, arm, settings.main_patient)
    for (d, _), arm in weighed.items()
    if d == "hist2st"
}
measured = {arm: mechanism.gradient_shares(settings, result) for arm, result in first.items()}

# %%
store = runs.store(settings, settings.training_patients(settings.main_patient)[0])
tissue = [counts[:, mask] for counts, mask in zip(store.counts, store.mask, strict=True)]
variance = np.concatenate(tissue, axis=1).var(axis=1)
mean = training_mean(settings, next(iter(first.values())).run)
mean, variance = mean.clip(1e-9), variance.clip(1e-9)
weight = {"none": 1.0, "mean": mean, "1/mean": 1 / mean, "1/variance": 1 / variance}
rich = np.argsort(mean)[-10:]


# %%
def of_rich(share):
    """Part of the ten richest genes in shares of genes."""
    return share[rich].sum() / share.sum()


expected = []
for (loss, kind), name in WEIGHED.items():
    if arm := weighed.get(("hist2st", name)):
        slope = {"mse": 2, "poisson": 1}[loss]  # powers of λ in the curvature
        row = {"loss": name, "curvature": of_rich(weight[kind] * mean**slope)}
        row |= {"noise": of_rich(np.square(weight[kind]) * mean ** (2 * slope - 1))}
        for panel, share in measured[arm].groupby("panel", sort=False)["share"]:
            row[f"measured, {panel.rpartition(', ')[2]}"] = of_rich(share.to_numpy())
        expected.append(row)
expected = pd.DataFrame(expected)
tables.show(
    expected.rename(columns={"curvature": "expected, curvature", "noise": "expected, noise"})
)

# %% [markdown]
# An even balance would give ten of {val}`panel.n_genes` genes 10 / {val}`panel.n_genes`. Where ten rich genes hold nearly all of a gradient, the shared trunk learns for them first. That is a matter of weights between tasks, as in any model with many outputs, and not of counts being sparse.
