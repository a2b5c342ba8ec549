"""Sums over cells and their scores, on cells that are made up, against pandas and scipy."""

from __future__ import annotations

import doctest
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy import stats

from sparsity_trap import cells as cells_module
from sparsity_trap.bin_table import Layout
from sparsity_trap.cells import ALL_CELLS, cell_table, score_cells, score_genes, sum_bins
from sparsity_trap.data.cells import Cells
from sparsity_trap.data.geometry import Orientation
from sparsity_trap.settings import UserError

PANEL = pd.DataFrame({"gene": ["ACTB", "KRT8", "DES"], "category": ["a", "b", "a"]})
TURNED = Orientation(transpose=True, flip_rows=False, flip_cols=True)


@pytest.fixture
def evidence():
    """Two patches of a turned section, cells of 5 x 5 bins, and rates and counts of the array."""
    rng = np.random.default_rng(0)
    shape = (262, 130)  # of the array
    rows, cols = np.indices(shape)
    of_bin = (rows // 5 * 26 + cols // 5).astype(np.int32)
    names = tuple(f"c{i}" for i in range(of_bin.max() + 1))
    of_bin[rng.random(shape) < 0.2] = -1
    rate = rng.gamma(0.5, 0.4, (3, *shape)).astype(np.float32)
    counts, tissue = rng.poisson(rate), rng.random(shape) < 0.7
    oriented = [TURNED.apply(part) for part in (rate, counts, tissue)]
    origin = np.array([[0, 0], [0, 128]])
    windows = [(slice(r, r + 128), slice(c, c + 128)) for r, c in origin]
    patches = [np.stack([part[..., r, c] for r, c in windows]) for part in oriented]
    layout = Layout(
        name="P5", microns_per_pixel=0.5, orientation=TURNED, shape=oriented[2].shape,
        origin=origin, mask=patches[2], pixels=lambda r, c, _: np.stack([4.0 * c, 4.0 * r], 1),
        images={}, scales={"tissue_hires_scalef": 0.1}, counts=patches[1],
        count_genes=["ACTB", "KRT8", "DES"],
    )  # fmt: skip
    whole = np.zeros(shape, bool)  # in tissue and in a patch
    inside = TURNED.apply(whole)
    for r, c in windows:
        inside[r, c] = oriented[2][r, c]
    nowhere = np.full((len(names), 2), np.nan)
    return layout, patches[0], Cells(names, of_bin, nowhere), (rate, counts, whole)


def table_of(evidence, cells=None, **options) -> AnnData:
    layout, rates, own, _ = evidence
    return cell_table(layout, enumerate(rates), PANEL, cells or own, **options)


def test_sums_are_those_of_a_plain_groupby(evidence):
    *_, cells, (rate, counts, whole) = evidence
    held, own = whole & (cells.of_bin >= 0), cells.of_bin >= 0
    bins = pd.Series(cells.of_bin[held]).value_counts()
    kept = np.sort(bins.index[bins > pd.Series(cells.of_bin[own]).value_counts()[bins.index] / 2])
    table = table_of(evidence)
    assert table.obs_names.tolist() == [f"c{i}" for i in kept] and len(kept) > 500
    assert table.obs["bins"].tolist() == bins[kept].tolist() and table.obs["share"].min() > 0.5
    for values, summed in ((rate, table.X), (counts, table.layers["counts"].toarray())):
        sums = pd.DataFrame(values[:, held].T.astype(float)).groupby(cells.of_bin[held]).sum()
        np.testing.assert_allclose(summed, sums.loc[kept], rtol=1e-5)
    assert table.X.dtype == np.float32 and table.layers["counts"].dtype == np.int32
    # The centre is that of all bins of the cell, in tissue or not.
    places = pd.DataFrame(np.argwhere(own) * 4.0).groupby(cells.of_bin[own]).mean().loc[kept]
    np.testing.assert_allclose(table.obsm["spatial"], places[[1, 0]])
    scales = table.uns["spatial"]["P5"]["scalefactors"]
    area = np.median(table.obs["bins"]) * 4  # µm²
    assert np.pi / 4 * (scales["spot_diameter_fullres"] * 0.5) ** 2 == pytest.approx(area)
    few = table_of(evidence, genes=["DES", "ACTB"])
    assert np.array_equal(few.X, table[:, ["DES", "ACTB"]].X) and list(few.var["category"]) == [
        "a", "a",
    ]  # fmt: skip


def test_the_patches_order_changes_nothing(evidence):
    layout, rates, cells, _ = evidence
    back = cell_table(layout, reversed(list(enumerate(rates))), PANEL, cells)
    np.testing.assert_allclose(back.X, table_of(evidence).X, rtol=1e-6)
    assert (back.layers["counts"] != table_of(evidence).layers["counts"]).nnz == 0


def test_polygons_give_the_centre_where_there_are_any(evidence):
    cells = evidence[2]
    plain = table_of(evidence)
    drawn = np.full((len(cells.names), 2), np.nan)
    number = [cells.names.index(name) for name in plain.obs_names]
    drawn[number[::2]] = plain.obsm["spatial"][::2] + [3, -2]
    table = table_of(evidence, replace(cells, centre=drawn))
    np.testing.assert_allclose(table.obsm["spatial"][::2], plain.obsm["spatial"][::2] + [3, -2])
    np.testing.assert_allclose(table.obsm["spatial"][1::2], plain.obsm["spatial"][1::2])
    with pytest.raises(UserError, match="cells lie 52 µm beside their bins"):
        table_of(evidence, replace(cells, centre=drawn + [100, 0]))


def test_what_does_not_fit_is_refused(evidence, monkeypatch):
    cells = evidence[2]
    with pytest.raises(UserError, match=r"array of \(130, 262\) bins, section P5 on .*262, 130"):
        table_of(evidence, replace(cells, of_bin=cells.of_bin.T))
    beyond = np.full_like(cells.of_bin, -1)
    beyond[:6] = 0  # the array is turned: these bins come last, behind the patches
    with pytest.raises(UserError, match="none of the 1378 cells lies in the patches of section P5"):
        table_of(evidence, replace(cells, of_bin=beyond))
    with pytest.raises(UserError, match="does not predict gene TP53"):
        table_of(evidence, genes=["TP53"])
    monkeypatch.setattr(cells_module, "MAX_VALUES", 1500)
    with pytest.raises(UserError, match="pass at most 1 in genes="):
        table_of(evidence)


def bin_table_of(evidence) -> AnnData:
    """A row per bin in tissue and in a patch, in an order of its own; counts sparse."""
    *_, (rate, counts, whole) = evidence
    rows, cols = np.random.default_rng(2).permutation(np.argwhere(whole)).T
    obs = pd.DataFrame({"array_row": rows, "array_col": cols}, [f"b{i}" for i in range(len(rows))])
    table = AnnData(rate[:, rows, cols].T.copy(), obs, PANEL.set_index("gene"))
    table.layers["counts"] = sp.csr_matrix(counts[:, rows, cols].T)
    table.obsm["spatial"] = np.stack([4.0 * cols, 4.0 * rows], 1)
    return table


def test_bins_of_any_model_are_summed_as_patches_are(evidence):
    cells, table = evidence[2], bin_table_of(evidence)
    own, other = table_of(evidence), sum_bins(table, cells)
    assert other.obs.equals(own.obs) and other.var_names.equals(own.var_names)
    np.testing.assert_allclose(other.X, own.X, rtol=1e-5)
    assert (other.layers["counts"] != own.layers["counts"]).nnz == 0
    # Here the centre is that of the bins which the table holds.
    assert np.abs(other.obsm["spatial"] - own.obsm["spatial"]).max() < 4 * 4
    table.X, table.layers["counts"] = sp.csr_matrix(table.X), table.layers["counts"].toarray()
    sparse = sum_bins(table, cells)
    np.testing.assert_allclose(score_genes(sparse)["pcc"], score_genes(own)["pcc"], atol=1e-5)
    np.testing.assert_allclose(score_cells(sparse)["count"], score_cells(own)["count"])


def test_bins_that_are_not_the_sections_are_refused(evidence):
    cells, table = evidence[2], bin_table_of(evidence)
    coarse = table.copy()
    coarse.obs_names = [f"s_008um_{i:05d}_00000-1" for i in range(table.n_obs)]
    beyond = table.copy()
    beyond.obs["array_row"] += 200
    for wrong in (coarse, beyond):
        with pytest.raises(UserError, match="not of this section's bins of 2 µm"):
            sum_bins(wrong, cells)
    with pytest.raises(UserError, match="none of the 1378 cells lies in the table of bins"):
        sum_bins(table[table.obs["array_row"] > 500], cells)
    del table.obs["array_col"]
    with pytest.raises(UserError, match="no array_row and array_col: add them"):
        sum_bins(table, cells)


def scored(n: int = 400) -> AnnData:
    """Cells of two types and one without; gene 1 follows size alone, gene 2 is a constant."""
    rng = np.random.default_rng(1)
    bins = rng.integers(4, 60, n)
    kinds = pd.Categorical(rng.choice(["goblet", "tumour", ""], n), ["goblet", "tumour"])
    level = np.where(kinds == "goblet", 0.3, 0.05)
    rate = np.stack([bins * level, bins * 0.1, np.full(n, 2.0)], 1).astype(np.float32)
    obs = pd.DataFrame({"bins": bins, "cell_type": kinds}, [f"c{i}" for i in range(n)])
    table = AnnData(rate, obs, PANEL.set_index("gene"))
    table.layers["counts"] = sp.csr_matrix(rng.poisson(rate))
    return table


def test_genes_are_scored_over_cells_and_within_types():
    table = scored()
    scores = score_genes(table).set_index(["cell_type", "gene"])
    assert scores.index.unique(0).tolist() == [ALL_CELLS, "goblet", "tumour"]
    y, p = table.layers["counts"].toarray().astype(float), table.X.astype(float)
    bins = table.obs["bins"].to_numpy(float)
    for kind in (ALL_CELLS, "goblet", "tumour"):
        inside = np.ones(len(y), bool) if kind == ALL_CELLS else table.obs["cell_type"] == kind
        for g, gene in enumerate(table.var_names):
            row, counts, rate = scores.loc[kind, gene], y[inside, g], p[inside, g]
            assert row["cells"] == inside.sum() and row["mean_count"] == pytest.approx(
                counts.mean()
            )
            assert row["calibration"] == pytest.approx(rate.sum() / counts.sum(), rel=1e-5)
            by_size = stats.pearsonr(counts, bins[inside])[0]
            assert row["pcc_bins"] == pytest.approx(by_size, abs=1e-5)
            level = counts.sum() / bins[inside].sum() * bins[inside]
            deviance = [
                stats.poisson(counts).logpmf(counts).sum() - stats.poisson(m).logpmf(counts).sum()
                for m in (rate, level)
            ]
            assert row["d2"] == pytest.approx(1 - deviance[0] / deviance[1], abs=1e-4)
            if gene == "DES":
                assert np.isnan(row["pcc"]) and np.isnan(row["spearman"])
            else:
                assert row["pcc"] == pytest.approx(stats.pearsonr(counts, rate)[0], abs=1e-5)
                assert row["spearman"] == pytest.approx(stats.spearmanr(counts, rate)[0], abs=1e-6)
    # What tells types apart is worth more than size over all cells, and nothing within a type.
    every, within = scores.loc[(ALL_CELLS, "ACTB")], scores.loc[("goblet", "ACTB")]
    assert every["d2"] > 0.3 > 0.05 > within["d2"]
    assert every["pcc"] > every["pcc_bins"] + 0.1


def test_cells_are_scored_over_genes():
    table = scored()
    scores = score_cells(table)
    assert scores.index.equals(table.obs_names)
    assert list(scores) == [
        "cell_type", "bins", "count", "rate", "pcc", "pcc_mean", "deviance",
    ]  # fmt: skip
    y, p = table.layers["counts"].toarray().astype(float), table.X.astype(float)
    np.testing.assert_allclose(scores["count"], y.sum(1))
    np.testing.assert_allclose(scores["rate"], p.sum(1), rtol=1e-5)
    mean = y.mean(0)
    for i in (0, 7, 100):
        if y[i].std() > 0:
            assert scores["pcc"].iloc[i] == pytest.approx(np.corrcoef(y[i], p[i])[0, 1], abs=1e-5)
            null = np.corrcoef(y[i], mean)[0, 1]
            assert scores["pcc_mean"].iloc[i] == pytest.approx(null, abs=1e-5)
        best, own = (stats.poisson(m).logpmf(y[i]).sum() for m in (y[i], p[i]))
        assert scores["deviance"].iloc[i] == pytest.approx(2 * (best - own) / 3, abs=1e-4)


def test_a_gene_that_a_type_lacks_has_no_score_there():
    table = scored()
    counts = table.layers["counts"].toarray()
    counts[(table.obs["cell_type"] == "tumour").to_numpy(), 1] = 0
    table.layers["counts"] = sp.csr_matrix(counts)
    scores = score_genes(table).set_index(["cell_type", "gene"])
    lacking = scores.loc[("tumour", "KRT8"), ["pcc", "pcc_bins", "spearman", "d2", "calibration"]]
    few = score_genes(table[table.obs["cell_type"] == "goblet"])
    assert few["cell_type"].unique().tolist() == [ALL_CELLS, "goblet"]
    assert lacking.isna().all() and scores.loc[("goblet", "KRT8")].notna().all()


def test_a_table_without_types_or_counts():
    table = scored(30)
    del table.obs["cell_type"]
    assert set(score_genes(table)["cell_type"]) == {ALL_CELLS}
    assert "cell_type" not in score_cells(table)
    wrong = table.copy()
    wrong.X = np.log(wrong.X)
    with pytest.raises(UserError, match="negative or undefined in places: give expected counts"):
        score_genes(wrong)
    del table.layers["counts"]
    for score in (score_genes, score_cells):
        with pytest.raises(UserError, match="has no counts to score against"):
            score(table)


def test_the_example():
    tried = doctest.testmod(cells_module)
    assert tried.attempted and not tried.failed
