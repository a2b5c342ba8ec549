"""Predictions as AnnData: places, sums, and what other libraries read from them."""
# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import zarr
from cells import run_cells
from PIL import Image
from predicted import (  # noqa: F401 - fixtures
    FEW,
    RUN,
    cut,
    position_table,
    preset,
    root,
    run_dir,
    simulated,
    write_run,
)
from safetensors.torch import load_file
from scipy import ndimage
from spaceranger import turned_grid, write_outs

from sparsity_trap import bin_table, predict
from sparsity_trap.cells import ALL_CELLS, score_genes
from sparsity_trap.data.cells import MAPPINGS, read_cells
from sparsity_trap.data.genes import PANEL, panel_table
from sparsity_trap.data.image import open_image, small_images
from sparsity_trap.data.sections import Section
from sparsity_trap.data.spaceranger import MATRIX, POSITIONS, open_slide
from sparsity_trap.encoders import load_encoder
from sparsity_trap.predict import load_model, predict_image, predict_section
from sparsity_trap.settings import UserError
from sparsity_trap.training import Model


@pytest.fixture(scope="module")
def at_8um(run_dir, simulated):
    return predict_section(run_dir, *simulated)


@pytest.fixture(scope="module")
def at_2um(run_dir, simulated):
    return predict_section(run_dir, *simulated, bin_um=2)


def test_model_is_rebuilt_with_its_weights_and_record(run_dir, simulated):
    trained = load_model(run_dir)
    assert trained.run == RUN and trained.preset.name == "smoke"
    assert tuple(trained.genes["gene"]) == PANEL and not trained.model.training
    for key, value in load_file(run_dir / "checkpoint.safetensors").items():
        assert torch.equal(trained.model.state_dict()[key].cpu(), value)


def test_faulty_run_folders_are_refused(tmp_path, run_dir):
    with pytest.raises(UserError, match="provenance.json does not exist"):
        load_model(tmp_path)
    for name in ("provenance.json", "genes.parquet", "checkpoint.safetensors"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    assert load_model(tmp_path).run == RUN
    pd.read_parquet(run_dir / "genes.parquet").head(3).to_parquet(tmp_path / "genes.parquet")
    with pytest.raises(UserError, match="cannot be read as a run"):
        load_model(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="cannot be read as a run"):
        load_model(tmp_path)


def test_bins_carry_their_barcode_position_and_rate(at_2um, simulated):
    """Against the positions table, the matrix and the true rates, all in the array's own frame."""
    import scanpy as sc

    _, slide = simulated
    table = position_table(slide).loc[at_2um.obs_names]
    assert (table["in_tissue"] == 1).all() and (at_2um.obs["in_tissue"] == 1).all()
    for column in ("array_row", "array_col"):
        assert np.array_equal(table[column], at_2um.obs[column])
    expected = table[["pxl_col_in_fullres", "pxl_row_in_fullres"]]
    assert np.allclose(at_2um.obsm["spatial"], expected, atol=1e-3)

    rate = zarr.open_group(slide.outs / "truth.zarr", mode="r")
    order = [list(rate.attrs["genes"]).index(gene) for gene in at_2um.var_names]
    rate = rate["rate"][:][order][:, at_2um.obs["array_row"], at_2um.obs["array_col"]].T
    assert at_2um.X.dtype == np.float32 and np.array_equal(at_2um.X, rate.astype(np.float32))

    measured = sc.read_10x_h5(slide.outs / MATRIX)[at_2um.obs_names, at_2um.var_names]
    assert (at_2um.layers["counts"] != measured.X).nnz == 0


def test_large_bins_are_sums_of_small_ones(at_2um, at_8um):
    parent = [
        f"s_008um_{r:05d}_{c:05d}-1"
        for r, c in zip(at_2um.obs["array_row"] // 4, at_2um.obs["array_col"] // 4, strict=True)
    ]
    for small, large in (
        (at_2um.X, at_8um.X),
        (at_2um.layers["counts"].toarray(), at_8um.layers["counts"].toarray()),
    ):
        sums = pd.DataFrame(small.astype(float)).groupby(parent).sum()
        assert np.allclose(sums.loc[at_8um.obs_names], large, rtol=1e-4)
    members = pd.Series(parent).value_counts()
    assert set(members.index[members > 8]) == set(at_8um.obs_names)
    middle = pd.DataFrame(at_2um.obsm["spatial"]).groupby(parent).mean()
    middle = middle[middle.index.isin(members.index[members == 16])]
    whole = at_8um[middle.index].obsm["spatial"]
    assert np.allclose(middle, whole, atol=1e-3)


def test_cells_are_sums_of_the_true_rates_and_of_space_rangers_counts(run_dir, simulated):
    """Of the simulated section's own files, by pandas and scanpy."""
    import scanpy as sc

    store, slide = simulated
    cells = read_cells(slide.outs)
    table = predict_section(run_dir, store, slide, cells=cells)
    bins = pd.read_parquet(slide.outs / MAPPINGS).set_index("square_002um")["cell_id"]
    places = position_table(slide).loc[bins.index]
    size = bins.value_counts().loc[table.obs_names]
    np.testing.assert_allclose(table.obs["bins"] / size, table.obs["share"])

    whole = table[table.obs["share"] == 1]
    truth = zarr.open_group(slide.outs / "truth.zarr", mode="r")
    at = places["array_row"].to_numpy(), places["array_col"].to_numpy()
    order = [list(truth.attrs["genes"]).index(gene) for gene in table.var_names]
    rates = truth["rate"][:][order][:, *at].T.astype(np.float64)
    sums = pd.DataFrame(rates).groupby(bins.to_numpy()).sum().loc[whole.obs_names]
    np.testing.assert_allclose(whole.X, sums, rtol=1e-5)
    written = sc.read_10x_h5(slide.outs / "segmented_outputs" / "filtered_feature_cell_matrix.h5")
    counts = written[whole.obs_names, whole.var_names].X
    assert (whole.layers["counts"] != counts).nnz == 0 and whole.n_obs > 200

    known = pd.read_csv(slide.outs / "truth_cells.csv", index_col="cell_id").loc[table.obs_names]
    assert table.obs["cell_type"].astype(str).tolist() == known["cell_type"].tolist()
    nuclei = known[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    away = np.hypot(*(table.obsm["spatial"] - nuclei).T) * 0.5
    assert np.median(away) < 3 and away.max() < 25  # µm
    assert table.uns["sparsity_trap"]["unit"] == "expected UMI count per cell"
    scores = score_genes(table).set_index(["cell_type", "gene"])
    every = scores.loc[ALL_CELLS]
    # The rates that counts were drawn from score close to what is possible, and above size alone.
    assert (every["pcc"] > every["pcc_bins"]).mean() > 0.9
    assert np.abs(np.median(every["calibration"]) - 1) < 0.05 and every["d2"].median() > 0


def test_a_users_table_of_bins_gives_the_same_cells(run_dir, simulated):
    store, slide = simulated
    bins = pd.read_parquet(slide.outs / MAPPINGS, columns=["square_002um", "cell_id"])
    places = position_table(slide).loc[bins["square_002um"], ["array_row", "array_col"]]
    places["cell"] = bins["cell_id"].str[7:16].astype(float).to_numpy()
    own = predict_section(run_dir, store, slide, cells=read_cells(slide.outs), genes=FEW)
    table = predict_section(run_dir, store, slide, cells=read_cells(slide.outs, places), genes=FEW)
    number = own.obs_names.str[7:16].astype(int).astype(str)
    assert np.array_equal(table[number].X, own.X) and "cell_type" not in table.obs
    away = np.hypot(*(table[number].obsm["spatial"] - own.obsm["spatial"]).T) * 0.5
    assert np.median(away) < 0.1  # µm; pieces of a cell that its polygon leaves out


@pytest.mark.parametrize("how", [(False, True, False), (True, False, True)])
def test_grids_that_are_no_multiple_of_four(preset, tmp_path, how):
    """Turned grids whose 8 µm bins are cut by the patches' edges; two patches, other run."""
    rng = np.random.default_rng(0)
    shape = (270, 150) if how[0] else (150, 270)
    in_tissue = rng.random(shape) < 0.8
    counts = rng.poisson(0.2, (3, *shape)) * in_tissue
    y, x, image_shape = turned_grid(shape, how)
    image = rng.integers(50, 250, (*image_shape, 3)).astype(np.uint8)
    outs = write_outs(tmp_path / "outs", counts, FEW, y=y, x=x, in_tissue=in_tissue, image=image)
    store, slide = cut(outs, tmp_path / "P1.zarr", FEW, "P1")
    moved = preset.model_copy(update={"name": f"turned-{how[0]}"})
    folder = write_run(moved, store.images[:], FEW)
    small, large = (predict_section(folder, store, slide, bin_um=um) for um in (2, 8))
    rows, cols = small.obs["array_row"], small.obs["array_col"]
    assert len(store) == 2 and small.n_obs == store.mask[:].sum()
    assert np.array_equal(small.layers["counts"].toarray(), counts[:, rows, cols].T)
    assert np.allclose(
        small.obsm["spatial"], np.stack([x[rows, cols], y[rows, cols]], 1), atol=0.01
    )
    parent = (rows // 4 * 1000 + cols // 4).to_numpy()
    sums = pd.DataFrame(small.X.astype(float)).groupby(parent).sum()
    key = large.obs["array_row"] * 1000 + large.obs["array_col"]
    assert np.allclose(sums.loc[key], large.X, rtol=1e-4)
    assert large.uns["sparsity_trap"]["seen_in_training"]

    # The rates themselves, patch by patch from the store's own images.
    trained = load_model(folder)
    with torch.inference_mode():
        tokens = load_encoder("filterbank")(torch.from_numpy(store.images[:])).half()
        rate = trained.model.rate(tokens).numpy()
    assert np.isclose(small.X.sum(), (rate * store.mask[:][:, None]).sum(), rtol=1e-4)


def test_positions_fall_on_the_tissue_that_bears_the_counts(at_8um, simulated):
    _, slide = simulated
    image = tifffile.imread(slide.image)
    dark = ndimage.gaussian_filter(255.0 - image.mean(2), 8)
    counts = np.asarray(at_8um.layers["counts"].sum(1)).ravel()
    x, y = at_8um.obsm["spatial"].T

    def agreement(y: np.ndarray, x: np.ndarray) -> float:
        return np.corrcoef(ndimage.map_coordinates(dark, [y, x], order=1), counts)[0, 1]

    right = agreement(y, x)
    mirrored = max(agreement(y.max() + y.min() - y, x), agreement(y, x.max() + x.min() - x))
    assert right > 0.2 and right > mirrored + 0.1

    # The small images show the same at their scale.
    spatial = at_8um.uns["spatial"]["P5"]
    for name in ("hires", "lowres"):
        small = spatial["images"][name].mean(2)
        scale = spatial["scalefactors"][f"tissue_{name}_scalef"]
        seen = ndimage.map_coordinates(small, [y * scale, x * scale], order=1)
        own = ndimage.map_coordinates(ndimage.gaussian_filter(image.mean(2), 1), [y, x], order=1)
        assert np.corrcoef(seen, own)[0, 1] > 0.8


def test_scanpy_and_squidpy_read_it(at_8um, tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import scanpy as sc
    import squidpy as sq

    path = predict.write(at_8um, tmp_path / "new" / "P5.h5ad")
    assert [p.name for p in path.parent.iterdir()] == ["P5.h5ad"]
    back = sc.read_h5ad(path)
    assert np.array_equal(back.X, at_8um.X) and list(back.var_names) == list(PANEL)
    assert back.obs_names.equals(at_8um.obs_names)
    assert (back.layers["counts"] != at_8um.layers["counts"]).nnz == 0
    assert list(back.var["category"]) == list(panel_table()["category"])
    origin = back.uns["sparsity_trap"]
    assert origin["mark"] == "SIMULATED DATA" and origin["run"] == "E-P5-s0"
    assert not origin["seen_in_training"] and origin["run_commit"]

    sq.pl.spatial_scatter(back, color="PIGR", shape="square", library_id="P5")
    sc.pl.spatial(back, color="PIGR", show=False)
    plt.gcf().savefig(tmp_path / "P5.png")
    plt.close("all")
    sq.gr.spatial_neighbors(back, coord_type="grid", n_neighs=4)
    neighbours = np.diff(back.obsp["spatial_connectivities"].indptr)
    assert np.median(neighbours) == 4  # one bin apart, so the scale is right
    sq.gr.spatial_autocorr(back, mode="moran", n_perms=None, n_jobs=1)
    assert back.uns["moranI"].loc["PIGR", "I"] > 0.2


def test_spatialdata_reads_back(at_8um, tmp_path):
    """The cells of the notebook that import and write it."""
    import spatialdata

    named = at_8um.copy()
    named.uns["spatial"] = {"slide 5": at_8um.uns["spatial"]["P5"]}
    path = tmp_path / "P5.zarr"
    run_cells(
        "09_predict",
        {"section": named, "library": "slide 5", "spatial_path": path},
        where=lambda source: "ShapesModel" in source or "TableModel" in source,
    )
    back = spatialdata.read_zarr(path)
    table = back["predictions"]
    assert np.array_equal(table.X, at_8um.X)
    squares = back["bins"].geometry.loc[table.obs["bin"]]
    assert np.allclose(np.sqrt(squares.area), 16)  # 8 µm at 0.5 µm per pixel
    centre = np.stack([squares.centroid.x, squares.centroid.y], axis=1)
    assert np.allclose(centre, at_8um.obsm["spatial"] + 0.5)
    extent = spatialdata.get_extent(back["hires"])
    assert extent["x"][1] >= centre[:, 0].max() and extent["y"][1] >= centre[:, 1].max()
    assert spatialdata.bounding_box_query(
        back, axes=("x", "y"), min_coordinate=[0, 0], max_coordinate=centre.mean(0),
        target_coordinate_system="global",
    )["predictions"].n_obs < table.n_obs  # fmt: skip


def test_the_notebook_scores_cells_by_type(run_dir, simulated, tmp_path, monkeypatch):
    """The cells of the notebook on cells: tables of the section's types, and a file."""
    import anndata

    store, slide = simulated
    monkeypatch.setattr("sparsity_trap.runs.section", lambda *_: Section(outs=slide.outs))
    shown: list = []
    names = run_cells("09_predict", {}, where=lambda source: source.startswith("from pathlib"))
    names |= {
        "image": "", "cells": "", "cell_types": "", "settings": None, "test_patient": "P5",
        "run": RUN, "library": "P5", "target": tmp_path, "written": [], "display": shown.append,
        "predicted": lambda **options: predict_section(run_dir, store, slide, genes=FEW, **options),
    }  # fmt: skip

    def of_cells(source: str) -> bool:
        return source.startswith(("by_cell = None", "if by_cell"))

    (path,) = run_cells("09_predict", names, of_cells)["written"]
    assert path.name == "E-P5-s0_P5_cells.h5ad" and anndata.read_h5ad(path).n_obs > 200
    kinds = set(names["by_cell"].obs["cell_type"])
    assert len(shown) == 2 and all(kind in table.data for kind in kinds for table in shown)
    assert ALL_CELLS in shown[0].data and "size alone" in shown[0].data
    names |= {"image": "he.tif"}
    assert run_cells("09_predict", names, of_cells)["by_cell"] is None and len(shown) == 2


@pytest.mark.parametrize("spoil", ["missing", "link", "text", "cut", "of another", "no scale"])
def test_small_pictures_that_cannot_be_read(simulated, tmp_path, spoil):
    """Copying a run may leave links that lead nowhere, or the text of links, in their place."""
    slide = simulated[1]
    with open_image(slide.image) as image:
        made, factors = small_images(image)
    folder = tmp_path / "outs" / POSITIONS.parent
    folder.mkdir(parents=True)
    small = folder / "tissue_lowres_image.png"
    for name in ("hires", "lowres"):
        Image.fromarray(255 - made[name]).save(folder / f"tissue_{name}_image.png")
    scales = folder / "scalefactors_json.json"
    scales.write_text(json.dumps(factors))
    copy = replace(slide, outs=tmp_path / "outs")
    own, _ = predict._pictures(copy)
    assert np.array_equal(own["lowres"], 255 - made["lowres"])
    whole = small.read_bytes()
    if spoil == "no scale":
        scales.write_text(json.dumps({**factors, "tissue_lowres_scalef": None}))
    elif spoil == "of another":
        Image.new("RGB", (40, 90)).save(small)
    else:
        small.unlink()
    if spoil == "link":
        small.symlink_to("../../../spatial/tissue_lowres_image.png")
    elif spoil == "text":
        small.write_text("../../../spatial/tissue_lowres_image.png")
    elif spoil == "cut":
        small.write_bytes(whole[: len(whole) // 2])
    found, scale = predict._pictures(copy)
    assert scale == factors and all(np.array_equal(found[name], made[name]) for name in made)


def test_rates_are_asked_for_with_the_tissue(preset, simulated, tmp_path, monkeypatch):
    """Without it, arms that interpolate would take in what stands beyond its edge."""
    store, slide = simulated
    moved = preset.model_copy(update={"name": "tissue"})
    folder = write_run(moved, store.images[:])
    asked, original = [], Model.rate

    def rate(model, tokens, mask=None):
        asked.append(mask)
        return original(model, tokens, mask)

    monkeypatch.setattr(Model, "rate", rate)
    other = cut(slide.outs, tmp_path / "P1.zarr", patient="P1")[0]
    predict_section(folder, other, slide)
    assert np.array_equal(torch.cat(asked).cpu().numpy(), store.mask[:])
    asked.clear()
    predict_image(folder, slide.image, 0.5)
    assert torch.cat(asked).any() and not torch.cat(asked).all()


def test_what_cannot_be_predicted_is_refused(preset, run_dir, simulated, tmp_path, monkeypatch):
    store, slide = simulated
    with pytest.raises(UserError, match="does not predict gene TP53"):
        predict_section(run_dir, store, slide, genes=["TP53"])
    with pytest.raises(UserError, match="choose 2 or 8"):
        predict_section(run_dir, store, slide, bin_um=16)
    few = predict_section(run_dir, store, slide, bin_um=2, genes=["DES", "PIGR"])
    assert list(few.var_names) == ["DES", "PIGR"]
    monkeypatch.setattr(bin_table, "MAX_VALUES", few.n_obs * 2)
    with pytest.raises(UserError, match="at most 2 in genes="):
        predict_section(run_dir, store, slide, bin_um=2)
    predict_section(run_dir, store, slide, bin_um=2, genes=["DES", "PIGR"])

    other = write_outs(tmp_path / "outs", np.ones((3, 20, 20), int), FEW)
    with pytest.raises(UserError, match="of the same section"):
        predict_section(run_dir, store, open_slide(other))
    with pytest.raises(UserError, match="microns_per_pixel is 0 for"):
        predict_image(run_dir, slide.image, 0.0)
    with pytest.raises(UserError, match="none.tif does not exist"):
        predict_image(run_dir, tmp_path / "none.tif", 0.5)
    glass = tmp_path / "glass.tif"
    tifffile.imwrite(glass, np.full((600, 600, 3), 240, np.uint8), photometric="rgb")
    with pytest.raises(UserError, match="no patch of 256 µm holds enough tissue"):
        predict_image(run_dir, glass, 0.5)
    Image.new("L", (20, 100)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="mask.png of 100 x 20 pixels has not the shape"):
        predict_image(run_dir, glass, 0.5, mask=tmp_path / "mask.png")
    with pytest.raises(UserError, match="is not a whole picture"):
        predict_image(run_dir, glass, 0.5, mask=run_dir / "provenance.json")


@pytest.mark.parametrize(
    "name", ["Müller 3 µ+", "##12", "P5-CRC.v1.0", "a: b", "it's {x}", "001", "NO", "%d", " a "]
)
def test_library_names_come_back_from_a_file(tmp_path, name):
    from anndata import AnnData, read_h5ad

    bin_table.check_library(name)
    table = AnnData(np.zeros((1, 1)), uns={"spatial": {name: {"images": {}}}})
    assert list(read_h5ad(predict.write(table, tmp_path / "t.h5ad")).uns["spatial"]) == [name]


@pytest.mark.parametrize("name", ["batch1/slide 3", "a\\b", ".", "..", "a\nb", "a\0b", "\udcff"])
def test_library_names_that_would_not_come_back_are_refused(tmp_path, name):
    """Before the run is read, and anything is predicted."""
    with pytest.raises(UserError, match="library name .* cannot be a key"):
        predict_image(tmp_path, tmp_path / "he.tif", 0.5, name=name)


def test_one_gene_may_be_given_by_its_name(at_8um, run_dir, simulated):
    one = predict_section(run_dir, *simulated, genes="KRT8")
    np.testing.assert_array_equal(one.X, at_8um[:, ["KRT8"]].X)
