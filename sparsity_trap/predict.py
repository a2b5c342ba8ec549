"""Predictions of a finished run as AnnData: of a section with counts, or of an H&E image alone.

`predict_section` and `predict_image` return the same kind of object: one observation per bin in
tissue, named as Space Ranger names bins, with pixel positions, image and scale where scanpy and
squidpy look for them. scanpy and its relatives are imported where they are used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd
import torch
import zarr
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.geometry import GridFit, Orientation, coarse_fit, orientation_of
from sparsity_trap.data.image import open_image, read_mask, read_region
from sparsity_trap.data.patches import PatchStore, patch_window, resample
from sparsity_trap.data.spaceranger import SPATIAL, Slide, read_positions
from sparsity_trap.decoders import PATCH_BINS, build_decoder
from sparsity_trap.encoders import load_encoder
from sparsity_trap.files import building, commit
from sparsity_trap.model import Model
from sparsity_trap.progress import track
from sparsity_trap.settings import MARKS, Preset, Run, UserError

if TYPE_CHECKING:
    import scipy.sparse as sp
    from anndata import AnnData
    from spatialdata import SpatialData

#: Largest ``X``, in values of 4 bytes: 1 GiB. All 50 genes of a full section fit at 8 µm; at 2 µm,
#: about 24 genes do.
MAX_VALUES = 2**28
#: Squares that `to_spatialdata` draws; each takes about 0.5 kB.
MAX_SQUARES = 2_000_000

#: What the readers of a run's files raise when these are damaged or of something else.
_DAMAGE = (
    ValidationError, LookupError, ValueError, TypeError, AttributeError, OSError, RuntimeError,
    MemoryError, SafetensorError, UserError,
)  # fmt: skip
_MOST_GENES = 100_000

_HIRES, _LOWRES = 2000, 600  # longest side of the images, pixels
_BATCH = 4  # patches encoded together
# Optical density of the thinnest tissue, over that of glass. Eosin in loose stroma reaches 0.1.
_TISSUE_DENSITY = 0.05


@dataclass(frozen=True)
class Trained:
    """A finished run, ready to predict.

    Attributes
    ----------
    model
        In evaluation mode, on the device that is present.
    preset, run
        What it was trained with, from the run's own record.
    genes
        Table with columns ``gene`` and ``category``, one row per output channel.
    provenance
        The run's record.
    """

    model: Model
    preset: Preset
    run: Run
    genes: pd.DataFrame
    provenance: dict


def load_model(run_dir: Path | str) -> Trained:
    """Rebuild the model of a finished run from its folder.

    Parameters
    ----------
    run_dir
        Folder written by :func:`sparsity_trap.training.train`. Its ``provenance.json`` tells the
        arm and the decoder, ``genes.parquet`` the genes, ``checkpoint.safetensors`` the weights.

    Raises
    ------
    UserError
        A file is missing or damaged, or the files do not belong together.
    """
    folder = Path(run_dir)
    record, table, weights = (
        folder / name for name in ("provenance.json", "genes.parquet", "checkpoint.safetensors")
    )
    for path in (record, table, weights):
        if not path.is_file():
            raise UserError(f"{path} does not exist: give the folder of a finished run")
    try:
        provenance = json.loads(record.read_text(encoding="utf-8"))
        preset = Preset.model_validate(provenance["preset"])
        run = Run(**{key: provenance[key] for key in Run.model_fields})
        arm = preset.arm(run.arm)
        if not isinstance(provenance["training_patients"], list) or "commit" not in provenance:
            raise ValueError("no training_patients or commit in provenance.json")
        state = load_file(weights)
        if any(not torch.isfinite(value).all() for value in state.values()):
            raise ValueError("a weight is not a finite number")
        mean, std = state["mean"], state["std"]
        if mean.shape != std.shape or mean.shape != (1, mean.numel(), 1, 1) or (std <= 0).any():
            raise ValueError("mean and std are not those of tokens")
        genes = _read_genes(table)
        # The decoder's shape follows from the tables: build it, then fill in the weights.
        decoder = build_decoder(
            arm.decoder, mean.shape[1], len(genes), **preset.decoder.model_dump()
        )
        model = Model(decoder, mean, std, arm.link, arm.bicubic_from_um)
        model.load_state_dict(state)
    except _DAMAGE as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{folder} cannot be read as a run of this version ({problem}): delete it and train again"
        ) from error
    return Trained(model.eval().to(_device()), preset, run, genes, provenance)


def _read_genes(path: Path) -> pd.DataFrame:
    """Genes and categories of a run, looking at the file's size before its content."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        if not 0 < table.metadata.num_rows <= _MOST_GENES:
            raise ValueError(f"genes.parquet lists {table.metadata.num_rows} genes")
        genes = table.read(columns=["gene", "category"]).to_pandas()
    if not genes.map(lambda value: isinstance(value, str)).all(axis=None):
        raise ValueError("genes.parquet holds something other than names")
    if genes["gene"].duplicated().any():
        raise ValueError("genes.parquet lists a gene twice")
    return genes


def predict_section(
    run_dir: Path | str,
    store: PatchStore,
    slide: Slide,
    *,
    bin_um: Literal[2, 8] = 8,
    genes: Sequence[str] | None = None,
) -> AnnData:
    """Predictions of a run for a section with counts.

    The run's stored predictions are used for its own test patient; any other section is encoded
    with the run's encoder and predicted.

    Parameters
    ----------
    run_dir
        Folder of a finished run.
    store
        Patches of the section; bins outside them have no prediction.
    slide
        The same section's Space Ranger output: pixel positions and image.
    bin_um
        2 or 8. A bin of 8 µm is the sum over its bins of 2 µm in tissue, and is kept when more
        than half of them are, as in the scores. Its row and column are those of 2 µm divided by
        four, as in Space Ranger's own 8 µm output.
    genes
        Leave out the others, which keeps the 2 µm table of a full section small.

    Returns
    -------
    AnnData
        ``X`` float32, expected counts per bin; ``layers["counts"]`` the measured counts (csr) of
        the same bins; ``obs``: ``array_row``, ``array_col``, ``in_tissue``; ``var``: ``category``;
        ``obsm["spatial"]``: full-resolution pixel x and y; ``uns["spatial"]``: images and scale
        factors; ``uns["sparsity_trap"]``: where it comes from.

    Raises
    ------
    UserError
        The run cannot be read, store and slide are not of one section, a gene is unknown, or the
        table would exceed ``MAX_VALUES``.
    """
    trained = load_model(run_dir)
    positions = read_positions(slide.outs)
    orientation = orientation_of(coarse_fit(positions.y, positions.x))
    array_shape = positions.y.shape
    if tuple(orientation.apply(positions.in_tissue).shape) != tuple(store.grid_shape):
        raise UserError(
            f"{slide.outs} has a grid of {array_shape}, {store.path} of {store.grid_shape}: give "
            "store and Space Ranger output of the same section"
        )

    def pixels(rows: np.ndarray, cols: np.ndarray, factor: int) -> np.ndarray:
        placed = (_block_mean(grid, factor)[rows, cols] for grid in (positions.x, positions.y))
        return np.stack(list(placed), axis=1)

    mask = store.mask[:]
    section = _Section(
        name=store.patient,
        source=store.source,
        microns_per_pixel=slide.microns_per_pixel,
        orientation=orientation,
        shape=store.grid_shape,
        origin=store.origin[:],
        mask=lambda i: mask[i],
        pixels=pixels,
        pictures=_space_ranger_pictures(slide),
        counts=store.counts,
        count_genes=store.genes,
    )
    rates = _stored_rates(Path(run_dir), trained, store)
    if rates is None:
        rates = _rates(trained, len(store), lambda i: store.images[i], section.mask)
    return _table(trained, section, rates, bin_um, genes)


def predict_image(
    run_dir: Path | str,
    image: Path | str,
    microns_per_pixel: float,
    *,
    name: str | None = None,
    mask: Path | str | None = None,
    bin_um: Literal[2, 8] = 8,
    genes: Sequence[str] | None = None,
) -> AnnData:
    """Predictions of a run for an H&E image without counts.

    A grid of 2 µm bins is laid over the whole image from its upper left corner and cut into patches
    of 256 µm, resampled to 224 pixels as for training. Patches with less tissue than the preset's
    ``patches.min_tissue`` are left out.

    Parameters
    ----------
    run_dir
        Folder of a finished run.
    image
        Full-resolution H&E in a format that :func:`~sparsity_trap.data.image.open_image` reads.
    microns_per_pixel
        Of that image: about 0.25 at 40×, 0.5 at 20×.
    name
        Library id; default: the image's name without ending.
    mask
        Image of any size that covers the same field, tissue brighter than half of its brightest
        pixel. Default: see `tissue_mask`.
    bin_um, genes
        As in `predict_section`.

    Returns
    -------
    AnnData
        As from `predict_section`, without counts; ``array_row`` and ``array_col`` number the bins
        from the upper left corner.

    Raises
    ------
    UserError
        The run, image or mask cannot be read, the scale is not that of a microscope's image, no
        patch holds tissue, or the table would exceed ``MAX_VALUES``.
    """
    if not 0.05 <= microns_per_pixel <= 1.2:
        raise UserError(
            f"microns_per_pixel is {microns_per_pixel}: give the µm per pixel of {image}, between "
            "0.05 and 1.2 (about 0.25 at 40×, 0.5 at 20×)"
        )
    path = Path(image)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the path of the full-resolution H&E")
    trained = load_model(run_dir)
    step = BIN_UM / microns_per_pixel  # image pixels per bin
    corner = step / 2 - 0.5
    fit = GridFit(np.array([[step, 0, corner], [0, step, corner]]), 0.0, 0.0)
    with open_image(path) as picture:
        size = np.array(picture.shape[:2])
        # Whole patches; what reaches over the edge is white glass and not tissue.
        patches = np.maximum(np.ceil(size / step / PATCH_BINS).astype(int), 1)
        shape = tuple((patches * PATCH_BINS).tolist())
        pictures = _pictures(picture)
        hires, scale = pictures["images"]["hires"], pictures["scalefactors"]["tissue_hires_scalef"]
        seen = (
            tissue_mask(hires, microns_per_pixel / scale)
            if mask is None
            else read_mask(mask, tuple(size))
        )
        in_tissue = _sample(seen, shape, size / step)
        blocks = in_tissue.reshape(patches[0], PATCH_BINS, patches[1], PATCH_BINS)
        share = blocks.mean((1, 3))
        chosen = (share >= trained.preset.patches.min_tissue) & (share > 0)
        origin = np.argwhere(chosen).astype(np.int32) * PATCH_BINS
        if len(origin) == 0:
            raise UserError(
                f"{path}: no patch of 256 µm holds enough tissue: check microns_per_pixel, or give "
                "a mask image in which tissue is bright"
            )

        def pixels(rows: np.ndarray, cols: np.ndarray, factor: int) -> np.ndarray:
            y, x = fit(*(factor * (n + 0.5) - 0.5 for n in (rows, cols)))
            return np.stack([x, y], axis=1)

        section = _Section(
            name=name or path.stem,
            source="image",
            microns_per_pixel=microns_per_pixel,
            orientation=Orientation(False, False, False),
            shape=shape,
            origin=origin,
            mask=lambda i: in_tissue[patch_window(*origin[i])],
            pixels=pixels,
            pictures=pictures,
        )
        rates = _rates(
            trained,
            len(origin),
            lambda i: resample(picture, fit, int(origin[i, 0]), int(origin[i, 1]), shape),
            section.mask,
        )
        return _table(trained, section, rates, bin_um, genes)


def tissue_mask(image: np.ndarray, microns_per_pixel: float) -> np.ndarray:
    """Tissue in a small H&E image, by optical density.

    Optical density is -log10 of the grey value over that of glass (the image's 99th percentile, at
    least 200), smoothed by 8 µm; above 0.05 is tissue. Pieces under 100 × 100 µm are dropped, and
    enclosed holes under 200 × 200 µm, lumens and vessels, filled. Ink and folds count as tissue:
    give a mask where that matters.

    Parameters
    ----------
    image
        uint8 [h, w, 3].
    microns_per_pixel
        Of this image.

    Returns
    -------
    bool [h, w].
    """
    from scipy import ndimage

    grey = image.astype(np.float32).mean(2)
    glass = max(200.0, float(np.percentile(grey, 99)))
    density = -np.log10((grey + 1) / (glass + 1))
    tissue = ndimage.gaussian_filter(density, 8 / microns_per_pixel) > _TISSUE_DENSITY
    tissue = _pieces(tissue, (100 / microns_per_pixel) ** 2)
    return ~_pieces(~tissue, (200 / microns_per_pixel) ** 2, keep_border=True)


def write(adata: AnnData, path: Path | str) -> Path:
    """Write a table as ``.h5ad``; the file appears only when complete.

    Read it back with ``scanpy.read_h5ad``.
    """
    path = Path(path)
    with building(path) as partial:
        adata.write_h5ad(partial, compression="gzip")
    return path


def to_spatialdata(adata: AnnData) -> SpatialData:
    """The same bins as SpatialData: table, one square per bin, and the H&E.

    Coordinates of the system ``global`` are full-resolution pixels, counted from the image's corner
    as SpatialData does (half a pixel more than in ``obsm``). Squares are drawn parallel to the image;
    in real sections bins lie turned by a degree or two.

    Parameters
    ----------
    adata
        From `predict_section` or `predict_image`.

    Returns
    -------
    SpatialData
        ``<library>_bins`` (shapes), ``<library>_hires`` (image), ``predictions`` (table).

    Raises
    ------
    UserError
        There are more than ``MAX_SQUARES`` bins.
    """
    if adata.n_obs > MAX_SQUARES:
        raise UserError(
            f"{adata.n_obs} bins are too many squares (at most {MAX_SQUARES}): use bin_um=8"
        )
    import geopandas
    import shapely
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale

    ((library, spatial),) = adata.uns["spatial"].items()
    factors = spatial["scalefactors"]
    centre, half = adata.obsm["spatial"] + 0.5, factors["spot_diameter_fullres"] / 2
    low, high = (centre - half).T, (centre + half).T
    squares = geopandas.GeoDataFrame(geometry=shapely.box(*low, *high), index=adata.obs_names)
    zoom = 1 / factors["tissue_hires_scalef"]
    image = Image2DModel.parse(
        spatial["images"]["hires"],
        dims=("y", "x", "c"),
        c_coords=["r", "g", "b"],
        transformations={"global": Scale([zoom, zoom], axes=("y", "x"))},
    )
    library = re.sub(r"[^\w.-]", "_", library)  # what SpatialData allows in names
    bins = f"{library}_bins"
    table = adata.copy()
    del table.uns["spatial"]  # the image is an element of its own
    table.obs["region"] = pd.Categorical([bins] * table.n_obs)
    table.obs["bin"] = table.obs_names
    table = TableModel.parse(table, region=bins, region_key="region", instance_key="bin")
    return SpatialData(
        images={f"{library}_hires": image},
        shapes={bins: ShapesModel.parse(squares, transformations={"global": Identity()})},
        tables={"predictions": table},
    )


def write_spatialdata(adata: AnnData, path: Path | str) -> Path:
    """Write `to_spatialdata` of a table as a ``.zarr`` folder, which appears only when complete."""
    path = Path(path)
    with building(path) as partial:
        to_spatialdata(adata).write(partial)
    return path


@dataclass(frozen=True)
class _Section:
    """Where patches lie, in the oriented grid, in the array and in the image."""

    name: str
    source: str
    microns_per_pixel: float
    orientation: Orientation
    shape: tuple[int, int]  # of the oriented grid
    origin: np.ndarray  # [N, 2]
    mask: Callable[[int], np.ndarray]  # patch -> bool [128, 128]
    pixels: Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # rows, cols, factor -> [n, (x, y)]
    pictures: dict
    counts: zarr.Array | None = None
    count_genes: Sequence[str] = field(default_factory=tuple)

    @property
    def array_shape(self) -> tuple[int, int]:
        return self.shape[::-1] if self.orientation.transpose else self.shape

    def bins(self, patch: int, factor: int) -> np.ndarray:
        """Number of the larger bin in the array that each bin of a patch in tissue lies in, [n]."""
        window = patch_window(*self.origin[patch].tolist())
        rows, cols = self.orientation.array_window(self.shape, *window)
        width = -(-self.array_shape[1] // factor)
        row, col = (np.arange(part.start, part.stop) // factor for part in (rows, cols))
        number = (row[:, None] * width + col).astype(np.int32)
        return self.orientation.apply(number)[self.mask(patch)]


def _table(
    trained: Trained,
    section: _Section,
    rates: Iterator[tuple[int, np.ndarray]],
    bin_um: int,
    genes: Sequence[str] | None,
) -> AnnData:
    """Lay patches out as one row per bin in tissue, in array order."""
    import scipy.sparse as sp
    from anndata import AnnData

    if bin_um not in (2, 8):
        raise UserError(f"bin_um is {bin_um}: choose 2 or 8")
    factor = round(bin_um / BIN_UM)
    names = list(trained.genes["gene"])
    wanted = list(dict.fromkeys(names if genes is None else genes))
    if unknown := set(wanted) - set(names):
        raise UserError(
            f"the run does not predict gene {', '.join(sorted(unknown))}: choose among its "
            f"{len(names)} genes"
        )
    column = [names.index(gene) for gene in wanted]

    parts = [section.bins(i, factor) for i in range(len(section.origin))]
    number, members = np.unique(np.concatenate(parts), return_counts=True)
    number = number[2 * members > factor**2]
    if number.size * len(wanted) > MAX_VALUES:
        raise UserError(
            f"{number.size} bins of {bin_um} µm × {len(wanted)} genes exceed {MAX_VALUES} values "
            f"(1 GiB): pass at most {MAX_VALUES // number.size} in genes=, or use bin_um=8"
        )
    measured = section.counts is not None and set(wanted) <= set(section.count_genes)
    count_column = [list(section.count_genes).index(gene) for gene in wanted] if measured else []
    values = np.zeros((number.size, len(wanted)), np.float32)
    counted = []
    for i, rate in rates:
        sums, row = _sum_matrix(parts[i], number)
        inside = section.mask(i)
        values[row] += sums @ rate[column][:, inside].T
        if measured:
            count = cast("zarr.Array", section.counts)[i][count_column][:, inside].T.astype(
                np.int32
            )
            piece = sp.coo_array(sums.astype(np.int32) @ sp.csr_array(count))
            counted.append((piece.data, row[piece.row], piece.col))

    rows, cols = np.divmod(number, -(-section.array_shape[1] // factor))
    obs = pd.DataFrame(
        {
            "in_tissue": np.ones(number.size, np.int32),
            "array_row": rows.astype(np.int32),
            "array_col": cols.astype(np.int32),
        },
        index=[
            f"s_{bin_um:03d}um_{r:05d}_{c:05d}-1"
            for r, c in zip(rows.tolist(), cols.tolist(), strict=True)
        ],
    )
    categories = trained.genes.set_index("gene")["category"].loc[wanted]
    adata = AnnData(
        values,
        obs=obs,
        var=pd.DataFrame(
            {"category": pd.Categorical(categories)}, index=pd.Index(wanted, name="gene")
        ),
    )
    if measured:
        data, row, col = (np.concatenate(part) for part in zip(*counted, strict=True))
        # Patches whose edge cuts a large bin each hold a part of it; the conversion adds them.
        adata.layers["counts"] = sp.csr_matrix((data, (row, col)), shape=values.shape)
    adata.obsm["spatial"] = section.pixels(rows, cols, factor).astype(np.float64)
    scale = {
        **section.pictures["scalefactors"],
        "spot_diameter_fullres": bin_um / section.microns_per_pixel,
        "microns_per_pixel": float(section.microns_per_pixel),
        "bin_size_um": float(bin_um),
    }
    images = section.pictures["images"]
    adata.uns["spatial"] = {section.name: {"images": images, "scalefactors": scale}}
    adata.uns["sparsity_trap"] = _origin_of(trained, section, bin_um)
    return adata


def _sum_matrix(bins: np.ndarray, number: np.ndarray) -> tuple[sp.csr_array, np.ndarray]:
    """Matrix that sums small bins into the rows kept of the table, and those rows."""
    import scipy.sparse as sp

    place = np.searchsorted(number, bins)
    kept = np.flatnonzero(number[np.minimum(place, number.size - 1)] == bins)
    row, local = np.unique(place[kept], return_inverse=True)
    ones = np.ones(len(kept), np.float32)
    return sp.csr_array((ones, (local, kept)), shape=(len(row), len(bins))), row


def _origin_of(trained: Trained, section: _Section, bin_um: int) -> dict[str, object]:
    mark = MARKS.get(section.source, "")
    if not mark and trained.preset.source in MARKS:
        mark = f"PREDICTED BY A MODEL TRAINED ON {MARKS[trained.preset.source]}"
    return {
        "mark": mark,
        "section": section.name,
        "source": section.source,
        "bin_um": bin_um,
        "unit": "expected UMI count per bin",
        "run": trained.run.name,
        "preset": trained.preset.name,
        "preset_source": trained.preset.source,
        "encoder": trained.preset.encoder.name,
        "training_patients": list(trained.provenance["training_patients"]),
        "seen_in_training": section.name in trained.provenance["training_patients"],
        "run_commit": trained.provenance["commit"],
        "commit": commit(),
    }


def _stored_rates(
    folder: Path, trained: Trained, store: PatchStore
) -> Iterator[tuple[int, np.ndarray]] | None:
    """Predictions in the run's folder, where they are of this very store."""
    own = trained.preset.store(trained.run.test_patient)
    path = folder / "predictions.zarr"
    same = store.path.resolve() == own.resolve() and store.genes == tuple(trained.genes["gene"])
    if not same or not path.is_dir():
        return None
    remedy = f"delete {folder} and train again"
    try:
        rates = zarr.open_group(path, mode="r")["rate"]
        fits = rates.shape == store.counts.shape and rates.dtype == np.float16
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): {remedy}") from error
    if not fits:
        raise UserError(f"{path} does not fit {store.path}: {remedy}")

    def read() -> Iterator[tuple[int, np.ndarray]]:
        for i in range(len(store)):
            try:
                rate = rates[i].astype(np.float32)
            except _DAMAGE as error:
                raise UserError(f"{path} is damaged ({type(error).__name__}): {remedy}") from error
            if not np.isfinite(rate).all():
                raise UserError(f"{path} holds values that are no rates: {remedy}")
            yield i, rate

    return read()


def _rates(
    trained: Trained,
    number: int,
    image: Callable[[int], np.ndarray],
    mask: Callable[[int], np.ndarray],
) -> Iterator[tuple[int, np.ndarray]]:
    """Encode and predict patches; yields patch and rates float32 [G, 128, 128].

    ``image`` and ``mask`` give a patch's pixels uint8 [224, 224, 3] and tissue bool [128, 128].
    """
    device = _device()
    encoder = load_encoder(trained.preset.encoder.name).to(device)
    for start in track(range(0, number, _BATCH), "predicting", "batch"):
        patches = range(start, min(start + _BATCH, number))
        pixels = torch.from_numpy(np.stack([image(i) for i in patches])).to(device)
        tissue = torch.from_numpy(np.stack([mask(i) for i in patches])).to(device)
        with torch.inference_mode():
            # Through half precision, as cached tokens go.
            batch = trained.model.rate(encoder(pixels).half(), tissue).cpu().numpy()
        yield from zip(patches, batch, strict=True)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _block_mean(grid: np.ndarray, factor: int) -> np.ndarray:
    """Means over ``factor`` × ``factor`` bins from the first, NaN and a rest at the end included."""
    if factor == 1:
        return grid
    starts = [np.arange(0, n, factor) for n in grid.shape]

    def total(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(values, starts[0], axis=0), starts[1], axis=1)

    known = np.isfinite(grid)
    with np.errstate(invalid="ignore"):
        return total(np.where(known, grid, 0).astype(np.float64)) / total(known.astype(np.int32))


def _space_ranger_pictures(slide: Slide) -> dict:
    """Space Ranger's own small images and their scale; made from the large one where absent."""
    from PIL import Image

    folder = slide.outs / SPATIAL
    scales = json.loads((folder / "scalefactors_json.json").read_text())
    names = ("hires", "lowres")
    paths = {name: folder / f"tissue_{name}_image.png" for name in names}
    if all(paths[n].is_file() and f"tissue_{n}_scalef" in scales for n in names):
        return {
            "images": {n: np.asarray(Image.open(paths[n]).convert("RGB")) for n in names},
            "scalefactors": {k: float(scales[k]) for k in (f"tissue_{n}_scalef" for n in names)},
        }
    with open_image(slide.image) as image:
        return _pictures(image)


def _pictures(image: zarr.Array | np.ndarray) -> dict:
    """Images of at most 2000 and 600 pixels a side, read strip by strip, and their scale."""
    height, width = image.shape[:2]
    step = -(-max(height, width) // _HIRES)
    rows = step * max(1, 512 // step)
    strips = []
    for top in range(0, max(height // step, 1) * step, rows):
        bottom = min(top + rows, max(height // step, 1) * step)
        strips.append(
            _shrink(read_region(image, top, bottom, 0, max(width // step, 1) * step), step)
        )
    hires = np.concatenate(strips)
    again = -(-max(hires.shape) // _LOWRES)
    return {
        "images": {"hires": hires, "lowres": _shrink(hires, again)},
        "scalefactors": {
            "tissue_hires_scalef": 1 / step,
            "tissue_lowres_scalef": 1 / (step * again),
        },
    }


def _shrink(image: np.ndarray, step: int) -> np.ndarray:
    rows, cols = (max(n // step, 1) for n in image.shape[:2])
    blocks = image[: rows * step, : cols * step].reshape(rows, step, cols, step, 3)
    return np.rint(blocks.mean((1, 3))).astype(np.uint8)


def _sample(mask: np.ndarray, shape: tuple[int, int], covered: np.ndarray) -> np.ndarray:
    """Mask at the centres of a grid whose first ``covered`` bins span it; false beyond."""
    places, inside = [], []
    for bins, span, size in zip(shape, covered, mask.shape, strict=True):
        place = (np.arange(bins) + 0.5) / span
        places.append(np.minimum((place * size).astype(int), size - 1))
        inside.append(place < 1)
    return mask[np.ix_(*places)] & np.logical_and.outer(*inside)


def _pieces(mask: np.ndarray, area: float, keep_border: bool = False) -> np.ndarray:
    """Keep connected pieces of at least ``area`` pixels, and if wanted all that touch the border."""
    from scipy import ndimage

    label, _ = ndimage.label(mask)
    keep = np.bincount(label.ravel()) >= area
    if keep_border:
        for edge in (label[0], label[-1], label[:, 0], label[:, -1]):
            keep[edge] = True
    keep[0] = False
    return keep[label]
