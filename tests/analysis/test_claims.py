"""Every claim of notebook 10 meets evidence for it, against it, and none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from cells import run_cells
from scipy import stats

from sparsity_trap.analysis import association, claims, published
from sparsity_trap.analysis.claims import Claim, Estimate, Ledger, read_claims, verdict
from sparsity_trap.data.genes import panel_table
from sparsity_trap.settings import UserError

ARMS = ("A", "B", "C", "D", "E", "V7", "D-matched", "E-linear")
PANEL = panel_table().rename(columns={"published_sparsity": "sparsity"})
GENES = PANEL["gene"].to_list()
RANK = PANEL["sparsity"].rank(pct=True).to_numpy() - 0.5
MITOCHONDRIAL = (PANEL["category"] == "mitochondrial").to_numpy()
SHOWN = PANEL["gene"].isin(published.RESCUES["gene"]).to_numpy()
WIDE = 0.5  # noise that leaves the sign open


def noise(sd: float = 0.05, seed: int = 0, size: int = 50) -> np.ndarray:
    """Noise whose mean is 0 exactly, so that a planted mean is the sample's own."""
    values = np.random.default_rng(seed).normal(0, sd, size)
    return values - values.mean()


def runs(sd: float = 0.0, patients: tuple[str, ...] = ("P5",), **levels: Any) -> pd.DataFrame:
    """One row per run and gene: all scores of an arm at 0.3, or at the level given plus noise.

    ``levels`` are such as ``E={"pcc_8um": 0.4}``; a name's underscore stands for a hyphen.
    """
    own = {name.replace("_", "-"): scores for name, scores in levels.items()}
    tables = []
    for i, arm in enumerate(ARMS):
        table = PANEL.assign(arm=arm, seed=0)
        for score in ("pcc_2um", "pcc_8um", "pcc_8um_unmasked", "ssim_2um"):
            table[score] = own.get(arm, {}).get(score, 0.3) + noise(sd, 10 + i)
        tables += [table.assign(patient=patient) for patient in patients]
    return pd.concat(tables, ignore_index=True)


def gain(gain: Any, score: str = "pcc_8um", sd: float = 0.05, **others: Any) -> dict[str, Any]:
    """Scores of arm E above those of arm D, as evidence."""
    return {"scores": runs(E={score: 0.3 + gain + noise(sd, 2)} | others)}


def control(name: str, score: str, level: float, sd: float = 0.02) -> dict[str, Any]:
    values = pd.DataFrame({score: level + noise(sd, 5)}, index=GENES)
    empty = pd.DataFrame({"ssim_2um": np.nan}, index=GENES)
    controls = {"zeros": empty} | {name: values}
    return {"nothing": pd.concat(controls, names=["control", "gene"]), "scores": runs()}


def share(value: float) -> dict[str, Any]:
    row = {"factor": "loss", "share": value, "ci_low": value - 0.1, "ci_high": value + 0.1}
    return {"shares": pd.DataFrame([row | {"n_genes": 50}])}


def dial(level: float, sd: float = 0.01) -> dict[str, Any]:
    """Change of the gain per halving of the counts."""
    return {"halvings": pd.Series(level + noise(sd), GENES)}


def toy(*minimiser: float, converged: bool = True) -> dict[str, Any]:
    fits = {"loss": "mse", "link": "exp", "mean_count": [0.1, 1.0], "minimiser": minimiser}
    return {"toy": pd.DataFrame(fits | {"converged": converged})}


def reached(part: float) -> dict[str, Any]:
    return {"scores": runs(E={"pcc_2um": 0.4 * part + noise()}), "ceiling": pd.Series(0.4, GENES)}


def judged(**evidence: Any) -> dict[str, Claim]:
    """The claims, judged by the notebook's own cells; evidence that is not given is missing."""
    scores = evidence.pop("scores", runs()[:0])
    main = scores[(scores["patient"] == "P5") & (scores["seed"] == 0)]
    namespace = {
        "np": np, "pd": pd, "stats": stats, "published": published,
        **{name: getattr(claims, name) for name in ("NULL_PCC", "WORTH", "WORTH_RHO")},
        "Estimate": Estimate, "verdict": verdict, "ledger": Ledger(),
        "LEAST_GENES": association.LEAST_GENES, "mean_interval": association.mean_interval,
        "scores": scores, "main": main, "shares": None, "halvings": pd.Series(dtype=float),
        "ceiling": pd.Series(dtype=float),
        "nothing": control("zeros", "ssim_2um", np.nan)["nothing"],
        "toy": pd.DataFrame(columns=["loss", "link", "mean_count", "minimiser", "converged"]),
    }  # fmt: skip
    namespace |= evidence

    def judging(source: str) -> bool:
        return "ledger.judge" in source or source.startswith("def ")

    return run_cells("10_claims", namespace, judging)["ledger"].claims


#: claim -> evidence that supports it, speaks against it, and leaves it open.
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "rescue": (gain(0.1), gain(-0.1), gain(0.02, sd=WIDE)),
    "rescue_matched": (gain(0.1), gain(0.0, sd=0.01), gain(0.02, sd=WIDE)),
    "share_of_loss": (share(0.8), share(0.2), share(0.55)),
    "most_genes": tuple(
        gain(np.where(np.arange(50) < wins, 0.1, -0.1), sd=0) for wins in (33, 17, 30)
    ),
    "rescued_genes": tuple(
        gain(0.1 + SHOWN * extra, sd=sd) for extra, sd in ((0.3, 0.05), (-0.3, 0.05), (0.02, WIDE))
    ),
    "ssim_gain": tuple(
        gain(level, "ssim_2um", sd) for level, sd in ((0.2, 0.1), (0, 0.01), (0.01, WIDE))
    ),
    "sparser_genes": tuple(gain(0.1 + k * RANK) for k in (0.3, -0.3, 0.0)),
    "sparser_genes_without_mitochondrial": (
        gain(0.1 + 0.4 * RANK),
        gain(0.1 - 0.4 * RANK),
        gain(0.1 - 0.3 * MITOCHONDRIAL),  # the published trend: one category
    ),
    "sparsity_causes_gain": (dial(0.02), dial(0.0), dial(0.005, WIDE)),
    "collapse_in_tissue": (
        gain(0.2, pcc_8um_unmasked=0.55),
        gain(0.05, pcc_8um_unmasked=0.7),
        gain(0.1, sd=WIDE),
    ),
    "trap_at_2um": tuple(
        {"scores": runs(sd, D={"pcc_2um": d}, A={"pcc_2um": a})}
        for d, a, sd in ((0.1, 0.3, 0.02), (0.29, 0.2, 0.02), (0.29, 0.3, WIDE))
    ),
    "native_2um": (reached(0.9), reached(0.2), reached(0.5)),
    "interpolation": tuple(
        {"scores": runs(sd, B={"pcc_2um": b})} for b, sd in ((0.2, 0.02), (0.4, 0.02), (0.31, WIDE))
    ),
    "multi_resolution": tuple(
        {"scores": runs(sd, V7={"pcc_8um": 0.4}, C={"pcc_8um": c})}
        for c, sd in ((0.3, 0.02), (0.5, 0.02), (0.3, WIDE))
    ),
    "ssim_beats_emptiness": tuple(
        control("zeros", "ssim_2um", level, sd)
        for level, sd in ((0.1, 0.02), (0.4, 0.02), (0.29, WIDE))
    ),
    "deep_beats_linear": tuple(
        {"scores": runs(sd, E_linear={"pcc_8um": level})}
        for level, sd in ((0.2, 0.02), (0.3, 0.005), (0.28, WIDE))
    ),
    "shuffled_is_null": tuple(control("shuffled", "pcc_8um", level) for level in (0.01, 0.2, 0.05)),
    "constant_optimum": (toy(0.05, 0.05), toy(0.1, 1.0), toy(0.05, 0.5)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.1, "supported"),
        (0.0, 0.1, "undetermined"),  # an end on the bound is not beyond it
        (-0.1, 0.02, "undetermined"),
        (-0.1, 0.019, "not supported"),
        (np.nan, np.nan, "undetermined"),
    ],
)
def test_verdict_of_an_interval(low, high, expected):
    assert verdict(low, high) == expected


def test_verdict_has_bounds_of_its_own():
    assert verdict(0.4, 0.6, above=0.5, below=0.5) == "undetermined"
    assert verdict(0.51, 0.6, above=0.5, below=0.5) == "supported"
    assert verdict(0.4, 0.49, above=0.5, below=0.5) == "not supported"


@pytest.mark.parametrize("key", CASES)
def test_every_verdict_can_be_reached(key):
    found = [judged(**evidence)[key] for evidence in CASES[key]]
    assert [claim.verdict for claim in found] == ["supported", "not supported", "undetermined"]
    for claim in found[:2]:
        assert claim.n > 0 and np.isfinite(claim.value)
        if key != "constant_optimum":  # an exact optimum has no interval
            assert claim.ci_low <= claim.value <= claim.ci_high


def test_no_evidence_leaves_this_projects_claims_open():
    found = judged()
    own = {key: claim for key, claim in found.items() if claim.source == "this project"}
    assert set(own) == set(CASES)
    assert list(found) == list(read_claims())
    for claim in own.values():
        assert claim.verdict == "undetermined" and np.isnan(claim.value) and claim.n == 0
        assert claim._repr_markdown_() == "**undetermined** · no evidence in this run"


def test_published_claims_can_fail_and_hold(monkeypatch):
    printed = {key: claim for key, claim in judged().items() if claim.source == "published"}
    assert {key: claim.verdict for key, claim in printed.items()} == {
        "published_most_genes": "supported",
        "published_rho": "not supported",
        "published_trap_at_2um": "not supported",
    }
    assert printed["published_rho"].ci_low < 0 < printed["published_rho"].value == 0.243
    assert printed["published_trap_at_2um"].value == pytest.approx(0.347 - 0.356)
    monkeypatch.setitem(published.SUMMARY, "rho", 0.5)
    monkeypatch.setitem(published.SUMMARY, "n_wins", 10)
    arms = published.ARMS.copy()
    arms.loc[arms["arm"] == "D", "pcc_2um"] = 0.2
    monkeypatch.setattr(published, "ARMS", arms)
    found = judged()
    assert found["published_rho"].verdict == "supported"
    assert found["published_most_genes"].verdict == "not supported"
    assert found["published_trap_at_2um"].verdict == "supported"


def test_statistics_are_those_of_the_evidence():
    found = judged(**gain(0.1))
    assert found["rescue"].value == pytest.approx(0.1) and found["rescue"].n == 50
    halving = judged(**dial(0.02))["sparsity_causes_gain"]
    assert halving.value == pytest.approx(0.02) and halving.n == 50
    scores = runs(D={"pcc_2um": 0.1}, A={"pcc_2um": 0.25}, V7={"pcc_8um": 0.4}, C={"pcc_8um": 0.35})
    found = judged(scores=scores)
    assert found["trap_at_2um"].value == pytest.approx(0.15)
    assert found["multi_resolution"].value == pytest.approx(0.05)
    assert judged(**CASES["most_genes"][0])["most_genes"].value == pytest.approx(33 / 50)
    table = CASES["sparser_genes"][0]["scores"].pivot(index="gene", columns="arm", values="pcc_8um")
    rho = stats.spearmanr(PANEL["sparsity"], (table["E"] - table["D"])[GENES]).statistic
    assert judged(**CASES["sparser_genes"][0])["sparser_genes"].value == pytest.approx(rho)


def test_arms_are_compared_within_patient_and_seed():
    scores = runs(0.02, patients=("P1", "P5"), E_linear={"pcc_8um": 0.2})
    scores.loc[scores["patient"] == "P1", "pcc_8um"] += 0.4  # an easier section
    lacking = (scores["patient"] == "P1") & (scores["arm"] == "E-linear")
    assert judged(scores=scores[~lacking])["deep_beats_linear"].value == pytest.approx(0.1)
    apart = scores[lacking | ((scores["patient"] == "P5") & (scores["arm"] == "E"))]
    assert judged(scores=apart)["deep_beats_linear"].verdict == "undetermined"


def test_undefined_scores_are_left_out():
    evidence = gain(0.1)
    scores = evidence["scores"]
    of_e = scores["arm"] == "E"
    scores.loc[of_e & scores["gene"].isin(GENES[:10]), "pcc_8um"] = np.nan
    found = judged(**evidence)
    assert found["rescue"].n == found["sparser_genes"].n == 40
    scores.loc[of_e, "pcc_8um"] = np.nan
    found = judged(**evidence)
    for key in ("rescue", "most_genes", "sparser_genes", "rescued_genes"):
        assert found[key].verdict == "undetermined"


def test_collapse_over_all_bins_alone_is_not_enough():
    found = judged(**gain(0.0, sd=0.005, pcc_8um_unmasked=0.1))  # the deficit's half is negative
    assert found["collapse_in_tissue"].verdict == "not supported"


def test_a_gap_that_is_none_has_no_share_and_an_unfinished_optimum_proves_nothing():
    assert judged(**share(np.nan))["share_of_loss"].verdict == "undetermined"
    assert judged(**toy(0.1, 1.0, converged=False))["constant_optimum"].verdict == "undetermined"


# --- the ledger -----------------------------------------------------------------------------------


def test_sentences_and_rules_stand_in_the_notebook():
    listed = read_claims()
    assert len(listed) == 21
    assert all(text and rule.endswith(".") for text, rule in listed.values())
    assert len({text for text, _ in listed.values()}) == 21


def script(tmp_path, *keys: str):
    path = tmp_path / "claims.py"
    path.write_text(
        "\n\n".join(f"# (claim-{key})=\n# ### It is {key}.\n#\n# *Rule.* If so." for key in keys)
    )
    return path


def test_ledger_keeps_the_notebooks_order_and_knows_its_claims(tmp_path):
    ledger = Ledger(script(tmp_path, "one", "two"))
    with pytest.raises(UserError, match="claim 'three' is not in claims.py: choose from one, two"):
        ledger.judge("three", "share", Estimate())
    shown = ledger.judge("two", "mean", Estimate(-0.1, -0.2, 0.01, 50))
    assert shown._repr_markdown_() == "**not supported** · mean: −0.1 (−0.2 to 0.01), n = 50"
    with pytest.raises(UserError, match="without a verdict in claims.py: one"):
        ledger.table()
    ledger.judge("one", "share", Estimate(0.3), "supported", source="published")
    table = ledger.table()
    assert list(table.columns) == list(Claim._fields)
    assert table["key"].tolist() == ["one", "two"]
    assert table.loc[0, ["text", "rule", "source"]].tolist() == [
        "It is one.", "If so.", "published",
    ]  # fmt: skip
    assert ledger.counts() == {"supported": 1, "not_supported": 1, "undetermined": 0}
    with pytest.raises(UserError, match="claim 'one' stands there twice"):
        read_claims(script(tmp_path, "one", "one"))
