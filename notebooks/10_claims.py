# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The claims, one by one
#
# Each claim stands here with the rule by which it is judged, written before any result was seen; below them the evidence and the verdict.
#
# Unless a rule says otherwise the unit is the gene. Scores of two arms are compared gene by gene, within the same test patient and seed, and averaged over patients and seeds. The 95 % interval is a bootstrap over genes; it speaks neither for patients that were not tested
# nor for another training of the same arms. *Supported* takes an interval beyond the claim's bound. *Not supported* takes an interval that leaves no room for an effect worth the name. Everything else, evidence that this preset does not compute included, is *undetermined*.
# The whole ledger stands [at the end](claims-ledger).

# %% tags=["remove-cell", "parameters"]
preset = "smoke"
source = ""
cohort = ""

# %%
import numpy as np
import pandas as pd
from scipy import stats

from sparsity_trap import runs
from sparsity_trap.analysis import ceilings, controls, dial, factorial, mechanism, published
from sparsity_trap.analysis.association import LEAST_GENES, mean_interval
from sparsity_trap.analysis.claims import NULL_PCC, WORTH, WORTH_RHO, Estimate, Ledger, verdict
from sparsity_trap.show import tables

settings = runs.open_preset(preset, source, cohort)
quote = runs.Quotes(settings, "10_claims")
ledger = Ledger()

# %% [markdown]
# ## The evidence
#
# Per-gene scores of every run, and of every arm's first run on the main patient as one table of genes by arms:

# %%
results = runs.load_all(settings)
scores = runs.long_table(settings, results)
main = scores[scores["patient"] == settings.main_patient]
main = main[main["seed"] == main.groupby("arm")["seed"].transform("min")]
poisson = runs.pick(results, "E", settings.main_patient)

# %% [markdown]
# Controls are scored once, for [](06_controls.ipynb) and this page: here an empty map, and the predictions of arm E dealt to other patches. So are ceilings, the best attainable PCC, from the true rate where it is known and else from split counts:

# %%
nothing = controls.control_scores(settings, poisson).set_index(["control", "gene"])
ceiling = ceilings.best_pcc(settings, settings.main_patient).set_index("gene")["ceiling_2um"]

# %% [markdown]
# The shares of the gap ([](07_factorial.ipynb)), the slope of every gene along the thinned counts ([](08_dial.ipynb)), and the toy fits of [](07_factorial.ipynb):

# %%
between = factorial.complete_blocks(factorial.gap_runs(scores), "pcc_8um")
shares = factorial.share_of_gap(factorial.contributions(between)) if len(between) else None
thinned = dial.gains(scores, "keep").pivot(index="gene", columns="keep", values="delta")
halvings = pd.Series(dtype=float)  # change of each gene's gain per halving of the counts
if len(thinned):
    halvings = -np.polyfit(np.log2(thinned.columns.astype(float)), thinned.T, 1)[0]
    halvings = pd.Series(halvings, thinned.index)
toy = mechanism.toy_minimisers()

# %% [markdown]
# What a claim over genes is judged on: gains on the main patient, or advantages over all patients and seeds that the arms share; then the mean over genes and its interval. Fewer than four genes decide nothing.


# %%
def of_arms(score, *arms):
    """A score on the main patient, [genes, arms]; NaN for an arm that was not trained."""
    wide = main.pivot(index="gene", columns="arm", values=score)
    return wide.reindex(index=main["gene"].unique(), columns=list(arms))


def gain(score, mse="D", poisson="E"):
    """Poisson minus MSE per gene, on the main patient."""
    both = of_arms(score, mse, poisson)
    return (both[poisson] - both[mse]).dropna()


def advantages(score, arm, others):
    """An arm minus each of the others, [genes, others], over the runs that all of them share."""
    wide = scores.pivot(index=["gene", "patient", "seed"], columns="arm", values=score)
    wide = wide.reindex(columns=[arm, *others]).dropna()
    return wide[others].rsub(wide[arm], axis=0).groupby("gene").mean()


# %%
def mean(values):
    """Mean over genes with its interval."""
    values = values.dropna()
    if len(values) < LEAST_GENES:
        return Estimate(n=len(values))
    return Estimate(values.mean(), *mean_interval(values), len(values))


def least(differences):
    """Smallest of the columns' means; each draw of genes finds the smallest anew."""
    if len(differences) < LEAST_GENES:
        return Estimate(n=len(differences))

    def statistic(*columns, axis):
        return np.min([column.mean(axis) for column in columns], axis=0)

    columns = differences.to_numpy().T
    interval = stats.bootstrap(
        columns, statistic, paired=True, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    return Estimate(statistic(*columns, axis=-1), *interval, len(differences))


def signs(wins, losses):
    """Share of genes that gain, its exact interval, and the verdict of a two-sided sign test."""
    if wins + losses < LEAST_GENES:
        return Estimate(n=wins + losses), "undetermined"
    test = stats.binomtest(wins, wins + losses)
    estimate = Estimate(wins / test.n, *test.proportion_ci(method="exact"), test.n)
    if test.pvalue >= 0.05:
        return estimate, "undetermined"
    return estimate, "supported" if wins > losses else "not supported"


# %% [markdown]
# ## The rescue
#
# (claim-rescue)=
# ### The Poisson likelihood rescues prediction at 2 µm: PCC at 8 µm rises from arm D to E.
#
# *Rule.* Supported if the mean gain's interval lies above 0, not supported if below 0.02.

# %%
ledger.judge("rescue", "mean gain in PCC at 8 µm", mean(gain("pcc_8um")))

# %% [markdown]
# (claim-rescue_matched)=
# ### The rescue is the loss's: it remains with link and head bias equal.
#
# *Rule.* As for the rescue, between two arms that differ in nothing but the loss.

# %%
matched = gain("pcc_8um", mse="D-matched")
ledger.judge("rescue_matched", "mean gain in PCC at 8 µm, matched arms", mean(matched))

# %% [markdown]
# (claim-share_of_loss)=
# ### The gap between arms D and E is explained by the loss.
#
# *Rule.* Supported if the interval of the loss's Shapley share lies above one half, not supported if below; undetermined where there is no gap to share.

# %%
share = Estimate()
if shares is not None:
    loss = shares.set_index("factor").loc["loss"]
    share = Estimate(loss["share"], loss["ci_low"], loss["ci_high"], int(loss["n_genes"]))
ledger.judge("share_of_loss", "share of the gap due to the loss", share, above=0.5, below=0.5)

# %% [markdown]
# (claim-most_genes)=
# ### Most genes improve from arm D to E.
#
# *Rule.* Supported if more genes gain than lose with p < 0.05 in the two-sided exact sign test on PCC at 8 µm, not supported if more lose with p < 0.05.

# %%
gains = gain("pcc_8um")
improved = signs(int((gains > 0).sum()), int((gains < 0).sum()))
ledger.judge("most_genes", "share of genes that gain", *improved)

# %% [markdown]
# (claim-published_most_genes)=
# ### 48 of 50 genes improve.
#
# *Rule.* As for most genes, on the printed numbers.

# %%
wins, total = published.SUMMARY["n_wins"], published.SUMMARY["n_genes"]
printed = signs(wins, total - wins)
ledger.judge("published_most_genes", "share of genes that gain", *printed, source="published")

# %% [markdown]
# (claim-rescued_genes)=
# ### The genes shown as rescued (MUC12, MT-ND3, JCHAIN, DES, FCGBP) gain more than others.
#
# *Rule.* Genes picked for their gain must keep it on data that did not pick them: supported if the interval of their mean gain minus that of all other genes, bootstrapped within either group, lies above 0, not supported if below 0.02.


# %%
def difference(x, y, axis=-1):
    return x.mean(axis) - y.mean(axis)


shown = gains.index.isin(published.RESCUES["gene"])
extra = Estimate(n=int(shown.sum()))
if min(shown.sum(), (~shown).sum()) >= LEAST_GENES:
    groups = gains[shown].to_numpy(), gains[~shown].to_numpy()
    interval = stats.bootstrap(
        groups, difference, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    extra = Estimate(difference(*groups), *interval, int(shown.sum()))
ledger.judge("rescued_genes", "extra gain in PCC at 8 µm of the genes shown", extra)

# %% [markdown]
# (claim-ssim_gain)=
# ### SSIM at 2 µm rises from arm D to E.
#
# *Rule.* Supported if the mean gain's interval lies above 0, not supported if below 0.02; what a gain in SSIM means is another claim.

# %%
ledger.judge("ssim_gain", "mean gain in SSIM at 2 µm", mean(gain("ssim_2um")))

# %% [markdown]
# ## Sparsity
#
# (claim-sparser_genes)=
# ### Sparser genes gain more from the Poisson likelihood.
#
# *Rule.* Supported if the interval of Spearman's rho of sparsity with gain lies above 0, not supported if below 0.1.


# %%
def spearman(x, y, axis=-1):
    return stats.spearmanrho(x, y, axis=axis).statistic


def rank_correlation(x, y):
    """Spearman's rho with its interval over genes; none where a side is constant."""
    if len(x) < LEAST_GENES or min(x.nunique(), y.nunique()) < 2:
        return Estimate(n=len(x))
    interval = stats.bootstrap(
        (x, y), spearman, paired=True, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    return Estimate(spearman(x, y), *interval, len(x))


sparsity = main[main["arm"] == "E"].set_index("gene")["sparsity"].reindex(gains.index)
rho = rank_correlation(sparsity, gains)
ledger.judge("sparser_genes", "Spearman's rho", rho, below=WORTH_RHO)

# %% [markdown]
# (claim-sparser_genes_without_mitochondrial)=
# ### That holds without the mitochondrial genes, the least sparse by far.
#
# *Rule.* As for sparser genes, over the genes of all other categories.

# %%
category = main[main["arm"] == "E"].set_index("gene")["category"].reindex(gains.index)
others = category != "mitochondrial"
rho = Estimate()
if not others.all():
    rho = rank_correlation(sparsity[others], gains[others])
statistic = "Spearman's rho without mitochondrial genes"
ledger.judge("sparser_genes_without_mitochondrial", statistic, rho, below=WORTH_RHO)

# %% [markdown]
# (claim-published_rho)=
# ### Sparsity and gain correlate over 50 genes (rho = 0.243, printed as p < 0.001).
#
# *Rule.* Supported if the two-sided p-value of the printed rho (Student's t, 48 degrees of freedom) is below 0.05, else not supported; the interval is Fisher's.

# %%
rho, n = published.SUMMARY["rho"], published.SUMMARY["n_genes"]
p_value = 2 * stats.t.sf(abs(rho) * np.sqrt((n - 2) / (1 - rho**2)), n - 2)
# Variance 1.06 / (n - 3) of Fisher's z for Spearman's rho: Fieller, Hartley & Pearson 1957.
half = stats.norm.ppf(0.975) * np.sqrt(1.06 / (n - 3))
low, high = np.tanh(np.arctanh(rho) + np.array([-half, half]))
ledger.judge(
    "published_rho",
    "Spearman's rho",
    Estimate(rho, low, high, n),
    "supported" if p_value < 0.05 else "not supported",
    source="published",
)

# %% [markdown]
# (claim-sparsity_causes_gain)=
# ### Sparsity causes the gain: thinning the counts of the same genes makes it larger.
#
# *Rule.* Supported if the interval of the mean change of gain per halving of the training counts lies above 0, not supported if below 0.005 (0.02 over four halvings).

# %%
halving = mean(halvings)
ledger.judge("sparsity_causes_gain", "gain in PCC per halving of counts", halving, below=WORTH / 4)

# %% [markdown]
# ## The trap
#
# (claim-collapse_in_tissue)=
# ### The collapse of MSE is visible within tissue and not only over all bins.
#
# *Rule.* Supported if within tissue the mean deficit of D to E in PCC at 8 µm has an interval above 0 and exceeds half the deficit over all bins, its interval too; not supported if the deficit within tissue lies below 0.02 or its excess over that half below 0.

# %%
excess = (gain("pcc_8um") - 0.5 * gain("pcc_8um_unmasked")).dropna()
deficit = mean(gain("pcc_8um")[excess.index])
over_half = mean(excess)
inside = {verdict(deficit.low, deficit.high), verdict(over_half.low, over_half.high, below=0)}
ruling = "not supported" if "not supported" in inside else "undetermined"
ledger.judge(
    "collapse_in_tissue",
    "deficit within tissue minus half the deficit over all bins",
    over_half,
    "supported" if inside == {"supported"} else ruling,
)

# %% [markdown]
# (claim-trap_at_2um)=
# ### MSE fails at 2 µm: arm D predicts 2 µm bins worse than arms A and E.
#
# *Rule.* Supported if the smaller of the mean advantages of A and E over D in PCC at 2 µm has an interval above 0, not supported if below 0.02.

# %%
over_d = least(-advantages("pcc_2um", "D", ["A", "E"]))
ledger.judge("trap_at_2um", "smaller advantage over D in PCC at 2 µm", over_d)

# %% [markdown]
# (claim-published_trap_at_2um)=
# ### MSE fails at 2 µm: the printed PCC of D at 2 µm is below those of A and E.
#
# *Rule.* Supported if D's printed, pooled value is the smallest of the three by 0.02 or more, else not supported; single printed numbers have no interval.

# %%
pcc = published.ARMS.set_index("arm")["pcc_2um"]
smaller = min(pcc["A"], pcc["E"]) - pcc["D"]
ledger.judge(
    "published_trap_at_2um",
    "smaller advantage over D in pooled PCC at 2 µm (n: arms)",
    Estimate(smaller, n=3),
    "supported" if smaller >= WORTH else "not supported",
    source="published",
)

# %% [markdown]
# (claim-native_2um)=
# ### Gene counts can be predicted at native 2 µm resolution.
#
# *Rule.* Supported if arm E reaches more than half of the best attainable PCC at 2 µm, mean over genes with its interval, not supported if less.

# %%
reached = mean(of_arms("pcc_2um", "E")["E"] / ceiling[ceiling > 0])
ledger.judge("native_2um", "PCC at 2 µm relative to its ceiling", reached, above=0.5, below=0.5)

# %% [markdown]
# (claim-interpolation)=
# ### Training coarse and interpolating (B) is no better than training at 2 µm (E).
#
# *Rule.* Supported if the interval of B's mean advantage over E in PCC at 2 µm lies below 0.02, else not supported if above 0.

# %%
b_over_e = mean(advantages("pcc_2um", "B", ["E"])["E"])
ruling = "not supported" if b_over_e.low > 0 else "undetermined"
ledger.judge(
    "interpolation",
    "advantage of B over E in PCC at 2 µm",
    b_over_e,
    "supported" if b_over_e.high < WORTH else ruling,
)

# %% [markdown]
# (claim-multi_resolution)=
# ### Training at 2, 4, 8 and 16 µm together (V7) is best.
#
# *Rule.* Supported if V7's smallest mean advantage over arms A to E in PCC at 8 µm has an interval above 0, not supported if below 0.02.

# %%
over_all = least(advantages("pcc_8um", "V7", ["A", "B", "C", "D", "E"]))
ledger.judge("multi_resolution", "smallest advantage of V7 in PCC at 8 µm", over_all)

# %% [markdown]
# ## Controls
#
# (claim-ssim_beats_emptiness)=
# ### SSIM separates models from emptiness: arm E scores above a prediction of zeros.
#
# *Rule.* Supported if the interval of E's mean advantage in SSIM at 2 µm lies above 0, not supported if below 0.02.

# %%
over_zeros = mean(of_arms("ssim_2um", "E")["E"] - nothing.loc["zeros", "ssim_2um"])
ledger.judge("ssim_beats_emptiness", "advantage over all zeros in SSIM at 2 µm", over_zeros)

# %% [markdown]
# (claim-deep_beats_linear)=
# ### The deep decoder beats a linear map of the tokens.
#
# *Rule.* Supported if the interval of E's mean advantage over E-linear in PCC at 8 µm lies above 0, not supported if below 0.02.

# %%
over_linear = mean(advantages("pcc_8um", "E", ["E-linear"])["E-linear"])
ledger.judge("deep_beats_linear", "advantage over linear in PCC at 8 µm", over_linear)

# %% [markdown]
# (claim-shuffled_is_null)=
# ### PCC measures what the image says: with patches shuffled it falls to nothing.
#
# *Rule.* Supported if the interval of the shuffled control's mean PCC at 8 µm lies within 0.05 of 0, not supported if wholly outside.

# %%
null = mean(nothing.loc["shuffled", "pcc_8um"]) if "shuffled" in nothing.index else Estimate()
ruling = "undetermined"
if null.low > -NULL_PCC and null.high < NULL_PCC:
    ruling = "supported"
elif null.low > NULL_PCC or null.high < -NULL_PCC:
    ruling = "not supported"
ledger.judge("shuffled_is_null", "PCC at 8 µm of shuffled patches", null, ruling)

# %% [markdown]
# ## Mathematics
#
# (claim-constant_optimum)=
# ### The optimum of MSE on sparse counts is a small constant.
#
# *Rule.* Solved to convergence on groups of different rates: supported if MSE gives all groups the same rate to 1 %, not supported if it gives each group its own mean count to 1 %.

# %%
fits = toy[toy["loss"] == "mse"]
error = (fits["minimiser"] / fits["mean_count"] - 1).abs().max()
by_link = fits.groupby("link")["minimiser"]
ruling = "not supported" if error < 0.01 else "undetermined"
if (by_link.max() / by_link.min() - 1).max() < 0.01:
    ruling = "supported"
solved = fits["converged"].all()
ledger.judge(
    "constant_optimum",
    "largest relative error of MSE's minimiser (n: fits)",
    Estimate(error, n=len(fits)) if solved else Estimate(),
    ruling if solved else "undetermined",
)

# %% [markdown]
# (claims-ledger)=
# ## The ledger

# %%
claims = ledger.table()
folder = settings.folder / "tables"
folder.mkdir(exist_ok=True)
claims.to_csv(folder / "claims.csv", index=False)
quote("claims", **ledger.counts())
tables.show(claims[["text", "source", "verdict", "statistic", "value", "ci_low", "ci_high", "n"]])

# %% [markdown]
# On this run {val}`claims.supported` claims are supported, {val}`claims.not_supported` are not, and {val}`claims.undetermined` are undetermined, because the interval leaves both open or the preset does not train the arms (also as {download}`CSV <tables/claims.csv>`).
