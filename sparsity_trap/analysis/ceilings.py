"""Ceilings of a preset's test patient: the best PCC with counts that any prediction can have."""

from __future__ import annotations

import pandas as pd

from sparsity_trap import runs
from sparsity_trap.evaluation.ceilings import poisson_ceiling, split_ceiling
from sparsity_trap.settings import Preset

__all__ = ["best_pcc", "poisson_ceiling", "split_ceiling"]


def best_pcc(preset: Preset, patient: str) -> pd.DataFrame:
    """Best attainable PCC per gene: exact where the true rate is known, else by splitting.

    Computed once and kept as ``tables/ceilings.parquet``.

    Returns
    -------
    DataFrame with ``gene``, ``ceiling_2um`` and ``ceiling_8um``.
    """

    def computed() -> pd.DataFrame:
        store = runs.store(preset, patient)
        mask, columns = store.mask[:], {}
        for name, factor in (("ceiling_2um", 1), ("ceiling_8um", 4)):
            if store.truth is not None:
                columns[name] = poisson_ceiling(store.truth, mask, factor)
            else:
                columns[name] = split_ceiling(store.counts, mask, factor)
        return pd.DataFrame({"gene": list(store.genes), **columns})

    return runs.kept_table(preset, "ceilings", patient, computed)
