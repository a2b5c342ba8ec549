"""Space Ranger reading against scanpy, pandas and known counts."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from spaceranger import turned_grid, write_outs

from sparsity_trap.data import matrix as matrix_module
from sparsity_trap.data.matrix import in_order
from sparsity_trap.data.spaceranger import (
    MATRIX,
    POSITIONS,
    SCALES,
    open_slide,
    read_8um_table,
    read_counts,
    read_positions,
)
from sparsity_trap.settings import UserError

GENES = ["ACTB", "KRT8", "JCHAIN", "VIM", "MT-ND3"]


def random_counts(shape: tuple[int, ...], density: float = 0.2) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.poisson(3, shape) * (rng.random(shape) < density)


@pytest.fixture
def outs(tmp_path: Path) -> Path:
    return write_outs(tmp_path / "outs", random_counts((5, 6, 7), 0.5), GENES)


@pytest.mark.parametrize("index_dtype", ["int32", "uint32", "int64"])
@pytest.mark.parametrize("block", [50, 1000, 10_000_000])
def test_counts_equal_scanpy(tmp_path, index_dtype, block):
    import scanpy

    in_tissue = np.random.default_rng(2).random((61, 83)) < 0.8
    counts = random_counts((5, 61, 83)) * in_tissue
    outs = write_outs(
        tmp_path / "outs", counts, GENES, in_tissue=in_tissue, index_dtype=index_dtype
    )
    wanted = ["MT-ND3", "ACTB", "VIM"]
    result = read_counts(outs, wanted, block=block)

    peer = scanpy.read_10x_h5(outs / MATRIX)
    place = peer.obs_names.str.extract(r"s_002um_(\d+)_(\d+)-1").astype(int).to_numpy()
    expected = np.zeros((61, 83, 3))
    expected[place[:, 0], place[:, 1]] = peer[:, wanted].X.toarray()
    assert expected.sum() > 1000
    assert np.array_equal(result.toarray(), expected.reshape(-1, 3))
    assert result.dtype == np.uint16 and result.indices.dtype == np.int32
    assert result.format == "csc" and result.has_canonical_format
    assert open_slide(outs).array_shape == (61, 83) and open_slide(outs).genes == tuple(GENES)


def test_8um_table_equals_sums_of_scanpys_table(tmp_path):
    """With a rest at the end of the array, bins without a barcode, a symbol twice, an antibody."""
    import scanpy

    in_tissue = np.random.default_rng(2).random((33, 42)) < 0.3
    in_tissue[8:12, 4:8] = False
    kinds = ["Gene Expression"] * 4 + ["Antibody Capture"]
    genes = ["ACTB", "KRT8", "ACTB", "VIM", "CD3"]
    counts = random_counts((5, 33, 42)) * in_tissue
    outs = write_outs(tmp_path / "outs", counts, genes, in_tissue=in_tissue, kinds=kinds)
    table = read_8um_table(outs)

    peer = scanpy.read_10x_h5(outs / MATRIX)
    row, col = peer.obs_names.str.extract(r"s_002um_(\d+)_(\d+)-1").astype(int).to_numpy().T
    names = [f"s_008um_{r:05d}_{c:05d}-1" for r, c in zip(row // 4, col // 4, strict=True)]
    expected = pd.DataFrame(peer.X.toarray(), names).groupby(level=0).sum()
    expected.columns = peer.var_names
    expected = expected.T.groupby(level=0).sum().T[["ACTB", "KRT8", "VIM"]]
    assert list(table.obs_names) == list(expected.index) and "s_008um_00002_00001-1" not in names
    assert list(table.var_names) == ["ACTB", "KRT8", "VIM"]
    assert np.array_equal(table.X.toarray(), expected.to_numpy())
    assert (table.obs["array_row"] == [int(name[8:13]) for name in expected.index]).all()


@pytest.mark.parametrize(
    "layout",
    [
        {},  # in one piece, uncompressed
        {"chunks": (100,)},
        {"chunks": (100,), "compression": "gzip"},
        {"chunks": (100,), "compression": "gzip", "shuffle": True},
        {"chunks": (100,), "compression": "lzf", "shuffle": True},
        {"chunks": (100,), "compression": "gzip", "fletcher32": True},
    ],
)
def test_any_layout_of_the_file(tmp_path, layout):
    counts = random_counts((5, 31, 33)) * 300  # more than a byte holds
    outs = write_outs(tmp_path / "outs", counts, GENES)
    with h5py.File(outs / MATRIX, "a") as file:
        for name in ("barcodes", "indices", "data"):
            values = file["matrix"][name][:]
            if name == "data":
                values = values.astype(">i4")
            del file["matrix"][name]
            file["matrix"].create_dataset(name, data=values, **layout)
    result = read_counts(outs, GENES, block=250).toarray()
    assert np.array_equal(result, counts.reshape(5, -1).T)


def test_empty_matrix(tmp_path):
    outs = write_outs(tmp_path / "outs", np.zeros((5, 6, 7), int), GENES)
    assert read_counts(outs, GENES).nnz == 0
    no_tissue = {"in_tissue": np.zeros((6, 7), bool)}
    outs = write_outs(tmp_path / "b", np.ones((5, 6, 7), int), GENES, **no_tissue)
    counts = read_counts(outs, GENES)
    assert counts.shape == (42, 5) and counts.nnz == 0


def test_space_ranger_4_folder(tmp_path):
    """Cell segmentations lie beside the bins, and scale factors have further keys."""
    counts = random_counts((5, 6, 7))
    outs = write_outs(tmp_path / "outs", counts, GENES)
    (outs / "segmented_outputs").mkdir()
    (outs / "segmented_outputs" / "filtered_feature_cell_matrix.h5").write_bytes(b"")
    scales = json.loads((outs / SCALES).read_text())
    scales |= {"spot_diameter_fullres": 7.3, "tissue_hires_scalef": 0.1, "regist_target_img": 0.2}
    (outs / SCALES).write_text(json.dumps(scales))
    assert read_counts(outs, GENES).sum() == counts.sum()
    shutil.rmtree(outs / "binned_outputs")
    with pytest.raises(UserError, match="binned_outputs.*does not exist"):
        open_slide(outs)


def test_real_miniature(shared_data, tmp_path):
    """The real file has text and integer types of its own, and not a single count."""
    import scanpy

    outs = shared_data / "visium_hd_002um_mini"
    image = tmp_path / "he.tif"
    tifffile.imwrite(image, np.zeros((8, 8, 3), np.uint8), photometric="rgb")
    slide = open_slide(outs, image)
    peer = scanpy.read_10x_h5(outs / MATRIX)
    assert slide.genes == tuple(peer.var_names)
    counts = read_counts(outs, ["Sox17", "Xkr4"])
    assert counts.shape == (slide.array_shape[0] * slide.array_shape[1], 2) and counts.nnz == 0
    assert slide.microns_per_pixel == pytest.approx(0.2738242950835738)

    table = pd.read_parquet(outs / POSITIONS)
    positions = read_positions(outs)
    assert positions.in_tissue.sum() == (table.in_tissue == 1).sum()
    assert np.isfinite(positions.y).sum() == len(table)
    found = positions.x[table.array_row, table.array_col]
    np.testing.assert_allclose(found, table.pxl_col_in_fullres, atol=0.005)


def test_positions_equal_pandas(tmp_path):
    y, x, _ = turned_grid((61, 83), (False, True, False))
    in_tissue = np.random.default_rng(2).random((61, 83)) < 0.5
    outs = write_outs(
        tmp_path / "outs", np.zeros((5, 61, 83), int), GENES, y=y, x=x, in_tissue=in_tissue
    )
    positions = read_positions(outs)
    assert np.array_equal(positions.in_tissue, in_tissue)
    np.testing.assert_allclose(positions.y, y, atol=1e-3)
    np.testing.assert_allclose(positions.x, x, atol=1e-3)


def test_features_of_one_symbol_are_summed_and_antibodies_ignored(tmp_path):
    counts = random_counts((3, 20, 30))
    kinds = ["Gene Expression", "Gene Expression", "Antibody Capture"]
    outs = write_outs(tmp_path / "outs", counts, ["CD74"] * 3, kinds=kinds)
    result = read_counts(outs, ["CD74"]).toarray()[:, 0]
    assert np.array_equal(result, counts[:2].sum(0).ravel())


def test_a_sum_of_features_above_16_bits(tmp_path):
    counts = np.zeros((2, 20, 30), int)
    counts[:, 3, 4] = 40_000
    outs = write_outs(tmp_path / "outs", counts, ["CD74"] * 2)
    with pytest.raises(UserError, match="holds 80000 counts of one gene"):
        read_counts(outs, ["CD74"])


@pytest.mark.parametrize("bin_", [0, 9000, 3350**2, 2**31 - 1])
@pytest.mark.parametrize("largest", [9, 255, 256, 40_000])
@pytest.mark.parametrize("block", [700, 10**6])
def test_in_order_sorts_and_adds_up(monkeypatch, bin_, largest, block):
    monkeypatch.setattr(matrix_module, "_BATCH", block)
    rng = np.random.default_rng(6)
    bins, values = rng.integers(0, 2000, 5000, np.int32), rng.integers(0, 5, 5000, np.uint16)
    bins[99], values[99] = bin_, largest
    for n in (0, 1, 5000):
        found, sums = bins[:n].copy(), values[:n].copy()
        size = in_order(found, sums, Path("matrix.h5"))
        expected, place = np.unique(bins[:n], return_inverse=True)
        total = np.bincount(place, values[:n])
        assert np.array_equal(found[:size], expected[total > 0])
        assert np.array_equal(sums[:size], total[total > 0])
    assert 1000 < size < 2100


def test_memory_does_not_grow_with_other_genes(tmp_path):
    """A million entries of genes nobody asked for pass through in blocks."""

    def peak(others: int) -> int:
        counts = np.ones((1 + others, 200, 200), np.uint8)
        counts[0] = np.random.default_rng(3).random((200, 200)) < 0.05
        genes = ["ACTB", *(f"G{i}" for i in range(others))]
        outs = write_outs(tmp_path / f"outs{others}", counts, genes)
        tracemalloc.start()
        result = read_counts(outs, ["ACTB"], block=20_000)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert result.sum() == counts[0].sum()
        return traced

    peak(1)  # imports and caches
    assert peak(24) < 1.1 * peak(2)


@pytest.mark.parametrize("missing", [MATRIX, POSITIONS, SCALES, "tissue_image.tif"])
def test_missing_file_is_named(outs, missing):
    (outs / missing).unlink()
    with pytest.raises(UserError, match=Path(missing).name):
        open_slide(outs)


def test_missing_folders_and_named_image(outs, tmp_path):
    with pytest.raises(UserError, match="he.tif does not exist"):
        open_slide(outs, tmp_path / "he.tif")
    shutil.rmtree(outs / "binned_outputs")
    with pytest.raises(UserError, match="binned_outputs"):
        open_slide(outs)
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_slide(tmp_path / "nowhere")


def test_unknown_gene_is_named(outs):
    with pytest.raises(UserError, match="filtered_feature_bc_matrix.h5 has no gene MUC12"):
        read_counts(outs, ["ACTB", "MUC12"])


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (-2, "int32", "-2, which is not a count"),
        (0.5, "float32", "0.5, which is not"),
        (70000, "int32", "65535"),
    ],
)
def test_values_that_are_no_counts(tmp_path, value, dtype, message):
    counts = np.zeros((5, 4, 4))
    counts[1, 2, 3] = value
    outs = write_outs(tmp_path / "outs", counts, GENES, data_dtype=dtype)
    assert read_counts(outs, ["ACTB"]).nnz == 0
    with pytest.raises(UserError, match=message):
        read_counts(outs, ["KRT8"])


def test_wrong_bin_size(tmp_path):
    counts = np.ones((5, 4, 4), int)
    outs = write_outs(tmp_path / "a", counts, GENES, bin_um=8.0)
    with pytest.raises(UserError, match="bin_size_um is 8.0"):
        open_slide(outs)
    outs = write_outs(tmp_path / "b", counts, GENES, prefix="s_008um")
    with pytest.raises(UserError, match="s_008um_.*not that of a 2 µm bin"):
        read_counts(outs, ["ACTB"])


def test_files_of_different_sections(outs):
    path = outs / POSITIONS
    table = pd.read_parquet(path)
    table[table.array_row < 3].to_parquet(path)
    with pytest.raises(UserError, match="outside the grid of 3 x 7 bins"):
        read_counts(outs, ["ACTB"])


def test_damaged_files(outs):
    with h5py.File(outs / MATRIX, "a") as file:
        del file["matrix/indices"]
    with pytest.raises(UserError, match="has no indices in the group"):
        read_counts(outs, ["ACTB"])
    (outs / MATRIX).write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="not a whole Space Ranger matrix"):
        open_slide(outs)
    (outs / "tissue_image.tif").write_bytes(b"no TIFF")
    (outs / POSITIONS).write_bytes(b"no parquet")
    with pytest.raises(UserError, match="h5|parquet"):
        open_slide(outs)


def test_truncated_files(tmp_path):
    counts = random_counts((5, 200, 200))
    outs = write_outs(tmp_path / "outs", counts, GENES)
    whole = (outs / MATRIX).read_bytes()
    for share in (0.1, 0.5, 0.99):
        (outs / MATRIX).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="filtered_feature_bc_matrix.h5 is not a whole.*copy"):
            open_slide(outs)
    (outs / MATRIX).write_bytes(whole)
    with h5py.File(outs / MATRIX) as file:
        chunk = file["matrix/indices"].id.get_chunk_info(0)
    damaged = bytearray(whole)
    damaged[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    (outs / MATRIX).write_bytes(damaged)
    with pytest.raises(UserError, match="not a whole Space Ranger matrix.*damaged chunk.*copy"):
        read_counts(outs, ["ACTB"])

    whole = (outs / POSITIONS).read_bytes()
    (outs / POSITIONS).write_bytes(whole[: len(whole) // 2])
    for read in (lambda: open_slide(outs), lambda: read_positions(outs)):
        with pytest.raises(UserError, match="tissue_positions.parquet is not a whole.*copy it"):
            read()
    # The middle overwritten, the footer whole.
    (outs / POSITIONS).write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[-len(whole) // 2 :])
    with pytest.raises(UserError, match="tissue_positions.parquet is not a whole.*copy it"):
        read_positions(outs)


def test_parquet_without_a_column_or_a_row(outs):
    table = pd.read_parquet(outs / POSITIONS)
    table.drop(columns="in_tissue").to_parquet(outs / POSITIONS)
    with pytest.raises(UserError, match="tissue_positions.parquet has no column in_tissue"):
        read_positions(outs)
    table.drop(columns="array_row").to_parquet(outs / POSITIONS)
    with pytest.raises(UserError, match="tissue_positions.parquet has no column array_row"):
        open_slide(outs)
    table[:0].to_parquet(outs / POSITIONS)
    with pytest.raises(UserError, match="lists no bins"):
        open_slide(outs)


def test_barcodes_that_cannot_be(outs):
    with h5py.File(outs / MATRIX, "a") as file:
        barcodes = file["matrix/barcodes"]
        first = barcodes[0]
        barcodes[0] = barcodes[1]
    with pytest.raises(UserError, match="lists a barcode twice"):
        read_counts(outs, ["ACTB"])
    with h5py.File(outs / MATRIX, "a") as file:
        file["matrix/barcodes"][0] = b"AAACCTGA-1"
    with pytest.raises(UserError, match="barcode AAACCTGA-1 is not that of a 2 µm bin"):
        read_counts(outs, ["ACTB"])
    with h5py.File(outs / MATRIX, "a") as file:
        matrix = file["matrix"]
        matrix["barcodes"][0] = first
        indices = matrix["indices"]
        indices[3], before = 99, indices[3]
    with pytest.raises(UserError, match="is not a whole Space Ranger matrix"):
        read_counts(outs, ["ACTB"])
    with h5py.File(outs / MATRIX, "a") as file:
        matrix = file["matrix"]
        matrix["indices"][3] = before
        matrix["indptr"][-1] = 10_000
    with pytest.raises(UserError, match="indptr does not fit"):
        read_counts(outs, ["ACTB"])
