"""Predictions from files, laid over a section: the same scores whatever the file."""

from __future__ import annotations

import warnings

import anndata
import h5py
import numpy as np
import pytest
import zarr
from files import GENES, SPARSE, made_section, table

import sparsity_trap as st
from sparsity_trap.bins import PATCH_BINS, bin_mask, bin_sum
from sparsity_trap.evaluation.result import MODEL, ORACLE
from sparsity_trap.score.pairing import pair
from sparsity_trap.score.predictions import read
from sparsity_trap.score.section import open_section
from sparsity_trap.settings import UserError

UNITS = {"units": "counts"}


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    return made_section(tmp_path_factory.mktemp("section"))


@pytest.fixture(scope="module")
def patches(section):
    """Counts, rates and tissue of every patch, cut by hand: [4, G, 128, 128] and [4, 128, 128]."""
    pad = [(0, 256 - n) for n in section.shape]

    def cut(maps):
        whole = np.pad(maps, [(0, 0), *pad])
        parts = [whole[:, r : r + 128, c : c + 128] for r in (0, 128) for c in (0, 128)]
        return np.stack(parts)

    return cut(section.counts), cut(section.rate), cut(section.tissue[None])[:, 0]


def paired(found) -> list[np.ndarray]:
    """Counts, rates in the mask and masks of all patches."""
    parts = list(found.patches())
    return [np.stack(x) for x in zip(*((y, p * m, m) for y, p, m, _ in parts), strict=True)]


def check(found, patches, rtol=1e-6) -> None:
    counts, rate, mask = paired(found)
    np.testing.assert_array_equal(mask, patches[2])
    np.testing.assert_array_equal(counts, patches[0])
    np.testing.assert_allclose(rate, patches[1] * patches[2][:, None], rtol=rtol, atol=1e-6)
    assert found.coverage == 1 and found.findings == []


@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize("kind", ["dense", "csr", "csc", "float16", "compressed"])
def test_every_way_to_keep_a_table_gives_the_same_patches(section, patches, tmp_path, kind, places):
    options = {"places": places, "sparse": SPARSE.get(kind)}
    options |= {"dtype": np.float16} if kind == "float16" else {}
    adata = table(section, **options)
    path = tmp_path / "p.h5ad"
    adata.write_h5ad(path, compression="gzip" if kind == "compressed" else None)
    width = {"bin_um": 2} if places else {}
    found = pair(path, section.outs, **UNITS, **width)
    check(found, patches, 1e-3 if kind == "float16" else 1e-6)
    first, again = paired(found), paired(found)  # as often as they are wanted
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("sparse", [None, SPARSE["csr"], SPARSE["csc"]])
def test_zarr_views_and_backed_tables_are_read_too(section, patches, tmp_path, sparse):
    adata = table(section, sparse=sparse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zarr's formats
        adata.write_zarr(tmp_path / "p.zarr")
    check(pair(tmp_path / "p.zarr", section.outs, **UNITS), patches)
    twice = anndata.concat([adata, adata], index_unique=None)
    check(pair(twice[adata.n_obs :], section.outs, **UNITS), patches)
    adata.write_h5ad(tmp_path / "p.h5ad")
    backed = anndata.read_h5ad(tmp_path / "p.h5ad", backed="r")
    check(pair(backed, section.outs, **UNITS), patches)
    check(pair(backed[np.argsort(backed.obs_names)], section.outs, **UNITS), patches)


def test_a_spatialdata_names_its_table(section, patches, tmp_path):
    zarr.create_group(tmp_path / "s.zarr", zarr_format=2).create_group("tables")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table(section).write_zarr(tmp_path / "s.zarr" / "tables" / "model")
    check(pair(tmp_path / "s.zarr", section.outs, **UNITS), patches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table(section).write_zarr(tmp_path / "s.zarr" / "tables" / "other")
    with pytest.raises(UserError, match="has the tables model, other: name one"):
        read(tmp_path / "s.zarr")
    assert read(tmp_path / "s.zarr", table="other").genes == tuple(GENES)


def test_an_h5ad_of_an_older_anndata_is_read(section, patches, tmp_path):
    """Before 0.7, obs and var were arrays of records."""
    adata, path = table(section), tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        file["X"] = adata.X
        names = [("index", "S24")]
        file["obs"] = np.array([(name.encode(),) for name in adata.obs_names], names)
        file["var"] = np.array([(name.encode(),) for name in adata.var_names], names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(pair(path, section.outs, **UNITS), patches)


@pytest.mark.parametrize("kind", ["npz", "zarr"])
@pytest.mark.parametrize("whole", [True, False])
def test_maps_of_the_array_and_patches_with_places(section, patches, tmp_path, kind, whole):
    origin = 128 * np.stack(np.divmod(np.arange(4), 2), 1)
    rate = np.where(section.tissue, section.rate, np.nan)
    held = {"rate": rate, "genes": np.array(GENES)} if whole else {
        "rate": patches[1].astype("f4"), "origin": origin, "genes": np.array(GENES)
    }  # fmt: skip
    path = tmp_path / f"maps.{kind}"
    if kind == "npz":
        np.savez(path, **held)
    else:
        group = zarr.create_group(path, attributes={"genes": GENES})
        for name in held.keys() - {"genes"}:
            group.create_array(name, data=held[name])
    check(pair(path, section.outs, **UNITS), patches)


def test_bins_of_8_um_are_held_against_sums_of_counts(section, tmp_path):
    path = tmp_path / "p.h5ad"
    table(section, 8).write_h5ad(path)
    found = pair(path, section.outs, **UNITS)
    counts, rate, mask = paired(found)
    assert counts.shape == (4, 3, 32, 32) and found.bin_um == 8 and found.coverage == 1
    whole = np.pad(section.counts, [(0, 0), *((0, 256 - n) for n in section.shape)])
    tissue = np.pad(section.tissue, [(0, 256 - n) for n in section.shape])
    np.testing.assert_array_equal(counts[0], bin_sum(whole, 4)[:, :32, :32])
    np.testing.assert_array_equal(mask[3], bin_mask(tissue, 4)[32:, 32:])
    scored = found.evaluate()
    assert scored.main == "pcc_8um" and np.isfinite(scored.scores[MODEL]["pcc_8um"]).all()


def test_a_file_scores_as_its_arrays_do(section, patches, tmp_path):
    path = tmp_path / "p.h5ad"
    table(section).write_h5ad(path)
    found = pair(path, section.outs, **UNITS).evaluate()
    direct = st.evaluate(patches[0], patches[1].astype("f4"), patches[2], genes=GENES)
    for of, columns in direct.scores.items():
        for name, column in columns.items():
            if "unmasked" not in name:  # files say nothing of bins off tissue
                np.testing.assert_allclose(found.scores[of][name], column, rtol=1e-4, atol=1e-6)
    assert found.findings == [] and found.about["coverage"] == 1


def test_genes_are_matched_by_symbol_and_missing_ones_listed(section, patches, tmp_path):
    path = tmp_path / "p.h5ad"
    adata = table(section, genes=["VIM", "nothing", "EPCAM"])
    adata.write_h5ad(path)
    found = pair(path, section.outs, **UNITS)
    assert (found.genes, found.missing) == (("VIM", "EPCAM"), ("nothing",))
    counts, rate, mask = paired(found)
    np.testing.assert_array_equal(counts, patches[0][:, [2, 0]])
    np.testing.assert_allclose(rate, (patches[1] * patches[2][:, None])[:, [0, 2]], rtol=1e-6)
    assert pair(path, section.outs, genes=["EPCAM"], **UNITS).genes == ("EPCAM",)


def test_part_of_the_bins_is_scored_where_it_is_and_the_rest_left_out(section, tmp_path):
    adata = table(section)
    rows = np.array([int(name[8:13]) for name in adata.obs_names])
    path = tmp_path / "p.h5ad"
    adata[rows < 75].copy().write_h5ad(path)
    found = pair(path, section.outs, **UNITS)
    masks = paired(found)[2]
    inside = section.tissue[:75].sum()
    assert masks.sum() == inside and found.coverage == pytest.approx(inside / section.tissue.sum())
    assert found.numbers == [0, 1]  # patches without a predicted bin are left out


# --- what looks like a mistake --------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A section large enough for its overview at 16 µm: 320 x 304 bins."""
    import files

    shape, files.SHAPE = files.SHAPE, (320, 304)
    try:
        return made_section(tmp_path_factory.mktemp("larger"))
    finally:
        files.SHAPE = shape


def moved(adata, rows, cols, keep=None):
    """The table with other places of its bins."""
    from files import barcodes

    adata = adata.copy() if keep is None else adata[keep].copy()
    adata.obs_names = barcodes(rows, cols, 2)
    return adata


def places(adata):
    return (np.array([int(name[a : a + 5]) for name in adata.obs_names]) for a in (8, 14))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("rows", "flipped top to bottom"),
        ("columns", "flipped left to right"),
        ("both", "turned by 180°"),
        ("transposed", "transposed (rows are columns)"),
    ],
)
def test_a_section_that_is_turned_is_named(larger, how, words):
    adata = table(larger)
    rows, cols = places(adata)
    side = np.array(larger.shape) - 1
    new = {
        "rows": (side[0] - rows, cols), "columns": (rows, side[1] - cols),
        "both": (side[0] - rows, side[1] - cols), "transposed": (cols, rows),
    }[how]  # fmt: skip
    found = pair(moved(adata, *new), larger.outs, **UNITS)
    assert found.findings and f"fits better {words}: mean PCC" in found.findings[0]
    assert pair(adata, larger.outs, **UNITS).findings == []


def test_shifts_by_whole_bins_are_named_by_the_evaluation(larger):
    adata = table(larger)
    rows, cols = places(adata)
    found = pair(moved(adata, rows + 3, cols), larger.outs, **UNITS)
    (said,) = found.evaluate().findings
    assert "fits better moved 6 µm up: mean PCC" in said


def test_a_wrong_width_of_bins_is_named(larger):
    adata = table(larger, 8, places=True)
    found = pair(adata, larger.outs, bin_um=2, **UNITS)
    assert any("look like those of bins four times as wide than" in s for s in found.findings) or (
        "four times as wide" in found.findings[0]
    )


def test_bins_off_the_array_and_off_the_tissue_are_counted(section):
    adata = table(section)
    rows, cols = places(adata)
    found = pair(moved(adata, rows + 200, cols), section.outs, **UNITS)
    assert any("lie outside the section's array" in said for said in found.findings)
    assert any("lie off the tissue: are these predictions of another" in s for s in found.findings)
    with pytest.raises(UserError, match="predicts no bin in the tissue"):
        found.evaluate()


# --- stores ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory, patches):
    """A patch store with two patches, as far as scoring reads it."""
    path = tmp_path_factory.mktemp("store") / "P5.zarr"
    attributes = {
        "genes": GENES, "patient": "P5", "source": "simulated", "bin_um": 2.0,
        "grid_shape": [256, 256], "microns_per_pixel": 0.5, "registration": {},
    }  # fmt: skip
    group = zarr.create_group(path, attributes=attributes)
    counts, rate, mask = patches
    group.create_array("counts", data=counts[[0, 1]].astype("u2"))
    group.create_array("truth", data=rate[[0, 1]].astype("f2"))
    group.create_array("mask", data=mask[[0, 1]])
    group.create_array("images", data=np.full((2, 224, 224, 3), 200, "u1"))
    for name in ("origin", "overview", "total", "row_factor", "col_factor"):
        group.create_array(name, data=np.zeros((2, 2), "f4"))
    return path


def test_maps_in_the_order_of_a_store(store, patches, tmp_path):
    path = tmp_path / "maps.npz"
    rate = patches[1][[0, 1]].astype("f4")
    np.savez(path, rate=rate, genes=np.array(GENES))
    found = pair(path, store, **UNITS)
    counts, got, mask = paired(found)
    np.testing.assert_array_equal(counts, patches[0][[0, 1]])
    np.testing.assert_array_equal(got, rate * mask[:, None])
    scored = found.evaluate()
    assert scored.about["mark"] == "SIMULATED DATA" and ORACLE in scored.scores
    coarse = bin_sum(np.where(mask[:, None], rate, 0), 4)
    np.savez(path, rate=coarse, genes=np.array(GENES))
    assert pair(path, store, **UNITS).bin_um == 8


# --- bad input: one sentence ----------------------------------------------------------------------


def bad_tables(section):
    adata = table(section)
    negative, missing, twice = adata.copy(), adata.copy(), adata.copy()
    negative.X[5, 1], missing.X[7, 2] = -1, np.nan
    twice.obs_names = [twice.obs_names[1], *twice.obs_names[1:]]
    names, mixed, foreign = adata.copy(), adata.copy(), adata.copy()
    names.obs_names = [f"cell{i}" for i in range(names.n_obs)]
    mixed.obs_names = [*adata.obs_names[:-1], "s_008um_00001_00001-1"]
    foreign.var_names = ["a", "b", "c"]
    repeated = adata.copy()
    repeated.var_names = ["VIM", "VIM", "PIGR"]
    empty = adata[:, []].copy()
    own = adata.copy()
    own.uns["sparsity_trap"] = {"unit": "expected UMI count per bin", "section": "P1"}
    return {
        "gene PIGR has negative values and so no counts": (negative, UNITS),
        "gene VIM has values that are not numbers": (missing, UNITS),
        "predicts the bin in array row": (twice, UNITS),
        "'cell0' is not the barcode of a bin": (names, UNITS),
        "mixes bins of several widths": (mixed, UNITS),
        "share no gene: the first names are a and": (foreign, UNITS),
        "predicts gene VIM twice": (repeated, UNITS),
        "holds no gene": (empty, UNITS),
        "does not say in which units": (adata, {}),
        "units are 'tpm': choose among": (adata, {"units": "tpm"}),
        "says that it holds counts, not z-score": (own, {"units": "z-score"}),
        "barcodes name bins of 2 µm, where 8 µm is stated": (adata, UNITS | {"bin_um": 8}),
        "bins are of unknown width": (table(section, places=True), UNITS),
        "bins are 55 µm wide": (table(section, places=True), UNITS | {"bin_um": 55}),
        "does not predict gene XYZ": (adata, UNITS | {"genes": ["XYZ"]}),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_tables_are_one_sentence(section):
    for sentence, (adata, options) in bad_tables(section).items():
        with pytest.raises(UserError, match=sentence) as raised:
            list(pair(adata, section.outs, **options).patches())
        assert "\n" not in str(raised.value)


def test_bad_files_are_one_sentence(section, store, tmp_path):
    (tmp_path / "text.h5ad").write_text("no table")
    np.savez(tmp_path / "none.npz", other=np.zeros(3))
    np.savez(tmp_path / "anonymous.npz", rate=np.zeros((2, 3, 128, 128)))
    np.savez(tmp_path / "shape.npz", rate=np.zeros((2, 4, 128, 128)), genes=np.array(GENES))
    np.savez(tmp_path / "n.npz", rate=np.zeros((3, 3, 128, 128)), genes=np.array(GENES))
    np.savez(tmp_path / "placeless.npz", rate=np.zeros((2, 3, 64, 64)), genes=np.array(GENES))
    table(section).write_h5ad(tmp_path / "table.h5ad")
    for name, against, sentence in [
        ("absent.h5ad", section.outs, "does not exist: give a file of predictions"),
        ("text.h5ad", section.outs, "cannot be read as predictions"),
        ("none.npz", section.outs, "holds other: keep maps"),
        ("anonymous.npz", section.outs, "does not name its genes"),
        ("shape.npz", section.outs, "do not fit 3 genes"),
        ("n.npz", store, "are not those of the 2 patches"),
        ("placeless.npz", section.outs, "have no place in"),
        ("table.h5ad", store, "which the patch store .* does not know"),
        ("table.h5ad", tmp_path / "absent", "is neither a patch store nor Space Ranger"),
    ]:
        with pytest.raises(UserError, match=sentence) as raised:
            pair(tmp_path / name, against, **UNITS)
        assert "\n" not in str(raised.value)


def test_pictures_of_a_section_are_turned_like_the_image(section):
    opened = open_section(section.outs)
    assert opened.picture(0).shape == (224, 224, 3)
    assert opened.tissue.shape == (2 * PATCH_BINS, 2 * PATCH_BINS)
