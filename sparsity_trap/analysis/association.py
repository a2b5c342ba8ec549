"""Tables S1 to S3 and the association of sparsity with the gain of Poisson over MSE.

The unit of every statistic here is the gene. The gain ("delta") is Poisson minus MSE, by default
of the per-gene PCC at 8 µm; a gene is won when its gain is positive.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from sparsity_trap.settings import UserError

#: Columns that describe the gene in the test section, the same whichever arm predicted it.
GENE_COLUMNS = ("gene", "category", "sparsity", "mean_count")

_REQUIRED = ("gene", "category", "sparsity", "pcc_8um_mse", "pcc_8um_poisson")
#: A correlation over fewer genes is not tested.
LEAST_GENES = 4

_EXACT_UP_TO = 8  # genes; all 8! = 40,320 orders are still quick to list
_PERMUTATIONS = 9999

#: Metrics whose gain is set against sparsity where a table has them, with their range.
_METRICS = {"pcc_8um": (-1, 1), "ssim_2um": (-1, 1), "d2": (-np.inf, 1)}

_LEAST_LEVELS = 5  # patients or seeds; a variance is not estimated from fewer


# --- tables ---------------------------------------------------------------------------------------


def gene_table(mse: pd.DataFrame, poisson: pd.DataFrame) -> pd.DataFrame:
    """Table S1: one row per gene, both runs side by side.

    Parameters
    ----------
    mse, poisson
        Per-gene tables of two runs on the same test patient.

    Returns
    -------
    DataFrame
        ``gene``, ``category``, ``sparsity``, ``mean_count``, each metric with the suffix ``_mse``
        and ``_poisson``, ``delta_pcc_8um``, ``delta_ssim_2um`` (Poisson - MSE) and ``improved``
        (gain in PCC at 8 µm above 0), in the gene order of ``mse``.

    Raises
    ------
    UserError
        A column is missing, genes are repeated or differ, or the runs have different test patients.
    """
    for name, table in (("MSE", mse), ("Poisson", poisson)):
        _check_columns(table, (*GENE_COLUMNS, "pcc_8um", "ssim_2um"), f"{name} per-gene table")
        _check_genes(table, f"{name} per-gene table")
    if set(mse["gene"]) != set(poisson["gene"]):
        odd = ", ".join(sorted(set(mse["gene"]) ^ set(poisson["gene"])))
        raise UserError(f"the two runs differ in genes ({odd}): score both with the same panel")
    right = poisson.set_index("gene").loc[mse["gene"]].reset_index()
    left = mse.reset_index(drop=True)
    for column in ("sparsity", "mean_count"):
        if not np.allclose(left[column], right[column], equal_nan=True):
            raise UserError(
                f"the two runs differ in column '{column}', so in test patient: "
                "compare runs of the same test patient"
            )
    metrics = [c for c in left if c in right and c not in (*GENE_COLUMNS, "auprc_base")]
    table = left[list(GENE_COLUMNS)].copy()
    for metric in metrics:
        table[f"{metric}_mse"] = left[metric]
        table[f"{metric}_poisson"] = right[metric]
    for metric in ("pcc_8um", "ssim_2um"):
        table[f"delta_{metric}"] = table[f"{metric}_poisson"] - table[f"{metric}_mse"]
    table["improved"] = table["delta_pcc_8um"] > 0
    return table


def category_table(table: pd.DataFrame, n_boot: int = 5000, seed: int = 0) -> pd.DataFrame:
    """Table S2: gains per gene category, most gain first, then a row ``overall``.

    Parameters
    ----------
    table
        Columns ``gene``, ``category``, ``sparsity`` (fraction), ``pcc_8um_mse``,
        ``pcc_8um_poisson``; table S1 has them. Rows with a missing value are left out.
    n_boot, seed
        Bootstrap draws over genes for the interval of the mean gain.

    Returns
    -------
    DataFrame
        ``category``, ``n_genes``, ``mean_sparsity``, ``mean_pcc_mse``, ``mean_pcc_poisson``,
        ``mean_delta``, ``ci_low``, ``ci_high`` (95 %), ``n_wins``, ``p_value`` (paired Wilcoxon,
        two-sided) and ``q_value`` (Benjamini-Hochberg over the categories; NaN for ``overall``).
    """
    table, _ = _checked(table)
    groups = _grouped(table, "category", n_boot, seed)
    groups = groups.sort_values("mean_delta", ascending=False, kind="stable")
    overall = _group_row(table, n_boot, seed) | {"category": "overall", "q_value": np.nan}
    return pd.concat([groups, pd.DataFrame([overall])[groups.columns]], ignore_index=True)


def quartile_table(table: pd.DataFrame, n_boot: int = 5000, seed: int = 0) -> pd.DataFrame:
    """Table S3: gains per quartile of sparsity, from ``Q1`` (least sparse genes) to ``Q4``.

    Arguments and columns as for ``category_table``, with ``quartile`` in place of ``category`` and
    no overall row. Ties in sparsity are split by table order, so quartiles differ by at most one
    gene in size.
    """
    table, _ = _checked(table)
    rank = table["sparsity"].rank(method="first")
    quartile = pd.qcut(rank, 4, labels=["Q1", "Q2", "Q3", "Q4"]).astype(str)
    return _grouped(table.assign(quartile=quartile), "quartile", n_boot, seed)


# --- sparsity and gain ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SparsityAssociation:
    """Spearman correlation over genes of sparsity with the gain in PCC at 8 µm, and its context.

    Attributes
    ----------
    rho, p_value, ci_low, ci_high
        Spearman's rho, its two-sided p-value from permuted genes (all orders up to 8 genes, 9,999
        random ones beyond) and its 95 % bootstrap interval over genes.
    partial_rho, partial_p_value
        The same correlation with (log) mean expression held fixed, by ranks; NaN without a column
        ``mean_count``, or where the ranks of sparsity and expression are the same.
    n_genes, n_dropped
        Genes used, and rows of the input left out for a missing value.
    n_wins, sign_p_value, mean_delta
        Genes with a gain above 0, two-sided exact sign test (ties left out), and the mean gain.
    by_category, by_quartile
        Tables S2 and S3.
    without_category
        One row per category: ``n_genes``, ``rho``, ``p_value``, ``ci_low``, ``ci_high`` over the
        genes of all other categories.
    by_metric
        One row per metric that the table has for both losses (``pcc_8um``, ``ssim_2um``, ``d2``):
        ``metric``, ``n_genes``, ``n_wins``, ``mean_delta``, ``rho``, ``p_value``, ``ci_low``,
        ``ci_high``. Genes without a value are left out of that row only.
    """

    rho: float
    p_value: float
    ci_low: float
    ci_high: float
    partial_rho: float
    partial_p_value: float
    n_genes: int
    n_dropped: int
    n_wins: int
    sign_p_value: float
    mean_delta: float
    by_category: pd.DataFrame
    by_quartile: pd.DataFrame
    without_category: pd.DataFrame
    by_metric: pd.DataFrame


def sparsity_association(
    table: pd.DataFrame | str | Path, n_boot: int = 5000, seed: int = 0
) -> SparsityAssociation:
    """Test whether sparser genes gain more from Poisson than from MSE.

    Parameters
    ----------
    table
        Table or CSV file with columns ``gene``, ``category``, ``sparsity`` (fraction of bins with
        count 0, from 0 to 1), ``pcc_8um_mse`` and ``pcc_8um_poisson``; ``mean_count`` (counts per
        bin), ``ssim_2um_mse`` and ``_poisson``, ``d2_mse`` and ``_poisson`` are used where present.
        Rows with a missing value in the first five are dropped and counted.
    n_boot, seed
        Bootstrap draws over genes for every interval, and the seed of draws and permutations.

    Raises
    ------
    UserError
        A column is missing or out of range, a gene is repeated, or fewer than 4 genes are left.
    """
    table, n_dropped = _checked(table)
    sparsity, delta = table["sparsity"].to_numpy(), _delta(table)
    without = []
    for category in table["category"].unique():
        rest = (table["category"] != category).to_numpy()
        without.append(
            {"category": category, "n_genes": int(rest.sum())}
            | _rho_row(sparsity[rest], delta[rest], n_boot, seed)
        )
    partial_rho, partial_p = np.nan, np.nan
    if "mean_count" in table:
        known = table["mean_count"].notna().to_numpy()
        partial_rho, partial_p = partial_spearman(
            sparsity[known], delta[known], table["mean_count"].to_numpy()[known]
        )
    return SparsityAssociation(
        **_rho_row(sparsity, delta, n_boot, seed),
        partial_rho=partial_rho,
        partial_p_value=partial_p,
        n_genes=len(table),
        n_dropped=n_dropped,
        n_wins=int((delta > 0).sum()),
        sign_p_value=sign_test(delta),
        mean_delta=float(delta.mean()),
        by_category=category_table(table, n_boot, seed),
        by_quartile=quartile_table(table, n_boot, seed),
        without_category=pd.DataFrame(without),
        by_metric=_by_metric(table, n_boot, seed),
    )


def spearman(x: np.ndarray, y: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Spearman's rho and its two-sided permutation p-value, the share of orders as extreme.

    Up to 8 pairs all orders are counted. Beyond, 9,999 random orders are, with the observed one
    among them, so the smallest p-value is 1e-4 and a seed gives the same one each time. Both are
    NaN with fewer than 4 pairs or a constant side.
    """
    n = len(x)
    if n < LEAST_GENES or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan, np.nan
    ranks_x, ranks_y = _standard_ranks(x), _standard_ranks(y)
    rho = float(ranks_x @ ranks_y)
    extreme = abs(rho) - 1e-12  # orders that tie with the observed one count
    if n <= _EXACT_UP_TO:
        orders = np.array(list(permutations(ranks_y)))
        return rho, float(np.mean(np.abs(orders @ ranks_x) >= extreme))
    orders = np.tile(ranks_y, (_PERMUTATIONS, 1))
    np.random.default_rng(seed).permuted(orders, axis=1, out=orders)
    n_extreme = int((np.abs(orders @ ranks_x) >= extreme).sum())
    return rho, (n_extreme + 1) / (_PERMUTATIONS + 1)


def spearman_p_value(rho: float, n: int) -> float:
    """Two-sided p-value of a Spearman correlation over ``n`` pairs, Student's t with n - 2.

    For a correlation of which only rho and n are known, as the published one.
    """
    return _t_p_value(rho, n - 2)


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """Spearman's rho of x and y with ``given`` held fixed, and its two-sided p-value.

    The correlation of what is left of the ranks of x and y after regression on the ranks of
    ``given``; taking the log of ``given`` changes no rank. Student's t with n - 3 degrees of
    freedom. NaN with fewer than 4 complete triples, a constant side, or ``given`` in the same (or
    the opposite) order as x or y.
    """
    n = len(x)
    if n < LEAST_GENES or min(np.ptp(x), np.ptp(y), np.ptp(given)) == 0:
        return np.nan, np.nan
    x, y, given = _standard_ranks(x), _standard_ranks(y), _standard_ranks(given)
    xy, xz, yz = x @ y, x @ given, y @ given
    left = (1 - xz**2) * (1 - yz**2)
    if left < 1e-12:
        return np.nan, np.nan
    rho = float((xy - xz * yz) / np.sqrt(left))
    return rho, _t_p_value(rho, n - 3)


def sign_test(delta: np.ndarray) -> float:
    """Two-sided exact sign test that gains and losses are equally likely; zeros are left out.

    NaN where nothing differs from zero.
    """
    wins, losses = int(np.sum(delta > 0)), int(np.sum(delta < 0))
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else np.nan


# --- sparsity, patients and seeds -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MixedModel:
    """Effect of sparsity on the gain, with genes, categories, patients and seeds accounted for.

    Attributes
    ----------
    coefficient, ci_low, ci_high, p_value
        Change of the gain per unit of sparsity (from 0 to 1), Wald 95 % interval and test; NaN
        where the model could not be fitted.
    converged
        Whether the optimiser reached an optimum with a proper interval.
    problem
        One sentence that says why there is no result; empty otherwise.
    variances
        Variance of each random effect and of the ``residual``.
    fixed
        ``patient`` and ``seed`` where they entered as fixed effects, having too few levels.
    n_genes, n_patients, n_seeds
        Levels in the complete rows.
    """

    coefficient: float = np.nan
    ci_low: float = np.nan
    ci_high: float = np.nan
    p_value: float = np.nan
    converged: bool = False
    problem: str = ""
    variances: dict[str, float] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    n_genes: int = 0
    n_patients: int = 0
    n_seeds: int = 0


def mixed_model(table: pd.DataFrame) -> MixedModel:
    """Regress the gain on sparsity over all patients and seeds, by restricted maximum likelihood.

    Random intercepts for categories and for the genes within them; patients and seeds are random
    too where there are at least 5 of them, and fixed where there are fewer, because a variance
    cannot be told from three values. Runs on one patient cannot be used: they leave the gene's own
    gain and its noise on that patient's section the same thing.

    Parameters
    ----------
    table
        One row per gene and pair of runs: ``gene``, ``category``, ``sparsity`` (fraction, of the
        test patient), ``patient``, ``seed``, ``delta`` (Poisson - MSE of one metric). Incomplete
        rows are left out.

    Raises
    ------
    UserError
        A column is missing.
    """
    columns = ("gene", "category", "sparsity", "patient", "seed", "delta")
    _check_columns(table, columns, "table of gains")
    table = table[list(columns)].dropna().reset_index(drop=True).assign(everything=1)
    levels = {f"n_{c}s": int(table[c].nunique()) for c in ("gene", "patient", "seed")}
    if levels["n_genes"] < LEAST_GENES:
        return MixedModel(problem=f"Fewer than {LEAST_GENES} genes have a gain.", **levels)
    if levels["n_patients"] < 2:
        return MixedModel(
            problem="All gains come from one patient: a second test patient is needed to tell "
            "a gene's gain from the noise of one section.",
            **levels,
        )
    fixed = tuple(c for c in ("patient", "seed") if 1 < levels[f"n_{c}s"] < _LEAST_LEVELS)
    random = ["gene"] + [c for c in ("patient", "seed") if levels[f"n_{c}s"] >= _LEAST_LEVELS]
    if table["category"].nunique() > 1:
        random.insert(0, "category")
    # Imported here: it takes seconds, and most notebooks fit no model.
    from statsmodels.regression.mixed_linear_model import MixedLM

    formula = " + ".join(["delta ~ sparsity", *(f"C({c})" for c in fixed)])
    # Patients cross all categories, so the effects are nested in one group that holds every row.
    # statsmodels lays its components out in alphabetical order.
    components = {c: f"0 + C({c})" for c in sorted(random)}
    model = MixedLM.from_formula(formula, table, groups="everything", vc_formula=components)
    if np.linalg.matrix_rank(model.exog) < model.exog.shape[1]:
        return MixedModel(
            problem="Sparsity is constant or follows from patient and seed (singular design).",
            fixed=fixed,
            **levels,
        )
    # A variance of zero is an ordinary answer, about which statsmodels warns; Powell's method
    # finds that boundary where the gradient methods stop short of it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fit = model.fit(method=["bfgs", "lbfgs", "powell"])
        except np.linalg.LinAlgError:
            return MixedModel(problem="The covariance is singular.", fixed=fixed, **levels)
        low, high = fit.conf_int().loc["sparsity"]
    if not np.isfinite([low, high]).all():
        return MixedModel(
            problem="The likelihood is singular at its optimum: no interval.", fixed=fixed, **levels
        )
    return MixedModel(
        coefficient=float(fit.params["sparsity"]),
        ci_low=float(low),
        ci_high=float(high),
        p_value=float(fit.pvalues["sparsity"]),
        converged=bool(fit.converged),
        problem="" if fit.converged else "The optimiser did not converge: take no number from it.",
        variances=dict(zip(components, map(float, fit.vcomp), strict=True))
        | {"residual": float(fit.scale)},
        fixed=fixed,
        **levels,
    )


# --- bootstrap over genes -------------------------------------------------------------------------


def draw_genes(n: int, n_boot: int, seed: int) -> np.ndarray:
    """Indices of ``n_boot`` samples of ``n`` genes with replacement, [n_boot, n]."""
    return np.random.default_rng(seed).integers(n, size=(n_boot, n))


def interval(draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval; draws in which the statistic is undefined are left out."""
    draws = draws[np.isfinite(draws)]
    if draws.size == 0:
        return np.nan, np.nan
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(values: np.ndarray, n_boot: int = 5000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over genes; NaN with fewer than two."""
    if len(values) < 2:
        return np.nan, np.nan  # one gene says nothing about the spread between genes
    return interval(values[draw_genes(len(values), n_boot, seed)].mean(axis=1))


def mean_interval(values: pd.Series | np.ndarray, n_resamples: int = 5000) -> tuple[float, float]:
    """95 % interval of a mean over genes: bootstrap percentiles, genes drawn with replacement.

    It speaks of other draws of genes, not of other patients or of another training of the arm.
    NaN with fewer than two values, which say nothing about the spread between genes.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return np.nan, np.nan
    low, high = stats.bootstrap(
        (values,), np.mean, n_resamples=n_resamples, method="percentile", rng=0
    ).confidence_interval
    return float(low), float(high)


# --- details --------------------------------------------------------------------------------------


def _delta(table: pd.DataFrame) -> np.ndarray:
    return (table["pcc_8um_poisson"] - table["pcc_8um_mse"]).to_numpy()


def _grouped(table: pd.DataFrame, by: str, n_boot: int, seed: int) -> pd.DataFrame:
    rows = [{by: name} | _group_row(group, n_boot, seed) for name, group in table.groupby(by)]
    return pd.DataFrame(rows).assign(q_value=lambda t: _benjamini_hochberg(t["p_value"]))


def _group_row(table: pd.DataFrame, n_boot: int, seed: int) -> dict[str, float]:
    delta = _delta(table)
    ci_low, ci_high = bootstrap_mean(delta, n_boot, seed)
    # A group in which nothing differs has no paired test.
    p_value = stats.wilcoxon(delta).pvalue if np.any(delta) else np.nan
    return {
        "n_genes": len(table),
        "mean_sparsity": table["sparsity"].mean(),
        "mean_pcc_mse": table["pcc_8um_mse"].mean(),
        "mean_pcc_poisson": table["pcc_8um_poisson"].mean(),
        "mean_delta": delta.mean(),
        "ci_low": ci_low,
        "ci_high": ci_high,
        "n_wins": int((delta > 0).sum()),
        "p_value": float(p_value),
    }


def _benjamini_hochberg(p_values: pd.Series) -> np.ndarray:
    q_values = np.full(len(p_values), np.nan)
    known = p_values.notna().to_numpy()
    if known.any():
        q_values[known] = stats.false_discovery_control(p_values[known], method="bh")
    return q_values


def _by_metric(table: pd.DataFrame, n_boot: int, seed: int) -> pd.DataFrame:
    rows = []
    for metric in _METRICS:
        if {f"{metric}_mse", f"{metric}_poisson"} <= set(table):
            delta = table[f"{metric}_poisson"] - table[f"{metric}_mse"]
            known = delta.notna()
            delta, sparsity = delta[known].to_numpy(), table["sparsity"][known].to_numpy()
            row = {"metric": metric, "n_genes": len(delta), "n_wins": int((delta > 0).sum())}
            row["mean_delta"] = float(delta.mean()) if len(delta) else np.nan
            rows.append(row | _rho_row(sparsity, delta, n_boot, seed))
    return pd.DataFrame(rows)


def _rho_row(x: np.ndarray, y: np.ndarray, n_boot: int, seed: int) -> dict[str, float]:
    rho, p_value = spearman(x, y, seed)
    low, high = np.nan, np.nan
    if np.isfinite(rho):
        low, high = interval(_bootstrap_spearman(x, y, n_boot, seed))
    return {"rho": rho, "p_value": p_value, "ci_low": low, "ci_high": high}


def _bootstrap_spearman(x: np.ndarray, y: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    draws = draw_genes(len(x), n_boot, seed)
    return _row_correlation(stats.rankdata(x[draws], axis=1), stats.rankdata(y[draws], axis=1))


def _standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with mean 0 and sum of squares 1, so that a product of two is Spearman's rho."""
    ranks = stats.rankdata(values)
    ranks -= ranks.mean()
    return ranks / np.linalg.norm(ranks)


def _t_p_value(rho: float, freedom: int) -> float:
    if abs(rho) >= 1:
        return 0.0
    if freedom < 1:
        return np.nan
    return float(2 * stats.t.sf(abs(rho) * np.sqrt(freedom / (1 - rho**2)), freedom))


def _row_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation along the last axis; NaN where a side is constant."""
    x = x - x.mean(axis=-1, keepdims=True)
    y = y - y.mean(axis=-1, keepdims=True)
    spread = np.sqrt((x * x).sum(axis=-1) * (y * y).sum(axis=-1))
    product = (x * y).sum(axis=-1)
    return np.divide(product, spread, out=np.full_like(product, np.nan), where=spread > 0)


def _checked(table: pd.DataFrame | str | Path) -> tuple[pd.DataFrame, int]:
    """Read and check a table; return its complete rows and the number of rows dropped."""
    name = "table"
    if not isinstance(table, pd.DataFrame):
        name = str(table)
        if not Path(table).is_file():
            raise UserError(f"{name} does not exist: give the path of a CSV file")
        try:
            table = pd.read_csv(table)
        except (OSError, ValueError, OverflowError) as error:  # pandas' own are ValueErrors
            reason = " ".join(str(error).split())
            raise UserError(
                f"{name} cannot be read as a table ({reason}): give a CSV file in UTF-8 with one "
                "line of column names"
            ) from None
    _check_columns(table, _REQUIRED, name)
    _check_genes(table, name)
    ranges = {"sparsity": (0, 1), "mean_count": (0, np.inf)} | {
        f"{metric}_{loss}": bounds
        for metric, bounds in _METRICS.items()
        for loss in ("mse", "poisson")
    }
    numbers = table[["gene", "category"]].copy()
    for column, (low, high) in ranges.items():
        if column in table:
            numbers[column] = _numeric(table[column], low, high, name)
    complete = numbers.dropna(subset=list(_REQUIRED)).reset_index(drop=True)
    if len(complete) < LEAST_GENES:
        raise UserError(
            f"{name}: {len(complete)} complete rows, but a correlation over column 'gene' needs "
            f"at least {LEAST_GENES} genes: add genes or fill missing values"
        )
    return complete, len(numbers) - len(complete)


def _numeric(column: pd.Series, low: float, high: float, name: str) -> pd.Series:
    try:
        if column.dtype.kind in "bcmM":
            raise TypeError(f"values of type {column.dtype}")
        values = pd.to_numeric(column).astype(float)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"{name}: column '{column.name}' holds text ({error}): put numbers there, "
            "or leave unknown values empty"
        ) from None
    wrong = values[(values < low) | (values > high) | np.isinf(values)]
    if len(wrong):
        hint = "divide percentages by 100" if wrong.iloc[0] > 1 else "correct it"
        raise UserError(
            f"{name}: column '{column.name}' must lie between {low:g} and {high:g}, "
            f"but holds {wrong.iloc[0]:g}: {hint}"
        )
    return values


def _check_columns(table: pd.DataFrame, columns: tuple[str, ...], name: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(
            f"{name}: column '{missing[0]}' is missing: add it or rename the column that holds it "
            f"(found {', '.join(map(str, table.columns))})"
        )


def _check_genes(table: pd.DataFrame, name: str) -> None:
    repeated = table["gene"][table["gene"].duplicated()].dropna().unique()
    if len(repeated):
        raise UserError(
            f"{name}: column 'gene' repeats {', '.join(map(str, repeated[:5]))}: "
            "keep one row per gene"
        )
