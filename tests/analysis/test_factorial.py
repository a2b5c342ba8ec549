"""Effects of the factorial and shares of the gap, on tables whose effects are known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from planted import planted_scores, run_page
from scipy import stats

from sparsity_trap.analysis import factorial
from sparsity_trap.settings import PUBLISHED_BIAS

#: Cells of the page that need trained models.
MECHANISM = ("gradient_shares(", "powers", "toy_minimisers(")


@pytest.fixture
def planted() -> pd.DataFrame:
    return planted_scores()


@pytest.fixture
def factors(monkeypatch):
    """Run the page of the factorial on a table of scores."""
    return lambda scores: run_page(monkeypatch, "07_factorial", scores, *MECHANISM)


def between(score, genes: int = 20, patients: tuple[str, ...] = ("P1", "P5")) -> pd.DataFrame:
    """The eight cells between arms D and E; ``score`` takes a gene's number and its cell."""
    ends = zip(factorial.ARM_D, factorial.ARM_E, strict=True)
    columns = pd.MultiIndex.from_product(ends, names=factorial.FACTORS)
    places = list(product(range(genes), patients, [0]))
    rows = pd.MultiIndex.from_tuples(places, names=["gene", "patient", "seed"])
    values = [[score(gene, cell) for cell in columns] for gene, *_ in places]
    return pd.DataFrame(values, rows, columns)


# --- which runs -----------------------------------------------------------------------------------


def test_cells_are_the_arms_that_differ_in_the_factors_alone(planted):
    chosen = factorial.factorial_runs(planted)
    arms = chosen.groupby("arm")[list(factorial.FACTORS)].first()
    assert len(arms) == 16 == len(arms.drop_duplicates())
    assert {"D", "E", "D-matched", "E-matched"} <= set(arms.index)
    assert not any(
        arm.startswith(("A", "B", "C", "V7", "E-keep", "E-linear", "E-img")) for arm in arms.index
    )
    gap = factorial.gap_runs(planted)
    assert gap["arm"].nunique() == 8 and set(gap["bias"]) == {0.0, -3.0}


def test_published_bias_is_that_of_the_link(planted):
    named = planted[planted["bias"] == "published"]
    assert (named["bias_value"] == named["link"].map(PUBLISHED_BIAS)).all()
    assert (planted.loc[planted["arm"] == "mse-exp-zero", "bias"] == 0).all()


def test_blocks_have_the_score_in_every_cell(planted):
    rows = factorial.gap_runs(planted)
    blocks = factorial.complete_blocks(rows, "pcc_8um")
    assert blocks.shape == (50, 8)
    assert set(blocks.index.get_level_values("patient")) == {"P5"}  # others have D and E alone
    gene = rows["gene"].iloc[0]
    undefined = (rows["gene"] == gene) & (rows["arm"] == "mse-exp-zero")
    rest = factorial.complete_blocks(
        rows.assign(pcc_8um=rows["pcc_8um"].mask(undefined)), "pcc_8um"
    )
    assert set(blocks.index) - set(rest.index) == {(gene, "P5", 0)}


def test_designs_that_are_not_crossed_have_no_blocks(planted):
    rows = factorial.factorial_runs(planted)
    few = rows[rows["gene"].isin(rows["gene"].unique()[:3])]
    for part in (
        rows[rows["arm"] != "nb-exp"],
        rows[rows["bias"] == "published"],
        rows[rows["arm"].isin(["D", "E"])],
        few,
        rows.iloc[:0],
    ):
        assert factorial.complete_blocks(part, "pcc_8um").empty


# --- effects --------------------------------------------------------------------------------------


def test_planted_effects_come_back(factors, planted):
    found = factors(planted)
    effect = found["on_pcc"].set_index("term")["effect"]
    # With softplus the published bias is 0, with exp it is -3, to which 0.02 was added.
    expected = {
        "loss=poisson": 0.1,
        "loss=mse-log1p": -0.05,
        "loss=nb": 0.08,
        "link=exp": 0.04 + 0.02 / 2,
        "bias=gene-mean": 0.03 - 0.02 / 2,
        "link=exp x bias=gene-mean": -0.02,
        "loss=poisson x link=exp": 0,
    }
    for term, value in expected.items():
        assert effect[term] == pytest.approx(value, abs=1e-3), term
    assert found["on_pcc"]["order"].value_counts().to_dict() == {1: 5, 2: 7, 3: 3}
    assert found["quoted"]["factorial.gene-mean.effect"] == effect["bias=gene-mean"]
    assert found["quoted"]["gap.loss.share"] == pytest.approx(0.1 / 0.16, abs=0.01)


def test_intervals_are_those_of_contrasts_per_gene(factors, planted):
    """That of a mean over genes is Student's, but for the regression's factor of small samples."""
    crossed = factorial.factorial_runs(planted)
    noise = np.random.default_rng(3).normal(0, 0.05, len(crossed))
    on_pcc = factors(crossed.assign(pcc_8um=crossed["pcc_8um"] + noise))["on_pcc"]
    cells = crossed.assign(score=crossed["pcc_8um"] + noise)
    cells = cells[cells["patient"] == "P5"]
    of_loss = cells.pivot_table(index="gene", columns="loss", values="score")
    of_link = cells.pivot_table(index="gene", columns=["loss", "link"], values="score")
    contrasts = {
        "loss=poisson": of_loss["poisson"] - of_loss["mse"],
        "loss=nb x link=exp": (of_link["nb", "exp"] - of_link["mse", "exp"])
        - (of_link["nb", "softplus"] - of_link["mse", "softplus"]),
    }
    factor = np.sqrt((50 * 16 - 1) / (50 * 16 - 16))
    for term, contrast in contrasts.items():
        row = on_pcc.set_index("term").loc[term]
        half = stats.t.ppf(0.975, 49) * stats.sem(contrast) * factor
        assert row["effect"] == pytest.approx(contrast.mean())
        assert row["ci_high"] - row["effect"] == pytest.approx(half)
        assert row["effect"] - row["ci_low"] == pytest.approx(half)
        assert row["p_value"] == pytest.approx(
            2 * stats.t.sf(abs(contrast.mean()) / stats.sem(contrast) / factor, 49)
        )


def test_a_preset_without_the_factorial_has_a_page(factors, planted):
    found = factors(planted[planted["arm"].isin(["D", "E", "D-matched"])])
    assert not found["trained"] and len(found["between"]) == 0 and found["quoted"] == {}


# --- shares of the gap ----------------------------------------------------------------------------


def test_contributions_are_shapley_values():
    """Against the textbook formula over coalitions, with cells of arbitrary scores."""
    rng = np.random.default_rng(5)
    worth = {cell: rng.normal() for cell in product((0, 1), repeat=3)}

    def score(_, cell):
        return worth[tuple(int(x == end) for x, end in zip(cell, factorial.ARM_E, strict=True))]

    parts = factorial.contributions(between(score))
    assert (parts == parts.iloc[0]).all().all() and len(parts) == 40
    weight = {0: 2 / 6, 1: 1 / 6, 2: 2 / 6}  # s! (2 - s)! / 3!
    for i, factor in enumerate(factorial.FACTORS):
        expected = sum(
            weight[sum(cell)] * (worth[*cell[:i], 1, *cell[i + 1 :]] - value)
            for cell, value in worth.items()
            if not cell[i]
        )
        assert parts[factor].iloc[0] == pytest.approx(expected)
    assert parts.iloc[0].sum() == pytest.approx(worth[1, 1, 1] - worth[0, 0, 0])


def noisy(rng: np.random.Generator, noise: float = 0.02):
    """Additive scores: loss 0.12, link 0.03, bias 0.06, to which each gene adds its own gain."""
    gain = rng.normal(0, 0.05, 20)

    def score(gene, cell):
        changed = [x == end for x, end in zip(cell, factorial.ARM_E, strict=True)]
        own = np.dot(changed, [0.12 + gain[gene], 0.03, 0.06])
        return own + rng.normal(0, noise)

    return score


def test_shares_of_additive_factors_are_their_effects():
    parts = factorial.contributions(between(noisy(np.random.default_rng(0), noise=0)))
    shares = factorial.share_of_gap(parts).set_index("factor")
    loss = shares.loc["loss", "contribution"]
    assert shares.loc["link", "contribution"] == pytest.approx(0.03)
    assert shares.loc["bias", "contribution"] == pytest.approx(0.06)
    assert shares.loc["gap", "contribution"] == pytest.approx(loss + 0.09)
    assert shares.loc["loss", "share"] == pytest.approx(loss / (loss + 0.09))
    assert shares["share"].drop("gap").sum() == pytest.approx(1)
    assert shares.loc["gap", ["share", "ci_low", "ci_high"]].tolist() == pytest.approx([1, 1, 1])
    assert (shares["n_genes"] == 20).all()


def test_intervals_of_shares_cover_the_truth():
    covered = []
    for seed in range(20):
        parts = factorial.contributions(between(noisy(np.random.default_rng(seed))))
        row = factorial.share_of_gap(parts).set_index("factor").loc["loss"]
        covered.append(row["ci_low"] < 0.12 / 0.21 < row["ci_high"])
        assert row["contribution_low"] < row["contribution"] < row["contribution_high"]
    assert np.mean(covered) > 0.8


def test_a_drawn_gene_brings_its_patients():
    """Patients that repeat a gene's scores leave the interval as it is."""
    one = between(noisy(np.random.default_rng(1), noise=0), patients=("P5",))
    two = between(noisy(np.random.default_rng(1), noise=0), patients=("P1", "P5"))
    found = (factorial.share_of_gap(factorial.contributions(cells)) for cells in (one, two))
    pd.testing.assert_frame_equal(*found)


def test_no_gap_has_no_shares():
    rng = np.random.default_rng(0)
    parts = factorial.contributions(between(lambda *_: rng.normal(0, 0.1)))
    shares = factorial.share_of_gap(parts)
    assert shares["share"].isna().all() and shares["contribution"].notna().all()
