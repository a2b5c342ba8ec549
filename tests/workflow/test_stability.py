"""Verdicts compared between sets of runs."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from sparsity_trap.presets import in_world, load_preset

sys.path.insert(0, str(ROOT / "workflow"))
import bench_tables
import stability


def ledger(*claims: tuple[str, float]) -> pd.DataFrame:
    """Claims with a verdict and a value, each with an interval of ± 0.1."""
    return pd.DataFrame(
        {
            "key": [f"c{i}" for i in range(len(claims))],
            "text": [f"Claim {i}." for i in range(len(claims))],
            "family": "build",
            "verdict": [verdict for verdict, _ in claims],
            "value": [value for _, value in claims],
            "ci_low": [value - 0.1 for _, value in claims],
            "ci_high": [value + 0.1 for _, value in claims],
            "p": 0.01,
        }
    )


def test_claims_that_change_sides_are_named_and_intervals_checked():
    sets = {
        "book": ledger(("supported", 0.3), ("supported", 0.2), ("undetermined", np.nan)),
        "fewer": ledger(("supported", 0.3)),
        "other": ledger(("undetermined", 0.42), ("not supported", 0.0), ("supported", 0.3)),
    }
    found = stability.compare(sets)
    assert found["flips"] == ["c1"]
    # 0.12 apart is within 0.1 √2, 0.2 is not; a value that is not there lies in no interval
    assert (found["covered"], found["compared"]) == (2, 4)
    assert found["claims"]["c2"]["sets"]["book"]["value"] is None
    table = bench_tables.stability({"laptop": found | {"hardware": "two cores", "commit": "abc"}})
    assert "back: *Claim 1*." in table and "2 lie within" in table
    assert "every other set: *Claim 0*; *Claim 1*. Of" in table
    assert "| Claim 1. | supported (+0.200) | not judged | not supported (+0.000) |" in table


@pytest.mark.parametrize(
    ("repeat", "seeds"),
    [("seeds1000", {1000, 1001}), ("threads2", {0, 1}), ("gpu", {0, 1})],
)
def test_repeats_share_sections_and_nothing_else(repeat, seeds):
    preset, again = load_preset("smoke"), load_preset(f"smoke/{repeat}")
    assert {run.seed for run in again.all_runs()} == seeds
    assert len(again.all_runs()) == len(preset.all_runs())
    for patient in preset.patients:
        assert again.store(patient) == preset.store(patient)
        assert again.tokens(patient) == preset.tokens(patient)
        assert again.outs(patient) == preset.outs(patient)
    assert again.folder != preset.folder and again.run_dir(again.all_runs()[0]).is_relative_to(
        again.folder
    )
    assert again.simulation == preset.simulation and not again.worlds


def test_repeats_have_the_runs_that_carry_claims():
    preset = load_preset("smoke")
    claims, others = preset.runs[0].model_copy(update={"claims": True}), preset.runs[0]
    marked = preset.model_copy(update={"runs": [others, claims]})
    assert in_world(marked, "seeds10").runs == [claims.model_copy(update={"seeds": [10, 11]})]
