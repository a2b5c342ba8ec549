"""Panels: a user's list, and variable genes chosen without the test patient."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from spaceranger import write_outs

from sparsity_trap import runs
from sparsity_trap.data.genes import (
    choose_variable_genes,
    load_panel,
    moments_of_totals,
    panel,
)
from sparsity_trap.data.spaceranger import open_slide
from sparsity_trap.settings import Genes, Preset, UserError, load_preset


@pytest.mark.parametrize(
    "text",
    [
        "gene,category\nDES,stromal\n\nMUC12,\n",
        "# mine\ncategory\tgene\tnote\nstromal\tDES\tx\n\tMUC12\n",
        "\ufeffcategory,gene\r\nstromal,DES\r\nother,MUC12\r\n",
    ],
)
def test_a_table_gives_genes_and_categories_in_order(tmp_path, text):
    path = tmp_path / "panel.csv"
    path.write_bytes(text.encode())
    assert load_panel(path).to_dict("list") == {
        "gene": ["DES", "MUC12"],
        "category": ["stromal", "other"],
    }


def test_a_list_of_symbols_needs_no_header(tmp_path):
    path = tmp_path / "panel.txt"
    path.write_text("# comment\nHLA-A\n\nMT-CO1 \n")
    table = load_panel(path)
    assert list(table["gene"]) == ["HLA-A", "MT-CO1"] and set(table["category"]) == {"other"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no gene"),
        ("gene\n", "has no gene"),
        ("gene,category\nDES,stromal\n,stromal\n", "a line without one"),
        ("gene\nDES\nVIM\nDES\n", "gene DES occurs twice"),
        ("symbol,category\nDES,stromal\n", "no column 'gene'"),
        ("gene\nDES,stromal\n", "more cells"),
        ("gene,category\nDES,muscle\n", "category 'muscle' is unknown"),
    ],
)
def test_a_faulty_list_is_refused(tmp_path, text, problem):
    path = tmp_path / "panel.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        load_panel(path)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    (tmp_path / "panel.csv").write_bytes(b"\xff\xfe\x00g")
    for name in ("panel.csv", "none.csv"):
        with pytest.raises(UserError, match="cannot be read"):
            load_panel(tmp_path / name)


GENES = [f"G{i:02d}" for i in range(40)]
VARIABLE = GENES[10:16]


def moments_of(counts: np.ndarray, genes: list[str]) -> pd.DataFrame:
    """Sums over all bins of counts [bins, genes]."""
    total, squares = counts.sum(0).astype(float), (counts.astype(float) ** 2).sum(0)
    return pd.DataFrame(
        {"gene": genes, "bins": len(counts), "total": total, "total_squares": squares}
    )


def planted(seed: int) -> np.ndarray:
    """Counts of 5000 bins: six variable genes, ten rare ones, the rest Poisson with any mean."""
    draw = np.random.default_rng(seed)
    mean = draw.uniform(0.3, 20, len(GENES))
    mean[:10] = 0.005  # a single count more makes these look overdispersed
    rate = np.repeat(mean[None], 5000, axis=0)
    for rank, gene in enumerate(VARIABLE):
        shape = 0.5 + 0.25 * rank
        rate[:, GENES.index(gene)] *= draw.gamma(shape, 1 / shape, 5000)
    return draw.poisson(rate)


def test_planted_variable_genes_are_found_in_order():
    moments = {p: moments_of(planted(seed), GENES) for seed, p in enumerate(["P1", "P2"])}
    chosen = choose_variable_genes(
        moments, 6, patients=["P1", "P2"], test_patient="P5", min_mean=0.05
    )
    assert list(chosen["gene"]) == VARIABLE
    assert set(chosen["category"]) == {"other"}
    # A gamma of shape a multiplies the rate by a factor of variance 1 / a.
    expected = 1 / (0.5 + 0.25 * np.arange(6))
    assert np.allclose(chosen["overdispersion"], expected, rtol=0.15)
    other_order = choose_variable_genes(
        dict(reversed(moments.items())), 6, patients=["P2", "P1"], test_patient="P5", min_mean=0.05
    )
    assert other_order.equals(chosen)


def test_totals_of_a_matrix_are_moments_too(tmp_path):
    counts = np.random.default_rng(0).poisson(0.5, (4, 30, 40))
    slide = open_slide(write_outs(tmp_path / "outs", counts, ["DES", "TWICE", "VIM", "TWICE"]))
    _, totals = slide.counts_and_totals([])
    expected = moments_of(counts[[0, 2]].reshape(2, -1).T, ["DES", "VIM"])
    assert moments_of_totals(slide.genes, totals).equals(expected)


def test_a_difference_between_patients_is_no_variability():
    draw = np.random.default_rng(0)
    moments = {
        patient: moments_of(draw.poisson([[level, 3]] * 20000), ["DIFFERS", "SAME"])
        for patient, level in (("P1", 1), ("P2", 9))
    }
    chosen = choose_variable_genes(moments, 2, patients=["P1", "P2"], test_patient="P5")
    assert (chosen["overdispersion"].abs() < 0.05).all()


def test_only_training_patients_may_choose():
    moments = {p: moments_of(planted(0), GENES) for p in ("P1", "P2", "P5")}
    training = {p: moments[p] for p in ("P1", "P2")}
    with pytest.raises(UserError, match="test patient 'P5' must not choose"):
        choose_variable_genes(moments, 6, patients=["P1", "P2"], test_patient="P5")
    with pytest.raises(UserError, match="test patient 'P2' must not choose"):
        choose_variable_genes(training, 6, patients=["P1", "P2"], test_patient="P2")
    with pytest.raises(UserError, match="exactly those"):
        choose_variable_genes(training, 6, patients=["P1"], test_patient="P5")
    with pytest.raises(UserError, match="40 genes have a mean of 0.003"):
        choose_variable_genes(training, 41, patients=["P1", "P2"], test_patient="P5")
    twice = {"P1": training["P1"].assign(gene=[GENES[0], *GENES[:-1]])}
    with pytest.raises(UserError, match="G00 occurs twice"):
        choose_variable_genes(twice, 3, patients=["P1"], test_patient="P5")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Preset:
    """A preset of three small simulated sections, in a folder of its own."""
    preset = load_preset("smoke")
    monkeypatch.setattr(Preset, "folder", property(lambda self: tmp_path / "results"))
    return preset.model_copy(
        update={"simulation": preset.simulation.model_copy(update={"side_um": 300})}
    )


def test_variable_genes_of_a_preset_are_chosen_without_the_main_patient(tiny):
    preset = tiny.model_copy(update={"genes": Genes(panel="variable", count=7)})
    with pytest.raises(UserError, match="panel.csv does not exist"):
        panel(preset)
    chosen = runs.panel(preset)
    assert len(chosen) == 7 and list(chosen.columns) == ["gene", "category"]
    assert not preset.outs("P5").exists()
    assert runs.store(preset, "P5").genes == tuple(chosen["gene"]) == tuple(panel(preset)["gene"])
    # What the test patient holds cannot change the choice.
    preset.panel_file.unlink()
    matrix = runs.section(preset, "P5").open().matrix_path
    with h5py.File(matrix, "r+") as file:
        file["matrix/data"][:] = file["matrix/data"][:][::-1]
    assert runs.panel(preset).equals(chosen)


def test_a_users_list_is_a_panel(tiny, tmp_path):
    (tmp_path / "mine.csv").write_text("gene,category\nDES,stromal\nMUC12,\n")
    preset = tiny.model_copy(update={"genes": Genes(panel=str(tmp_path / "mine.csv"))})
    assert runs.store(preset, "P1").genes == ("DES", "MUC12")
    (tmp_path / "mine.csv").write_text("DES\nNOSUCHGENE\n")
    with pytest.raises(UserError, match=r"has no gene NOSUCHGENE.*genes\.panel"):
        runs.store(preset, "P2")


@pytest.mark.parametrize(
    ("genes", "problem"),
    [
        ({"panel": "variable"}, "give count with panel 'variable'"),
        ({"panel": "paper", "count": 5}, "give count with panel 'variable'"),
        ({"panel": "variable", "count": 0}, "genes.count"),
    ],
)
def test_a_panel_setting_that_makes_no_sense_is_refused(genes, problem):
    content = load_preset("smoke").model_dump() | {"genes": genes}
    with pytest.raises(ValidationError, match=problem):
        Preset.model_validate(content)


def test_variable_genes_allow_one_test_patient_only():
    content = load_preset("laptop").model_dump()
    content["genes"] = {"panel": "variable", "count": 5}
    with pytest.raises(ValidationError, match="take test patient 'P1' out of runs"):
        Preset.model_validate(content)
