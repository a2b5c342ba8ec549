"""Cells of a simulated section in Space Ranger's files, against the cells that were grown."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import shapely
from scipy.spatial import cKDTree

from sparsity_trap.settings import Simulation
from sparsity_trap.simulation import section as simulate
from sparsity_trap.simulation.cells import Kind
from sparsity_trap.simulation.growth import grow_section
from sparsity_trap.simulation.segments import label_nuclei

SETTINGS = Simulation(side_um=203, seed=3)  # no multiple of any bin


@pytest.fixture(scope="module")
def outs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("section") / "outs"
    simulate.simulate_section(folder, "P5", SETTINGS)
    return folder


@pytest.fixture(scope="module")
def mappings(outs) -> pd.DataFrame:
    return pd.read_parquet(outs / "barcode_mappings.parquet")


@pytest.fixture(scope="module")
def grown() -> pd.DataFrame:
    """The cells, grown again from the same seed."""
    side = SETTINGS.side_um + 2 * simulate.margin_um(SETTINGS)
    return grow_section("P5", side, simulate._rng(SETTINGS, "P5", "anatomy")).cells


def test_the_table_of_bins_is_laid_out_as_by_space_ranger(outs, mappings):
    positions = pd.read_parquet(
        outs / "binned_outputs" / "square_002um" / "spatial" / "tissue_positions.parquet"
    )
    assert list(mappings) == [
        "square_002um", "square_008um", "square_016um", "cell_id", "in_nucleus", "in_cell",
    ]  # fmt: skip
    assert mappings["square_002um"].tolist() == positions["barcode"].tolist()
    row, col = positions["array_row"], positions["array_col"]
    for um, factor in ((8, 4), (16, 8)):
        names = [
            f"s_{um:03d}um_{r:05d}_{c:05d}-1"
            for r, c in zip(row // factor, col // factor, strict=True)
        ]
        assert mappings[f"square_{um:03d}um"].tolist() == names
    assert mappings["in_cell"].equals(mappings["cell_id"].notna())
    assert (mappings["in_cell"] | ~mappings["in_nucleus"]).all()
    assert mappings["cell_id"].dropna().str.fullmatch(r"cellid_\d{9}-1").all()
    assert 0.05 < mappings["in_nucleus"].mean() < 0.5 < mappings["in_cell"].mean()


def test_bins_belong_to_the_nearest_nucleus(outs, mappings, grown):
    """Places in µm by another way than the code's: from the positions table."""
    positions = pd.read_parquet(
        outs / "binned_outputs" / "square_002um" / "spatial" / "tissue_positions.parquet"
    )
    um = (positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]] + 0.5) * SETTINGS.pixel_um
    nuclei = [
        shapely.affinity.translate(
            shapely.affinity.rotate(
                shapely.affinity.scale(shapely.Point(0, 0).buffer(1, 64), c.major / 2, c.minor / 2),
                c.angle, use_radians=True,
            ),
            c.x, c.y,
        )
        for c in grown.itertuples()
    ]  # fmt: skip
    own = mappings["cell_id"].str[7:16]
    held = np.flatnonzero(mappings["in_nucleus"])
    points = shapely.points(um.to_numpy())
    which = own.iloc[held].astype(int).to_numpy() - 1
    far = shapely.distance(points[held], np.array(nuclei)[which])
    # All but the bin that thin nuclei are given for their centre.
    assert (far < 0.02).mean() > 0.97 and far.max() < np.sqrt(2)

    tree = cKDTree(um.to_numpy()[held])
    rest = np.flatnonzero(~mappings["in_nucleus"])
    distance, nearest = tree.query(um.to_numpy()[rest])
    assert mappings["in_cell"].to_numpy()[rest][distance < 7.9].all()
    assert not mappings["in_cell"].to_numpy()[rest][distance > 8.1].any()
    # Of several as near, any; a bin in a hundred is turned by the slight perspective.
    taken = np.flatnonzero(mappings["in_cell"].to_numpy()[rest])
    mine = own.iloc[rest[taken]].astype(int).to_numpy()
    theirs = own.iloc[held[nearest[taken]]].astype(int).to_numpy()
    other = mine != theirs
    assert other.mean() < 0.25
    apart = pd.DataFrame(um.to_numpy()[held]).groupby(own.iloc[held].astype(int).to_numpy())
    for bin_, cell, limit in zip(
        rest[taken][other], mine[other], distance[taken][other], strict=True
    ):
        reach = np.hypot(*(apart.get_group(cell).to_numpy() - um.to_numpy()[bin_]).T).min()
        assert reach < limit * 1.02 + 1e-6


def test_outlines_types_and_counts_are_those_of_the_bins(outs, mappings, grown):
    shapes = geopandas.read_file(outs / "segmented_outputs" / "cell_segmentations.geojson")
    truth = pd.read_csv(outs / "truth_cells.csv", index_col="cell_id")
    size = mappings["cell_id"].value_counts()
    names = [f"cellid_{number:09d}-1" for number in shapes["cell_id"]]
    assert sorted(names) == sorted(size.index) == sorted(truth.index)
    assert shapes.geometry.is_valid.all() and (shapes.geom_type == "Polygon").all()
    bins = shapely.area(shapes.geometry.to_numpy()) / (2 / SETTINGS.pixel_um) ** 2
    whole = np.isclose(bins, size.loc[names], rtol=0.05)
    assert whole.mean() > 0.97  # others lie in pieces, of which the largest is drawn
    kinds = grown["kind"].iloc[shapes["cell_id"] - 1]
    assert [Kind[name.upper()] for name in truth.loc[names, "cell_type"]] == kinds.tolist()

    centre = truth.loc[names, ["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    away = shapely.distance(shapes.geometry.to_numpy(), shapely.points(centre))
    assert np.quantile(away, 0.9) == 0  # nuclei lie within their cells, but at the edge

    square = outs / "binned_outputs" / "square_002um"
    counts = sc.read_10x_h5(square / "filtered_feature_bc_matrix.h5").to_df()
    summed = counts.groupby(mappings.set_index("square_002um")["cell_id"]).sum()
    cells = sc.read_10x_h5(outs / "segmented_outputs" / "filtered_feature_cell_matrix.h5").to_df()
    assert cells.index.is_monotonic_increasing and cells.equals(summed.loc[cells.index])
    assert cells.to_numpy().sum() == summed.to_numpy().sum()


def test_a_section_without_nuclei_has_no_cells():
    cells = pd.DataFrame({"x": [9.0], "y": [9.0], "major": [0.0], "minor": [0.0], "angle": [0.0]})

    def same(x, y):
        return x, y

    assert not label_nuclei(cells, same, same, 32).any()
    assert label_nuclei(cells.assign(major=0.1, minor=0.1), same, same, 32).sum() == 1
