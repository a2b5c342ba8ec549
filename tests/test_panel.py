"""Panels: a user's list, and variable genes chosen without the test patient."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from spaceranger import write_outs

from sparsity_trap.config import UserError
from sparsity_trap.genes import (
    bin_moments,
    choose_variable_genes,
    load_panel,
    moments_of_totals,
)
from sparsity_trap.visium_hd import open_slide


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
    moments = {p: bin_moments([planted(seed)], GENES) for seed, p in enumerate(["P1", "P2"])}
    chosen = choose_variable_genes(moments, 6, patients=["P1", "P2"], test_patient="P5")
    assert list(chosen["gene"]) == VARIABLE
    assert set(chosen["category"]) == {"other"}
    # A gamma of shape a multiplies the rate by a factor of variance 1 / a.
    expected = 1 / (0.5 + 0.25 * np.arange(6))
    assert np.allclose(chosen["overdispersion"], expected, rtol=0.15)
    other_order = choose_variable_genes(
        dict(reversed(moments.items())), 6, patients=["P2", "P1"], test_patient="P5"
    )
    assert other_order.equals(chosen)


def test_moments_do_not_depend_on_blocks_or_storage():
    counts = planted(3)
    whole = bin_moments([counts], GENES)
    pieces = bin_moments((sp.csr_array(part.astype(np.uint16)) for part in
                          np.array_split(counts, 7)), GENES)  # fmt: skip
    assert whole.equals(pieces)
    assert np.allclose(whole["total_squares"], (counts**2).sum(0))


def test_totals_of_a_matrix_are_moments_too(tmp_path):
    counts = np.random.default_rng(0).poisson(0.5, (4, 30, 40))
    slide = open_slide(write_outs(tmp_path / "outs", counts, ["DES", "TWICE", "VIM", "TWICE"]))
    _, totals = slide.counts_and_totals([])
    expected = bin_moments([counts[[0, 2]].reshape(2, -1).T], ["DES", "VIM"])
    assert moments_of_totals(slide.genes, totals).equals(expected)


def test_a_difference_between_patients_is_no_variability():
    draw = np.random.default_rng(0)
    moments = {
        patient: bin_moments([draw.poisson([[level, 3]] * 20000)], ["DIFFERS", "SAME"])
        for patient, level in (("P1", 1), ("P2", 9))
    }
    chosen = choose_variable_genes(moments, 2, patients=["P1", "P2"], test_patient="P5")
    assert (chosen["overdispersion"].abs() < 0.05).all()


def test_only_training_patients_may_choose():
    moments = {p: bin_moments([planted(0)], GENES) for p in ("P1", "P2", "P5")}
    training = {p: moments[p] for p in ("P1", "P2")}
    with pytest.raises(UserError, match="test patient 'P5' must not choose"):
        choose_variable_genes(moments, 6, patients=["P1", "P2"], test_patient="P5")
    with pytest.raises(UserError, match="test patient 'P2' must not choose"):
        choose_variable_genes(training, 6, patients=["P1", "P2"], test_patient="P2")
    with pytest.raises(UserError, match="exactly those"):
        choose_variable_genes(training, 6, patients=["P1"], test_patient="P5")
    with pytest.raises(UserError, match="30 genes have a mean of 0.05"):
        choose_variable_genes(training, 31, patients=["P1", "P2"], test_patient="P5")
    twice = {"P1": training["P1"].assign(gene=[GENES[0], *GENES[:-1]])}
    with pytest.raises(UserError, match="G00 occurs twice"):
        choose_variable_genes(twice, 3, patients=["P1"], test_patient="P5")
