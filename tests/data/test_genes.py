"""Panels: a user's list, and variable genes chosen without the test patient."""

from __future__ import annotations

import re

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from pydantic import ValidationError
from spaceranger import write_outs

from sparsity_trap import runs
from sparsity_trap.data.genes import choose_variable_genes, load_panel, panel
from sparsity_trap.data.spaceranger import MATRIX, read_8um_table, read_counts
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Genes, Preset, UserError


@pytest.mark.parametrize(
    "text",
    [
        "gene,category\nDES,stromal\n\nMUC12,\n",
        "# mine\ncategory\tgene\tnote\nstromal\tDES\tx\n\tMUC12\n",
        "\ufeffcategory,gene\r\nstromal,DES\r\nother,MUC12\r\n",
        "Gene;Category\r\nDES;Stromal\r\nMUC12;\r\n",
        '"gene","category",,\n"DES","stromal",,\n"MUC12","",,\n',
        '"","gene","category"\n"1","DES","stromal"\n"2","MUC12",""\n',
    ],
)
def test_a_table_gives_genes_and_categories_in_order(tmp_path, text):
    path = tmp_path / "panel.csv"
    path.write_bytes(text.encode())
    assert load_panel(path).to_dict("list") == {
        "gene": ["DES", "MUC12"],
        "category": ["stromal", "other"],
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("gene\n", "no column 'gene' or no line"),
        ("gene,category\nDES,stromal\n,stromal\n", "a line has no gene"),
        ("gene\nDES\nVIM\nDES\n", "gene DES occurs twice"),
        ("symbol,category\nDES,stromal\n", "no column 'gene'"),
        ("DES\nVIM\n", "no column 'gene'"),
        ("gene\nDES,stromal\n", "more cells"),
        ("gene,category\nDES,muscle\n", "category 'muscle' is unknown"),
    ],
)
def test_a_faulty_list_is_refused(tmp_path, text, problem):
    path = tmp_path / "panel.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        load_panel(path)


@pytest.mark.parametrize(
    ("gene", "said"),
    [
        *[(x, "is a date") for x in ("2-Sep", "Mar-01", "2024-09-02", "2024-03-01 00:00:00")],
        *[
            (x, "is a date")
            for x in ("1. Mrz", "1-März", "02-Sep-23", "3/1/2024", "01.03.", "1-OCT")
        ],
        *[(x, "is a number") for x in ("44256", "44256.0", "2.31E+13", "2,31E+13", "7")],
        *[(x, "is an error") for x in ("#NAME?", "#N/A", "#REF!")],
        *[(x, "is an id of Ensembl") for x in ("ENSG00000075624", "ENSMUSG00000029580.14")],
    ],
)
def test_what_a_spreadsheet_made_of_a_symbol_is_recognised(tmp_path, gene, said):
    path = tmp_path / "panel.csv"
    path.write_text(f'gene,category\n"{gene}",stromal\nDES,stromal\n')
    for table in (path, pd.DataFrame({"gene": [gene, "DES"]})):
        with pytest.raises(UserError, match=re.escape(f"{gene} {said}")):
            load_panel(table)


def test_symbols_that_look_odd_are_kept(tmp_path):
    genes = [
        "NA",
        "None",
        "MARCH1",
        "SEPT2",
        "DEC1",
        "MT-CO1",
        "HLA-A",
        "7SK",
        "1-8U",
        "NAN",
        "INF2",
    ]
    path = tmp_path / "panel.csv"
    path.write_text("gene\n" + "\n".join(genes))
    assert list(load_panel(path)["gene"]) == genes == list(load_panel({"gene": genes})["gene"])


def test_section_says_what_it_calls_a_missing_gene(tmp_path):
    outs = write_outs(tmp_path, np.ones((3, 2, 2), int), ["MARCHF1", "Actb", "2-Sep"])
    with pytest.raises(UserError, match="MARCHF1 for MARCH1; Actb for ACTB; 2-Sep, a date"):
        read_counts(outs, ["MARCH1", "ACTB", "DES"])


def test_a_missing_or_binary_file_is_refused(tmp_path):
    (tmp_path / "panel.csv").write_bytes(b"\xff\x00g")
    for name, problem in (("panel.csv", "save it as UTF-8"), ("none.csv", "does not exist")):
        with pytest.raises(UserError, match=problem):
            load_panel(tmp_path / name)


GENES = [f"G{i:03d}" for i in range(400)]  # scanpy compares genes of a like mean
VARIABLE = GENES[10:16]


def planted(seed: int, level: float = 1.0) -> AnnData:
    """Counts of 3000 bins: six variable genes, ten rare ones, the rest Poisson with any mean."""
    draw = np.random.default_rng(seed)
    mean = np.random.default_rng(9).permutation(np.geomspace(0.3, 20, len(GENES))) * level
    mean[:10] = 0.01  # a single count more makes these look dispersed
    rate = np.repeat(mean[None], 3000, axis=0)
    for gene in VARIABLE:
        rate[:, GENES.index(gene)] *= draw.gamma(0.5, 2, 3000)
    counts = sp.csr_matrix(draw.poisson(rate).astype(np.float32))
    return AnnData(counts, var=pd.DataFrame(index=GENES))


def test_planted_variable_genes_are_found():
    """Whatever the depth of a patient's section, and among genes too rare to tell."""
    tables = {"P1": planted(0), "P2": planted(1, level=3)}
    chosen = choose_variable_genes(tables, 6)
    assert set(chosen["gene"]) == set(VARIABLE) and set(chosen["category"]) == {"other"}
    with pytest.raises(UserError, match="390 genes have a mean of 0.05 .* 391 are asked for"):
        choose_variable_genes(tables, 391)


def test_variable_genes_are_scanpys_own_choice(tmp_path):
    """From files, in one call, what scanpy chooses from tables that are put together by hand."""
    draw, tables = np.random.default_rng(0), {}
    genes = [f"G{i}" for i in range(40)]
    for patient in ("P1", "P2"):
        rate = draw.gamma(0.3, 1, (40, 48, 48)) * draw.uniform(0.05, 2, (40, 1, 1))
        outs = write_outs(tmp_path / patient, draw.poisson(rate), genes)
        tables[patient] = read_8um_table(outs)
    chosen = choose_variable_genes(tables, 12)

    counts = anndata.concat([table.copy() for table in tables.values()], index_unique="-")
    counts.obs["patient"] = pd.Categorical(np.repeat(["P1", "P2"], 12 * 12))
    sc.pp.normalize_total(counts)
    sc.pp.log1p(counts)
    sc.pp.highly_variable_genes(counts, n_top_genes=12, batch_key="patient")
    assert set(chosen["gene"]) == set(counts.var_names[counts.var["highly_variable"]])
    score = counts.var.loc[chosen["gene"], "dispersions_norm"].to_numpy()
    both = counts.var.loc[chosen["gene"], "highly_variable_nbatches"] == 2
    assert both.any() and (np.diff(score[both]) <= 0).all()


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
    matrix = runs.section(preset, "P5").outs / MATRIX
    with h5py.File(matrix, "r+") as file:
        file["matrix/data"][:] = file["matrix/data"][:][::-1]
    assert runs.panel(preset).equals(chosen)


def test_a_users_list_is_a_panel(tiny, tmp_path):
    (tmp_path / "mine.csv").write_text("gene,category\nDES,stromal\nMUC12,\n")
    preset = tiny.model_copy(update={"genes": Genes(panel=str(tmp_path / "mine.csv"))})
    assert runs.store(preset, "P1").genes == ("DES", "MUC12")
    (tmp_path / "mine.csv").write_text("gene\nDES\nNOSUCHGENE\n")
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
