"""Tables S1 to S3 and the association of sparsity with the gain of Poisson over MSE.

The unit of every statistic here is the gene. The gain ("delta") is Poisson minus MSE, by default
of the per-gene PCC at 8 µm; a gene is won when its gain is positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from sparsity_trap.config import UserError

#: Columns that describe the gene in the test section, the same whichever arm predicted it.
GENE_COLUMNS = ("gene", "category", "sparsity", "mean_count")

_REQUIRED = ("gene", "category", "sparsity", "pcc_8um_mse", "pcc_8um_poisson")
_LEAST_GENES = 4
_EXACT_UP_TO = 8  # genes; all 8! = 40,320 orders are still quick to list


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
    metrics = [c for c in left if c in right and c not in GENE_COLUMNS]
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

    ``ci_low`` and ``ci_high`` bound ``rho`` at 95 %. ``by_category`` and ``by_quartile`` are tables
    S2 and S3. ``without_category`` has one row per category with ``rho`` and ``p_value`` over the
    genes of all others. ``n_dropped`` rows of the input had a missing value.
    """

    rho: float
    p_value: float
    ci_low: float
    ci_high: float
    n_genes: int
    n_dropped: int
    n_wins: int
    mean_delta: float
    by_category: pd.DataFrame
    by_quartile: pd.DataFrame
    without_category: pd.DataFrame


def sparsity_association(
    table: pd.DataFrame | str | Path, n_boot: int = 5000, seed: int = 0
) -> SparsityAssociation:
    """Test whether sparser genes gain more from Poisson than from MSE.

    Parameters
    ----------
    table
        Table or CSV file with columns ``gene``, ``category``, ``sparsity`` (fraction of bins with
        count 0, from 0 to 1), ``pcc_8um_mse`` and ``pcc_8um_poisson``. Rows with a missing value
        are dropped and counted.
    n_boot, seed
        Bootstrap draws over genes for every interval.

    Raises
    ------
    UserError
        A column is missing or out of range, a gene is repeated, or fewer than 4 genes are left.
    """
    table, n_dropped = _checked(table)
    sparsity, delta = table["sparsity"].to_numpy(), _delta(table)
    rho, p_value = spearman(sparsity, delta)
    ci_low, ci_high = _interval(_bootstrap_spearman(sparsity, delta, n_boot, seed))
    without = []
    for category in table["category"].unique():
        rest = (table["category"] != category).to_numpy()
        rest_rho, rest_p = spearman(sparsity[rest], delta[rest])
        without.append((category, int(rest.sum()), rest_rho, rest_p))
    return SparsityAssociation(
        rho=rho,
        p_value=p_value,
        ci_low=ci_low,
        ci_high=ci_high,
        n_genes=len(table),
        n_dropped=n_dropped,
        n_wins=int((delta > 0).sum()),
        mean_delta=float(delta.mean()),
        by_category=category_table(table, n_boot, seed),
        by_quartile=quartile_table(table, n_boot, seed),
        without_category=pd.DataFrame(without, columns=["category", "n_genes", "rho", "p_value"]),
    )


def spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Spearman's rho and its two-sided p-value.

    The p-value is exact, from all orders, up to 8 pairs and ``spearman_p_value`` beyond. Both are
    NaN with fewer than 4 pairs or a constant side.
    """
    n = len(x)
    if n < _LEAST_GENES or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan, np.nan
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y)
    rho = float(_row_correlation(ranks_x[None], ranks_y[None])[0])
    if n > _EXACT_UP_TO:
        return rho, spearman_p_value(rho, n)
    exact = stats.permutation_test(
        (ranks_x,),
        lambda order, axis: _row_correlation(order, np.broadcast_to(ranks_y, order.shape)),
        permutation_type="pairings",
        n_resamples=np.inf,
        vectorized=True,
        axis=-1,
    )
    return rho, float(exact.pvalue)


def spearman_p_value(rho: float, n: int) -> float:
    """Two-sided p-value of a Spearman correlation over ``n`` pairs, Student's t with n - 2."""
    if abs(rho) >= 1:
        return 0.0
    t = rho * np.sqrt((n - 2) / (1 - rho**2))
    return float(2 * stats.t.sf(abs(t), n - 2))


# --- details --------------------------------------------------------------------------------------


def _delta(table: pd.DataFrame) -> np.ndarray:
    return (table["pcc_8um_poisson"] - table["pcc_8um_mse"]).to_numpy()


def _grouped(table: pd.DataFrame, by: str, n_boot: int, seed: int) -> pd.DataFrame:
    rows = [{by: name} | _group_row(group, n_boot, seed) for name, group in table.groupby(by)]
    return pd.DataFrame(rows).assign(q_value=lambda t: _benjamini_hochberg(t["p_value"]))


def _group_row(table: pd.DataFrame, n_boot: int, seed: int) -> dict[str, float]:
    delta = _delta(table)
    ci_low, ci_high = _bootstrap_mean(delta, n_boot, seed)
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
        q_values[known] = multipletests(p_values[known], method="fdr_bh")[1]
    return q_values


def _bootstrap_mean(values: np.ndarray, n_boot: int, seed: int) -> tuple[float, float]:
    if len(values) < 2:
        return np.nan, np.nan  # one gene says nothing about the spread between genes
    return _interval(values[_draws(len(values), n_boot, seed)].mean(axis=1))


def _bootstrap_spearman(x: np.ndarray, y: np.ndarray, n_boot: int, seed: int) -> np.ndarray:
    draws = _draws(len(x), n_boot, seed)
    return _row_correlation(stats.rankdata(x[draws], axis=1), stats.rankdata(y[draws], axis=1))


def _draws(n: int, n_boot: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(n, size=(n_boot, n))


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval; draws in which the statistic is undefined are left out."""
    draws = draws[np.isfinite(draws)]
    if draws.size == 0:
        return np.nan, np.nan
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


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
        table = pd.read_csv(table)
    _check_columns(table, _REQUIRED, name)
    _check_genes(table, name)
    numbers = table[list(_REQUIRED)].copy()
    for column, low in (("sparsity", 0), ("pcc_8um_mse", -1), ("pcc_8um_poisson", -1)):
        try:
            values = pd.to_numeric(table[column]).astype(float)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{name}: column '{column}' holds text ({error}): put numbers there, "
                "or leave unknown values empty"
            ) from None
        wrong = values[(values < low) | (values > 1)]
        if len(wrong):
            hint = "divide percentages by 100" if wrong.iloc[0] > 1 else "correct it"
            raise UserError(
                f"{name}: column '{column}' must lie between {low} and 1, "
                f"but holds {wrong.iloc[0]:g}: {hint}"
            )
        numbers[column] = values
    complete = numbers.dropna().reset_index(drop=True)
    if len(complete) < _LEAST_GENES:
        raise UserError(
            f"{name}: {len(complete)} complete rows, but a correlation over column 'gene' needs "
            f"at least {_LEAST_GENES} genes: add genes or fill missing values"
        )
    return complete, len(numbers) - len(complete)


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
