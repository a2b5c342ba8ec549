"""Tables of users: the same from a file and from memory, whatever library or program wrote them."""

from __future__ import annotations

import doctest
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from anndata import AnnData

from sparsity_trap import frames
from sparsity_trap.data import sections
from sparsity_trap.frames import as_frame
from sparsity_trap.settings import UserError

WORDS = ["NA", "None", "nan", "1E5", "TRUE", "0123", "a,b;c", "x"]
TABLE = pd.DataFrame({"gene": WORDS, "score": [0.1, np.nan, 1 / 3, -2e-9, 0, 5, np.inf, 1]})
TABLE["seed"] = np.arange(len(WORDS))


class OfArrow:
    """A table of another library that speaks Arrow."""

    def __arrow_c_stream__(self, requested_schema=None):
        return pa.Table.from_pandas(TABLE).__arrow_c_stream__(requested_schema)


KINDS = {
    "DataFrame": TABLE,
    "nullable": TABLE.convert_dtypes(),
    "types of Arrow": TABLE.convert_dtypes(dtype_backend="pyarrow"),
    "categories": TABLE.astype({"gene": pd.CategoricalDtype([*WORDS, "unused"])}),
    "objects": TABLE.astype(object),
    "index": TABLE.set_index("gene"),
    "pyarrow": pa.Table.from_pandas(TABLE),
    "another library": OfArrow(),
    "columns": TABLE.to_dict("list"),
    "rows": TABLE.to_dict("records"),
    "records": TABLE.to_records(index=False),
    "text": TABLE.astype(str),
    "decimals": TABLE.assign(seed=[Decimal(n) for n in TABLE["seed"]]),
}


def taken(table: object) -> pd.DataFrame:
    frame = as_frame(table, "the table", text=["gene"], numbers=["score", "seed"])
    return frame[list(TABLE)]


@pytest.mark.parametrize("table", KINDS.values(), ids=KINDS)
def test_every_kind_of_table_is_the_same(table):
    pd.testing.assert_frame_equal(taken(table), TABLE)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("missing", ["", "NA", "NaN"])
def test_table_of_a_file_is_that_of_memory(tmp_path, separator, missing):
    path = tmp_path / "table.csv"
    TABLE.to_csv(path, index=False, sep=separator, na_rep=missing, encoding="utf-8-sig")
    pd.testing.assert_frame_equal(taken(path), TABLE)
    TABLE.astype({"gene": "category"}).to_parquet(tmp_path / "table.parquet")
    pd.testing.assert_frame_equal(taken(str(tmp_path / "table.parquet")), TABLE)


def test_other_columns_of_a_file_are_numbers_or_text(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(" gene,n,x,word,1_0,,\nA,1,0.25,yes,1_0,,\nB,,3,,2,,\n")
    frame = as_frame(path, "the table", text=["gene"])
    assert list(frame) == ["gene", "n", "x", "word", "1_0"]
    assert [frame[name].dtype.kind for name in frame] == ["O", "f", "f", "O", "O"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (3, "no table"),
        ("no such.csv", "does not exist"),
        (b"gene", "no table"),
        (["A", "B"], "no column gene"),
        (pd.Series(["A"], name="gene"), "no table"),
        (AnnData(np.zeros((1, 1))), "no table"),
        ({"gene": ["A", "B"], "score": [1]}, "no table"),
        (TABLE.drop(columns="score"), "no column score"),
        (TABLE.assign(score="0,5"), "holds '0,5', which is no number"),
        (TABLE.rename(columns={"seed": "gene"}), "two columns gene"),
    ],
)
def test_what_is_no_such_table_is_refused_in_a_sentence(table, said):
    with pytest.raises(UserError, match=said) as caught:
        as_frame(table, "the table", text=["gene"], numbers=["score"])
    assert ": " in str(caught.value) and "\n" not in str(caught.value)


def test_examples():
    for module in (frames, sections):
        tried = doctest.testmod(module)
        assert tried.attempted and not tried.failed
