"""The claims ledger: each claim of the paper with its decision rule, and what the results say of it.

A rule was written before any result was seen. Unless it says otherwise the unit is the gene: scores
of two arms are compared gene by gene, within the same test patient and seed, then averaged over
patients and seeds, and the 95 % interval is a bootstrap over genes. It does not speak for patients
that were not tested. "Supported" takes an interval beyond the claim's bound; "not supported" takes
an interval that leaves no room for an effect worth the name; everything else, a missing table
included, is "undetermined".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeGuard

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from sparsity_trap.analysis import published
from sparsity_trap.analysis.association import (
    LEAST_GENES,
    bootstrap_mean,
    draw_genes,
    interval,
    sign_test,
    sparsity_association,
    spearman_p_value,
)
from sparsity_trap.analysis.factorial import DialCurve

Verdict = Literal["supported", "not supported", "undetermined"]
Source = Literal["published", "this project"]

#: Least difference of a PCC or SSIM worth the name.
WORTH = 0.02

#: Least rank correlation worth the name.
WORTH_RHO = 0.1

#: A correlation this near to 0 counts as null.
NULL_PCC = 0.05

_ALPHA = 0.05
_BOOT = 5000


@dataclass(frozen=True, eq=False)
class Evidence:
    """Results on which the claims are judged; a table left out leaves its claims undetermined.

    Attributes
    ----------
    genes
        Table S1 of arms D and E (`stats.gene_table`).
    genes_matched
        Table S1 of two arms that differ in the loss only.
    scores
        One row per run and gene: ``arm``, ``patient``, ``seed``, ``gene`` and the columns of a
        run's per-gene table.
    controls
        One row per control and gene on the patient of ``genes``: ``control`` (``all-zeros``,
        ``shuffled``), ``gene`` and the same score columns.
    shares
        `effects.share_of_gap` from arm D to arm E.
    dial
        `effects.dial_curve` of the thinning levels (``keep``), from arms that differ in loss and
        thinning only.
    ceilings
        One row per gene on the patient of ``genes``: ``gene`` and best attainable ``pcc_2um``.
    toy
        `mechanism.toy_minimisers`.
    """

    genes: pd.DataFrame | None = None
    genes_matched: pd.DataFrame | None = None
    scores: pd.DataFrame | None = None
    controls: pd.DataFrame | None = None
    shares: pd.DataFrame | None = None
    dial: DialCurve | None = None
    ceilings: pd.DataFrame | None = None
    toy: pd.DataFrame | None = None


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and its verdict.

    Attributes
    ----------
    key, text, rule
        Short name, the claim and its decision rule in a sentence each.
    source
        Whose numbers it is judged on.
    verdict
        What they say.
    statistic, value, ci_low, ci_high, n
        Name and value of the statistic, its 95 % interval (NaN where it has none), and the number
        of units, genes unless the statistic says otherwise.
    """

    key: str
    text: str
    rule: str
    source: Source
    verdict: Verdict
    statistic: str
    value: float = np.nan
    ci_low: float = np.nan
    ci_high: float = np.nan
    n: int = 0


@dataclass(frozen=True)
class _Finding:
    verdict: Verdict = "undetermined"
    value: float = np.nan
    ci_low: float = np.nan
    ci_high: float = np.nan
    n: int = 0


_Judge = Callable[[Evidence], _Finding]

#: Key of each claim and the function that judges it, in the order of the ledger.
CLAIMS: dict[str, Callable[[Evidence], Claim]] = {}


def ledger(evidence: Evidence) -> pd.DataFrame:
    """Judge every claim: one row each in a fixed order, columns as the attributes of `Claim`."""
    return pd.DataFrame([vars(judge(evidence)) for judge in CLAIMS.values()])


def _claim(
    key: str, *, text: str, rule: str, statistic: str, source: Source = "this project"
) -> Callable[[_Judge], Callable[[Evidence], Claim]]:
    """Register a function as the judge of a claim, with its rule beside it."""

    def register(judge: _Judge) -> Callable[[Evidence], Claim]:
        def judged(evidence: Evidence) -> Claim:
            return Claim(
                key=key,
                text=text,
                rule=rule,
                source=source,
                statistic=statistic,
                **vars(judge(evidence)),
            )

        CLAIMS[key] = judged
        return judged

    return register


# --- from values over genes to a verdict ----------------------------------------------------------


def _verdict(low: float, high: float, above: float = 0.0, below: float = WORTH) -> Verdict:
    """Supported where the interval lies over ``above``, not supported where under ``below``."""
    if low > above:
        return "supported"
    return "not supported" if high < below else "undetermined"


def _mean_finding(values: pd.Series, above: float = 0.0, below: float = WORTH) -> _Finding:
    values = values.dropna().to_numpy(dtype=float)
    if len(values) < LEAST_GENES:
        return _Finding(n=len(values))
    low, high = bootstrap_mean(values, _BOOT)
    return _Finding(_verdict(low, high, above, below), values.mean(), low, high, len(values))


def _has(table: pd.DataFrame | None, *columns: str) -> TypeGuard[pd.DataFrame]:
    return table is not None and len(table) > 0 and set(columns) <= set(table)


def _gain(table: pd.DataFrame | None, metric: str) -> pd.Series:
    """Poisson minus MSE per gene; empty where the table or its columns are missing."""
    if not _has(table, f"{metric}_mse", f"{metric}_poisson"):
        return pd.Series(dtype=float)
    return table[f"{metric}_poisson"] - table[f"{metric}_mse"]


def _over(scores: pd.DataFrame | None, arm: str, others: list[str], metric: str) -> pd.DataFrame:
    """Score of an arm minus that of each other arm, [genes, arms], over shared runs.

    Empty where an arm is missing or shares no patient and seed with the rest.
    """
    runs = ["gene", "patient", "seed"]
    if not _has(scores, "arm", *runs, metric) or not {arm, *others} <= set(scores["arm"]):
        return pd.DataFrame(columns=others, dtype=float)
    wide = scores[scores["arm"].isin([arm, *others])].pivot(
        index=runs, columns="arm", values=metric
    )
    wide = wide.dropna()
    return wide[others].rsub(wide[arm], axis=0).groupby("gene").mean()


def _least_finding(differences: pd.DataFrame) -> _Finding:
    """Smallest of the columns' means; each draw of genes finds the smallest anew."""
    n = len(differences)
    if n < LEAST_GENES:
        return _Finding(n=n)
    values = differences.to_numpy()
    low, high = interval(values[draw_genes(n, _BOOT, 0)].mean(axis=1).min(axis=1))
    return _Finding(_verdict(low, high), values.mean(axis=0).min(), low, high, n)


def _over_control(evidence: Evidence, control: str, metric: str) -> pd.Series:
    """Score of arm E minus that of a control, per gene; empty where either is missing."""
    column = f"{metric}_poisson"
    controls = evidence.controls
    if not _has(evidence.genes, "gene", column) or not _has(controls, "control", "gene", metric):
        return pd.Series(dtype=float)
    null = controls[controls["control"] == control].set_index("gene")[metric]
    return evidence.genes.set_index("gene")[column].sub(null).dropna()


def _rho_finding(row: pd.Series, n: int) -> _Finding:
    low, high = row["ci_low"], row["ci_high"]
    return _Finding(_verdict(low, high, below=WORTH_RHO), row["rho"], low, high, n)


# --- the rescue -----------------------------------------------------------------------------------


@_claim(
    "rescue",
    text="The Poisson likelihood rescues prediction at 2 µm: PCC at 8 µm rises from arm D to E.",
    rule="Supported if the mean gain's interval lies above 0, not supported if below 0.02.",
    statistic="mean gain in PCC at 8 µm",
)
def rescue(evidence: Evidence) -> _Finding:
    return _mean_finding(_gain(evidence.genes, "pcc_8um"))


@_claim(
    "rescue_matched",
    text="The rescue is the loss's: it remains with link and head bias equal.",
    rule="As for the rescue, between two arms that differ in nothing but the loss.",
    statistic="mean gain in PCC at 8 µm, matched arms",
)
def rescue_matched(evidence: Evidence) -> _Finding:
    return _mean_finding(_gain(evidence.genes_matched, "pcc_8um"))


@_claim(
    "share_of_loss",
    text="The gap between arms D and E is explained by the loss.",
    rule="Supported if the interval of the loss's Shapley share lies above one half, not supported "
    "if below; undetermined where there is no gap to share.",
    statistic="share of the gap due to the loss",
)
def share_of_loss(evidence: Evidence) -> _Finding:
    if not _has(evidence.shares, "factor", "share", "ci_low", "ci_high", "n_genes"):
        return _Finding()
    rows = evidence.shares[evidence.shares["factor"] == "loss"]
    if rows.empty:
        return _Finding()
    row = rows.iloc[0]
    low, high = row["ci_low"], row["ci_high"]
    return _Finding(_verdict(low, high, 0.5, 0.5), row["share"], low, high, int(row["n_genes"]))


@_claim(
    "most_genes",
    text="Most genes improve from arm D to E.",
    rule="Supported if more genes gain than lose with p < 0.05 in the two-sided exact sign test on "
    "PCC at 8 µm, not supported if more lose with p < 0.05.",
    statistic="share of genes that gain",
)
def most_genes(evidence: Evidence) -> _Finding:
    gain = _gain(evidence.genes, "pcc_8um").dropna()
    return _sign_finding(int((gain > 0).sum()), int((gain < 0).sum()))


@_claim(
    "published_most_genes",
    text="48 of 50 genes improve.",
    rule="As for most genes, on the printed numbers.",
    statistic="share of genes that gain",
    source="published",
)
def published_most_genes(evidence: Evidence) -> _Finding:
    wins = int(published.SUMMARY["n_wins"])
    return _sign_finding(wins, int(published.SUMMARY["n_genes"]) - wins)


def _sign_finding(wins: int, losses: int) -> _Finding:
    n = wins + losses
    if n < LEAST_GENES:
        return _Finding(n=n)
    low, high = binomtest(wins, n).proportion_ci(method="exact")
    verdict: Verdict = "undetermined"
    if sign_test(np.repeat([1, -1], [wins, losses])) < _ALPHA:
        verdict = "supported" if wins > losses else "not supported"
    return _Finding(verdict, wins / n, low, high, n)


@_claim(
    "rescued_genes",
    text="The genes shown as rescued (MUC12, MT-ND3, JCHAIN, DES, FCGBP) gain more than others.",
    rule="Genes picked for their gain must keep it on data that did not pick them: supported if the "
    "interval of their mean gain minus that of all other genes, bootstrapped within either group, "
    "lies above 0, not supported if below 0.02.",
    statistic="extra gain in PCC at 8 µm of the genes shown",
)
def rescued_genes(evidence: Evidence) -> _Finding:
    gain = _gain(evidence.genes, "pcc_8um")
    if evidence.genes is None or gain.empty:
        return _Finding()
    shown = evidence.genes["gene"].isin(published.RESCUES["gene"])
    chosen, rest = (gain[which].dropna().to_numpy() for which in (shown, ~shown))
    n = len(chosen)
    if min(n, len(rest)) < LEAST_GENES:
        return _Finding(n=n)
    drawn = chosen[draw_genes(n, _BOOT, 0)].mean(axis=1)
    low, high = interval(drawn - rest[draw_genes(len(rest), _BOOT, 1)].mean(axis=1))
    return _Finding(_verdict(low, high), chosen.mean() - rest.mean(), low, high, n)


@_claim(
    "ssim_gain",
    text="SSIM at 2 µm rises from arm D to E.",
    rule="Supported if the mean gain's interval lies above 0, not supported if below 0.02; what a "
    "gain in SSIM means is another claim.",
    statistic="mean gain in SSIM at 2 µm",
)
def ssim_gain(evidence: Evidence) -> _Finding:
    return _mean_finding(_gain(evidence.genes, "ssim_2um"))


# --- sparsity -------------------------------------------------------------------------------------


@_claim(
    "sparser_genes",
    text="Sparser genes gain more from the Poisson likelihood.",
    rule="Supported if the interval of Spearman's rho of sparsity with gain lies above 0, not "
    "supported if below 0.1.",
    statistic="Spearman's rho",
)
def sparser_genes(evidence: Evidence) -> _Finding:
    table = _association_table(evidence)
    if table is None:
        return _Finding()
    found = sparsity_association(table, n_boot=_BOOT)
    return _rho_finding(pd.Series(vars(found)), found.n_genes)


@_claim(
    "sparser_genes_without_mitochondrial",
    text="That holds without the mitochondrial genes, the least sparse by far.",
    rule="As for sparser genes, over the genes of all other categories.",
    statistic="Spearman's rho without mitochondrial genes",
)
def sparser_genes_without_mitochondrial(evidence: Evidence) -> _Finding:
    table = _association_table(evidence)
    if table is None:
        return _Finding()
    rows = sparsity_association(table, n_boot=_BOOT).without_category.set_index("category")
    if "mitochondrial" not in rows.index:
        return _Finding()
    row = rows.loc["mitochondrial"]
    return _rho_finding(row, int(row["n_genes"]))


def _association_table(evidence: Evidence) -> pd.DataFrame | None:
    columns = ("gene", "category", "sparsity", "pcc_8um_mse", "pcc_8um_poisson")
    if not _has(evidence.genes, *columns):
        return None
    table = evidence.genes[list(columns)].dropna()
    return table if len(table) >= LEAST_GENES else None


@_claim(
    "published_rho",
    text="Sparsity and gain correlate over 50 genes (rho = 0.243, printed as p < 0.001).",
    rule="Supported if the two-sided p-value of the printed rho (Student's t, 48 degrees of "
    "freedom) is below 0.05, else not supported; the interval is Fisher's.",
    statistic="Spearman's rho",
    source="published",
)
def published_rho(evidence: Evidence) -> _Finding:
    rho, n = published.SUMMARY["rho"], int(published.SUMMARY["n_genes"])
    # Variance 1.06 / (n - 3) of Fisher's z for Spearman's rho: Fieller, Hartley & Pearson 1957.
    half = 1.96 * np.sqrt(1.06 / (n - 3))
    low, high = np.tanh(np.arctanh(rho) + np.array([-half, half]))
    significant = spearman_p_value(rho, n) < _ALPHA
    return _Finding("supported" if significant else "not supported", rho, low, high, n)


@_claim(
    "sparsity_causes_gain",
    text="Sparsity causes the gain: thinning the counts of the same genes makes it larger.",
    rule="Supported if the interval of the mean change of gain per halving of the training counts "
    "lies above 0, not supported if below 0.005 (0.02 over four halvings).",
    statistic="gain in PCC per halving of counts",
)
def sparsity_causes_gain(evidence: Evidence) -> _Finding:
    dial = evidence.dial
    if dial is None or dial.n_genes < LEAST_GENES:
        return _Finding()
    low, high = -dial.ci_high, -dial.ci_low
    return _Finding(_verdict(low, high, below=WORTH / 4), -dial.slope, low, high, dial.n_genes)


# --- the trap -------------------------------------------------------------------------------------


@_claim(
    "collapse_in_tissue",
    text="The collapse of MSE is visible within tissue and not only over all bins.",
    rule="Supported if within tissue the mean deficit of D to E in PCC at 8 µm has an interval above "
    "0 and exceeds half the deficit over all bins, its interval too; not supported if the deficit "
    "within tissue lies below 0.02 or its excess over that half below 0.",
    statistic="deficit within tissue minus half the deficit over all bins",
)
def collapse_in_tissue(evidence: Evidence) -> _Finding:
    inside = _gain(evidence.genes, "pcc_8um")
    excess = inside - 0.5 * _gain(evidence.genes, "pcc_8um_unmasked")
    inside = inside[excess.notna()] if len(excess) == len(inside) else inside[:0]
    deficit, found = _mean_finding(inside), _mean_finding(excess, 0.0, 0.0)
    verdicts = {deficit.verdict, found.verdict}
    if "not supported" in verdicts:
        verdict: Verdict = "not supported"
    else:
        verdict = "supported" if verdicts == {"supported"} else "undetermined"
    return _Finding(verdict, found.value, found.ci_low, found.ci_high, found.n)


@_claim(
    "trap_at_2um",
    text="MSE fails at 2 µm: arm D predicts 2 µm bins worse than arms A and E.",
    rule="Supported if the smaller of the mean advantages of A and E over D in PCC at 2 µm has an "
    "interval above 0, not supported if below 0.02.",
    statistic="smaller advantage over D in PCC at 2 µm",
)
def trap_at_2um(evidence: Evidence) -> _Finding:
    return _least_finding(-_over(evidence.scores, "D", ["A", "E"], "pcc_2um"))


@_claim(
    "published_trap_at_2um",
    text="MSE fails at 2 µm: the printed PCC of D at 2 µm is below those of A and E.",
    rule="Supported if D's printed, pooled value is the smallest of the three by 0.02 or more, else "
    "not supported; single printed numbers have no interval.",
    statistic="smaller advantage over D in pooled PCC at 2 µm (n: arms)",
    source="published",
)
def published_trap_at_2um(evidence: Evidence) -> _Finding:
    pcc = published.ARMS.set_index("arm")["pcc_2um"]
    value = float(pcc[["A", "E"]].min() - pcc["D"])
    return _Finding("supported" if value >= WORTH else "not supported", value, n=3)


@_claim(
    "native_2um",
    text="Gene counts can be predicted at native 2 µm resolution.",
    rule="Supported if arm E reaches more than half of the best attainable PCC at 2 µm, mean over "
    "genes with its interval, not supported if less.",
    statistic="PCC at 2 µm relative to its ceiling",
)
def native_2um(evidence: Evidence) -> _Finding:
    genes, ceilings = evidence.genes, evidence.ceilings
    if not _has(genes, "gene", "pcc_2um_poisson") or not _has(ceilings, "gene", "pcc_2um"):
        return _Finding()
    ceiling = ceilings.set_index("gene")["pcc_2um"]
    reached = genes.set_index("gene")["pcc_2um_poisson"] / ceiling[ceiling > 0]
    return _mean_finding(reached, 0.5, 0.5)


@_claim(
    "interpolation",
    text="Training coarse and interpolating (B) is no better than training at 2 µm (E).",
    rule="Supported if the interval of B's mean advantage over E in PCC at 2 µm lies below 0.02, "
    "else not supported if above 0.",
    statistic="advantage of B over E in PCC at 2 µm",
)
def interpolation(evidence: Evidence) -> _Finding:
    found = _mean_finding(_over(evidence.scores, "B", ["E"], "pcc_2um")["E"])
    verdict: Verdict = "undetermined"
    if found.ci_high < WORTH:
        verdict = "supported"
    elif found.ci_low > 0:
        verdict = "not supported"
    return _Finding(verdict, found.value, found.ci_low, found.ci_high, found.n)


@_claim(
    "multi_resolution",
    text="Training at 2, 4, 8 and 16 µm together (V7) is best.",
    rule="Supported if V7's smallest mean advantage over arms A to E in PCC at 8 µm has an interval "
    "above 0, not supported if below 0.02.",
    statistic="smallest advantage of V7 in PCC at 8 µm",
)
def multi_resolution(evidence: Evidence) -> _Finding:
    return _least_finding(_over(evidence.scores, "V7", list("ABCDE"), "pcc_8um"))


# --- controls -------------------------------------------------------------------------------------


@_claim(
    "ssim_beats_emptiness",
    text="SSIM separates models from emptiness: arm E scores above a prediction of zeros.",
    rule="Supported if the interval of E's mean advantage in SSIM at 2 µm lies above 0, not "
    "supported if below 0.02.",
    statistic="advantage over all zeros in SSIM at 2 µm",
)
def ssim_beats_emptiness(evidence: Evidence) -> _Finding:
    return _mean_finding(_over_control(evidence, "all-zeros", "ssim_2um"))


@_claim(
    "deep_beats_linear",
    text="The deep decoder beats a linear map of the tokens.",
    rule="Supported if the interval of E's mean advantage over E-linear in PCC at 8 µm lies above "
    "0, not supported if below 0.02.",
    statistic="advantage over linear in PCC at 8 µm",
)
def deep_beats_linear(evidence: Evidence) -> _Finding:
    return _mean_finding(_over(evidence.scores, "E", ["E-linear"], "pcc_8um")["E-linear"])


@_claim(
    "shuffled_is_null",
    text="PCC measures what the image says: with patches shuffled it falls to nothing.",
    rule="Supported if the interval of the shuffled control's mean PCC at 8 µm lies within 0.05 of "
    "0, not supported if wholly outside.",
    statistic="PCC at 8 µm of shuffled patches",
)
def shuffled_is_null(evidence: Evidence) -> _Finding:
    if not _has(evidence.controls, "control", "gene", "pcc_8um"):
        return _Finding()
    controls = evidence.controls
    found = _mean_finding(controls[controls["control"] == "shuffled"]["pcc_8um"])
    low, high = found.ci_low, found.ci_high
    verdict: Verdict = "undetermined"
    if low > -NULL_PCC and high < NULL_PCC:
        verdict = "supported"
    elif low > NULL_PCC or high < -NULL_PCC:
        verdict = "not supported"
    return _Finding(verdict, found.value, low, high, found.n)


# --- mathematics ----------------------------------------------------------------------------------


@_claim(
    "constant_optimum",
    text="The optimum of MSE on sparse counts is a small constant.",
    rule="Solved to convergence on groups of different rates: supported if MSE gives all groups the "
    "same rate to 1 %, not supported if it gives each group its own mean count to 1 %.",
    statistic="largest relative error of MSE's minimiser (n: fits)",
)
def constant_optimum(evidence: Evidence) -> _Finding:
    columns = ("loss", "link", "minimiser", "mean_count", "converged")
    if not _has(evidence.toy, *columns):
        return _Finding()
    fits = evidence.toy[evidence.toy["loss"] == "mse"]
    if fits.empty or not fits["converged"].all():
        return _Finding()
    error = float((fits["minimiser"] / fits["mean_count"] - 1).abs().max())
    spread = fits.groupby("link")["minimiser"].agg(lambda x: x.max() / x.min() - 1).max()
    verdict: Verdict = "undetermined"
    if spread < 0.01:
        verdict = "supported"
    elif error < 0.01:
        verdict = "not supported"
    return _Finding(verdict, error, n=len(fits))
