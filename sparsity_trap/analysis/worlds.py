"""Other simulated worlds: what sets their counts apart from those of the preset's own sections."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import reduce

import numpy as np
import pandas as pd

from sparsity_trap import metrics, runs
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.metrics import Moments, PoissonSums
from sparsity_trap.settings import Preset, UserError


def facts(store: PatchStore, home: PatchStore) -> pd.DataFrame:
    """What counts of 2 µm bins in tissue are like, per gene.

    Parameters
    ----------
    store
        A patient in one world.
    home
        The same patient in the preset's own.

    Returns
    -------
    DataFrame
        ``gene``; ``mean_count`` and ``sparsity`` per bin; ``fano``, variance over mean of the
        counts, and ``fano_around_rate``, that of their deviations from the true rate, 1 for Poisson
        counts; ``agreement``, correlation of the true rate with that at home.

    Raises
    ------
    UserError
        A section is a real one.
    """
    rates, plain = store.truth, home.truth
    if rates is None or plain is None:
        real = store if rates is None else home
        raise UserError(f"{real.path} has no true rates: take a simulated section")
    # Counts against true rates, patch by patch: a section need not fit into memory.
    places = range(len(store))
    both = reduce(
        operator.add, (Moments.of(store.counts[i], rates[i], store.mask[i]) for i in places)
    )
    zeros = reduce(
        operator.add, (PoissonSums.of(store.counts[i], rates[i], store.mask[i]) for i in places)
    )
    mean = np.where(both.mean_x > 0, both.mean_x, np.nan)
    return pd.DataFrame(
        {
            "gene": store.genes,
            "mean_count": both.mean_x,
            "sparsity": zeros.sparsity(),
            "fano": both.xx / both.n / mean,
            "fano_around_rate": both.mse() / mean,
            "agreement": metrics.pcc(plain, rates, store.mask),
        }
    )


def every_run(worlds: Mapping[str, Preset]) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Scores of the runs of several worlds in one table, so that each sees how runs vary in all.

    Parameters
    ----------
    worlds
        Name of a world -> its preset.

    Returns
    -------
    As `runs.long_table`, arms and runs called "arm in world"; and of each run the sums of its
    patches (`runs.Result.patches`).
    """
    tables: list[pd.DataFrame] = []
    patches: dict[str, np.ndarray] = {}
    for name, world in worlds.items():
        results = runs.load_all(world)
        table = runs.long_table(world, results)
        tables.append(table.assign(**{c: table[c] + f" in {name}" for c in ("arm", "run")}))
        patches |= {f"{result.run.name} in {name}": result.patches for result in results}
    return pd.concat(tables, ignore_index=True), patches
