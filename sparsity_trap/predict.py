"""Predictions of a finished run as AnnData: of a section with counts, or of an H&E image alone.

`predict_section` and `predict_image` return the same kind of object: one observation per bin in
tissue, as `bin_table` lays them out.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
import zarr
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparsity_trap.bin_table import Layout, bin_table, check_library
from sparsity_trap.bins import BIN_UM, PATCH_BINS
from sparsity_trap.cells import cell_table
from sparsity_trap.data.cells import Cells
from sparsity_trap.data.geometry import GridFit, Orientation, coarse_fit, orientation_of
from sparsity_trap.data.image import (
    Pixels,
    check_scale,
    check_stain,
    open_image,
    read_mask,
    scanned,
    small_images,
    tissue_mask,
)
from sparsity_trap.data.patches import PatchStore, choose_patches, patch_window, resample
from sparsity_trap.data.spaceranger import SPATIAL, Slide, read_positions, read_scales
from sparsity_trap.decoders import build_decoder
from sparsity_trap.encoders import load_encoder
from sparsity_trap.files import building, commit
from sparsity_trap.inputs import check_file
from sparsity_trap.model import Model
from sparsity_trap.progress import track
from sparsity_trap.settings import MARKS, Preset, Run, UserError

if TYPE_CHECKING:
    from anndata import AnnData

_BATCH = 4  # patches encoded together


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
    training_patients
        Whose patches it was trained on.
    commit
        Of the code that trained it.
    """

    model: Model
    preset: Preset
    run: Run
    genes: pd.DataFrame
    training_patients: list[str]
    commit: str


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
        A file is missing or cut short, or the files do not belong together.
    """
    folder = Path(run_dir)
    for name in ("provenance.json", "genes.parquet", "checkpoint.safetensors"):
        check_file(folder / name, "give the folder of a finished run")
    try:
        return _read_run(folder)
    except (
        LookupError, OSError, RuntimeError, TypeError, ValueError, SafetensorError, UserError
    ) as error:  # fmt: skip
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{folder} cannot be read as a run of this version ({problem}): delete it and train "
            "again"
        ) from error


def _read_run(folder: Path) -> Trained:
    record = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    preset = Preset.model_validate(record["preset"])
    run = Run(**{key: record[key] for key in Run.model_fields})
    arm = preset.arm(run.arm)
    genes = pd.read_parquet(folder / "genes.parquet", columns=["gene", "category"])
    state = load_file(folder / "checkpoint.safetensors")
    mean, std = state["mean"], state["std"]
    # The decoder's shape follows from the tables: build it, then fill in the weights.
    sizes = preset.decoder.model_dump()
    decoder = build_decoder(arm.decoder, mean.shape[1], len(genes), **sizes)
    model = Model(decoder, mean, std, arm.link, arm.bicubic_from_um)
    model.load_state_dict(state)
    model.eval().to(_device())
    return Trained(model, preset, run, genes, list(record["training_patients"]), record["commit"])


def predict_section(
    run_dir: Path | str,
    store: PatchStore,
    slide: Slide,
    *,
    bin_um: Literal[2, 8] = 8,
    genes: Sequence[str] | None = None,
    cells: Cells | None = None,
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
    cells
        Sum to these cells, from `data.cells.read_cells`, in place of bins.

    Returns
    -------
    AnnData
        Of bins: ``X`` float32, expected counts per bin; ``layers["counts"]`` the measured counts
        (csr) of the same bins; ``obs``: ``array_row``, ``array_col``, ``in_tissue``; ``var``:
        ``category``; ``obsm["spatial"]``: full-resolution pixel x and y; ``uns["spatial"]``: images
        and scale factors; ``uns["sparsity_trap"]``: where it comes from. Of cells as
        `cells.cell_table` describes it.

    Raises
    ------
    UserError
        The run cannot be read, store, slide and cells are not of one section, a gene is unknown, or
        the table would exceed ``bin_table.MAX_VALUES``.
    """
    trained = load_model(run_dir)
    positions = read_positions(slide.outs)
    orientation = orientation_of(coarse_fit(positions.y, positions.x))
    if orientation.apply(positions.in_tissue).shape != tuple(store.grid_shape):
        raise UserError(
            f"{slide.outs} has a grid of {positions.y.shape}, {store.path} of {store.grid_shape}: "
            "give store and Space Ranger output of the same section"
        )

    def pixels(rows: np.ndarray, cols: np.ndarray, factor: int) -> np.ndarray:
        placed = (_block_mean(grid, factor)[rows, cols] for grid in (positions.x, positions.y))
        return np.stack(list(placed), axis=1)

    images, scales = _pictures(slide)
    layout = Layout(
        name=store.patient,
        microns_per_pixel=slide.microns_per_pixel,
        orientation=orientation,
        shape=store.grid_shape,
        origin=store.origin[:],
        mask=store.mask[:],
        pixels=pixels,
        images=images,
        scales=scales,
        counts=store.counts,
        count_genes=store.genes,
    )
    rates = _stored_rates(Path(run_dir), trained, store)
    if rates is None:
        rates = _rates(trained, layout.mask, lambda i: store.images[i])
    origin = _origin_of(trained, store.patient, store.source, bin_um)
    if cells is None:
        adata = bin_table(layout, rates, trained.genes, bin_um, genes)
    else:
        adata = cell_table(layout, rates, trained.genes, cells, genes)
        origin |= {"bin_um": 2, "unit": "expected UMI count per cell"}
    adata.uns["sparsity_trap"] = origin
    return adata


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
        Picture of any size that covers the same field, dark where tissue is left out, as for a
        cohort; see :func:`~sparsity_trap.data.image.read_mask`. What is tissue `tissue_mask` finds.
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
        The run, image or mask cannot be read, the image is no H&E or its scale not that of a
        microscope, no patch holds tissue, or the table would exceed ``bin_table.MAX_VALUES``.
    """
    name = name or Path(image).stem
    check_library(name)  # before an hour is spent
    check_scale(microns_per_pixel, image)
    trained = load_model(run_dir)
    step = BIN_UM / microns_per_pixel  # image pixels per bin
    corner = step / 2 - 0.5
    fit = GridFit(np.array([[step, 0, corner], [0, step, corner]]), 0.0, 0.0)

    def pixels(rows: np.ndarray, cols: np.ndarray, factor: int) -> np.ndarray:
        y, x = fit(*(factor * (n + 0.5) - 0.5 for n in (rows, cols)))
        return np.stack([x, y], axis=1)

    with open_image(image) as picture:
        check_stain(picture, image)
        images, scales = small_images(picture)
        small_um = microns_per_pixel / scales["tissue_hires_scalef"]
        in_tissue = _tissue_of(picture, images["hires"], small_um, fit, mask)
        origin = choose_patches(in_tissue, trained.preset.patches.min_tissue)
        if len(origin) == 0:
            raise UserError(
                f"{image}: no patch of 256 µm holds enough tissue: check microns_per_pixel"
                + (f", and that {mask} is bright at tissue" if mask else "")
            )
        layout = Layout(
            name=name,
            microns_per_pixel=microns_per_pixel,
            orientation=Orientation(False, False, False),
            shape=in_tissue.shape,
            origin=origin,
            mask=np.stack([in_tissue[patch_window(*first)] for first in origin]),
            pixels=pixels,
            images=images,
            scales=scales,
        )

        def patch(i: int) -> np.ndarray:
            row, col = origin[i].tolist()
            return resample(picture, fit, row, col, in_tissue.shape)

        rates = _rates(trained, layout.mask, patch)
        adata = bin_table(layout, rates, trained.genes, bin_um, genes)
    adata.uns["sparsity_trap"] = _origin_of(trained, layout.name, "image", bin_um)
    return adata


def write(adata: AnnData, path: Path | str) -> Path:
    """Write a table as ``.h5ad``; the file appears only when complete.

    Read it back with ``scanpy.read_h5ad``.
    """
    path = Path(path)
    with building(path) as partial:
        adata.write_h5ad(partial, compression="gzip")
    return path


def _origin_of(trained: Trained, section: str, source: str, bin_um: int) -> dict[str, object]:
    """What the table says of its origin, in ``uns["sparsity_trap"]``."""
    preset = trained.preset
    mark = MARKS.get(source, "")
    if not mark and preset.source in MARKS:
        mark = f"PREDICTED BY A MODEL TRAINED ON {MARKS[preset.source]}"
    return {
        "mark": mark,
        "section": section,
        "source": source,
        "bin_um": bin_um,
        "unit": "expected UMI count per bin",
        "run": trained.run.name,
        "preset": preset.name,
        "preset_source": preset.source,
        "encoder": preset.encoder.name,
        "training_patients": trained.training_patients,
        "seen_in_training": section in trained.training_patients,
        "run_commit": trained.commit,
        "commit": commit(),
    }


def _stored_rates(
    folder: Path, trained: Trained, store: PatchStore
) -> Iterator[tuple[int, np.ndarray]] | None:
    """Predictions in the run's folder, where they are of this very store."""
    own = trained.preset.store(trained.run.test_patient)
    path = folder / "predictions.zarr"
    if store.path.resolve() != own.resolve() or not path.is_dir():
        return None
    rates = zarr.open_group(path, mode="r")["rate"]
    if rates.shape != store.counts.shape or store.genes != tuple(trained.genes["gene"]):
        return None
    return ((i, rates[i].astype(np.float32)) for i in range(len(store)))


def _rates(
    trained: Trained, mask: np.ndarray, image: Callable[[int], np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Encode and predict patches; yields patch and rates float32 [G, 128, 128].

    ``mask`` [N, 128, 128] is true in tissue, ``image`` gives the H&E of a patch.
    """
    device = _device()
    encoder = load_encoder(trained.preset.encoder.name).to(device)
    for start in track(range(0, len(mask), _BATCH), "predicting", "batch"):
        patches = range(start, min(start + _BATCH, len(mask)))
        pixels = torch.from_numpy(np.stack([image(i) for i in patches])).to(device)
        inside = torch.from_numpy(mask[patches.start : patches.stop]).to(device)
        with torch.inference_mode():
            # Through half precision, as cached tokens go.
            batch = trained.model.rate(encoder(pixels).half(), inside).cpu().numpy()
        yield from zip(patches, batch, strict=True)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _block_mean(grid: np.ndarray, factor: int) -> np.ndarray:
    """Means over squares of bins, from the first and at the end of fewer; NaN is left out."""
    from skimage.measure import block_reduce

    if factor == 1:
        return grid
    with warnings.catch_warnings():
        # Where no bin of a block is known, neither is their mean.
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return block_reduce(grid, factor, np.nanmean, np.nan, {"dtype": np.float64})


def _pictures(slide: Slide) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Space Ranger's own small images and their scale; made from the large one without these.

    In copies of a run they may be missing, links that lead nowhere, or the text of such links.
    """
    from PIL import Image

    folder = slide.outs / SPATIAL
    try:
        content = read_scales(slide.outs)
        images, scales, sizes = {}, {}, []
        for name in ("hires", "lowres"):
            scale = scales[f"tissue_{name}_scalef"] = float(content[f"tissue_{name}_scalef"])
            with Image.open(folder / f"tissue_{name}_image.png") as picture:
                images[name] = np.asarray(picture.convert("RGB"))
            sizes.append(np.divide(images[name].shape[:2], scale))
        # Each size is rounded to whole pixels, which are many of the image.
        if not np.allclose(sizes[0], sizes[1], rtol=0.01, atol=2 / min(scales.values())):
            raise ValueError("pictures of two images")
        return images, scales
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError):
        with open_image(slide.image) as image:
            return small_images(image)


def _tissue_of(
    picture: Pixels, small: np.ndarray, small_um: float, fit: GridFit, mask: Path | str | None
) -> np.ndarray:
    """Bins in tissue, bool ``[rows, cols]``: found in the small image, scanned, not left out."""
    covered = np.array(picture.shape[:2]) / fit.matrix[0, 0]
    in_tissue = _on_grid(tissue_mask(small, small_um), covered)
    if mask is not None:
        in_tissue &= _on_grid(read_mask(mask, picture.shape), covered)
    bins = np.nonzero(in_tissue)
    in_tissue[bins] = scanned(picture, *fit(*bins).round())
    return in_tissue


def _on_grid(mask: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Mask at the centres of a grid of whole patches whose first ``covered`` bins span it.

    What reaches over the edge is white glass and not tissue.
    """
    places, inside = [], []
    for span, size in zip(covered, mask.shape, strict=True):
        bins = max(int(np.ceil(span / PATCH_BINS)), 1) * PATCH_BINS
        place = (np.arange(bins) + 0.5) / span
        places.append(np.minimum((place * size).astype(int), size - 1))
        inside.append(place < 1)
    return mask[np.ix_(*places)] & np.logical_and.outer(*inside)
