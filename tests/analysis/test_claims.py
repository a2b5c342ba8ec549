"""Every claim of notebook 10 meets evidence for it, against it, and none."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from cells import run_cells
from scipy import stats
from statsmodels.stats.multitest import multipletests

from sparsity_trap import runs as module_runs
from sparsity_trap.analysis import controls, effects, mechanism, published
from sparsity_trap.analysis.claims import Claim, Estimate, Least, Ledger, read_claims, read_ledgers
from sparsity_trap.analysis.effects import Effect
from sparsity_trap.analysis.families import FAMILIES
from sparsity_trap.data.genes import panel_table
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import UserError

PANEL = panel_table().rename(columns={"published_sparsity": "sparsity"})
GENES = PANEL["gene"].to_list()
RANK = PANEL["sparsity"].rank(pct=True).to_numpy() - 0.5
MITOCHONDRIAL = (PANEL["category"] == "mitochondrial").to_numpy()
SHOWN = PANEL["gene"].isin(published.RESCUES["gene"]).to_numpy()
SCORES = ("pcc_2um", "pcc_4um", "pcc_8um", "pcc_16um", "pcc_8um_unmasked", "ssim_2um")
ARMS = {
    name: arm.model_dump(exclude={"title", "resolutions_um"})
    | {
        "bin_um": arm.resolutions_um[0] if len(arm.resolutions_um) == 1 else np.nan,
        "bias_value": arm.bias,
    }
    for name, arm in load_preset("laptop").arms.items()
}
PATCHES = 1 + np.random.default_rng(0).random((3, 50, 6))
WIDE = 0.3  # noise between runs that leaves the sign open


def runs(*arms: str, sd: float = 0.002, seeds: int = 4, **levels: Any) -> pd.DataFrame:
    """One row per run and gene: all scores of an arm at 0.3, or at the level given.

    Runs differ by a noise of the given s.d. that their genes share, and genes by one of their own.
    ``levels`` are such as ``E={"pcc_8um": 0.4}``.
    """
    draw, names = np.random.default_rng(5), list(dict.fromkeys((*arms, *levels)))
    scores: dict[str, list[np.ndarray]] = {score: [] for score in SCORES}
    for arm, _, score in itertools.product(names, range(seeds), SCORES):
        noise = draw.normal(0, sd) + draw.normal(0, 0.004, len(PANEL))
        scores[score].append(levels.get(arm, {}).get(score, 0.3) + noise)
    of_runs = [
        {"run": f"{arm}-{seed}", "arm": arm, "seed": seed, **ARMS[arm]}
        | {"bias": "published" if ARMS[arm]["bias"] == -3 else ARMS[arm]["bias"]}
        for arm, seed in itertools.product(names, range(seeds))
    ]
    table = pd.DataFrame(of_runs).merge(PANEL, how="cross")  # in the order of the scores
    everywhere = {"patient": "P5", "collapsed": False, "mean_count": 0.1}
    return table.assign(**everywhere, **{name: np.concatenate(v) for name, v in scores.items()})


def at(score: str, levels: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Levels of one score, by arm, as `runs` takes them."""
    return {arm: {score: level} for arm, level in levels.items()}


def gain(gain: Any, score: str = "pcc_8um", mse: str = "D", poisson: str = "E", **options: Any):
    """Scores of one arm above those of another, as evidence."""
    return {"scores": runs(mse, **{poisson: {score: 0.3 + gain}}, **options)}


def control(level: float, **options: Any) -> dict[str, Any]:
    """Arm E at 0.3, and a map of zeros at another level of SSIM."""
    zeros = pd.DataFrame({"ssim_2um": level}, index=GENES)
    nothing = pd.concat({"zeros": zeros}, names=["control", "gene"])
    return {"scores": runs("E", **options), "nothing": nothing}


def dials(thinning: float, summing: float, **options: Any) -> dict[str, Any]:
    """The gain at the full counts, at 1/8 of them and at 8 µm, given as changes per halving."""
    base = {"pcc_8um": 0.33, "pcc_2um": 0.33}
    levels = {
        "poisson-exp-mean": base,
        "keep1_8-poisson": {"pcc_8um": 0.33 + 3 * thinning},
        "8um-poisson": {"pcc_8um": 0.33 - 2 * summing},
    }
    mse = ("mse-exp-mean", "keep1_8-mse", "8um-mse")
    return {"scores": runs(*mse, **options, **levels)}


def toy(*minimiser: float, converged: bool = True) -> dict[str, Any]:
    fits = {"loss": "mse", "link": "exp", "mean_count": [0.1, 1.0], "minimiser": minimiser}
    return {"toy": pd.DataFrame(fits | {"converged": converged})}


def detail(level: float, **options: Any) -> dict[str, Any]:
    """PCC at 2 µm of arm E, whose averages over 8 µm have 0.3."""
    return {"scores": runs(E={"pcc_2um": level}, **options)}


def best_rates(gain: float, **options: Any) -> dict[str, Any]:
    """Poisson is best at half the rate on the strips, squared error at twice."""
    grid = [f"{arm}{rate}" for arm in ("D-matched", "E") for rate in ("", "-lr1_2", "-lr2", "-lr4")]
    levels = {"E-lr1_2": {"pcc_8um": 0.3 + gain}, "E": {"pcc_8um": 0.9}}
    strips = dict.fromkeys(grid, 0.1) | {"E-lr1_2": 0.3, "D-matched-lr2": 0.3}
    return {"scores": runs(*grid, **levels, **options), "strips": strips}


def cells_between(loss: float, link: float, **options: Any) -> dict[str, Any]:
    """The eight cells between D and E, whose levels add up."""
    levels = {
        arm: {"pcc_8um": 0.3 + loss * ("poisson" in arm or arm[0] == "E") + link * exp}
        for arm, exp in {
            "D": 0, "E": 1, "D-matched": 1, "E-matched": 0, "mse-softplus-minus3": 0,
            "mse-exp-zero": 1, "poisson-softplus-minus3": 0, "poisson-exp-zero": 1,
        }.items()
    }  # fmt: skip
    return {"scores": runs(**levels, **options)}


def fake_result(table: pd.DataFrame, strips: dict[str, float]) -> SimpleNamespace:
    first = table.iloc[0]
    run = SimpleNamespace(
        name=first["run"], arm=first["arm"], test_patient=first["patient"], seed=first["seed"]
    )
    log = {"validation_loss": [2, 1], "validation_pcc_8um": [9, strips.get(first["arm"], 0)]}
    # The same sums in every run: patches have no part in a contrast.
    return SimpleNamespace(run=run, genes=table, log=pd.DataFrame(log), patches=PATCHES)


def judged(monkeypatch, tmp_path: Path, *keys: str, **evidence: Any) -> dict[str, Claim]:
    """The claims of these keys, or all, judged by the notebook's own cells."""
    scores = evidence.get("scores", runs("D")[:0])
    results = [fake_result(table, evidence.get("strips", {})) for _, table in scores.groupby("run")]
    lost = pd.DataFrame({"ssim_2um": np.nan}, index=GENES)
    nothing = evidence.get("nothing", pd.concat({"zeros": lost}, names=["control", "gene"]))
    if "shuffles" in evidence:
        nothing = pd.concat([nothing, pd.concat({"shuffled": lost}, names=["control", "gene"])])
    no_fits = pd.DataFrame(columns=["loss", "link", "mean_count", "minimiser", "converged"])
    coarse = pd.Series(0.3, GENES)
    for module, name, value in (
        (module_runs, "open_preset", SimpleNamespace(main_patient="P5", folder=tmp_path)),
        (module_runs, "load_all", results),
        (module_runs, "long_table", scores.copy()),
        (module_runs, "pick", None),
        (module_runs, "Quotes", lambda *_, **__: None),
        (controls, "control_scores", nothing.reset_index()),
        (controls, "averaged", coarse),
        (controls, "shuffle_null", evidence.get("shuffles")),
        (mechanism, "toy_minimisers", evidence.get("toy", no_fits)),
    ):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # which statsmodels calls in every correction
    monkeypatch.setattr(effects.crossed_draws, "__defaults__", (400,))
    parameters = {"preset": "", "source": "", "cohort": ""}

    def wanted(source: str) -> bool:
        mine = not keys or any(f'"{key}"' in source for key in keys)
        others = ("ledger.settle", "recompute.recompute")
        return not any(text in source for text in others) and (mine or "ledger.judge" not in source)

    ledger = run_cells("10_claims", parameters, wanted)["ledger"]
    ledger.listed = {key: ledger.listed[key] for key in ledger.claims}
    ledger.settle()
    return ledger.claims


#: claim -> evidence that supports it, speaks against it, and leaves it open.
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "rescue": (gain(0.1), gain(-0.1), gain(0.1, sd=WIDE)),
    "rescue_matched": tuple(
        gain(level, mse="D-matched", sd=sd) for level, sd in ((0.1, 0.002), (0, 0.002), (0.1, WIDE))
    ),
    "rescue_best_rate": (best_rates(0.1), best_rates(0), best_rates(0.1, sd=WIDE)),
    "rescue_linear": tuple(
        gain(level, mse="D-linear", poisson="E-linear", sd=sd)
        for level, sd in ((0.1, 0.002), (0, 0.002), (0.1, WIDE))
    ),
    "share_of_loss": (
        cells_between(0.1, 0.02), cells_between(0.02, 0.1), cells_between(0.1, 0.02, sd=WIDE),
    ),
    "most_genes": tuple(
        gain(np.where(np.arange(50) < wins, 0.1, -0.1)) for wins in (45, 10, 31)
    ),
    "rescued_genes": (
        gain(0.1 + SHOWN * 0.3), gain(0.1 - SHOWN * 0.3),
        gain(0.1 + SHOWN * np.linspace(-0.5, 0.5, 50)),
    ),
    "ssim_gain": tuple(
        gain(level, "ssim_2um", sd=sd) for level, sd in ((0.2, 0.002), (0, 0.002), (0.2, WIDE))
    ),
    "between_genes": tuple(
        {"scores": runs("D-matched", sd=sd, **at("pcc_8um", {"E": 0.4, "mse-per-mean": level}))}
        for level, sd in ((0.4, 0.002), (0.3, 0.002), (0.4, WIDE))
    ),
    "dose": tuple(
        {"scores": runs("D-matched", sd=sd, **at("pcc_8um", {"power-0.5": half, "E": 0.4}))}
        for half, sd in ((0.35, 0.002), (0.42, 0.002), (0.35, WIDE))
    ),
    "sparser_genes": (gain(0.1 + 0.3 * RANK), gain(0.1 - 0.3 * RANK), gain(0.1)),
    "sparser_genes_without_mitochondrial": (
        gain(0.1 + 0.4 * RANK),
        gain(0.1 - 0.4 * RANK),
        gain(0.1 - 0.3 * MITOCHONDRIAL),  # the published trend: one category
    ),
    "sparsity_causes_gain": (dials(0.03, 0.03), dials(0.03, -0.03), dials(0.03, 0.03, sd=WIDE)),
    "collapse_in_tissue": tuple(
        {"scores": runs("D", sd=sd, E={"pcc_8um": inside, "pcc_8um_unmasked": over_all})}
        for inside, over_all, sd in ((0.5, 0.55, 0.002), (0.35, 0.7, 0.002), (0.5, 0.55, WIDE))
    ),
    "trap_at_2um": tuple(
        {"scores": runs("E", sd=sd, D={"pcc_2um": d}, A={"pcc_2um": a})}
        for d, a, sd in ((0.1, 0.3, 0.002), (0.29, 0.2, 0.002), (0.1, 0.3, WIDE))
    ),
    "supervision_at_2um": tuple(
        gain(level, "pcc_2um", "C", sd=sd) for level, sd in ((0.1, 0.002), (0, 0.002), (0.1, WIDE))
    ),
    "native_2um": (detail(0.35), detail(0.3), detail(0.35, sd=WIDE)),
    "multi_resolution": tuple(
        {"scores": runs("A", "B", "D", "E", sd=sd, V7={"pcc_8um": 0.4}, C={"pcc_8um": c})}
        for c, sd in ((0.3, 0.002), (0.5, 0.002), (0.3, WIDE))
    ),
    "ssim_beats_emptiness": (control(0.1), control(0.4), control(0.1, sd=WIDE)),
    "deep_beats_linear": tuple(
        gain(level, mse="E-linear", sd=sd) for level, sd in ((0.1, 0.002), (0, 0.002), (0.1, WIDE))
    ),
    "shuffled_is_null": tuple(
        {"shuffles": np.linspace(low, high, 50)} for low, high in ((0, 0.03), (0.1, 0.2), (0, 0.1))
    ),
    "constant_optimum": (toy(0.05, 0.05), toy(0.1, 1.0), toy(0.05, 0.5)),
}  # fmt: skip
OF_ITS_OWN = {"collapse", "shuffled_is_null", "constant_optimum"}


@pytest.fixture
def judge(monkeypatch, tmp_path):
    return lambda *keys, **evidence: judged(monkeypatch, tmp_path, *keys, **evidence)


@pytest.mark.parametrize("key", CASES)
def test_every_verdict_can_be_reached(judge, key):
    found = [judge(key, **evidence)[key] for evidence in CASES[key]]
    assert [claim.verdict for claim in found] == ["supported", "not supported", "undetermined"]
    for claim in found[:2]:
        assert claim.n > 0 and np.isfinite(claim.value)
        if key != "constant_optimum":  # an exact optimum has no interval
            assert claim.ci_low - 1e-3 <= claim.value <= claim.ci_high + 1e-3
        assert np.isfinite(claim.p) == (key not in OF_ITS_OWN)


@pytest.mark.parametrize(
    ("dead", "verdict"), [(6, "supported"), (0, "not supported"), (1, "undetermined")]
)
def test_collapsed_runs_are_counted(judge, dead, verdict):
    scores = runs("D", seeds=20)
    scores["collapsed"] = scores["seed"] < dead
    found = judge("collapse", scores=scores)["collapse"]
    assert (found.value, found.n, found.verdict) == (dead / 20, 20, verdict)


def test_no_evidence_leaves_this_projects_claims_open(judge):
    found = judge()
    assert set(found) == set(CASES) | {"collapse"}
    assert list(found) == list(read_claims(FAMILIES["build"].script))
    for claim in found.values():
        assert claim.family == "build"
        assert claim.verdict == "undetermined" and np.isnan(claim.value) and claim.n == 0
        assert claim._repr_markdown_() == "**undetermined** · no evidence in this run"


def test_one_run_of_each_arm_decides_nothing(judge):
    """No effect from one run, however many genes it has."""
    scores = gain(0.2, seeds=1)["scores"]
    found = judge("rescue", "most_genes", "rescued_genes", "sparser_genes", scores=scores)
    assert {claim.verdict for claim in found.values()} == {"undetermined"}
    assert found["rescue"].value == pytest.approx(0.2, abs=0.01)


def test_statistics_are_those_of_the_evidence(judge):
    assert judge("rescue", **gain(0.1))["rescue"].value == pytest.approx(0.1, abs=0.004)
    halving = judge("sparsity_causes_gain", **dials(0.03, 0.02))["sparsity_causes_gain"]
    assert halving.value == pytest.approx(0.02, abs=0.003)
    evidence = CASES["sparser_genes"][0]
    by_arm = evidence["scores"].pivot_table(index="gene", columns="arm", values="pcc_8um")
    rho = stats.spearmanr(PANEL["sparsity"], (by_arm["E"] - by_arm["D"])[GENES]).statistic
    assert judge("sparser_genes", **evidence)["sparser_genes"].value == pytest.approx(rho)
    share = judge("share_of_loss", **cells_between(0.1, 0.02))["share_of_loss"]
    assert share.value == pytest.approx(0.1 - 0.12 / 2, abs=0.004)


def test_what_data_are_like_without_an_effect_is_rarely_called_one(monkeypatch):
    """The share of wrong verdicts in a family of claims without effects, of which p are uniform."""
    monkeypatch.setattr("sparsity_trap.analysis.claims.update_display", lambda *_, **__: None)
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # which statsmodels calls in every correction
    draw, wrong, names = np.random.default_rng(0), 0, [f"c{i}" for i in range(15)]
    for _ in range(400):
        ledger = Ledger.__new__(Ledger)
        ledger.listed = {name: ("", "") for name in names}
        empty = ("", "", "", "build", "undetermined", "", 0.0, 0.0, 0.0, 1, "")
        ledger.claims = {name: Claim(*empty) for name in names}
        ledger.tests = {name: ("supported", draw.uniform()) for name in names}
        wrong += "supported" in set(ledger.settle()["verdict"])
    assert 0.005 < wrong / 400 < 0.045  # one side of 5 %


# --- the ledger -----------------------------------------------------------------------------------


def test_sentences_and_rules_stand_in_the_notebook():
    assert set(read_claims(FAMILIES["build"].script)) >= set(CASES)
    listed = [item for f in FAMILIES.values() for item in read_claims(f.script).items()]
    assert all(text and rule.endswith(".") for _, (text, rule) in listed)
    # Labels are the whole book's.
    assert len({key for key, _ in listed}) == len({text for _, (text, _) in listed}) == len(listed)


def test_families_are_written_and_read_apart(tmp_path):
    folder = tmp_path / "tables"
    assert {family: len(table) for family, table in read_ledgers(folder).items()} == dict.fromkeys(
        FAMILIES, 0
    )
    weak = Effect(0.03, 0.0125, 30, 5)
    for family, number in (("build", 1), ("printed", 3)):
        names = [f"{family}{i}" for i in range(number)]
        ledger = Ledger(family, script(tmp_path, *names))
        for name in names:
            ledger.judge(name, "mean", weak)
        written = ledger.settle(folder)
        read = read_ledgers(folder)[family]
        assert read["key"].to_list() == names and set(read["family"]) == {family}
        assert read["p"].to_list() == pytest.approx(written["p"].to_list())
    # Each is corrected for its own number of tests.
    read = read_ledgers(folder)
    assert read["build"]["verdict"].to_list() == ["supported"]
    assert set(read["printed"]["verdict"]) == {"undetermined"}
    with pytest.raises(UserError, match="family 'rumours' of claims does not exist: choose from"):
        Ledger("rumours")


def script(tmp_path, *keys: str):
    path = tmp_path / "claims.py"
    path.write_text(
        "\n\n".join(f"# (claim-{key})=\n# ### It is {key}.\n#\n# *Rule.* If so." for key in keys)
    )
    return path


def test_ledger_keeps_the_notebooks_order_and_knows_its_claims(tmp_path):
    ledger = Ledger("build", script(tmp_path, "one", "two"))
    with pytest.raises(UserError, match="claim 'three' is not in claims.py: choose from one, two"):
        ledger.judge("three", "share", Estimate())
    ledger.judge("two", "mean", Effect(-0.1, 0.01, 9, 5))
    with pytest.raises(UserError, match="without a verdict in claims.py: one"):
        ledger.settle()
    ledger.judge("one", "share", Estimate(0.3), "supported")
    table = ledger.settle()
    assert list(table.columns) == list(Claim._fields)
    assert table["key"].tolist() == ["one", "two"]
    assert table.loc[0, ["text", "rule", "family"]].tolist() == ["It is one.", "If so.", "build"]
    two = ledger.claims["two"]._repr_markdown_()
    assert two == "**not supported** · mean: −0.1 (−0.123 to −0.0774), 5 runs, p = 3.8e-07"
    assert ledger.counts() == {"supported": 1, "not_supported": 1, "undetermined": 0}
    with pytest.raises(UserError, match="claim 'one' stands there twice"):
        read_claims(script(tmp_path, "one", "one"))


def test_tests_are_corrected_together(tmp_path):
    """A test that would pass alone fails beside others that are as weak."""
    names = [f"c{i}" for i in range(5)]
    ledger = Ledger("build", script(tmp_path, *names))
    weak, strong = Effect(0.03, 0.0125, 30, 5), Effect(0.2, 0.0125, 30, 5)
    for name in names:
        ledger.judge(name, "mean", strong if name == "c0" else weak)
    table = ledger.settle().set_index("key")
    p = [effect.p_above(0) for effect in (strong, *[weak] * 4)]
    assert table["p"].to_list() == pytest.approx(multipletests(p, method="holm")[1])
    assert p[1] < 0.025 < table.loc["c1", "p"]
    assert table["verdict"].to_list() == ["supported", *["undetermined"] * 4]


@pytest.mark.parametrize(
    ("value", "se", "verdict"),
    [
        (0.05, 0.01, "supported"),
        (0.05, 0.04, "undetermined"),
        (0.01, 0.001, "not supported"),  # above 0, and not worth the name
        (0.019, 0.005, "undetermined"),
        (-0.1, 0.01, "not supported"),
        (np.nan, np.nan, "undetermined"),
    ],
)
def test_an_effect_is_above_zero_and_worth_the_name(tmp_path, value, se, verdict):
    ledger = Ledger("build", script(tmp_path, "one"))
    ledger.judge("one", "mean", Effect(value, se, 30, 5))
    assert ledger.settle()["verdict"].item() == verdict


def test_the_smallest_of_several_has_the_p_of_the_weakest():
    effects = [Effect(0.1, 0.01, 9, 5), Effect(0.05, 0.04, 9, 4)]
    least = Least(effects)
    assert (least.value, least.n, least.interval) == (0.05, 4, effects[1].interval)
    assert least.p_above(0) == effects[1].p_above(0) > effects[0].p_above(0)
    assert least.p_below(0.02) == min(1, 2 * effects[1].p_below(0.02))
    assert np.isnan(Least([Effect(), effects[0]]).value)
