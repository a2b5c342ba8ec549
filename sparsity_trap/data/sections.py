"""Cohort file: where each patient's section lies, and guards against sections that mislead.

The guards look for mistakes that raise no error later and spoil a result: a section that occurs
twice, normalised values in place of counts, bins of another width, an image of another section.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsity_trap.bins import BIN_UM
from sparsity_trap.data.spaceranger import (
    SQUARE,
    Slide,
    fit_grid_to_pixels,
    open_slide,
    read_region,
)
from sparsity_trap.settings import (
    SIMULATION,
    Name,
    Preset,
    Runs,
    UserError,
    first_problem,
    load_preset,
    read_yaml,
)

if TYPE_CHECKING:
    import h5py

#: Blocks of each array of a matrix that are looked at, and values in a block. At full size the
#: whole array takes minutes to decompress and the sample a fraction of a second.
_BLOCKS, _BLOCK = 24, 4096

_IMAGE_HEAD, _IMAGE_BLOCK = 1 << 20, 1 << 16  # bytes

#: How far a bin width measured from pixel positions may be from 2 µm, as a share of it. Real
#: sections agree to 0.1 %; the scale factors of another scan do not.
_SCALE_TOLERANCE = 0.02

#: Share of tissue bins that may lie outside the image. The capture area may reach over its edge:
#: in the public section P2, 8 % of all bins and 0.06 % of tissue bins do.
_OUTSIDE = 0.01

#: Squares of the image that are compared with Space Ranger's downsized copy, their width in pixels
#: of the copy (about 14 µm, so that rounding does not matter), the least correlation of their
#: brightness, and the least s.d. of brightness (0-255) for a correlation to say anything.
_SQUARES, _SQUARE_WIDTH, _LIKENESS, _CONTRAST = 150, 4, 0.7, 2.0


class Section(BaseModel):
    """Files of one patient's section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outs: Path = Field(description="Space Ranger's outs folder")
    image: Path | None = Field(None, description="full-resolution H&E; default: the one in outs")
    mask: Path | None = Field(None, description="picture that is black where bins are left out")

    def open(self) -> Slide:
        """Open the section for reading; see :func:`sparsity_trap.data.spaceranger.open_slide`."""
        return open_slide(self.outs, self.image)


class Cohort(BaseModel):
    """Sections by patient, in the order of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patients: dict[Name, Section] = Field(min_length=1)


def read_cohort(path: Path | str) -> Cohort:
    """Read a cohort file without looking at the sections it names.

    Parameters
    ----------
    path
        YAML file; see ``cohort.example.yaml``. Relative paths in it are relative to it.

    Raises
    ------
    UserError
        The file is missing, is not YAML, names a patient twice or not usably, or has an unknown or
        invalid key.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: copy cohort.example.yaml and fill in your folders")
    content = read_yaml(path)
    try:
        cohort = Cohort.model_validate(content)
    except ValidationError as error:
        where = error.errors()[0]["loc"]
        if where[-1] == "[key]":
            raise UserError(
                f"{path}: patient name '{where[-2]}' cannot name a folder: use letters, digits, "
                "_ . + - beginning with a letter or digit, and quotes around a number"
            ) from None
        raise UserError(f"{path}: {first_problem(error)}") from None
    folder = path.resolve().parent
    return Cohort(
        patients={
            name: Section(
                **{key: folder / file.expanduser() for key, file in section if file is not None}
            )
            for name, section in cohort.patients.items()
        }
    )


def load_cohort(path: Path | str, *, at_least: int = 2) -> Cohort:
    """Read a cohort file and check that every file and folder it names exists.

    Parameters
    ----------
    path
        YAML file; see ``cohort.example.yaml``.
    at_least
        Patients needed: two for training, because one is left out for testing; one for predicting.

    Raises
    ------
    UserError
        As :func:`read_cohort`; too few patients; a file or folder does not exist.
    """
    cohort = read_cohort(path)
    if len(cohort.patients) < at_least:
        raise UserError(
            f"{path}: patients: {len(cohort.patients)} given, {at_least} needed; add a patient, "
            "since each is tested by a model that never saw it"
        )
    for name, section in cohort.patients.items():
        check_files(path, name, section)
    return cohort


def open_preset(preset: str, source: str = "", cohort: str = "") -> Preset:
    """Load a preset, with another source or the patients of a cohort file where these are given."""
    if not cohort:
        return load_preset(preset, source)
    if source not in ("", "spaceranger"):
        raise UserError(f"COHORT names real sections, but SOURCE is '{source}': leave one out")
    return with_cohort(load_preset(preset), cohort)


def real_section(preset: Preset, patient: str) -> Section:
    """Files of a patient's real section: those of the cohort file, or in data/sections.

    Raises
    ------
    UserError
        Nothing is there, or the section is a simulated one.
    """
    if preset.cohort_file is not None:
        section = load_cohort(preset.cohort_file).patients[patient]
    else:
        section = Section(outs=preset.outs(patient))
        if not section.outs.is_dir():
            raise UserError(
                f"{section.outs} does not exist: put the Space Ranger output of patient {patient} "
                "there (or a link to it), with its full-resolution image, give a cohort file "
                "(COHORT=), or choose SOURCE=simulated"
            )
    if is_simulated(section):
        raise UserError(
            f"section {patient}: {section.outs} is simulated: choose SOURCE=simulated or "
            "tissue-map, so that nobody takes its results for real ones"
        )
    return section


def is_simulated(section: Section) -> bool:
    """Whether this project's simulation wrote the section."""
    if (section.outs / "truth.zarr").exists():
        return True
    with _matrix(section.outs) as matrix:
        return matrix.file.attrs.get("software_version") == SIMULATION


def with_cohort(preset: Preset, path: Path | str) -> Preset:
    """Give a preset the patients of a cohort file.

    The preset's main patient stands for itself where the cohort has a patient of that name, and
    for the cohort's last patient otherwise. A group of runs that tests the preset's other patients
    too tests every patient of the cohort.

    Returns
    -------
    A preset of source ``spaceranger``, with the file's stem added to its name.
    """
    path = Path(path).resolve()
    patients = list(load_cohort(path).patients)
    main = preset.main_patient if preset.main_patient in patients else patients[-1]
    others = [name for name in patients if name != main]
    runs = []
    for group in preset.runs:
        tests_main = preset.main_patient in group.test_patients
        tests_others = len(group.test_patients) > tests_main
        tested = [main] * tests_main + others * tests_others
        runs.append(Runs(arms=group.arms, test_patients=tested, seeds=group.seeds))
    changes = {
        "name": f"{preset.name}-{path.stem}",
        "source": "spaceranger",
        "patients": patients,
        "main_patient": main,
        "cohort_file": path,
        "runs": runs,
    }
    return preset.model_copy(update=changes)


def check_files(path: Path | str, name: str, section: Section) -> None:
    """Raise ``UserError`` when a file or folder of one patient does not exist."""
    if not section.outs.is_dir():
        raise UserError(
            f"{path}: patients.{name}.outs: {section.outs} is not a folder: give the outs folder "
            "of Space Ranger (relative paths are relative to the cohort file)"
        )
    for key, what in (("image", "full-resolution H&E"), ("mask", "mask, or leave the key out")):
        file = getattr(section, key)
        if file is not None and not file.is_file():
            raise UserError(
                f"{path}: patients.{name}.{key}: {file} is not a file: give the {what} "
                "(relative paths are relative to the cohort file)"
            )


def content_hash(outs: Path | str) -> str:
    """Hash of a section's counts that survives copying, renaming and recompression.

    SHA-256 over the matrix's shape, its number of non-zeros and fixed blocks of its barcodes, row
    pointers, gene indices and counts: of their values, not of the file's bytes, which differ with
    the level of compression, the chunks and the type of numbers. Pixel positions and the image are
    left out on purpose: the same section aligned again is still the same section. A matrix that
    another run or program wrote with other bins, genes or order is not recognised; the image of
    such a section is, by :func:`check_distinct`, unless that was saved anew too.

    Parameters
    ----------
    outs
        Space Ranger's outs folder.

    Returns
    -------
    64 hexadecimal digits.

    Raises
    ------
    UserError
        The matrix is missing or damaged.
    """
    with _matrix(Path(outs)) as matrix:
        digest = hashlib.sha256(
            np.array([*matrix["shape"][:], len(matrix["data"])], "<i8").tobytes()
        )
        for name in ("indptr", "indices"):
            digest.update(_sample(matrix[name]).astype("<i8").tobytes())
        # Counts are hashed as real numbers, so that their storage type does not matter.
        digest.update(_sample(matrix["data"]).astype("<f8").tobytes())
        digest.update(_sample(matrix["barcodes"]).astype("S32").tobytes())
    return digest.hexdigest()


def check_cohort(cohort: Cohort) -> None:
    """Raise ``UserError`` at the first section that would mislead.

    Takes some seconds per full section: positions are read whole, all else is sampled.
    """
    for name, section in cohort.patients.items():
        check_section(name, section)
    check_distinct(cohort)


def check_section(name: str, section: Section) -> None:
    """Guard one section: raw counts, 2 µm bins, and the image that its positions belong to."""
    slide = open_section(name, section)
    check_counts(name, section)
    step, pixels = bin_geometry(slide)
    check_bin_width(name, slide, step)
    check_image(name, slide, pixels)
    check_mask(name, section, slide)


def open_section(name: str, section: Section) -> Slide:
    """Open a section; an error names the patient too."""
    try:
        return section.open()
    except UserError as error:
        raise UserError(f"section {name}: {error}") from None


def check_counts(name: str, section: Section) -> None:
    """Raise ``UserError`` when a sample of the matrix is not raw counts of 2 µm bins."""
    with _matrix(section.outs) as matrix:
        values, barcodes = _sample(matrix["data"]), _sample(matrix["barcodes"]).astype("S32")
        path = matrix.file.filename
    wrong = values[~np.isfinite(values) | (values < 0) | (values != np.floor(values))]
    if wrong.size:
        raise UserError(
            f"section {name}: {path} holds {wrong[0]:g}, which is not a count: give the raw UMI "
            "matrix of Space Ranger, not normalised or log-transformed values"
        )
    foreign = barcodes[~np.char.startswith(barcodes, b"s_002um_")]
    if foreign.size:
        raise UserError(
            f"section {name}: {path} has barcode {foreign[0].decode(errors='replace')}, not that of a 2 µm bin: "
            f"give the matrix in binned_outputs/{SQUARE}"
        )


def bin_geometry(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """Measure where bins lie in the image.

    Returns
    -------
    step
        Pixels from a bin to the next along array rows and columns, ``[2]``.
    pixels
        Pixel row and column of each tissue bin, ``[2, bins]``.

    Raises
    ------
    UserError
        No bin lies in tissue, or the bins do not span the plane.
    """
    in_tissue, y, x = slide.positions()
    if not in_tissue.any():
        raise UserError(
            f"{slide.positions_path} has no bin in tissue: detect tissue again, or leave the "
            "section out"
        )
    # A thousand or so bins determine the scale; fitting all 11 million would take seconds.
    some = np.ix_(*(np.arange(0, n, max(1, n // 32)) for n in in_tissue.shape))
    rows, cols = np.broadcast_arrays(*some)
    fit = fit_grid_to_pixels(rows.ravel(), cols.ravel(), y[some].ravel(), x[some].ravel())
    step = np.linalg.norm(fit.matrix[:, :2], axis=0)
    return step, np.stack([y[in_tissue], x[in_tissue]])


def check_bin_width(name: str, slide: Slide, step: np.ndarray) -> None:
    """Raise ``UserError`` when positions and scale factors disagree on the width of a bin."""
    width = step * slide.microns_per_pixel
    if not np.allclose(width, BIN_UM, rtol=_SCALE_TOLERANCE):
        raise UserError(
            f"section {name}: bins in {slide.positions_path} are {width[0]:.3g} x {width[1]:.3g} "
            f"µm apart at {slide.microns_per_pixel:g} µm per pixel, not {BIN_UM:g}: give the "
            f"positions and scalefactors_json.json of one run, both from {SQUARE}"
        )


def check_image(name: str, slide: Slide, pixels: np.ndarray) -> None:
    """Raise ``UserError`` when the image cannot be the one the section was aligned to.

    All but a few tissue bins, ``pixels`` ``[2, bins]``, must lie inside it. Where Space Ranger's
    downsized copy is at hand, it must have been made from an image of this size and look the same:
    scans of one instrument have one size, whatever is on them.
    """
    remedy = (
        "give the full-resolution image that Space Ranger was run on for this section, not a "
        "resized copy or that of another"
    )
    with slide.open_image() as image:
        size = np.array(image.shape[:2])
        inside = ((pixels >= 0) & (pixels <= size[:, None] - 1)).all(axis=0)
        if 1 - inside.mean() > _OUTSIDE:
            (y0, x0), (y1, x1) = pixels.min(1), pixels.max(1)
            raise UserError(
                f"section {name}: {1 - inside.mean():.0%} of tissue bins lie outside {slide.image} "
                f"of {size[0]} x {size[1]} pixels (bins: rows {y0:.0f} to {y1:.0f}, columns "
                f"{x0:.0f} to {x1:.0f}): {remedy}"
            )
        copy = downsized_copy(slide)
        if copy is None:
            return
        picture, scale = copy
        expected = np.array(picture.shape) / scale
        # The copy's size is rounded to whole pixels, each of which is many of the original.
        if (np.abs(size - expected) > 2 / scale).any():
            raise UserError(
                f"section {name}: {slide.image} has {size[0]} x {size[1]} pixels, but tissue_hires_"
                f"image.png was made from {expected[0]:.0f} x {expected[1]:.0f}: {remedy}"
            )
        likeness = _likeness(image, picture, scale, pixels[:, inside])
    if likeness < _LIKENESS:
        raise UserError(
            f"section {name}: {slide.image} does not show what tissue_hires_image.png shows "
            f"(correlation {likeness:.2f} in tissue): {remedy}"
        )


def downsized_copy(slide: Slide) -> tuple[np.ndarray, float] | None:
    """Space Ranger's copy of the image it was run on, of up to 6000 pixels a side.

    Returns
    -------
    Brightness, uint8 ``[height, width]``, and pixels of the copy per pixel of the image; None where
    no copy was kept.

    Raises
    ------
    UserError
        The copy is damaged, or its scale is not a positive number.
    """
    import json

    from PIL import Image

    spatial = slide.positions_path.parent
    path, scales = spatial / "tissue_hires_image.png", spatial / "scalefactors_json.json"
    scale = json.loads(scales.read_text()).get("tissue_hires_scalef")
    if scale is None or not path.is_file():
        return None
    if not isinstance(scale, int | float) or not 0 < scale < np.inf:
        raise UserError(f"{scales}: tissue_hires_scalef is {scale}, no scale: copy it again")
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L")), scale
    except (OSError, SyntaxError) as error:  # both stand for damage in Pillow
        raise UserError(
            f"{path} is not a whole picture ({error}): copy it again, or delete it, which leaves "
            "out the comparison with the image"
        ) from None


def _likeness(image: np.ndarray, copy: np.ndarray, scale: float, pixels: np.ndarray) -> float:
    """Correlation of brightness between image and copy over squares on some of ``pixels``.

    NaN where the copy is too even to tell, 0 where only the image is.
    """
    chosen = np.random.default_rng(0).integers(0, pixels.shape[1], _SQUARES)
    first = (pixels[:, chosen].T * scale).astype(int) - _SQUARE_WIDTH // 2
    first = first.clip(0, np.maximum(np.array(copy.shape) - _SQUARE_WIDTH, 0))
    pairs = []
    for row, col in first:
        y0, y1, x0, x1 = (
            round(edge / scale) for edge in (row, row + _SQUARE_WIDTH, col, col + _SQUARE_WIDTH)
        )
        # Weights of ITU-R 601, as in Pillow's conversion to brightness.
        here = read_region(image, y0, y1, x0, x1).mean((0, 1)) @ (0.299, 0.587, 0.114)
        there = copy[row : row + _SQUARE_WIDTH, col : col + _SQUARE_WIDTH].mean()
        pairs.append((here, there))
    here, there = np.transpose(pairs)
    if there.std() < _CONTRAST:
        return np.nan
    if here.std() < _CONTRAST:
        return 0.0
    return float(np.corrcoef(here, there)[0, 1])


def check_mask(name: str, section: Section, slide: Slide) -> None:
    """Raise ``UserError`` when the mask cannot be of the same field of view as the image."""
    if section.mask is None:
        return
    from PIL import Image

    try:
        with Image.open(section.mask) as mask:
            mask.load()  # finds a picture that was cut short
            width, height = mask.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"section {name}: mask {section.mask} is not a whole picture of usual size ({error}): "
            "save it as PNG, of at most 10,000 pixels a side"
        ) from None
    with slide.open_image() as image:
        ratio = image.shape[0] / image.shape[1]
    # A pixel of rounding on the shorter side of a small mask is no error.
    if abs(height / width / ratio - 1) > 0.01 + 1 / min(width, height):
        raise UserError(
            f"section {name}: mask {section.mask} of {height} x {width} pixels has not the shape "
            f"of {slide.image}: draw it on the whole image, at any scale"
        )


def check_distinct(cohort: Cohort) -> None:
    """Raise ``UserError`` when two patients have the same section or the same image."""
    for what, of in (("section", _section_of), ("image", _image_of)):
        seen: dict[str, str] = {}
        for name, section in cohort.patients.items():
            other = seen.setdefault(of(section), name)
            if other != name:
                raise UserError(
                    f"sections {other} and {name} are the same {what} "
                    f"({cohort.patients[other].outs}, {section.outs}): remove one, or a model is "
                    "tested on what it was trained on (10x's Visium_HD_Human_Colon_Cancer without "
                    "a suffix is P2 again)"
                )


def _section_of(section: Section) -> str:
    return content_hash(section.outs)


def _image_of(section: Section) -> str:
    """Hash of an image file's size, head and some blocks; heads alone may be empty glass."""
    path = section.open().image
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_IMAGE_HEAD))
        for start in np.linspace(0, max(size - _IMAGE_BLOCK, 0), _BLOCKS).astype(int):
            file.seek(start)
            digest.update(file.read(_IMAGE_BLOCK))
    return digest.hexdigest()


@contextmanager
def _matrix(outs: Path) -> Iterator[h5py.Group]:
    import h5py

    path = outs / "binned_outputs" / SQUARE / "filtered_feature_bc_matrix.h5"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the outs folder of a whole Visium HD run")
    try:
        with h5py.File(path) as file:
            yield file["matrix"]
    except (LookupError, OSError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not a whole Space Ranger matrix, version 3 ({error}): copy it again"
        ) from None


def _sample(dataset: h5py.Dataset) -> np.ndarray:
    """Evenly spaced blocks of a one-dimensional data set; all of a short one."""
    if len(dataset) <= _BLOCKS * _BLOCK:
        return dataset[:]
    starts = np.linspace(0, len(dataset) - _BLOCK, _BLOCKS).astype(int)
    return np.concatenate([dataset[start : start + _BLOCK] for start in starts])
