"""Executed notebooks become pages that say how they were made and offer their figures' numbers."""

from __future__ import annotations

import io
import sys

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from IPython.core.formatters import DisplayFormatter

from sparsity_trap import settings as config
from sparsity_trap.presets import load_preset
from sparsity_trap.runs import Quotes
from sparsity_trap.settings import UserError
from sparsity_trap.show import style

sys.path.insert(0, str(ROOT / "workflow"))
import pages  # noqa: E402
import stage_book  # noqa: E402

NUMBERS = {
    "run.commit": "of training",
    "run.hardware": "the machine of training",
    "training.seconds.total": 1234.5,
    **{f"cohort.sha256.{patient}": f"{patient}{'0' * 62}" for patient in ("P1", "P2", "P5")},
}


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    """A notebook as papermill leaves it: a title that a cell prints, and a figure."""
    figure = style.Exhibit(figsize=(1, 1))
    style.mark(figure, "simulated", pd.DataFrame({"gene": ["A", "B"], "gain": [0.1, 1 / 3]}))
    data, _ = DisplayFormatter().format(figure)
    data["image/png"] = ""
    v4 = nbformat.v4
    title = v4.new_output("execute_result", {"text/markdown": "# Arm E"})
    cells = [
        v4.new_code_cell("", metadata={"tags": ["title"]}, outputs=[title]),
        v4.new_code_cell("", metadata={"tags": ["injected-parameters"]}),
        v4.new_code_cell(
            "figure",
            metadata={"mystnb": {"figure": {"name": "fig-gain"}}},
            outputs=[v4.new_output("execute_result", data)],
        ),
    ]
    papermill = {
        "input_path": "/tmp/x/02_train.ipynb",
        "duration": 12.3,
        "parameters": {
            "preset": "smoke",
            "source": "",
            "arm": "E",
            "test_patients": "",
            "seeds": "0,1",
        },
    }
    own = {"commit": "0123456789", "hardware": "a machine"}
    return v4.new_notebook(cells=cells, metadata={"papermill": papermill, "sparsity_trap": own})


def test_page_says_how_it_was_made(notebook, tmp_path):
    page = pages.as_page(notebook, "02_train_E", load_preset("smoke"), NUMBERS, tmp_path)
    assert page.cells[0].source == "# Arm E"
    assert page.cells[1].metadata["tags"] == ["injected-parameters", "remove-cell"]
    made = page.cells[-1].source
    for said in (
        "Simulated sections", "P5 `P50000000000`", "</notebooks/02_train.py>", "`0123456789`",
        "preset=smoke arm=E seeds=0,1", "12 s for this page", "1,234 s", "a machine",
        "<tables/figures/02_train_E-gain.csv>",
    ):  # fmt: skip
        assert said in made
    assert "of training`" not in made and "machine of training" not in made


def test_page_of_other_evidence_names_it_and_no_sections(notebook, tmp_path):
    notebook.metadata.papermill["input_path"] = "/tmp/x/11_record.ipynb"
    notebook.metadata.papermill["parameters"] = {"preset": "smoke"}
    made = pages.as_page(notebook, "11_record", load_preset("smoke"), NUMBERS, tmp_path)
    made = made.cells[-1].source
    assert "printed by others about real tissue" in made and "| 12 s |" in made
    assert "imulated" not in made and "SHA-256" not in made and "seed" not in made


def test_numbers_behind_a_figure_are_a_file(notebook, tmp_path):
    page = pages.as_page(notebook, "02_train_E", load_preset("smoke"), NUMBERS, tmp_path)
    written = tmp_path / "tables" / "figures" / "02_train_E-gain.csv"
    pd.testing.assert_frame_equal(
        pd.read_csv(io.StringIO(written.read_text())),
        pd.DataFrame({"gene": ["A", "B"], "gain": [0.1, 0.333333]}),
    )
    assert set(page.cells[2].outputs[0].data) == {"text/plain", "image/png"}


@pytest.mark.parametrize(
    "data",
    [
        {"text/plain": "<IPython.core.display.Markdown object>", "text/markdown": ""},
        {"text/plain": "<Figure object at 0x7f00>"},
        {"text/plain": "[<matplotlib.lines.Line2D at 0x7f00>]"},
    ],
)
def test_no_page_shows_the_repr_of_an_object(notebook, tmp_path, data):
    output = nbformat.v4.new_output("execute_result", data)
    notebook.cells.append(nbformat.v4.new_code_cell("Markdown(text)", outputs=[output]))
    with pytest.raises(UserError, match=r"page 02_train_E: the cell 'Markdown\(text\)' shows"):
        pages.as_page(notebook, "02_train_E", load_preset("smoke"), NUMBERS, tmp_path)


def test_text_and_what_has_another_form_are_shown(notebook, tmp_path):
    v4 = nbformat.v4
    shown = [
        {"text/plain": "<0.001"},
        {"text/plain": "<IPython.core.display.Markdown object>", "text/markdown": "# Arm"},
    ]
    outputs = [v4.new_output("execute_result", data) for data in shown]
    notebook.cells += [v4.new_code_cell("x", outputs=[output]) for output in outputs]
    pages.as_page(notebook, "02_train_E", load_preset("smoke"), NUMBERS, tmp_path)


def test_the_leading_picture_stands_below_the_title_and_its_code_where_it_was(notebook, tmp_path):
    notebook.cells[2].metadata["tags"] = ["hide-input", "lead"]
    page = pages.as_page(notebook, "02_train_E", load_preset("smoke"), NUMBERS, tmp_path)
    lead, code = page.cells[1], page.cells[3]
    assert lead.metadata["mystnb"]["figure"]["name"] == "fig-gain"
    assert lead.outputs and lead.source
    assert code.source == "figure" and not code.outputs and "mystnb" not in code.metadata
    assert (tmp_path / "tables/figures/02_train_E-gain.csv").is_file()


def test_the_picture_of_the_front_page_is_taken_out(notebook, tmp_path):
    output = nbformat.v4.new_output("execute_result", {"image/jpeg": "/9j/"})
    cell = nbformat.v4.new_code_cell("x", metadata={"tags": ["front-page"]}, outputs=[output])
    notebook.cells.append(cell)
    pages.as_page(notebook, "05_rescue", load_preset("smoke"), NUMBERS, tmp_path)
    assert (tmp_path / "front.jpg").read_bytes() == b"\xff\xd8\xff" and not cell.outputs


@pytest.fixture
def quoting(monkeypatch, tmp_path):
    """Notebooks that quote numbers, and what staging makes of them."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    preset = load_preset("smoke")
    patches = {f"cohort.n_patches.{p}": 4 for p in preset.patients}
    digests = {f"cohort.sha256.{p}": "0" * 64 for p in preset.patients}
    settings = {"decoder.layers": 1} | patches | digests
    monkeypatch.setattr(stage_book, "of_preset", lambda preset: settings)
    for name in ("02_train_D", "02_train_E"):
        Quotes(preset, name)("decoder.hist2st", parameters=100)
    return preset


def test_numbers_of_all_pages_are_one_table(quoting):
    Quotes(quoting, "04_sparsity")("sparsity", rho=float("nan"))
    numbers = stage_book.quoted(quoting, ["01_data_P5", "02_train_D", "02_train_E", "04_sparsity"])
    assert numbers["decoder.hist2st.parameters"] == 100 and numbers["sparsity.rho"] is None
    assert numbers["decoder.layers"] == 1 and numbers["cohort.n_patches"] == 12


def test_a_number_quoted_twice_with_different_values_names_both_notebooks(quoting):
    Quotes(quoting, "02_train_E")("decoder.hist2st", parameters=200)
    said = "'decoder.hist2st.parameters' is 100 in 02_train_D and 200 in 02_train_E: quote it once"
    with pytest.raises(UserError, match=said):
        stage_book.quoted(quoting, ["02_train_D", "02_train_E"])
    # An arm that the preset no longer trains has no page.
    assert stage_book.quoted(quoting, ["02_train_E"])["decoder.hist2st.parameters"] == 200
