"""Tables as the book shows them: headings in words, numbers rounded, columns that sort."""

from __future__ import annotations

from numbers import Real

import numpy as np
import pandas as pd
from IPython.display import HTML

from sparsity_trap.show.page import asset

#: Column of a table -> its heading.
TITLES = {
    "n_genes": "genes",
    "n_wins": "genes gained",
    "mean_sparsity": "sparsity",
    "mean_pcc_mse": "PCC, MSE",
    "mean_pcc_poisson": "PCC, Poisson",
    "mean_delta": "mean gain",
    "mean_count": "mean count",
    "delta": "gain",
    "delta_pcc_8um": "gain in PCC 8 µm",
    "delta_ssim_2um": "gain in SSIM 2 µm",
    "ci_low": "95 % from",
    "ci_high": "to",
    "contribution_low": "contribution from",
    "contribution_high": "contribution to",
    "p_value": "p",
    "q_value": "q",
    "rho": "ρ",
    "keep": "counts kept",
    "bin_um": "bin, µm",
    "pcc_2um": "PCC 2 µm",
    "pcc_4um": "PCC 4 µm",
    "pcc_8um": "PCC 8 µm",
    "pcc_16um": "PCC 16 µm",
    "pcc_2um_unmasked": "PCC 2 µm unmasked",
    "pcc_8um_unmasked": "PCC 8 µm unmasked",
    "pcc_2um_rate": "PCC 2 µm, rate",
    "pcc_8um_rate": "PCC 8 µm, rate",
    "pooled_pcc_2um": "pooled PCC 2 µm",
    "pcc_8um_mse": "PCC 8 µm, MSE",
    "pcc_8um_poisson": "PCC 8 µm, Poisson",
    "ssim_2um": "SSIM 2 µm",
    "ssim_8um": "SSIM 8 µm",
    "ssim_2um_mse": "SSIM 2 µm, MSE",
    "ssim_2um_poisson": "SSIM 2 µm, Poisson",
    "d2": "D²",
    "auprc": "AUPRC",
    "mse": "MSE",
    "mse-log1p": "MSE on log1p",
    "poisson": "Poisson",
    "undefined_pcc_8um": "genes undefined",
    "spearman_8um": "Spearman 8 µm",
    "deviance": "Poisson deviance",
    "moran_truth": "Moran's I, counts",
    "moran_prediction_D": "arm D",
    "moran_prediction_E": "arm E",
    "zeros": "all-zeros",
    "invariant_to_offset": "invariant to an offset",
    "invariant_to_scale": "invariant to scale",
    "ignores_off_tissue": "ignores bins off tissue",
    "can_carry_a_claim": "can carry a claim",
    "trained_at": "trained at",
    "test_patient": "test",
    "title": "loss, link, bias",
    "seconds": "s",
}


def show(
    table: pd.DataFrame,
    digits: int = 3,
    *,
    index: bool = False,
    missing: str = "–",
    sortable: bool = False,
) -> HTML:
    """Display a table.

    Parameters
    ----------
    table
        Columns of text, numbers or both. Headings and values found in `TITLES` are put in words.
    digits
        Decimals of numbers that are not whole; p- and q-values have two significant digits.
    index
        Show the row labels.
    missing
        In place of undefined values.
    sortable
        Sort by the column whose heading is pressed.
    """
    shown = table.copy().astype(object)
    for i, column in enumerate(table.columns):
        spec = ".2g" if column in ("p", "q", "p_value", "q_value") else f".{digits}f"
        shown.isetitem(i, [_text(value, spec, missing) for value in table.iloc[:, i]])
    shown = shown.rename(columns=TITLES, index=TITLES)
    classes = "dataframe sortable" if sortable else "dataframe"
    html = shown.to_html(index=index, classes=classes, border=0)
    if sortable:
        html = (
            f"<style>{asset('sortable.css')}</style>{html}<script>{asset('sortable.js')}</script>"
        )
    return HTML(html)


def _text(value: object, spec: str, missing: str) -> str:
    if pd.isna(value):
        return missing
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, Real) and not float(value).is_integer():
        return format(value, spec).replace("-", "\N{MINUS SIGN}")
    if isinstance(value, Real):
        return f"{value:.0f}".replace("-", "\N{MINUS SIGN}")
    return TITLES.get(str(value), str(value))
