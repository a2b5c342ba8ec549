"""Space Ranger reading against scanpy, pandas and known maps."""

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
from PIL import Image
from spaceranger import DIHEDRAL, turned_grid, write_feature_slice, write_outs

from sparsity_trap.data import spaceranger as visium_hd
from sparsity_trap.data.inflate import read_all, reader
from sparsity_trap.data.spaceranger import (
    Orientation,
    Slide,
    fit_grid_to_pixels,
    in_order,
    open_slide,
    orientation_of,
    read_region,
)
from sparsity_trap.settings import UserError

GENES = ["ACTB", "KRT8", "JCHAIN", "VIM", "MT-ND3"]
MATRIX = "binned_outputs/square_002um/filtered_feature_bc_matrix.h5"
POSITIONS = "binned_outputs/square_002um/spatial/tissue_positions.parquet"
SCALES = "binned_outputs/square_002um/spatial/scalefactors_json.json"


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
    slide = open_slide(outs)
    wanted = ["MT-ND3", "ACTB", "VIM"]
    result = slide.counts(wanted, block=block)

    peer = scanpy.read_10x_h5(outs / MATRIX)
    place = peer.obs_names.str.extract(r"s_002um_(\d+)_(\d+)-1").astype(int).to_numpy()
    expected = np.zeros((61, 83, 3))
    expected[place[:, 0], place[:, 1]] = peer[:, wanted].X.toarray()
    assert expected.sum() > 1000
    assert np.array_equal(result.toarray(), expected.reshape(-1, 3))
    assert result.dtype == np.uint16 and result.indices.dtype == np.int32
    assert result.format == "csc" and result.has_canonical_format
    assert slide.array_shape == (61, 83) and slide.genes == tuple(GENES)


@pytest.mark.parametrize("dtype", ["int64", "uint32"])
@pytest.mark.parametrize("mask", [True, False])
def test_feature_slices_give_the_same_arrays(tmp_path, mask, dtype):
    in_tissue = np.random.default_rng(2).random((61, 83)) < 0.8
    counts = random_counts((5, 61, 83))
    counts[4] = 0
    genes = ["ACTB", "KRT8", "ACTB", "VIM", "MT-ND3"]  # one symbol twice, one gene without counts
    outs = write_outs(tmp_path / "outs", counts * in_tissue, genes, in_tissue=in_tissue)
    slide, wanted = open_slide(outs), ["MT-ND3", "ACTB", "VIM"]
    expected = slide.counts(wanted)
    path = write_feature_slice(outs, counts, genes, in_tissue, mask=mask, dtype=dtype)
    for block in (50, 1_000_000):
        result = slide.counts(wanted, block=block)
        for name in ("indptr", "indices", "data"):
            found, wanted_array = getattr(result, name), getattr(expected, name)
            assert np.array_equal(found, wanted_array) and found.dtype == wanted_array.dtype
    assert result.sum() == (counts[[0, 2, 3, 4]] * in_tissue).sum() > 1000

    with h5py.File(outs / MATRIX, "a") as file:
        del file["matrix/indices"]
    assert slide.counts(wanted).nnz == expected.nnz  # the matrix was not read
    with h5py.File(path, "a") as file:
        file["features/name"][0] = b"OTHER"
    with pytest.raises(UserError, match="feature_slice.h5 lists other features.*same section"):
        slide.counts(wanted)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match="feature_slice.h5 is not a whole feature_slice.h5"):
        slide.counts(wanted)


def test_feature_slices_of_another_section(tmp_path):
    counts, tissue = random_counts((5, 6, 7)), np.ones((6, 7), bool)
    slide = open_slide(write_outs(tmp_path / "outs", counts, GENES))
    fewer = tissue.copy()
    fewer[0, 0] = False
    write_feature_slice(slide.outs, counts, GENES, fewer)
    with pytest.raises(UserError, match="has 41 bins under tissue.*42.*same section"):
        slide.counts(["ACTB"])
    wider = np.pad(counts, ((0, 0), (0, 0), (0, 3)), constant_values=1)
    write_feature_slice(slide.outs, wider, GENES, tissue)
    with pytest.raises(UserError, match="outside the grid of 6 x 7 bins"):
        slide.counts(["ACTB"])


@pytest.mark.parametrize("block", [50, 1_000_000])
def test_counts_and_totals_in_one_pass(tmp_path, block):
    counts = random_counts((5, 61, 83))
    counts[3, 2, 2] = 40_000
    kinds = ["Gene Expression"] * 4 + ["Antibody Capture"]
    slide = open_slide(write_outs(tmp_path / "outs", counts, GENES, kinds=kinds))
    result, totals = slide.counts_and_totals(["VIM", "ACTB"], block=block)
    assert (result != slide.counts(["VIM", "ACTB"])).nnz == 0
    flat = counts[:4].reshape(4, -1).astype(np.int64)
    assert np.array_equal(totals.umis, flat.sum(1))
    assert np.array_equal(totals.squares, (flat**2).sum(1))
    assert np.array_equal(totals.bins, (flat > 0).sum(1))
    assert totals.n_bins == 61 * 83
    nothing, again = slide.counts_and_totals([])
    assert nothing.shape == (61 * 83, 0) and np.array_equal(again.umis, totals.umis)


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
    result = open_slide(outs).counts(GENES, block=250).toarray()
    assert np.array_equal(result, counts.reshape(5, -1).T)


def test_empty_matrix(tmp_path):
    slide = open_slide(write_outs(tmp_path / "outs", np.zeros((5, 6, 7), int), GENES))
    assert slide.counts(GENES).nnz == 0
    no_tissue = {"in_tissue": np.zeros((6, 7), bool)}
    slide = open_slide(write_outs(tmp_path / "b", np.ones((5, 6, 7), int), GENES, **no_tissue))
    counts, totals = slide.counts_and_totals(GENES)
    assert counts.shape == (42, 5) and counts.nnz == totals.umis.sum() == totals.n_bins == 0


def test_space_ranger_4_folder(tmp_path):
    """Cell segmentations lie beside the bins, and scale factors have further keys."""
    counts = random_counts((5, 6, 7))
    outs = write_outs(tmp_path / "outs", counts, GENES)
    (outs / "segmented_outputs").mkdir()
    (outs / "segmented_outputs" / "filtered_feature_cell_matrix.h5").write_bytes(b"")
    scales = json.loads((outs / SCALES).read_text())
    scales |= {"spot_diameter_fullres": 7.3, "tissue_hires_scalef": 0.1, "regist_target_img": 0.2}
    (outs / SCALES).write_text(json.dumps(scales))
    assert open_slide(outs).counts(GENES).sum() == counts.sum()
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
    counts = slide.counts(["Sox17", "Xkr4"])
    assert counts.shape == (slide.array_shape[0] * slide.array_shape[1], 2) and counts.nnz == 0
    assert slide.microns_per_pixel == pytest.approx(0.2738242950835738)

    table = pd.read_parquet(outs / POSITIONS)
    positions = slide.positions()
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
    positions = open_slide(outs).positions()
    assert np.array_equal(positions.in_tissue, in_tissue)
    np.testing.assert_allclose(positions.y, y, atol=1e-3)
    np.testing.assert_allclose(positions.x, x, atol=1e-3)


def test_features_of_one_symbol_are_summed_and_antibodies_ignored(tmp_path):
    counts = random_counts((3, 20, 30))
    kinds = ["Gene Expression", "Gene Expression", "Antibody Capture"]
    outs = write_outs(tmp_path / "outs", counts, ["CD74"] * 3, kinds=kinds)
    result = open_slide(outs).counts(["CD74"]).toarray()[:, 0]
    assert np.array_equal(result, counts[:2].sum(0).ravel())


def test_a_sum_of_features_above_16_bits(tmp_path):
    counts = np.zeros((2, 20, 30), int)
    counts[:, 3, 4] = 40_000
    outs = write_outs(tmp_path / "outs", counts, ["CD74"] * 2)
    for _ in range(2):
        with pytest.raises(UserError, match="holds 80000 counts of one gene"):
            open_slide(outs).counts(["CD74"])
        write_feature_slice(outs, counts, ["CD74"] * 2, np.ones((20, 30), bool))


def test_feature_slices_with_a_column_cut_short(outs):
    path = write_feature_slice(outs, random_counts((5, 6, 7), 0.9), GENES, np.ones((6, 7), bool))
    with h5py.File(path, "a") as file:
        file["feature_slices/0/row"].resize(3, axis=0)
    with pytest.raises(UserError, match="feature_slice.h5 is not a whole.*different lengths"):
        open_slide(outs).counts(["ACTB"])


def test_feature_slices_that_hold_fractions(outs):
    path = write_feature_slice(outs, random_counts((5, 6, 7), 0.9), GENES, np.ones((6, 7), bool))
    with h5py.File(path, "a") as file:
        rows = file["feature_slices/0/row"][:].astype(float)
        del file["feature_slices/0/row"]
        file["feature_slices/0/row"] = rows
    with pytest.raises(UserError, match="feature_slice.h5 is not a whole.*no whole numbers"):
        open_slide(outs).counts(["ACTB"])


@pytest.mark.parametrize("bin_", [0, 9000, 3350**2, 2**31 - 1])
@pytest.mark.parametrize("largest", [9, 255, 256, 40_000])
@pytest.mark.parametrize("block", [700, 10**6])
def test_in_order_sorts_filters_and_adds_up(monkeypatch, bin_, largest, block):
    monkeypatch.setattr(visium_hd, "_BATCH", block)
    rng = np.random.default_rng(6)
    bins, values = rng.integers(0, 2000, 5000, np.int32), rng.integers(0, 5, 5000, np.uint16)
    bins[99], values[99] = bin_, largest
    for n in (0, 1, 5000):
        for listed in (None, rng.random(bin_ + 2000) < 0.7) if bin_ < 10**8 else (None,):
            found, sums = bins[:n].copy(), values[:n].copy()
            size = in_order(found, sums, Path("matrix.h5"), listed)
            expected, place = np.unique(bins[:n], return_inverse=True)
            total = np.bincount(place, values[:n])
            kept = (total > 0) & (True if listed is None else listed[expected])
            assert np.array_equal(found[:size], expected[kept])
            assert np.array_equal(sums[:size], total[kept])
    assert 1000 < size < 2000


@pytest.mark.parametrize("layout", [{"shuffle": True, "compression": "gzip"}, {}])
@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(d, n) for d in ("<i8", ">i8", "<u4", ">i4", "<i2", "u1") for n in (100, 70_000, 2**40)
     if n <= np.iinfo(d).max] + [("<f4", 1), ("<i4", -3)],
)  # fmt: skip
def test_parts_of_a_dataset_equal_h5py(tmp_path, dtype, largest, layout):
    values = (np.random.default_rng(7).random(1000) * largest).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=values, chunks=(64,), **layout)
    with h5py.File(tmp_path / "a.h5") as file:
        read = reader(file["a"])
        for start, stop in ((0, 1000), (64, 128), (70, 75), (60, 200), (999, 1000), (5, 5)):
            assert np.array_equal(read(start, stop), file["a"][start:stop])
        assert np.array_equal(read_all(file["a"], 100), values)


def test_memory_does_not_grow_with_other_genes(tmp_path):
    """A million entries of genes nobody asked for pass through in blocks."""

    def peak(others: int) -> int:
        counts = np.ones((1 + others, 200, 200), np.uint8)
        counts[0] = np.random.default_rng(3).random((200, 200)) < 0.05
        genes = ["ACTB", *(f"G{i}" for i in range(others))]
        slide = open_slide(write_outs(tmp_path / f"outs{others}", counts, genes))
        tracemalloc.start()
        result = slide.counts(["ACTB"], block=20_000)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert result.sum() == counts[0].sum()
        return traced

    peak(1)  # imports and caches
    assert peak(24) < 1.1 * peak(2)


def test_region_reads_only_the_tiles_it_needs(tmp_path, outs, monkeypatch):
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 255, (1500, 2100, 3), np.uint8)
    for layout in ({"tile": (256, 256), "compression": "zlib"}, {"rowsperstrip": 64}, {}):
        path = tmp_path / "image.tif"
        tifffile.imwrite(path, pixels, photometric="rgb", **layout)
        with open_slide(outs, path).open_image() as image:
            assert np.array_equal(
                read_region(image, 300, 420, 1000, 1600), pixels[300:420, 1000:1600]
            )
            over = read_region(image, -10, 5, 2090, 2110)
            assert np.array_equal(over[10:, :10], pixels[:5, 2090:])
            assert (over[:10] == 255).all() and (over[:, 10:] == 255).all()
            assert (read_region(image, 5000, 5003, 0, 4) == 255).all()
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(256, 256), compression="zlib", bigtiff=True
    )
    read = []
    original = tifffile.FileHandle.read
    monkeypatch.setattr(
        tifffile.FileHandle, "read", lambda self, *a: read.append(original(self, *a)) or read[-1]
    )
    with open_slide(outs, path).open_image() as image:
        read.clear()
        read_region(image, 300, 420, 300, 420)
    assert sum(map(len, read)) < 2 * 256 * 256 * 3


def test_pyramid_gives_full_resolution(tmp_path, outs):
    pixels = np.random.default_rng(5).integers(0, 255, (600, 700, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "p.btf", bigtiff=True) as tiff:
        options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib"}
        tiff.write(pixels, subifds=1, **options)
        tiff.write(pixels[::2, ::2], subfiletype=1, **options)
    with open_slide(outs, tmp_path / "p.btf").open_image() as image:
        assert np.array_equal(read_region(image, 0, 600, 0, 700), pixels)


@pytest.mark.parametrize("how", DIHEDRAL)
def test_oriented_grid_runs_like_the_image(how):
    y, x, _ = turned_grid((40, 56), how, degrees=3)
    rows, cols = np.indices(y.shape)
    fit = fit_grid_to_pixels(rows.ravel(), cols.ravel(), y.ravel(), x.ravel())
    assert fit.max_px < 1e-6
    np.testing.assert_allclose(fit(rows, cols), [y, x], atol=1e-6)
    orientation = orientation_of(fit)
    assert orientation == Orientation(*how)
    turned_y, turned_x = orientation.apply(y), orientation.apply(x)
    assert (np.diff(turned_y, axis=0) > 0).all() and (np.diff(turned_x, axis=1) > 0).all()
    rows, cols = np.indices(turned_y.shape)
    turned = fit_grid_to_pixels(rows.ravel(), cols.ravel(), turned_y.ravel(), turned_x.ravel())
    assert np.linalg.det(turned.matrix[:, :2]) > 0  # never mirrored

    window = slice(5, 17), slice(20, 31)
    cut = orientation.apply(y[orientation.array_window(turned_y.shape, *window)])
    assert np.array_equal(cut, turned_y[window])


def test_real_positions(shared_data):
    """Rows of the real section run up; one affine map misses by pixels, maps per patch do not."""
    table = pd.read_parquet(shared_data / "crc_p2_016um_positions" / "tissue_positions.parquet")
    columns = ["array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    row, col, y, x = table[columns].to_numpy(float).T
    section = fit_grid_to_pixels(row, col, y, x)
    assert orientation_of(section) == Orientation(False, True, False)
    scales = json.loads(
        (shared_data / "crc_p2_016um_positions" / "scalefactors_json.json").read_text()
    )
    pixel_um = 16 / np.sqrt(abs(np.linalg.det(section.matrix[:, :2])))
    assert pixel_um == pytest.approx(scales["microns_per_pixel"], rel=0.002)
    # A patch of 128 bins at 2 µm is 16 bins of this table wide.
    patch = [
        fit_grid_to_pixels(*part[["array_row", "array_col"]].to_numpy(float).T,
                           *part[["pxl_row_in_fullres", "pxl_col_in_fullres"]].to_numpy().T)
        for _, part in table.groupby([table.array_row // 16, table.array_col // 16])
        if len(part) == 256
    ]  # fmt: skip
    assert len(patch) == 26 * 26
    worst = max(fit.max_px for fit in patch)
    assert section.max_px > 5 and worst < 0.05, (section.max_px, worst)


def test_fit_needs_bins_that_span_the_plane():
    line = np.arange(5.0)
    with pytest.raises(UserError, match="single line"):
        fit_grid_to_pixels(line, line * 0, line, line)
    with pytest.raises(UserError, match="no bins"):
        fit_grid_to_pixels(line, line, line * np.nan, line)


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
        open_slide(outs).counts(["ACTB", "MUC12"])


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(-2, "int32", "-2 is not a count"), (0.5, "float32", "0.5 is not"), (70000, "int32", "65535")],
)
def test_values_that_are_no_counts(tmp_path, value, dtype, message):
    counts = np.zeros((5, 4, 4))
    counts[1, 2, 3] = value
    slide = open_slide(write_outs(tmp_path / "outs", counts, GENES, data_dtype=dtype))
    assert slide.counts(["ACTB"]).nnz == 0
    with pytest.raises(UserError, match=message):
        slide.counts(["KRT8"])


def test_wrong_bin_size(tmp_path):
    counts = np.ones((5, 4, 4), int)
    outs = write_outs(tmp_path / "a", counts, GENES, bin_um=8.0)
    with pytest.raises(UserError, match="bin_size_um is 8.0"):
        open_slide(outs)
    slide = open_slide(write_outs(tmp_path / "b", counts, GENES, prefix="s_008um"))
    with pytest.raises(UserError, match="s_008um_.*not that of a 2 µm bin"):
        slide.counts(["ACTB"])


def test_files_of_different_sections(outs):
    path = outs / POSITIONS
    table = pd.read_parquet(path)
    table[table.array_row < 3].to_parquet(path)
    with pytest.raises(UserError, match="outside the grid of 3 x 7 bins"):
        open_slide(outs).counts(["ACTB"])


def test_damaged_files(outs):
    with h5py.File(outs / MATRIX, "a") as file:
        del file["matrix/indices"]
    with pytest.raises(UserError, match="not a whole Space Ranger matrix.*copy it again"):
        open_slide(outs).counts(["ACTB"])
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
    slide, whole = open_slide(outs), (outs / MATRIX).read_bytes()
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
        slide.counts(["ACTB"])

    whole = (outs / POSITIONS).read_bytes()
    (outs / POSITIONS).write_bytes(whole[: len(whole) // 2])
    for read in (lambda: open_slide(outs), slide.positions):
        with pytest.raises(UserError, match="tissue_positions.parquet is not a whole.*copy it"):
            read()
    # The middle overwritten, the footer whole.
    (outs / POSITIONS).write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[-len(whole) // 2 :])
    with pytest.raises(UserError, match="tissue_positions.parquet is not a whole.*copy it"):
        slide.positions()


def test_parquet_without_a_column_or_a_row(outs):
    slide = open_slide(outs)
    table = pd.read_parquet(outs / POSITIONS)
    table.drop(columns="in_tissue").to_parquet(outs / POSITIONS)
    with pytest.raises(UserError, match="tissue_positions.parquet has no column in_tissue"):
        slide.positions()
    table.drop(columns="array_row").to_parquet(outs / POSITIONS)
    with pytest.raises(UserError, match="tissue_positions.parquet has no column array_row"):
        open_slide(outs)
    table[:0].to_parquet(outs / POSITIONS)
    with pytest.raises(UserError, match="lists no bins"):
        open_slide(outs)


def test_array_shape_without_statistics(outs):
    pd.read_parquet(outs / POSITIONS).to_parquet(outs / POSITIONS, write_statistics=False)
    assert open_slide(outs).array_shape == (6, 7)


def test_barcodes_that_cannot_be(outs):
    slide = open_slide(outs)
    with h5py.File(outs / MATRIX, "a") as file:
        barcodes = file["matrix/barcodes"]
        first = barcodes[0]
        barcodes[0] = barcodes[1]
    with pytest.raises(UserError, match="lists a barcode twice"):
        slide.counts(["ACTB"])
    with h5py.File(outs / MATRIX, "a") as file:
        file["matrix/barcodes"][0] = b"AAACCTGA-1"
    with pytest.raises(UserError, match="barcode AAACCTGA-1 is not that of a 2 µm bin"):
        slide.counts(["ACTB"])
    with h5py.File(outs / MATRIX, "a") as file:
        matrix = file["matrix"]
        matrix["barcodes"][0] = first
        indices = matrix["indices"]
        indices[3], before = 99, indices[3]
    with pytest.raises(UserError, match="indices name features it does not list"):
        slide.counts(["ACTB"])
    with h5py.File(outs / MATRIX, "a") as file:
        matrix = file["matrix"]
        matrix["indices"][3] = before
        matrix["indptr"][3] = 10_000
    with pytest.raises(UserError, match="indptr does not fit"):
        slide.counts(["ACTB"])


def test_image_that_is_not_8_bit_rgb(outs, tmp_path):
    tifffile.imwrite(tmp_path / "grey.tif", np.zeros((9, 9), np.uint16))
    with (
        pytest.raises(UserError, match="grey.tif has shape .*8-bit RGB"),
        open_slide(outs, tmp_path / "grey.tif").open_image(),
    ):
        pass
    (tmp_path / "he.tif").write_bytes(b"no TIFF")
    with (
        pytest.raises(UserError, match="not a readable TIFF image"),
        open_slide(outs, tmp_path / "he.tif").open_image(),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("he.png", None),
        ("he.svs", {"tile": (32, 32), "compression": "jpeg", "photometric": "rgb"}),
        ("he.ome.tif", {"ome": True, "photometric": "rgb", "metadata": {"axes": "YXS"}}),
        ("planar.ome.tif", {"ome": True, "photometric": "rgb", "planarconfig": "separate",
                            "tile": (32, 32), "compression": "zlib"}),
        ("stripped.tif", {"rowsperstrip": 7, "compression": "zlib", "photometric": "rgb"}),
    ],
)  # fmt: skip
def test_image_formats_read_alike(tmp_path, name, options):
    y, x = np.mgrid[:64, :96]
    picture = np.stack([y * 3, x * 2, 255 - x - y], -1).clip(0, 255).astype(np.uint8)
    path = tmp_path / name
    if options is None:
        Image.fromarray(picture).save(path)
    else:
        planar = options.get("planarconfig") == "separate"
        tifffile.imwrite(path, np.moveaxis(picture, -1, 0) if planar else picture, **options)
    slide = Slide(tmp_path, path, 2.0, 0.5, (1, 1), ())
    with slide.open_image() as image:
        assert tuple(image.shape) == (64, 96, 3)
        region = read_region(image, 10, 30, 80, 100)
    tolerance = 6 if name.endswith("svs") else 0
    assert np.abs(region[:, :16].astype(int) - picture[10:30, 80:]).max() <= tolerance
    assert (region[:, 16:] == 255).all()


def test_damaged_picture_names_the_remedy(tmp_path):
    path = tmp_path / "he.png"
    path.write_bytes(b"not a picture")
    slide = Slide(tmp_path, path, 2.0, 0.5, (1, 1), ())
    with (
        pytest.raises(UserError, match="he.png cannot be read as a picture.*TIFF"),
        slide.open_image(),
    ):
        pass
