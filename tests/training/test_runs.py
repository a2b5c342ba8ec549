"""What runs are laid out as, and tables that are kept until what they were made from changes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from planted import planted_scores

from sparsity_trap import runs
from sparsity_trap import settings as config
from sparsity_trap.settings import Run, load_preset


def test_gains_are_of_the_patients_and_seeds_that_both_arms_have():
    table = planted_scores().assign(score=lambda t: t["pcc_8um"])
    gains = runs.gains(table, ("D-matched", "E"))
    assert set(gains["patient"]) == {"P1", "P2", "P5"} and len(gains) == 150
    assert np.isclose(gains.groupby("patient")["delta"].mean()["P5"], 0.1, atol=1e-3)
    assert set(runs.gains(table, ("D-linear", "E-linear"))["patient"]) == {"P5"}
    assert len(runs.gains(table, ("D", "never"))) == 0


@pytest.mark.parametrize("made_from", [Run(arm="E", test_patient="P5", seed=0), "P5"])
def test_a_kept_table_is_computed_again_when_its_source_has_changed(
    made_from, tmp_path, monkeypatch
):
    monkeypatch.setattr(config, "ROOT", tmp_path)
    preset = load_preset("smoke")
    computed = []

    def compute() -> pd.DataFrame:
        computed.append(len(computed))
        return pd.DataFrame({"number": computed[-1:]})

    def number(preset: config.Preset) -> int:
        return runs.kept_table(preset, "numbers", made_from, compute)["number"].item()

    assert [number(preset), number(preset)] == [0, 0]
    wider = preset.model_copy(update={"patches": config.Patches(min_tissue=0.1)})
    assert [number(wider), number(wider)] == [1, 1]
    (preset.folder / "tables" / "numbers.parquet").unlink()
    assert number(wider) == 2
