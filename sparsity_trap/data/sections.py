"""Cohort file: where each patient's section lies, and guards against sections that mislead.

The guards look for mistakes that raise no error later and spoil a result: a section that occurs
twice, normalised values in place of counts, bins of another width, an image of another section.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsity_trap.data.guards import (
    check_geometry,
    check_image,
    check_names,
    check_placement,
    read_geometry,
)
from sparsity_trap.data.matrix import check_counts, open_matrix
from sparsity_trap.data.spaceranger import (
    IMAGE_NAMES,
    MATRIX,
    POSITIONS,
    SCALES,
    Slide,
    open_slide,
)
from sparsity_trap.inputs import check_file, is_dir, is_file
from sparsity_trap.presets import first_problem, load_preset, read_yaml
from sparsity_trap.settings import SIMULATION, Name, Preset, Runs, UserError

if TYPE_CHECKING:
    import h5py

#: Blocks of each array of a matrix that are looked at, and values in a block. At full size the
#: whole array takes minutes to decompress and the sample a fraction of a second.
_BLOCKS, _BLOCK = 24, 4096

_IMAGE_HEAD, _IMAGE_BLOCK = 1 << 20, 1 << 16  # bytes


class Section(BaseModel):
    """Files of one patient's section."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    outs: Path = Field(description="Space Ranger's outs folder")
    image: Path | None = Field(None, description="full-resolution H&E; default: the one in outs")
    mask: Path | None = Field(None, description="picture that is dark where bins are left out")

    def open(self) -> Slide:
        """Open the section for reading; see :func:`sparsity_trap.data.spaceranger.open_slide`."""
        return open_slide(self.outs, self.image)

    def files(self) -> list[Path]:
        """What is read of the section, of what is there; the reader names what is missing."""
        own = [self.outs / name for name in (MATRIX, POSITIONS, SCALES, *IMAGE_NAMES)]
        return [file for file in (*own, self.image, self.mask) if file and is_file(file)]


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
    if not str(path).isprintable():
        raise UserError(f"the name {str(path)!r} holds signs that cannot be printed: rename it")
    check_file(path, "copy cohort.example.yaml and fill in your folders")
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
    if "/" in preset:
        raise UserError(
            f"COHORT names real sections, but '{preset}' is a simulated world: leave one out"
        )
    return with_cohort(load_preset(preset), cohort)


def real_sections(preset: Preset) -> dict[str, Section]:
    """Where the real section of each patient lies: by the cohort file, or in data/sections."""
    if preset.cohort_file is not None:
        return read_cohort(preset.cohort_file).patients
    return {patient: Section(outs=preset.outs(patient)) for patient in preset.patients}


def real_section(preset: Preset, patient: str) -> Section:
    """Files of a patient's real section.

    Raises
    ------
    UserError
        Something is missing, or the section is a simulated one.
    """
    section = real_sections(preset)[patient]
    if preset.cohort_file is not None:
        check_files(preset.cohort_file, patient, section)
    elif not is_dir(section.outs):
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
    with open_matrix(section.outs / MATRIX) as matrix:
        return matrix.file.attrs.get("software_version") == SIMULATION


def folder_name(stem: str) -> str:
    """A file's stem as part of a folder's name: other stems stay other folders.

    >>> folder_name("cohort"), folder_name("cohort (1)")
    ('cohort', 'cohort_1_-f8a84811')
    """
    plain = re.sub(r"[^\w.+-]+", "_", stem)[:60]
    return (
        plain if plain == stem else f"{plain}-{hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]}"
    )


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
        "name": f"{preset.name}-{folder_name(path.stem)}",
        "source": "spaceranger",
        "patients": patients,
        "main_patient": main,
        "cohort_file": path,
        "runs": runs,
    }
    try:
        return Preset.model_validate(preset.model_dump() | changes)
    except ValidationError as error:
        raise UserError(f"{path} with preset '{preset.name}': {first_problem(error)}") from None


def check_files(path: Path | str, name: str, section: Section) -> None:
    """Raise ``UserError`` when a file or folder of one patient does not exist."""
    if not is_dir(section.outs):
        raise UserError(
            f"{path}: patients.{name}.outs: {section.outs} is not a folder: give the outs folder "
            "of Space Ranger (relative paths are relative to the cohort file; put quotes around "
            "one that holds a #)"
        )
    for key, what in (("image", "full-resolution H&E"), ("mask", "mask, or leave the key out")):
        file = getattr(section, key)
        if file is not None and not is_file(file):
            raise UserError(
                f"{path}: patients.{name}.{key}: {file} is not a file: give the {what} "
                "(relative paths are relative to the cohort file)"
            )
        if file is not None:
            check_file(file, f"give the {what}", "a picture")


def check_section(name: str, section: Section) -> None:
    """Raise ``UserError`` when a section would mislead: one sentence, which names the patient.

    Counts must be raw, bins 2 µm wide and measured, and the image the one that the positions refer
    to. Takes seconds per full section: positions and barcodes are read whole, all else is sampled.
    """
    try:
        slide = open_slide(section.outs, section.image)
        check_raw(slide)
        geometry = read_geometry(slide, section.mask)
        check_names(slide)
        check_geometry(slide, geometry)
        check_image(slide, geometry)
        check_placement(slide, geometry)
    except UserError as error:
        raise UserError(f"section {name}: {error}") from None


def check_raw(slide: Slide) -> None:
    """Raise ``UserError`` when a sample of the matrix is not raw counts of 2 µm bins."""
    path = slide.outs / MATRIX
    with open_matrix(path) as matrix:
        check_counts(_sample(matrix["data"]), path)
        barcodes = _sample(matrix["barcodes"]).astype("S32")
    foreign = barcodes[~np.char.startswith(barcodes, b"s_002um_")]
    if foreign.size:
        raise UserError(
            f"{path} has barcode {foreign[0].decode(errors='replace')}, not that of a 2 µm bin: "
            "give the matrix in binned_outputs/square_002um"
        )


def check_distinct(name: str, sections: Mapping[str, Section]) -> None:
    """Raise ``UserError`` when another patient has the section or the image of this one.

    Files are hashed only where their sizes agree, which those of two sections hardly ever do. A
    section that cannot be read is passed over here: its own check names the fault.
    """
    for other, section in sections.items():
        if other == name:
            continue
        for what, same in (("section", _same_counts), ("image", _same_image)):
            try:
                found = same(sections[name], section)
            except UserError:
                continue
            if found:
                raise UserError(
                    f"sections {name} and {other} are the same {what} ({sections[name].outs}, "
                    f"{section.outs}): remove one, or a model is tested on what it was "
                    "trained on (10x's Visium_HD_Human_Colon_Cancer without a suffix is P2 again)"
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
    with open_matrix(Path(outs) / MATRIX) as matrix:
        digest = hashlib.sha256(np.array(_size(matrix), "<i8").tobytes())
        for name in ("indptr", "indices"):
            digest.update(_sample(matrix[name]).astype("<i8").tobytes())
        # Counts are hashed as real numbers, so that their storage type does not matter.
        digest.update(_sample(matrix["data"]).astype("<f8").tobytes())
        digest.update(_sample(matrix["barcodes"]).astype("S32").tobytes())
    return digest.hexdigest()


def _same_counts(a: Section, b: Section) -> bool:
    sizes = []
    for section in (a, b):
        with open_matrix(section.outs / MATRIX) as matrix:
            sizes.append(_size(matrix))
    return sizes[0] == sizes[1] and content_hash(a.outs) == content_hash(b.outs)


def _size(matrix: h5py.Group) -> list[int]:
    """Genes, barcodes and non-zero entries."""
    return [*matrix["shape"][:].tolist(), len(matrix["data"])]


def _same_image(a: Section, b: Section) -> bool:
    first, second = (open_slide(section.outs, section.image).image for section in (a, b))
    if first.stat().st_size != second.stat().st_size:
        return False
    return _image_hash(first) == _image_hash(second)


def _image_hash(path: Path) -> str:
    """Hash of an image file's head and some blocks; heads alone may be empty glass."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_IMAGE_HEAD))
        last = max(path.stat().st_size - _IMAGE_BLOCK, 0)
        for start in np.linspace(0, last, _BLOCKS).astype(int):
            file.seek(start)
            digest.update(file.read(_IMAGE_BLOCK))
    return digest.hexdigest()


def _sample(dataset: h5py.Dataset) -> np.ndarray:
    """Evenly spaced blocks of a one-dimensional data set; all of a short one."""
    if len(dataset) <= _BLOCKS * _BLOCK:
        return dataset[:]
    starts = np.linspace(0, len(dataset) - _BLOCK, _BLOCKS).astype(int)
    return np.concatenate([dataset[start : start + _BLOCK] for start in starts])
