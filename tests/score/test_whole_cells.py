"""Predictions of any model summed to whole cells and scored there, from files."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from files import GENES, made_section, table
from scipy import stats

from sparsity_trap.score.__main__ import main
from sparsity_trap.score.cells import cells_of
from sparsity_trap.score.pairing import pair
from sparsity_trap.settings import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A section, cells of 6 x 6 bins that touch, of two types, and predictions at 2 µm."""
    folder = tmp_path_factory.mktemp("cells")
    section = made_section(folder)
    rows, cols = np.indices(section.shape)
    section.cell = rows // 6 * 100 + cols // 6 + 1
    bins = {"array_row": rows.ravel(), "array_col": cols.ravel(), "cell_id": section.cell.ravel()}
    pd.DataFrame(bins).to_csv(folder / "my cells.csv", index=False)
    own = pd.Series(np.unique(section.cell), name="cell_id")
    kinds = np.where(own % 3, "epithelial", "stromal")
    own.to_frame().assign(cell_type=kinds).to_csv(folder / "types.csv", index=False)
    table(section).write_h5ad(folder / "model.h5ad")
    section.folder = folder
    return section


@pytest.fixture(scope="module")
def card(made):
    main(
        [
            str(made.folder / "model.h5ad"), f"--section={made.outs}", "--units=counts",
            f"--cells={made.folder / 'my cells.csv'}",
            f"--cell-types={made.folder / 'types.csv'}", f"--out={made.folder / 'card'}",
        ]
    )  # fmt: skip
    return made.folder / "card"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cells_are_sums_of_what_was_predicted_and_of_what_was_counted(made, card):
    found = anndata.read_h5ad(card / "cells.h5ad")
    number = found.obs_names.astype(int)
    inside = pd.Series(made.tissue.ravel()).groupby(made.cell.ravel()).agg(["mean", "sum"])
    assert set(number) == set(inside.index[inside["mean"] > 0.5])  # most cut by no patch
    assert found.obs["bins"].tolist() == inside["sum"].loc[number].tolist()
    for values, sums in ((made.rate, found.X), (made.counts, found.layers["counts"].toarray())):
        held = pd.DataFrame((values * made.tissue).reshape(3, -1).T)
        np.testing.assert_allclose(sums, held.groupby(made.cell.ravel()).sum().loc[number], 1e-5)
    assert list(found.var_names) == GENES and found.obsm["spatial"].shape == (len(number), 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_card_scores_cells_of_each_type(made, card):
    cells = anndata.read_h5ad(card / "cells.h5ad")
    means = json.loads((card / "card.json").read_text())["cells"]
    assert list(means) == ["all cells", "epithelial", "stromal"]
    for kind, row in means.items():
        own = cells[(cells.obs["cell_type"] == kind) | (kind == "all cells")]
        pairs = zip(own.X.T, own.layers["counts"].toarray().T, strict=True)
        expected = np.mean([stats.pearsonr(*pair).statistic for pair in pairs])
        assert row["cells"] == own.n_obs and row["pcc"] == pytest.approx(expected, abs=1e-5)
    by_gene = pd.read_csv(card / "cells_genes.csv")
    assert len(by_gene) == 3 * len(GENES)
    assert len(pd.read_csv(card / "cells.csv")) == cells.n_obs
    text = (card / "index.html").read_text()
    assert "Whole cells" in text and "stromal" in text


@pytest.mark.parametrize(
    ("bin_um", "units", "table_of_cells", "sentence"),
    [
        (8, "counts", "my cells.csv", "cells are sums of 2 µm bins .* or leave the cells out"),
        (2, "z-score", "my cells.csv", "cells are sums of 2 µm bins"),
        (2, "counts", "own", "barcode_mappings.parquet does not exist.*or give a table of bin and"),
        (2, "counts", "absent.csv", "absent.csv does not exist: give a table with columns"),
    ],
)
def test_cells_that_cannot_be_summed_are_refused(made, bin_um, units, table_of_cells, sentence):
    found = pair(table(made, bin_um), made.outs, units=units)
    where = table_of_cells if table_of_cells == "own" else str(made.folder / table_of_cells)
    with pytest.raises(UserError, match=sentence):
        cells_of(found, where)
