"""The ledger as the front page shows it."""

from __future__ import annotations

import re
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from sparsity_trap.analysis.claims import Claim

sys.path.append(str(ROOT / "workflow"))
import front  # noqa: E402 - a script beside the module

CLAIM = Claim(
    "a", "It is so: by far.", "If so.", "build", "supported", "mean gain", 0.03, 0.02, 0.05, 5,
    "runs", 0.0, 0.02, 0.001,
)  # fmt: skip


def test_every_family_has_a_picture_those_on_real_tissue_first(tmp_path):
    assert front.claims(tmp_path, first=True) == ""
    for family, text in (("build", "It is so."), ("real", "It holds."), ("printed", "It was so.")):
        rescue = CLAIM._replace(key="rescue", text=f"{text[:-1]} too.")
        table = pd.DataFrame(
            [CLAIM._replace(family=family, text=text), rescue][: 1 + (family == "build")]
        )
        table.to_csv(tmp_path / f"claims_{family}.csv", index=False)
    first, others = front.claims(tmp_path, first=True), front.claims(tmp_path, first=False)
    assert re.findall('class="says">([^<]*)', first) == [
        "Judged on real counts", "It holds", "Judged on this build", "It is so too"
    ]  # fmt: skip
    assert re.findall('class="says">([^<]*)', others) == [
        "Judged on printed numbers", "It was so", "Judged on this build", "It is so"
    ]  # fmt: skip
    assert others.count("[The evidence](claim-a)") == 2


def test_a_row_has_the_sentence_its_rule_and_its_verdict():
    lines = front.row(CLAIM._replace(verdict="not supported")).splitlines()
    assert lines[0] == '<details class="claim not-supported">'
    assert "It is so<" in lines[1] and ">not supported<" in lines[1]
    assert "It is so: by far. If so." in lines
    bracketed = front.row(CLAIM._replace(text="It is so (nearly: by far): always."))
    assert '"says">It is so (nearly: by far)<' in bracketed
    assert "Mean gain: 0.03 (0.02 to 0.05), 5 runs, p = 0.001. [The evidence](claim-a)" in lines


def test_effects_stand_in_multiples_of_the_least_worth_the_name():
    zone, zero, interval, point = (
        [float(x) for x in re.findall(r"(?:left|width):([\d.]+)%", part)]
        for part in front.drawn(CLAIM).split("</span>")[:4]
    )
    assert zone == [front.place(1)] and zero == [front.place(0)] and point == [front.place(1.5)]
    assert sum(interval) == pytest.approx(front.place(2.5), abs=0.01)
    # What is worth the name may be all that exceeds a bound, which is then 0.
    moved = CLAIM._replace(value=0.54, ci_low=0.52, ci_high=0.56, above=0.5, below=0.5)
    assert f"width:{front.place(0)}%" in front.drawn(moved)
    assert f'"point" style="left:{front.place(2)}%' in front.drawn(moved)


def test_the_axis_holds_what_is_far_away():
    places = [front.place(x) for x in (-1e9, -10, -1, 0, 1, 10, 30, 1e9)]
    assert places[0] == places[1] == 0 and places[-2] == places[-1] == 100
    assert sorted(places) == places and places[4] - places[3] > 8


@pytest.mark.parametrize("missing", ["value", "ci_low", "above"])
def test_a_claim_with_a_rule_of_another_kind_has_no_point(missing):
    assert front.drawn(CLAIM._replace(**{missing: np.nan})) == ""
