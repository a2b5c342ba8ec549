"""Predictions that need no training, and what they score.

A control is an iterator over the patches of a store, in store order: one array of rates
[G, 128, 128] a patch, so that memory does not grow with the section. ``predictions`` are a run's
rates [N, G, 128, 128], as zarr or in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import reduce

import numpy as np
import pandas as pd

from sparsity_trap import runs
from sparsity_trap.bins import BIN_UM, BINS_PER_TOKEN, Maps, bin_mask, bin_sum
from sparsity_trap.data.patches import PatchStore
from sparsity_trap.evaluation import nulls
from sparsity_trap.metrics import Moments
from sparsity_trap.runs import Result
from sparsity_trap.scores import GeneScores
from sparsity_trap.settings import Preset, UserError
from sparsity_trap.training import training_mean as mean_in_training

#: What softplus makes of an output of 0, counts per bin: the published MSE arm's initial value,
#: which stays where no loss is taken.
UNSUPERVISED_RATE = float(np.log(2))


# --- controls -------------------------------------------------------------------------------------


def zeros(store: PatchStore) -> Iterator[np.ndarray]:
    """No count anywhere."""
    n, *shape = store.counts.shape
    return (np.zeros(shape, np.float32) for _ in range(n))


def training_mean(store: PatchStore, train_mean: np.ndarray) -> Iterator[np.ndarray]:
    """Each gene's mean count per bin in the training sections [G], everywhere."""
    n, *shape = store.counts.shape
    flat = np.asarray(train_mean, np.float32)[:, None, None]
    return (np.broadcast_to(flat, shape) for _ in range(n))


def patch_mean(store: PatchStore) -> Iterator[np.ndarray]:
    """Each gene's mean count over the tissue of the patch itself; see `nulls.patch_mean`."""
    for i in range(store.counts.shape[0]):
        yield nulls.patch_mean(np.asarray(store.counts[i]), np.asarray(store.mask[i]))


def shuffled(predictions: Maps, seed: int) -> Iterator[np.ndarray]:
    """The model's prediction of another patch of the section, drawn so that none keeps its own.

    Raises
    ------
    UserError
        There is only one patch.
    """
    n = predictions.shape[0]
    if n < 2:
        raise UserError("one patch cannot be shuffled: score a section of at least two")
    order = np.random.default_rng(seed).permutation(n)
    source = np.empty(n, int)
    source[order] = np.roll(order, 1)  # one cycle through all patches
    return (_rates(predictions, i) for i in source)


def next_tile(predictions: Maps) -> Iterator[np.ndarray]:
    """The model's prediction of the next patch of the store, mostly the neighbour to the right.

    Neighbours share tissue, so this keeps more of the section's large structure than a shuffle.
    """
    n = predictions.shape[0]
    return (_rates(predictions, (i + 1) % n) for i in range(n))


def blurred(predictions: Maps, sigma: float) -> Iterator[np.ndarray]:
    """The model's prediction under a Gaussian of ``sigma`` 2 µm bins, patch by patch."""
    for i in range(predictions.shape[0]):
        yield nulls.blurred(_rates(predictions, i), None, sigma)


def shifted(predictions: Maps, bins: int) -> Iterator[np.ndarray]:
    """The model's prediction moved right by some 2 µm bins; the first column fills the gap."""
    for i in range(predictions.shape[0]):
        yield nulls.shifted(_rates(predictions, i), bins)


def scaled(predictions: Maps, factor: float) -> Iterator[np.ndarray]:
    """The model's prediction times a factor."""
    return (_rates(predictions, i) * np.float32(factor) for i in range(predictions.shape[0]))


def offset(
    predictions: Maps, by: np.ndarray | float, outside: Maps | None = None
) -> Iterator[np.ndarray]:
    """The model's prediction plus a constant for each gene [G], or for all.

    With masks [N, H, W] in ``outside``, only in the bins off tissue.
    """
    by = np.broadcast_to(np.asarray(by, np.float32), predictions.shape[1])[:, None, None]
    for i in range(predictions.shape[0]):
        where = True if outside is None else ~np.asarray(outside[i])
        yield _rates(predictions, i) + by * where


def oracle(store: PatchStore) -> Iterator[np.ndarray]:
    """The rate from which a simulated section's counts were drawn.

    Raises
    ------
    UserError
        The section is real.
    """
    if store.truth is None:
        raise UserError("the true rate of a real section is not known: use a simulated one")
    truth = store.truth
    return (_rates(truth, i) for i in range(truth.shape[0]))


def oracle_of_tokens(store: PatchStore, bins: int = BINS_PER_TOKEN) -> Iterator[np.ndarray]:
    """The true rate, averaged over encoder tokens of 16 µm: the best without detail in them."""
    for rate in oracle(store):
        mean = bin_sum(rate, bins) / bins**2
        yield mean.repeat(bins, 1).repeat(bins, 2)


def _rates(maps: Maps, i: int) -> np.ndarray:
    return np.asarray(maps[i], dtype=np.float32)


# --- scores ---------------------------------------------------------------------------------------


def score(
    store: PatchStore,
    rates: Iterable[np.ndarray],
    train_mean: np.ndarray | None = None,
    name: str = "prediction",
) -> pd.DataFrame:
    """Scores of a control against the counts of a store: ``gene`` and the columns of `GeneScores`.

    Parameters
    ----------
    store
        The test section.
    rates
        The control.
    train_mean
        [G] mean count per bin of each gene in the training sections.
    name
        Whose predictions these are, for errors.
    """
    scores = GeneScores(store.genes, train_mean=train_mean, name=name)
    for i, rate in enumerate(rates):
        part = slice(i, i + 1)
        truth = None if store.truth is None else np.asarray(store.truth[part], np.float32)
        scores.update(store.counts[part], rate[None], store.mask[part], truth)
    return pd.DataFrame({"gene": list(store.genes), **scores.compute()})


def all_controls(
    store: PatchStore, predictions: Maps, train_mean: np.ndarray
) -> dict[str, Iterator[np.ndarray]]:
    """The controls by name, those of a model made from its predictions.

    Shuffles are missing for a section of one patch, oracles for a real section.

    Parameters
    ----------
    store
        The test section.
    predictions
        The model's rates.
    train_mean
        [G] mean count per bin of each gene in the training sections; also the offset.
    """
    named = {
        "zeros": zeros(store),
        "training mean": training_mean(store, train_mean),
        "patch mean": patch_mean(store),
        **{f"blurred {BIN_UM * bins:g} µm": blurred(predictions, bins) for bins in (4, 16)},
        **{f"shifted {BIN_UM * bins:g} µm": shifted(predictions, bins) for bins in (4, 16)},
        "scaled by 2": scaled(predictions, 2),
        "offset": offset(predictions, train_mean),
        "offset off tissue": offset(predictions, UNSUPERVISED_RATE, store.mask),
    }
    if predictions.shape[0] > 1:
        named |= {"shuffled": shuffled(predictions, seed=0), "next tile": next_tile(predictions)}
    if store.truth is not None:
        named |= {"oracle": oracle(store), "oracle at 16 µm": oracle_of_tokens(store)}
    return named


def control_scores(preset: Preset, result: Result) -> pd.DataFrame:
    """Scores of `all_controls` of a run on its test patient, one row per control and gene.

    Computed once and kept as ``tables/controls.parquet``; see `runs.kept_table`.

    Returns
    -------
    DataFrame with ``control``, ``gene`` and the columns of `GeneScores`.
    """

    def scored() -> pd.DataFrame:
        store = runs.store(preset, result.run.test_patient)
        train_mean = mean_in_training(preset, result.run)
        return pd.concat(
            score(store, rates, train_mean, f"{result.run.name}, {name}").assign(control=name)
            for name, rates in all_controls(store, result.predictions, train_mean).items()
        )

    return runs.kept_table(preset, "controls", result.run, scored)


def averaged(preset: Preset, result: Result, width_um: int = 8) -> pd.Series:
    """PCC at 2 µm of a run's own maps, averaged over wider bins of tissue, by gene.

    What a run scores above it, it owes to detail within such bins.
    """
    store, factor = runs.store(preset, result.run.test_patient), round(width_um / BIN_UM)
    sums = []
    for i in range(result.predictions.shape[0]):
        mask, rates = np.asarray(store.mask[i]), _rates(result.predictions, i)
        tissue = bin_sum(mask.astype(np.float32), factor)
        mean = bin_sum(np.where(mask, rates, 0), factor) / tissue.clip(min=1)
        coarse = mean.repeat(factor, 1).repeat(factor, 2)
        sums.append(Moments.of(np.asarray(store.counts[i]), coarse, mask))
    return pd.Series(reduce(Moments.__add__, sums).pcc(), list(store.genes))


def shuffle_null(preset: Preset, result: Result, shuffles: int = 50) -> np.ndarray:
    """Mean PCC at 8 µm over genes of `shuffled` predictions, for each of some shuffles."""
    store = runs.store(preset, result.run.test_patient)
    counts, masks = np.asarray(store.counts[:]), np.asarray(store.mask[:])
    means = []
    for seed in range(shuffles):
        moments = (
            Moments.of(truth, rates, mask, 4)
            for truth, rates, mask in zip(
                counts, shuffled(result.predictions, seed), masks, strict=True
            )
        )
        means.append(np.nanmean(reduce(Moments.__add__, moments).pcc()))
    return np.array(means)


def morans_table(store: PatchStore, predictions: Maps) -> pd.DataFrame:
    """Moran's I at 8 µm of counts and prediction; see `morans_i`.

    Holds the 8 µm maps of the section in memory, about 0.5 GB for 570 patches of 50 genes.

    Returns
    -------
    DataFrame with ``gene``, ``moran_truth`` and ``moran_prediction``.
    """
    mask = bin_mask(np.asarray(store.mask[:]), 4)
    columns = {}
    for column, maps in (("moran_truth", store.counts), ("moran_prediction", predictions)):
        maps8 = [_inside8(maps, store.mask, i) for i in range(maps.shape[0])]
        columns[column] = morans_i(np.stack(maps8), mask, store.origin[:])
    return pd.DataFrame({"gene": list(store.genes), **columns})


def morans_i(maps: Maps, mask: Maps, origin: Maps) -> np.ndarray:
    """Moran's I of maps of 8 µm bins over their four neighbours, by squidpy.

    Patches are put back on the section's grid, so neighbours may lie in the next patch. Weights of
    a bin sum to 1, as squidpy normalises them.

    Parameters
    ----------
    maps
        8 µm maps [N, G, H, W], all in memory.
    mask
        bool [N, H, W]; ``bins.bin_mask`` of the tissue.
    origin
        [N, 2], row and column of each patch's first 2 µm bin; see ``PatchStore``.

    Returns
    -------
    float64 [G], exact to single precision; NaN where a map is constant or no two bins are
    neighbours.
    """
    import squidpy
    from anndata import AnnData

    logging.getLogger("spatialdata._logging").setLevel(logging.WARNING)  # squidpy's too
    maps, mask = np.asarray(maps), np.asarray(mask)
    patch, row, col = mask.nonzero()
    values = maps[patch, :, row, col].astype(np.float64)
    result = np.full(maps.shape[1], np.nan)
    varies = np.flatnonzero((values != values[:1]).any(0))
    if len(varies) == 0:
        return result
    data = AnnData(values[:, varies])
    data.var_names = [str(g) for g in varies]
    data.obsm["spatial"] = np.asarray(origin)[patch] // 4 + np.stack((row, col), axis=1)
    squidpy.gr.spatial_neighbors_radius(data, radius=1.0)
    if data.obsp["spatial_connectivities"].nnz:
        squidpy.gr.spatial_autocorr(data, mode="moran", show_progress_bar=False)
        table = data.uns["moranI"]["I"]
        result[[int(g) for g in table.index]] = table
    return result


def _inside8(maps: Maps, mask: Maps, i: int) -> np.ndarray:
    return bin_sum(np.where(mask[i], _rates(maps, i), 0), 4)
