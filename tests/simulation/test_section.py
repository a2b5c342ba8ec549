"""Simulated sections: counts, geometry and file format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pooch
import pytest
import tifffile
import zarr
from scipy import stats

from sparsity_trap.data.genes import PANEL, panel_table
from sparsity_trap.settings import Simulation, UserError
from sparsity_trap.simulation import label_map
from sparsity_trap.simulation import section as simulate
from sparsity_trap.simulation.cells import Kind, Region, expression
from sparsity_trap.simulation.growth import grow_section

SETTINGS = Simulation(side_um=384, pixel_um=1)


class Section:
    """What a simulated folder holds, read back without the package's own readers."""

    def __init__(self, outs: Path):
        square = outs / "binned_outputs" / "square_002um"
        self.h5 = square / "filtered_feature_bc_matrix.h5"
        self.positions = pd.read_parquet(square / "spatial" / "tissue_positions.parquet")
        self.image = tifffile.imread(outs / "tissue_image.tif")
        self.truth = zarr.open_group(outs / "truth.zarr", mode="r")
        self.rate = self.truth["rate"][:].astype(np.float32)
        side = self.positions.array_row.max() + 1
        self.mask = self.positions.in_tissue.to_numpy(bool).reshape(side, side)
        with h5py.File(self.h5) as file:
            matrix = file["matrix"]
            self.barcodes = matrix["barcodes"][:]
            self.types = {n: matrix[n].dtype for n in ("data", "indices", "indptr", "shape")}
            bins = np.repeat(np.arange(len(self.barcodes)), np.diff(matrix["indptr"][:]))
            self.counts = np.zeros((len(PANEL), len(self.barcodes)), np.int64)
            self.counts[matrix["indices"][:], bins] = matrix["data"][:]


@pytest.fixture(scope="module")
def outs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sections")
    for patient in ("P1", "P5"):
        simulate.simulate_section(folder / patient / "outs", patient, SETTINGS)
    return {p: folder / p / "outs" for p in ("P1", "P5")}


@pytest.fixture(scope="module")
def section(outs) -> Section:
    return Section(outs["P5"])


def test_sparsity_of_p5_is_the_published_one(section):
    zeros = (section.counts == 0).mean(axis=1)
    published = panel_table().published_sparsity.to_numpy()
    # Sampling error of a share over all bins: sqrt(p (1 - p) / bins), at most 0.23 points here.
    sampling = np.sqrt(published * (1 - published) / section.mask.sum())
    expected = np.exp(-section.rate[:, section.mask]).mean(axis=1)
    assert np.abs(expected - published).max() < 0.001
    assert (np.abs(zeros - published) < 0.001 + 4 * sampling).all()


def test_counts_are_poisson_draws_of_the_stored_rates(section):
    rate = section.rate[:, section.mask]
    total = rate.sum(axis=1)
    z = (section.counts.sum(axis=1) - total) / np.sqrt(total)
    assert np.abs(z).max() < 4.5
    assert stats.kstest(z, "norm").pvalue > 1e-3
    # Pearson dispersion is 1 for Poisson counts; its variance is (2 + 1/rate) / bins.
    solid = rate > 0.02
    square = (section.counts - rate) ** 2 / np.maximum(rate, 1e-9)
    for g in range(len(PANEL)):
        if (m := solid[g]).sum() > 2000:
            sd = np.sqrt((2 + 1 / rate[g, m]).mean() / m.sum())
            assert abs(square[g, m].mean() - 1) < 5 * sd, PANEL[g]


def test_no_rate_off_tissue(section):
    assert not section.mask.all()
    assert section.rate[:, ~section.mask].max() == 0
    assert section.truth["rate"].dtype == np.float16


def test_format_is_that_of_space_ranger(section, shared_data):
    real = shared_data / "crc_p2_016um_positions" / "tissue_positions.parquet"
    assert list(section.positions) == list(pd.read_parquet(real))
    types = {name: str(dtype) for name, dtype in section.types.items()}
    assert types == {"data": "int32", "indices": "int64", "indptr": "int64", "shape": "int32"}
    assert (np.sort(section.barcodes) == section.barcodes).all()
    inside = section.positions.barcode[section.positions.in_tissue == 1]
    assert [b.decode() for b in section.barcodes] == inside.tolist()
    with h5py.File(section.h5) as file:
        assert set(file["matrix"]) == {
            "barcodes", "data", "features", "indices", "indptr", "shape"
        }  # fmt: skip
        keys = {"id", "name", "feature_type", "genome", "_all_tag_keys"}
        assert set(file["matrix/features"]) == keys


def test_scanpy_reads_the_matrix(section):
    scanpy = pytest.importorskip("scanpy")
    data = scanpy.read_10x_h5(section.h5)
    assert list(data.var_names) == list(PANEL)
    assert data.var["gene_ids"].is_unique
    np.testing.assert_array_equal(np.asarray(data.X.sum(axis=0)).ravel(), section.counts.sum(1))
    expected = section.rate.sum()
    assert abs(data.X.sum() - expected) < 5 * np.sqrt(expected)


def test_same_settings_give_same_section(tmp_path, outs):
    simulate.simulate_section(tmp_path / "outs", "P5", SETTINGS)
    for path in outs["P5"].rglob("*"):
        if path.is_file():
            copy = tmp_path / "outs" / path.relative_to(outs["P5"])
            assert _digest(copy) == _digest(path), path.name


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_seed_gives_other_section(tmp_path, section):
    other = SETTINGS.model_copy(update={"seed": 1})
    simulate.simulate_section(tmp_path / "outs", "P5", other)
    assert (Section(tmp_path / "outs").image != section.image).mean() > 0.5


def test_positions_lead_to_the_tissue_in_the_image(section):
    image = section.image.astype(float).mean(axis=2)
    row = section.positions.pxl_row_in_fullres.to_numpy()
    col = section.positions.pxl_col_in_fullres.to_numpy()

    def agreement(row: np.ndarray) -> float:
        light = image[np.rint(row).astype(int), np.rint(col).astype(int)]
        return np.corrcoef(light < 225, section.positions.in_tissue)[0, 1]

    flipped = row.max() + row.min() - row
    assert agreement(row) > 0.7
    assert agreement(row) > agreement(flipped) + 0.2
    # Array rows run against image rows.
    assert np.corrcoef(row, section.positions.array_row)[0, 1] < -0.99


def test_positions_are_turned_and_not_exactly_affine(section):
    rows, cols = section.positions.array_row, section.positions.array_col
    design = np.stack([np.ones(len(rows)), rows, cols], axis=1)
    for name, main in (("pxl_row_in_fullres", 1), ("pxl_col_in_fullres", 2)):
        pixels = section.positions[name].to_numpy()
        fit = np.linalg.lstsq(design, pixels, rcond=None)[0]
        off = np.abs(pixels - design @ fit).max() * SETTINGS.pixel_um
        assert 0.05 < off < 2.0  # µm; 1.6 in the real section P2
        assert 0.002 < abs(fit[3 - main] / fit[main]) < 0.02


def test_nuclei_darken_bins_rich_in_rna(section):
    # Housekeeping RNA must follow what is visible, or there is nothing to learn.
    image = section.image.astype(float).mean(axis=2)
    at = section.positions[["pxl_row_in_fullres", "pxl_col_in_fullres"]].to_numpy()
    dark = 255 - image[tuple(np.rint(at).astype(int).T)].reshape(section.mask.shape)
    rate = section.rate[PANEL.index("TMSB4X")]

    def coarse(a: np.ndarray) -> np.ndarray:
        n = a.shape[0] // 8 * 8
        return a[:n, :n].reshape(n // 8, 8, n // 8, 8).mean(axis=(1, 3)).ravel()

    whole = coarse(section.mask) == 1
    right, flipped = (
        np.corrcoef(coarse(dark)[whole], r[whole])[0, 1] for r in (coarse(rate), coarse(rate[::-1]))
    )
    assert right > 0.3
    assert right > flipped + 0.2


def test_patients_differ_in_stain_and_expression(outs, section):
    other = Section(outs["P1"])

    def colour(s: Section) -> np.ndarray:
        return s.image[s.image.mean(axis=2) < 215].mean(axis=0)

    assert np.abs(colour(other) - colour(section)).max() > 3
    shift = np.log(other.rate[:, other.mask].mean(1) / section.rate[:, section.mask].mean(1))
    assert 0.1 < shift.std() < 0.8


def test_stripes_have_period_two():
    factor = simulate.stripes(np.random.default_rng(0), 2000, 0.3)
    ratio = np.abs(np.log2(factor[1:-1] / np.sqrt(factor[:-2] * factor[2:])))
    # 0.81 (rows) and 0.84 (columns) in the real P5 tiles.
    assert 0.6 < np.median(ratio) < 1.0
    assert factor.mean() == pytest.approx(1)
    power = np.abs(np.fft.rfft(factor - factor.mean()))
    assert power.argmax() == len(power) - 1
    assert (simulate.stripes(np.random.default_rng(0), 10, 0.0) == 1).all()


def test_stripes_appear_in_the_rates(section):
    row = section.truth["row_factor"][:]
    light = section.rate.sum(axis=(0, 2)) / np.maximum(section.mask.sum(axis=1), 1)
    full = section.mask.sum(axis=1) > 50
    even, odd = (light[full & (np.arange(len(row)) % 2 == k)].mean() for k in (0, 1))
    assert abs(np.log2(even / odd)) > 0.5
    assert np.sign(np.log(even / odd)) == np.sign(np.log(row[::2].mean() / row[1::2].mean()))


def test_scale_solves_for_the_share_of_zeros():
    rate = np.random.default_rng(0).gamma(0.3, size=5000)
    for zeros in (0.75, 0.95, 0.99):
        scale = simulate.scale_to_sparsity(rate, zeros)
        assert np.exp(-scale * rate).mean() == pytest.approx(zeros, abs=1e-6)


def test_expression_names_every_gene_of_the_panel_and_keeps_biology():
    genes, zeros, table = expression()
    assert genes == list(PANEL) and (table > 0).all()
    np.testing.assert_array_equal(zeros, panel_table()["published_sparsity"])
    levels = dict(zip(genes, table, strict=True))
    top = {gene: Kind(int(row.argmax())) for gene, row in levels.items()}
    assert top["OLFM4"] == Kind.CRYPT_BASE
    assert top["FCGBP"] == Kind.GOBLET
    assert top["CEACAM5"] == Kind.TUMOUR
    assert top["DES"] == Kind.SMOOTH_MUSCLE
    assert top["IGHG1"] == Kind.PLASMA_IGG
    assert top["COL1A1"] == Kind.CAF


@pytest.mark.parametrize("patient", ["P1", "P2", "P5"])
def test_every_patient_has_every_compartment(patient):
    anatomy = grow_section(patient, 800, np.random.default_rng(3))
    share = np.bincount(anatomy.region.ravel(), minlength=len(Region)) / anatomy.region.size
    assert 0.08 < share[Region.BACKGROUND] < 0.18
    for region in ("EPITHELIUM", "TUMOUR", "LAMINA_PROPRIA", "SUBMUCOSA", "MUSCLE", "LYMPHOID"):
        assert share[Region[region]] > 0.005, region
    assert anatomy.cells.x.between(0, 800).all()
    assert {Kind.GOBLET, Kind.PLASMA_IGA, Kind.CAF} <= {Kind(k) for k in anatomy.cells.kind}


def test_side_need_not_be_a_multiple_of_a_patch(tmp_path):
    simulate.simulate_section(tmp_path / "outs", "P2", Simulation(side_um=203, seed=2))
    assert Section(tmp_path / "outs").mask.shape == (102, 102)


def test_a_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("disk full")

    monkeypatch.setattr(simulate, "_write_positions", fail)
    with pytest.raises(RuntimeError):
        simulate.simulate_section(tmp_path / "outs", "P5", Simulation(side_um=128))
    assert list(tmp_path.iterdir()) == []


def test_missing_cell_type_map_is_named(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", offline)
    with pytest.raises(UserError, match="DeconvolutionResults_P5CRC.csv.gz") as error:
        simulate.simulate_section(
            tmp_path / "outs", "P5", SETTINGS, source="tissue-map", labels=tmp_path
        )
    assert str(tmp_path) in str(error.value) and "https://" in str(error.value)


def test_altered_cell_type_map_is_refused(tmp_path):
    (tmp_path / "DeconvolutionResults_P5CRC.csv.gz").write_bytes(b"something else")
    with pytest.raises(UserError, match="SHA-256"):
        label_map.find_labels("P5", tmp_path)


def test_patient_without_cell_type_map_is_refused(tmp_path):
    with pytest.raises(UserError, match="P1, P2, P5"):
        label_map.find_labels("P9", tmp_path)


@pytest.mark.parametrize("patient", ["P1", "P2", "P5"])
def test_tissue_map_follows_the_labels(patient, shared_data):
    labels = shared_data / "crc_8um_labels"
    path = label_map.find_labels(patient, labels)
    table = pd.read_csv(path, usecols=["DeconvolutionLabel2"], dtype=str)
    assert set(table.DeconvolutionLabel2.dropna()) == set(label_map.LABEL_KINDS)

    settings = Simulation(side_um=384)
    grid = label_map.read_label_grid(path)
    side = int(384 / label_map.LABEL_UM)
    row, col = label_map.choose_window(grid, side)
    window = grid[row : row + side, col : col + side]
    assert (window >= 0).mean() > 0.6
    matrix = simulate.bin_to_pixel(patient, settings)
    anatomy = simulate._anatomy_from_map(patient, settings, labels, matrix)

    cells = anatomy.cells
    x, y = cells.x.to_numpy() / settings.pixel_um, cells.y.to_numpy() / settings.pixel_um
    c, r, w = np.linalg.inv(matrix) @ np.stack([x, y, np.ones(len(x))])
    i, j = np.floor((r / w + 0.5) / 4).astype(int), np.floor((c / w + 0.5) / 4).astype(int)
    inside = (i >= 0) & (i < side) & (j >= 0) & (j < side)
    made = np.bincount(cells.kind[inside], minlength=len(Kind))
    asked = np.bincount(window[window >= 0], minlength=len(Kind))
    assert np.abs(made / made.sum() - asked / asked.sum()).max() < 0.01
    # Not only the shares: each cell lies in the bin whose label it carries.
    assert (window[i[inside], j[inside]] == cells.kind[inside]).mean() > 0.95


def test_tissue_map_section_is_complete(tmp_path, shared_data):
    simulate.simulate_section(
        tmp_path / "outs",
        "P5",
        Simulation(side_um=256),
        source="tissue-map",
        labels=shared_data / "crc_8um_labels",
    )
    section = Section(tmp_path / "outs")
    assert section.truth.attrs["source"] == "tissue-map"
    assert section.counts.sum() > 0
    assert section.mask.mean() > 0.3
