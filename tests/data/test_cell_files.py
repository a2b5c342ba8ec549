"""Cells from Space Ranger's files and from tables of the user's: the same, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from spaceranger import write_outs

from sparsity_trap.data.cells import MAPPINGS, POLYGONS, TYPES, has_cells, read_cells
from sparsity_trap.settings import UserError

SHAPE = (6, 9)
#: Cell of each bin, 0 for none.
LABEL = np.zeros(SHAPE, int)
LABEL[1:3, 1:4], LABEL[4:, 5:8], LABEL[0, 8] = 7, 12, 3


def barcodes() -> np.ndarray:
    return np.array([f"s_002um_{r:05d}_{c:05d}-1" for r, c in np.ndindex(SHAPE)]).reshape(SHAPE)


def names(label: np.ndarray) -> list[str | None]:
    return [f"cellid_{n:09d}-1" if n else None for n in label.ravel()]


def square(first: tuple[int, int], last: tuple[int, int]) -> list:
    (x0, y0), (x1, y1) = first, last
    return [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]]


@pytest.fixture
def outs(tmp_path) -> Path:
    """A small section in Space Ranger 4's layout, its tables in another order than the array's."""
    folder = write_outs(tmp_path / "outs", np.ones((1, *SHAPE), int), ["ACTB"])
    table = pd.DataFrame({"square_002um": barcodes().ravel(), "cell_id": names(LABEL)})
    table["in_cell"] = table["cell_id"].notna()
    table.sample(frac=1, random_state=1).to_parquet(folder / MAPPINGS, index=False)
    shapes = {
        12: square((20, 16), (32, 24)),
        7: square((4, 4), (16, 12)),
        3: square((1, 1), (9, 3)),
    }
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": points},
            "properties": {"cell_id": number},
        }
        for number, points in shapes.items()
    ]
    (folder / POLYGONS).parent.mkdir()
    (folder / POLYGONS).write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (folder / TYPES[1]).parent.mkdir(parents=True)
    (folder / TYPES[1]).write_text("Barcode,Cluster\ncellid_000000012-1,2\ncellid_000000007-1,1\n")
    return folder


def test_space_rangers_own_files(outs):
    cells = read_cells(outs)
    assert has_cells(outs) and not has_cells(outs.parent)
    assert cells.names == ("cellid_000000003-1", "cellid_000000007-1", "cellid_000000012-1")
    assert cells.of_bin.dtype == np.int32
    assert np.array_equal(cells.of_bin, np.select([n == LABEL for n in (3, 7, 12)], [0, 1, 2], -1))
    assert np.array_equal(cells.centre, [[5, 2], [10, 8], [26, 20]])
    assert cells.types is not None and cells.types.tolist() == ["", "1", "2"]
    (outs / TYPES[0]).write_text("cell_id,cell_type\ncellid_000000003-1,goblet\n")
    assert read_cells(outs).types.tolist() == ["goblet", "", ""]
    for file in (POLYGONS, *TYPES):
        (outs / file).unlink()
    bare = read_cells(outs)
    assert np.isnan(bare.centre).all() and bare.types is None


def test_a_table_means_the_same_however_it_is_given(outs, tmp_path):
    """As text, as parquet and in memory; by barcode or by row and column; in types of all kinds."""
    rows, cols = np.indices(SHAPE).reshape(2, -1)
    table = pd.DataFrame({"array_row": rows, "array_col": cols, "cell": LABEL.ravel()})
    gaps = table["cell"].where(table["cell"] > 0).astype(float)
    ways = {
        "plain": table,
        "gaps": table.assign(cell=gaps),
        "words": table.assign(cell=table["cell"].astype(str)),
        "mixed": table.assign(cell=[n if n != 7 else "7" for n in table["cell"]]),
        "nullable": table.assign(cell=gaps.astype("Int64")),
        "category": table.assign(cell=table["cell"].astype("category")),
        "na": table.assign(cell=gaps.astype("Int64").astype(str).replace("<NA>", "NA")),
        "doubles": table.astype(float),
        "barcodes": table.assign(Barcode=barcodes().ravel()).drop(columns=["array_row"]),
        "filled": table[table["cell"] > 0],
    }
    expected = read_cells(outs).of_bin
    for name, way in ways.items():
        given = [way]
        way.to_csv(tmp_path / f"{name}.csv", index=False)
        way.to_csv(tmp_path / f"{name}.tsv", index=False, sep="\t")
        way.to_csv(tmp_path / f"{name}.csv.gz", index=False)
        given += [tmp_path / f"{name}{end}" for end in (".csv", ".tsv", ".csv.gz")]
        if name != "mixed":
            way.to_parquet(tmp_path / f"{name}.parquet", index=False)
            given.append(str(tmp_path / f"{name}.parquet"))
        for one in given:
            cells = read_cells(outs, one)
            assert cells.names == ("3", "7", "12"), name
            assert np.array_equal(cells.of_bin, expected) and np.isnan(cells.centre).all(), name
            assert cells.types is None


def test_names_stay_as_they_are_written(outs, tmp_path):
    (tmp_path / "t.csv").write_text(
        "\ufeffbarcode,cell\n" + "\n".join(
            f"{b},{c}" for b, c in zip(barcodes()[0], ["001", "1", " a b ", "NO", "1e3", '"x,y"'],
                                       strict=False)
        )
    )  # fmt: skip
    cells = read_cells(outs, tmp_path / "t.csv")
    assert sorted(cells.names) == sorted(["001", "1", "a b", "NO", "1e3", "x,y"])


def test_polygons_and_types_of_the_users(outs):
    table = pd.DataFrame({"barcode": barcodes().ravel(), "cell": LABEL.ravel()})
    types = pd.DataFrame({"cell": [12, 3, 99], "Cell_Type": ["tumour", None, "goblet"]})
    cells = read_cells(outs, table, polygons=outs / POLYGONS, types=types)
    assert np.array_equal(cells.centre, [[5, 2], [10, 8], [26, 20]])
    assert cells.types.tolist() == ["", "", "tumour"]
    leiden = pd.DataFrame({"cell_id": [3, 7, 12], "cluster": [0, 1, 2]})
    assert read_cells(outs, table, types=leiden).types.tolist() == ["0", "1", "2"]


def frame(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns)


B = "s_002um_00001_00002-1"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (frame(barcode=[B, B], cell=[1, 1]), "row 1 and column 2 twice: give each bin one cell"),
        (frame(array_row=[1, 1], array_col=[2, 2], cell=[0, 1]), "row 1 and column 2 twice"),
        (frame(barcode=["s_002um_00006_00000-1"], cell=[1]), "row 6 and column 0, which .*list"),
        (frame(array_row=[-1], array_col=[0], cell=[1]), "row -1 and column 0, which"),
        (frame(array_row=[0.5], array_col=[0], cell=[1]), "must be whole numbers"),
        (frame(barcode=["s_008um_00000_00000-1"], cell=[1]), "'s_008um.*not that of a 2 µm bin"),
        (frame(barcode=[None], cell=[1]), "barcode '' is not that of a 2 µm bin"),
        (frame(barcode=[B], cell=[0]), "gives no bin a cell"),
        (frame(barcode=[B], label=[1]), "has columns barcode, label: it needs barcode"),
        (frame(array_row=[1], cell=[1]), "it needs barcode .or array_row and array_col. and"),
        (frame(barcode=[B], cell=[[1, 2]]), "give numbers or words"),
    ],
)  # fmt: skip
def test_faulty_tables_are_refused(outs, tmp_path, table, said):
    with pytest.raises(UserError, match=said) as error:
        read_cells(outs, table)
    assert str(error.value).startswith("the table of cells") and str(error.value).count(". ") == 0
    if not isinstance(table.iloc[0, -1], list):
        table.to_csv(tmp_path / "t.csv", index=False)
        with pytest.raises(UserError, match=said) as error:
            read_cells(outs, tmp_path / "t.csv")
        assert str(error.value).startswith(str(tmp_path / "t.csv"))


def test_a_bin_is_found_twice_in_any_piece_of_a_table(outs, monkeypatch):
    monkeypatch.setattr("sparsity_trap.data.cells._BATCH", 10)
    table = pd.DataFrame({"barcode": barcodes().ravel(), "cell": 1})
    assert (read_cells(outs, table).of_bin == 0).all()
    with pytest.raises(UserError, match="row 0 and column 3 twice"):
        read_cells(outs, pd.concat([table, table.iloc[3:4]]))


def test_missing_and_damaged_files_are_named(outs, tmp_path):
    with pytest.raises(UserError, match="none.csv does not exist: give a table with columns"):
        read_cells(outs, tmp_path / "none.csv")
    (tmp_path / "cut.parquet").write_bytes((outs / MAPPINGS).read_bytes()[:200])
    with pytest.raises(UserError, match="cut.parquet cannot be read as a table"):
        read_cells(outs, tmp_path / "cut.parquet")
    for content in (b"", b"\0\1\2", b"a,b\n1\n"):
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(UserError, match="bad.csv (cannot be read|has columns)"):
            read_cells(outs, tmp_path / "bad.csv")
    table = pd.read_parquet(outs / MAPPINGS)
    table.drop(columns="cell_id").to_parquet(outs / MAPPINGS)
    with pytest.raises(UserError, match="it needs barcode .* and cell_id"):
        read_cells(outs)  # as without segmentation
    assert not has_cells(outs)
    (outs / MAPPINGS).write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match="parquet cannot be read as a table"):
        has_cells(outs)
    (outs / MAPPINGS).unlink()
    with pytest.raises(UserError, match="from version 4 on"):
        read_cells(outs)


def test_polygons_and_types_of_other_cells_are_refused(outs, tmp_path):
    own = (outs / POLYGONS).read_text()
    for content, said in (
        (own[:90], "cannot be read as GeoJSON"),
        (own.replace("cell_id", "id"), "has no property cell_id"),
        (own.replace('"cell_id": 12', '"cell_id": 7'), "lists cell 7 twice"),
        (own.replace('"cell_id": ', '"cell_id": 10'), "names none of the cells"),
    ):
        (tmp_path / "p.geojson").write_text(content)
        with pytest.raises(UserError, match=said):
            read_cells(outs, polygons=tmp_path / "p.geojson")
    with pytest.raises(UserError, match="q.geojson does not exist"):
        read_cells(outs, polygons=tmp_path / "q.geojson")
    for types, said in (
        (frame(cell=[7, 7], type=["a", "b"]), "lists cell 7 twice"),
        (frame(cell=[8], type=["a"]), "names none of the cells"),
        (frame(cell=[7], kind=["a"]), "it needs cell_id and cell_type"),
    ):
        with pytest.raises(UserError, match=said):
            read_cells(outs, types=types)
