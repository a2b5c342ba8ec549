"""The page of real tiles: claims on planted scores, and what is committed."""

from __future__ import annotations

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cells import drawn, run_cells

from sparsity_trap import runs, settings
from sparsity_trap.analysis.claims import read_claims
from sparsity_trap.analysis.families import FAMILIES

RESULTS = settings.ROOT / "results" / "real_tiles"
SEEDS = {"linear": 5, "hist2st": 3, "img2st": 3}
LOSSES = {
    "linear": ("mse", "mse-per-mean", "power-0.5", "poisson", "power-1.5", "power-2", "nb"),
    "hist2st": ("mse", "mse-per-mean", "poisson"),
    "img2st": ("mse", "mse-per-mean", "poisson"),
}
CONTROLS = ("zeros", "training mean", "shuffled")
TILES = 60


def plant(folder, pcc: dict, ssim: dict, d2: float = 0.1, run_sd: float = 0.003) -> None:
    """Results in which (decoder, loss) or a control has the given scores, 0.3 elsewhere."""
    draw = np.random.default_rng(0)
    tile = np.array([*range(TILES), *range(20)])
    maps = pd.DataFrame({"map": np.arange(len(tile)), "tile": [f"{t:08d}" for t in tile]})
    maps = maps.assign(row=tile // 8, column=tile % 8, strip=tile % 5, gene="A", sparsity=0.9)
    maps = maps.assign(mean_count=0.1, largest=2, ceiling_2um=0.5, ceiling_8um=0.8)
    of_tile = draw.normal(0, 0.1, TILES)[tile]

    def scored(key, **about):
        value = {"pcc_8um": pcc.get(key, 0.3), "ssim_2um": ssim.get(key, 0.3), "d2": d2}
        value |= {"pcc_2um": 0.1, "ssim_8um": 0.2, "calibration": 1.0}
        run = draw.normal(0, run_sd)
        noise = {c: of_tile + draw.normal(0, 0.02, len(tile)) + run for c in value}
        return pd.DataFrame({c: value[c] + noise[c] for c in value}).assign(
            map=maps["map"], **about
        )

    models = [
        scored((decoder, loss), decoder=decoder, loss=loss, seed=seed)
        for decoder, count in SEEDS.items()
        for loss, seed in product(LOSSES[decoder], range(count))
    ]
    others = [
        scored(name, decoder="linear", loss="poisson", seed=seed, control=name)
        for name, seed in product(CONTROLS, range(5))
    ]
    published = [scored(f"published {x}", control=f"published {x}") for x in ("mse", "poisson")]
    rates = pd.DataFrame(
        [(d, x, lr, s) for d in SEEDS for x in LOSSES[d] for lr in (1e-3, 2e-3) for s in range(5)],
        columns=["decoder", "loss", "lr", "strip"],
    ).assign(pcc_8um=0.2)
    rates["chosen"] = rates["lr"] == 1e-3
    made = {"commit": "0123456789", "fits": 1, "seconds": 60, "hardware": "a computer"}
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps(made))
    files = {"maps": maps, "scores": pd.concat(models), "rates": rates}
    files["controls"] = pd.concat([*others, *published])
    for name, table in files.items():
        table.to_csv(folder / f"{name}.csv", index=False)


@pytest.fixture
def page(monkeypatch, tmp_path):
    """Run the page without its figures on planted results, or on those that are committed."""

    def run(planted: bool = True, **planting) -> dict:
        quoted: dict[str, object] = {}

        def quote(prefix, **numbers):
            quoted.update({f"{prefix}.{name}": number for name, number in numbers.items()})

        if planted:
            plant(tmp_path / "results" / "real_tiles", **planting)
            monkeypatch.setattr(settings, "ROOT", tmp_path)
        monkeypatch.setattr(runs, "open_preset", lambda *_: SimpleNamespace(folder=tmp_path))
        monkeypatch.setattr(runs, "Quotes", lambda *_: quote)
        start = {"preset": "", "source": "", "cohort": ""}
        found = run_cells("12_tiles", start, lambda source: not drawn(source))
        return found | {"quoted": quoted}

    return run


def verdicts(found) -> dict[str, str]:
    return {key: claim.verdict for key, claim in found["ledger"].claims.items()}


#: Planted scores in which every claim holds, and in which none does.
FOR = {
    "pcc": {
        ("linear", "mse"): 0.25, ("linear", "mse-per-mean"): 0.25, ("linear", "power-2"): 0.28,
        ("hist2st", "mse"): 0.3, ("hist2st", "poisson"): 0.4,
        ("img2st", "mse"): 0.3, ("img2st", "poisson"): 0.4, "shuffled": 0.0,
    },
    "ssim": {"zeros": 0.4},
    "d2": 0.1,
}  # fmt: skip
AGAINST = {
    "pcc": {
        ("linear", "power-2"): 0.4, ("hist2st", "poisson"): 0.25, ("hist2st", "mse"): 0.3,
        ("linear", "power-0.5"): 0.27,
    },
    "ssim": {"zeros": 0.2},
    "d2": -0.2,
}  # fmt: skip


@pytest.mark.parametrize(("planted", "verdict"), [(FOR, "supported"), (AGAINST, "not supported")])
def test_every_claim_meets_evidence_for_it_and_against_it(page, planted, verdict):
    found = page(**planted)
    judged = verdicts(found)
    assert list(judged) == list(read_claims(FAMILIES["real"].script))
    assert set(judged.values()) == {verdict}, judged


def test_a_run_effect_as_large_as_the_gain_leaves_it_open(page):
    found = page(pcc={("linear", "mse"): 0.25}, ssim={}, run_sd=0.08)
    assert verdicts(found)["real_loss"] == "undetermined"
    gain = found["gain"]("linear")
    assert gain.runs > 3 * gain.genes and gain.n == 5


def test_the_tile_is_the_unit(page):
    found = page(pcc={("linear", "mse"): 0.25}, ssim={})
    by_tile = found["by_tile"]
    assert len(by_tile) == TILES * sum(SEEDS[d] * len(LOSSES[d]) for d in SEEDS)
    wide = by_tile[by_tile["decoder"] == "linear"].pivot_table(
        index=["seed", "tile"], columns="loss", values="pcc_8um"
    )
    gain = wide["poisson"] - wide["mse"]
    own = found["gain"]("linear")
    assert own.value == pytest.approx(gain.mean())
    assert own.genes == pytest.approx(gain.groupby("tile").mean().std() / np.sqrt(TILES))
    assert own.runs == pytest.approx(gain.groupby("seed").mean().std() / np.sqrt(5))


def test_a_decoder_that_was_not_trained_leaves_its_claims_open(page, monkeypatch):
    monkeypatch.delitem(SEEDS, "hist2st")
    judged = verdicts(page(**FOR))
    assert judged.pop("real_deep") == judged.pop("real_depth") == "undetermined"
    assert set(judged.values()) == {"supported"}


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no results/real_tiles: run make tiles")
def test_the_page_shows_what_is_committed(page):
    found = page(planted=False)
    assert found["quoted"]["tiles.n"] == 73 and found["quoted"]["tiles.n_maps"] == 114
    scores = pd.read_csv(RESULTS / "scores.csv")
    assert scores.groupby(["decoder", "loss", "seed"])["map"].nunique().nunique() == 1
    for decoder, own in scores.groupby("decoder"):
        assert own["seed"].nunique() >= (5 if decoder == "linear" else 3)
    assert "-dirty" not in found["made"]["commit"]
