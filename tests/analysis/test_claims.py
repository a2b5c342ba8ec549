"""Every claim meets evidence for it, against it, and none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from sparsity_trap.analysis import claims, published
from sparsity_trap.analysis import factorial as effects
from sparsity_trap.analysis.claims import Evidence
from sparsity_trap.data.genes import panel_table

ARMS = ("A", "B", "C", "D", "E", "V7", "E-linear")
VERDICTS = {"supported", "not supported", "undetermined"}


def noise(size: int = 50, sd: float = 0.05, seed: int = 0) -> np.ndarray:
    """Noise whose mean is 0 exactly, so that a planted mean is the sample's own."""
    values = np.random.default_rng(seed).normal(0, sd, size)
    return values - values.mean()


def genes(
    gain: float | np.ndarray = 0.1,
    metric: str = "pcc_8um",
    sd: float = 0.05,
    **others: float | np.ndarray,
) -> pd.DataFrame:
    """Table S1 with a planted gain in one metric; ``others`` replace columns."""
    table = panel_table().rename(columns={"published_sparsity": "sparsity"})
    for name in ("pcc_2um", "pcc_8um", "pcc_8um_unmasked", "ssim_2um"):
        table[f"{name}_mse"] = 0.3 + noise(seed=1)
        table[f"{name}_poisson"] = table[f"{name}_mse"]
    table[f"{metric}_poisson"] += gain + noise(sd=sd, seed=2)
    return table.assign(**others)


def scores(metric: str, patients: tuple[str, ...] = ("P5",), sd: float = 0.02, **levels: float):
    """Scores of arms at 0.3, or at the level given (``E_linear`` for ``E-linear``)."""
    rows = []
    for a, arm in enumerate(ARMS):
        level = levels.get(arm.replace("-", "_"), 0.3)
        for patient in patients:
            own = noise(sd=sd, seed=10 + a)
            rows += [(arm, patient, 0, f"g{g}", level + own[g]) for g in range(50)]
    return pd.DataFrame(rows, columns=["arm", "patient", "seed", "gene", metric])


def control(name: str, metric: str, level: float, sd: float = 0.02) -> pd.DataFrame:
    table = panel_table()[["gene"]]
    return table.assign(control=name, **{metric: level + noise(sd=sd, seed=5)})


def share(value: float, half: float = 0.1) -> pd.DataFrame:
    row = {"factor": "loss", "share": value, "ci_low": value - half, "ci_high": value + half}
    return pd.DataFrame([row | {"n_genes": 50}, row | {"factor": "gap", "share": 1, "n_genes": 50}])


def dial(slope: float, sd: float = 0.005) -> effects.DialCurve:
    own = slope + noise(20, sd)
    rows = [
        (keep, loss, f"g{g}", 0.2 + (loss == "poisson") * own[g] * np.log2(keep))
        for keep in (1, 0.5, 0.25)
        for loss in ("mse", "poisson")
        for g in range(20)
    ]
    return effects.dial_curve(pd.DataFrame(rows, columns=["keep", "loss", "gene", "score"]))


def toy(minimiser: list[float], converged: bool = True) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "loss": "mse",
            "link": "exp",
            "mean_count": [0.1, 1.0],
            "minimiser": minimiser,
            "converged": converged,
        }
    )


SPARSITY = panel_table()["published_sparsity"]
RANK = SPARSITY.rank(pct=True).to_numpy() - 0.5
MITOCHONDRIAL = (panel_table()["category"] == "mitochondrial").to_numpy()
SHOWN = panel_table()["gene"].isin(published.RESCUES["gene"]).to_numpy()
CEILINGS = panel_table()[["gene"]].assign(pcc_2um=0.4)
WIDE = 0.5  # noise that leaves the sign open

#: claim -> evidence that supports it, speaks against it, and leaves it open.
CASES: dict[str, tuple[Evidence, Evidence, Evidence]] = {
    "rescue": (Evidence(genes()), Evidence(genes(-0.1)), Evidence(genes(0.02, sd=WIDE))),
    "rescue_matched": tuple(
        Evidence(genes_matched=t) for t in (genes(), genes(0.0, sd=0.01), genes(0.02, sd=WIDE))
    ),
    "share_of_loss": tuple(Evidence(shares=share(s)) for s in (0.8, 0.2, 0.55)),
    "most_genes": tuple(
        Evidence(genes(np.where(np.arange(50) < wins, 0.1, -0.1), sd=0.0)) for wins in (33, 17, 30)
    ),
    "rescued_genes": tuple(
        Evidence(genes(0.1 + SHOWN * extra, sd=sd))
        for extra, sd in ((0.3, 0.05), (-0.3, 0.05), (0.02, WIDE))
    ),
    "ssim_gain": tuple(
        Evidence(genes(gain, "ssim_2um", sd)) for gain, sd in ((0.2, 0.1), (0, 0.01), (0.01, WIDE))
    ),
    "sparser_genes": tuple(Evidence(genes(0.1 + k * RANK)) for k in (0.3, -0.3, 0.0)),
    "sparser_genes_without_mitochondrial": (
        Evidence(genes(0.1 + 0.4 * RANK)),
        Evidence(genes(0.1 - 0.4 * RANK)),
        Evidence(genes(0.1 - 0.3 * MITOCHONDRIAL)),  # the published trend: one category
    ),
    "sparsity_causes_gain": (
        Evidence(dial=dial(-0.02)),
        Evidence(dial=dial(0.0)),
        Evidence(dial=dial(-0.002, sd=0.05)),
    ),
    "collapse_in_tissue": (
        Evidence(genes(0.2, pcc_8um_unmasked_poisson=lambda t: t["pcc_8um_unmasked_mse"] + 0.25)),
        Evidence(genes(0.05, pcc_8um_unmasked_poisson=lambda t: t["pcc_8um_unmasked_mse"] + 0.4)),
        Evidence(genes(0.1, sd=WIDE)),
    ),
    "trap_at_2um": tuple(
        Evidence(scores=s)
        for s in (
            scores("pcc_2um", D=0.1),
            scores("pcc_2um", D=0.29, A=0.2),  # below E alone
            scores("pcc_2um", D=0.29, sd=WIDE),
        )
    ),
    "native_2um": tuple(
        Evidence(genes(pcc_2um_poisson=0.4 * part + noise(sd=sd)), ceilings=CEILINGS)
        for part, sd in ((0.9, 0.05), (0.2, 0.05), (0.5, 0.05))
    ),
    "interpolation": tuple(
        Evidence(scores=scores("pcc_2um", B=b, sd=sd))
        for b, sd in ((0.2, 0.02), (0.4, 0.02), (0.31, WIDE))
    ),
    "multi_resolution": tuple(
        Evidence(scores=s)
        for s in (
            scores("pcc_8um", V7=0.4),
            scores("pcc_8um", V7=0.4, C=0.5),
            scores("pcc_8um", V7=0.4, sd=WIDE),
        )
    ),
    "ssim_beats_emptiness": tuple(
        Evidence(genes(), controls=control("all-zeros", "ssim_2um", level, sd))
        for level, sd in ((0.1, 0.02), (0.4, 0.02), (0.29, WIDE))
    ),
    "deep_beats_linear": tuple(
        Evidence(scores=scores("pcc_8um", E_linear=level, sd=sd))
        for level, sd in ((0.2, 0.02), (0.3, 0.02), (0.28, WIDE))
    ),
    "shuffled_is_null": tuple(
        Evidence(controls=control("shuffled", "pcc_8um", level, sd))
        for level, sd in ((0.01, 0.02), (0.2, 0.02), (0.05, 0.02))
    ),
    "constant_optimum": (
        Evidence(toy=toy([0.05, 0.05])),
        Evidence(toy=toy([0.1, 1.0])),
        Evidence(toy=toy([0.05, 0.5])),
    ),
}


@pytest.mark.parametrize("key", CASES)
def test_every_verdict_can_be_reached(key):
    found = [claims.CLAIMS[key](evidence) for evidence in CASES[key]]
    assert [claim.verdict for claim in found] == ["supported", "not supported", "undetermined"]
    for claim in found[:2]:
        assert claim.n > 0
        assert np.isfinite(claim.value)
        if key != "constant_optimum":  # an exact optimum has no interval
            assert claim.ci_low <= claim.value <= claim.ci_high


def test_all_claims_have_cases():
    here = {key for key, judge in claims.CLAIMS.items() if judge(Evidence()).source != "published"}
    assert set(CASES) == here


@pytest.mark.parametrize("empty", [False, True])
def test_no_evidence_leaves_this_projects_claims_open(empty):
    tables = {f.name: pd.DataFrame() for f in dataclasses.fields(Evidence) if f.name != "dial"}
    table = claims.ledger(Evidence(**tables) if empty else Evidence())
    own = table[table["source"] == "this project"]
    assert (own["verdict"] == "undetermined").all()
    assert own["value"].isna().all() and (own["n"] == 0).all()


def test_statistics_are_those_of_the_tables():
    found = claims.rescue(Evidence(genes(0.1)))
    assert found.value == pytest.approx(0.1)
    assert found.n == 50
    found = claims.sparsity_causes_gain(Evidence(dial=dial(-0.02)))
    assert found.value == pytest.approx(0.02)
    assert found.ci_low == pytest.approx(-dial(-0.02).ci_high)
    found = claims.trap_at_2um(Evidence(scores=scores("pcc_2um", D=0.1, A=0.25)))
    assert found.value == pytest.approx(0.15)
    found = claims.multi_resolution(Evidence(scores=scores("pcc_8um", V7=0.4, C=0.35)))
    assert found.value == pytest.approx(0.05)
    found = claims.most_genes(Evidence(genes(np.where(np.arange(50) < 33, 0.1, -0.1), sd=0)))
    assert found.value == pytest.approx(33 / 50)


def test_published_claims():
    table = claims.ledger(Evidence()).set_index("key")
    table = table[table["source"] == "published"]
    assert table["verdict"].to_dict() == {
        "published_most_genes": "supported",
        "published_rho": "not supported",
        "published_trap_at_2um": "not supported",
    }
    rho = table.loc["published_rho"]
    assert rho["ci_low"] < 0 < rho["value"] == 0.243
    assert table.loc["published_trap_at_2um", "value"] == pytest.approx(0.347 - 0.356)


def test_published_claims_can_fail_and_hold(monkeypatch):
    monkeypatch.setitem(published.SUMMARY, "rho", 0.5)
    assert claims.published_rho(Evidence()).verdict == "supported"
    monkeypatch.setitem(published.SUMMARY, "n_wins", 10)
    assert claims.published_most_genes(Evidence()).verdict == "not supported"
    arms = published.ARMS.copy()
    arms.loc[arms["arm"] == "D", "pcc_2um"] = 0.2
    monkeypatch.setattr(published, "ARMS", arms)
    assert claims.published_trap_at_2um(Evidence()).verdict == "supported"


def test_arms_are_compared_within_patient_and_seed():
    table = scores("pcc_8um", patients=("P1", "P5"), E_linear=0.2)
    table.loc[table["patient"] == "P1", "pcc_8um"] += 0.4  # an easier section
    lacking = (table["patient"] == "P1") & (table["arm"] == "E-linear")
    found = claims.deep_beats_linear(Evidence(scores=table[~lacking]))
    assert found.value == pytest.approx(0.1)
    apart = table[lacking | ((table["patient"] == "P5") & (table["arm"] == "E"))]
    assert claims.deep_beats_linear(Evidence(scores=apart)).verdict == "undetermined"


def test_undefined_scores_are_left_out():
    table = genes(0.1)
    table.loc[:9, "pcc_8um_poisson"] = np.nan
    assert claims.rescue(Evidence(table)).n == 40
    assert claims.sparser_genes(Evidence(table)).n == 40
    table["pcc_8um_poisson"] = np.nan
    found = claims.ledger(Evidence(table)).set_index("key")["verdict"]
    assert (
        found[["rescue", "most_genes", "sparser_genes", "rescued_genes"]].eq("undetermined").all()
    )


def test_collapse_over_all_bins_alone_is_not_enough():
    nothing_inside = genes(0.0, sd=0.005)
    nothing_inside["pcc_8um_unmasked_poisson"] += -0.2  # the deficit's half is negative
    assert claims.collapse_in_tissue(Evidence(nothing_inside)).verdict == "not supported"


def test_a_gap_that_is_none_has_no_share():
    table = share(0.8).assign(share=np.nan, ci_low=np.nan, ci_high=np.nan)
    assert claims.share_of_loss(Evidence(shares=table)).verdict == "undetermined"


def test_an_unfinished_optimum_proves_nothing():
    found = claims.constant_optimum(Evidence(toy=toy([0.1, 1.0], converged=False)))
    assert found.verdict == "undetermined"


def test_ledger_has_one_row_per_claim_in_order():
    evidence = Evidence(
        genes=genes(), genes_matched=genes(), scores=scores("pcc_2um"), shares=share(0.8),
        controls=control("shuffled", "pcc_8um", 0.0), dial=dial(-0.02), ceilings=CEILINGS,
        toy=toy([0.1, 1.0]),
    )  # fmt: skip
    table = claims.ledger(evidence)
    assert table["key"].tolist() == list(claims.CLAIMS)
    assert list(table.columns) == [f.name for f in dataclasses.fields(claims.Claim)]
    assert set(table["verdict"]) <= VERDICTS
    assert set(table["source"]) == {"published", "this project"}
    for column in ("text", "rule", "statistic"):
        assert table[column].str.len().gt(5).all()
    assert table["text"].is_unique
    pd.testing.assert_frame_equal(table, claims.ledger(evidence))
