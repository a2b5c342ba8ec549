"""Controls, and what they say about metrics, on maps whose truth is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cells import run_cells
from planted import simulated_maps
from scipy import ndimage

from sparsity_trap import metrics, runs
from sparsity_trap.analysis import controls
from sparsity_trap.bins import bin_sum
from sparsity_trap.settings import UserError


@pytest.fixture(scope="module")
def store() -> SimpleNamespace:
    return simulated_maps(0)


@pytest.fixture(scope="module")
def predictions(store) -> np.ndarray:
    """A model: the rate as it would be seen in noise of a factor per token."""
    rng = np.random.default_rng(1)
    n, genes, side, _ = store.counts.shape
    tokens = rng.gamma(4, 0.25, (n, genes, side // 8, side // 8))
    rates = store.truth.astype(float) * tokens.repeat(8, 2).repeat(8, 3)
    return np.maximum(rates, 1e-3).astype(np.float16)


@pytest.fixture(scope="module")
def train_mean() -> np.ndarray:
    other = simulated_maps(2)
    return other.counts.sum((0, 2, 3)) / other.mask.sum()


def scored(store, predictions, train_mean) -> pd.DataFrame:
    """Means over genes of a model and its controls, as the page takes them."""
    maps = {"model: arm E": iter(predictions.astype(np.float32))}
    maps |= controls.all_controls(store, predictions, train_mean)
    tables = {name: controls.score(store, rates, train_mean, name) for name, rates in maps.items()}
    return (
        pd.concat(tables, names=["control"]).groupby("control", sort=False).mean(numeric_only=True)
    )


def audited(table: pd.DataFrame) -> pd.DataFrame:
    """The audit of the metrics, as it stands on the page."""
    shown = SimpleNamespace(show=lambda *_, **__: None)
    found = {"np": np, "pd": pd, "tables": shown, "table": table}
    steps = ("at = ", "audit = ", "of_rates = ")
    return run_cells("06_controls", found, lambda source: source.startswith(steps))["audit"]


@pytest.fixture(scope="module")
def table(store, predictions, train_mean):
    return scored(store, predictions, train_mean)


def stacked(rates) -> np.ndarray:
    return np.stack(list(rates))


# --- controls -------------------------------------------------------------------------------------


def test_constant_controls(store, train_mean):
    shape = store.counts.shape
    assert stacked(controls.zeros(store)).shape == shape
    assert not stacked(controls.zeros(store)).any()
    flat = stacked(controls.training_mean(store, train_mean))
    np.testing.assert_allclose(flat, np.broadcast_to(train_mean[:, None, None], shape), rtol=1e-6)
    mean = stacked(controls.patch_mean(store))
    assert (mean == mean[:, :, :1, :1]).all()
    expected = store.counts[0][:, store.mask[0]].mean(1)  # half of this patch is tissue
    np.testing.assert_allclose(mean[0, :, 0, 0], expected, rtol=1e-6)


def test_a_shuffle_moves_every_patch(predictions):
    seen = set()
    for seed in range(5):
        moved = stacked(controls.shuffled(predictions, seed))
        source = [next(i for i, p in enumerate(predictions) if (p == m).all()) for m in moved]
        assert sorted(source) == list(range(len(predictions)))
        assert all(i != s for i, s in enumerate(source))
        seen.add(tuple(source))
    assert len(seen) == 5
    again = stacked(controls.shuffled(predictions, 4))
    np.testing.assert_array_equal(moved, again)
    with pytest.raises(UserError, match="one patch cannot be shuffled"):
        controls.shuffled(predictions[:1], 0)


def test_controls_made_from_a_prediction(store, predictions):
    pred = predictions.astype(np.float32)
    np.testing.assert_array_equal(
        stacked(controls.next_tile(predictions)), np.roll(pred, -1, axis=0)
    )
    blurred = stacked(controls.blurred(predictions, 2))
    expected = ndimage.gaussian_filter(pred[3, 2].astype(float), 2, mode="nearest")
    np.testing.assert_allclose(blurred[3, 2], expected, rtol=1e-4)
    moved = stacked(controls.shifted(predictions, 3))
    np.testing.assert_array_equal(moved[..., 3:], pred[..., :-3])
    np.testing.assert_array_equal(moved[..., :3], pred[..., :1].repeat(3, -1))
    np.testing.assert_array_equal(stacked(controls.scaled(predictions, 2)), 2 * pred)
    by = np.array([1, 2, 3, 4])
    more = stacked(controls.offset(predictions, by))
    np.testing.assert_allclose(more, pred + by[:, None, None], rtol=1e-6)
    outside = stacked(controls.offset(predictions, 0.5, store.mask)) - pred
    np.testing.assert_allclose(outside, 0.5 * ~store.mask[:, None] * np.ones_like(pred), atol=1e-3)


def test_oracles(store):
    rate = stacked(controls.oracle(store))
    np.testing.assert_array_equal(rate, store.truth.astype(np.float32))
    tokens = stacked(controls.oracle_of_tokens(store))
    assert (tokens[:, :, :8, :8] == tokens[:, :, :1, :1]).all()
    np.testing.assert_allclose(bin_sum(tokens, 8), bin_sum(rate, 8), rtol=1e-4)
    real = SimpleNamespace(**{**vars(store), "truth": None})
    with pytest.raises(UserError, match="real section"):
        next(controls.oracle(real))


# --- tables ---------------------------------------------------------------------------------------


def test_scores_are_those_of_each_control(store, predictions, train_mean, table):
    assert table.index[0] == "model: arm E"
    expected = metrics.pcc(store.counts, predictions, store.mask).mean()
    assert table.loc["model: arm E", "pcc_2um"] == pytest.approx(expected, abs=1e-9)
    shifted = np.stack([p[..., np.maximum(np.arange(64) - 4, 0)] for p in predictions])
    expected = metrics.poisson_deviance(store.counts, shifted, store.mask).mean()
    assert table.loc["shifted 8 µm", "deviance"] == pytest.approx(expected, rel=1e-6)
    expected = metrics.d2(store.counts, 2 * predictions, train_mean, store.mask).mean()
    assert table.loc["scaled by 2", "d2"] == pytest.approx(expected, rel=1e-6)
    assert np.isnan(table.loc["zeros", "pcc_8um"])
    assert table.loc["training mean", "d2"] == pytest.approx(0, abs=1e-6)
    unmoved = table.loc[["offset", "model: arm E"], "pcc_8um"]
    assert unmoved.iloc[0] == pytest.approx(unmoved.iloc[1], abs=1e-6)


def test_controls_come_in_the_order_of_what_they_know(table):
    score = table["pcc_8um"]
    assert score["oracle"] > score["model: arm E"] > score["shifted 8 µm"] > score["shifted 32 µm"]
    assert score["oracle"] > score["oracle at 16 µm"] > score["model: arm E"]
    assert score["patch mean"] < score["model: arm E"] / 2
    assert abs(score["shuffled"]) < 0.1
    assert table.loc["oracle", "d2"] == table["d2"].max()
    assert table.loc["oracle", "pcc_8um_rate"] == pytest.approx(1)
    assert table.loc["blurred 32 µm", "pcc_8um"] < table.loc["blurred 8 µm", "pcc_8um"]


def test_controls_written_out_on_the_page_are_those_scored(store, predictions):
    page = {
        "np": np,
        "genes": pd.DataFrame({"mean_count": [0.1, 0.3, 0.2, 0.0]}),
        "store": SimpleNamespace(counts=SimpleNamespace(oindex=store.counts), mask=store.mask),
        "poisson": SimpleNamespace(predictions=SimpleNamespace(oindex=predictions)),
    }
    written = run_cells("06_controls", page, lambda source: source.startswith("gene = "))
    dealt = stacked(controls.shuffled(predictions, seed=0))[:, [1]]
    np.testing.assert_array_equal(written["shuffled"], dealt)
    np.testing.assert_array_equal(written["zeros"], stacked(controls.zeros(store))[:, [1]])


def test_the_audit_finds_what_each_metric_is_worth(table):
    audit = audited(table)
    claims = audit["claim"].to_dict()
    for metric in ("pcc_2um", "pcc_4um", "pcc_8um", "pcc_16um", "spearman_8um", "auprc"):
        assert claims[metric] == "where", metric
    for metric in ("deviance", "d2"):
        assert claims[metric] == "rates", metric
        assert not audit.loc[metric, "invariant_to_scale"]
    for metric in ("ssim_2um", "calibration", "pcc_2um_unmasked", "pcc_8um_unmasked"):
        assert claims[metric] == "none", metric
    # SSIM of sparse counts stays high for the wrong patch, and for nothing at all.
    assert not audit.loc["ssim_2um", "discriminates"]
    assert audit.loc["ssim_2um", "zeros"] > 0.5 * audit.loc["ssim_2um", "model"]
    assert not audit.loc["ssim_2um", "invariant_to_offset"]
    # Unmasked correlation reads bins in which no model was supervised.
    assert not audit.loc["pcc_8um_unmasked", "ignores_off_tissue"]
    assert audit.loc["pcc_8um", "ignores_off_tissue"]


def test_the_audit_condemns_a_model_that_knows_nothing(store, predictions, train_mean):
    wrong = stacked(controls.shuffled(predictions, 7))
    audit = audited(scored(store, wrong, train_mean))
    for metric in ("deviance", "d2", "mse"):  # worse than a constant, whatever the shuffle gives
        assert not audit.loc[metric, "discriminates"], metric


def test_one_patch_and_a_real_section(store, predictions, train_mean):
    part = {k: v[3:4] for k, v in vars(store).items() if k in ("counts", "mask", "origin")}
    one = SimpleNamespace(**part, truth=None, genes=store.genes)
    table = scored(one, predictions[3:4], train_mean)
    assert "shuffled" not in table.index
    assert "oracle" not in table.index
    assert np.isnan(table["pcc_2um_rate"]).all()
    assert (audited(table)["claim"] == "none").all()


def test_controls_are_computed_once(store, predictions, monkeypatch):
    kept = {}

    def keep(_, name, made_from, compute):
        return kept.setdefault((name, str(made_from)), compute())

    monkeypatch.setattr(runs, "kept_table", keep)
    monkeypatch.setattr(runs, "store", lambda *_: store)
    monkeypatch.setattr(controls, "mean_in_training", lambda *_: np.full(4, 0.1))
    run = SimpleNamespace(name="E-P5-s0", test_patient="P5")
    found = controls.control_scores(None, SimpleNamespace(run=run, predictions=predictions))
    assert found.groupby("control").size().eq(4).all() and found["gene"].tolist()[:4] == store.genes
    assert found["control"].unique().tolist() == list(
        controls.all_controls(store, predictions, np.full(4, 0.1))
    )
    assert len(kept) == 1


def test_wrong_predictions_are_named(store, predictions, train_mean):
    wrong = predictions.copy()
    wrong[2, 1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="E-P5-s0, scaled by 2: gene G1 .* patch 2 "):
        controls.score(store, controls.scaled(wrong, 2), train_mean, "E-P5-s0, scaled by 2")


def test_morans_table(store):
    table = controls.morans_table(store, store.truth)
    assert table["gene"].tolist() == store.genes
    # Rates are smooth over 10 µm; counts are the rates and noise.
    assert (table["moran_prediction"] > table["moran_truth"] + 0.02).all()
    assert (table["moran_truth"].to_numpy() > 0).all()


# --- spatial structure ----------------------------------------------------------------------------


def moran(values: np.ndarray, places: list[tuple[int, int]]) -> float:
    """The plain formula with row-normalised weights of the four neighbours."""
    index = {place: k for k, place in enumerate(places)}
    z = values - values.mean()
    product = weights = 0.0
    for (r, c), k in index.items():
        steps = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
        near = [index[step] for step in steps if step in index]
        if near:
            product += z[k] * z[near].mean()
            weights += 1
    return len(z) / weights * product / (z**2).sum()


def test_morans_i_equals_the_plain_formula():
    rng = np.random.default_rng(9)
    section = rng.random((3, 6, 12))
    section[1] += np.linspace(0, 5, 12)  # a gradient across both patches
    section[2] = 0.3
    maps = np.stack([section[:, :, :6], section[:, :, 6:]])
    mask = rng.random((2, 6, 6)) < 0.8
    origin = np.array([[24, 48], [24, 72]])  # side by side
    result = controls.morans_i(maps, mask, origin)
    places = [(r, c + 6 * n) for n, r, c in np.argwhere(mask)]
    for g in range(2):
        expected = moran(np.array([section[g, r, c] for r, c in places]), places)
        assert result[g] == pytest.approx(expected, abs=1e-7)
    assert np.isnan(result[2])
    assert result[1] > 0.7 > 0.2 > abs(result[0])
    assert np.isnan(controls.morans_i(maps, np.zeros_like(mask), origin)).all()
