"""What the doctor checks of sections: files, versions, counts, scale, image, bins and genes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from doctor_rows import Row, failed, guarded

from sparsity_trap.inputs import is_dir
from sparsity_trap.settings import Preset, UserError

#: How many missing genes are named.
_SHOWN = 50

#: First version of Space Ranger that corrects images of CytAssist software 2.1.
_ALIGNED = (3, 1, 2)

#: Correlation of counts with the darkness of the image below which they hardly belong together, and
#: share of bins in tissue that may be left out without a warning.
_FOLLOWS, _LOST = 0.1, 0.01


def sections(preset: Preset | None, cohort_file: Path | None) -> Iterator[Row]:
    """Every section of a cohort file or, without one, of a preset that reads real ones."""
    from sparsity_trap.data import sections as cohorts

    if cohort_file is not None:
        cohort = cohorts.read_cohort(cohort_file)
        yield Row("cohort", "ok", f"{cohort_file}: {', '.join(cohort.patients)}")
    elif preset is not None and preset.source == "spaceranger":
        cohort = cohorts.Cohort(
            patients={p: cohorts.Section(outs=preset.outs(p)) for p in preset.patients}
        )
        yield Row("cohort", "ok", f"no file given; sections in {preset.outs('<patient>')}")
    else:
        yield Row("cohort", "ok", "sections are simulated at first use")
        return
    readable = {}
    for name, this in cohort.patients.items():
        try:
            if cohort_file is not None:
                cohorts.check_files(cohort_file, name, this)
            elif not is_dir(this.outs):
                mend = "make download gets the public sections; name your own in a cohort file"
                yield Row(f"{name} files", "FAIL", f"{this.outs} does not exist", mend)
                continue
        except UserError as error:
            yield failed(f"{name} files", error)
            continue
        rows = list(guarded(f"{name} files", partial(section, name, this, preset)))
        yield from rows
        if all(row.state == "ok" for row in rows[:2]):
            readable[name] = this
    if len(readable) > 1:
        yield from guarded("duplicates", partial(_distinct, cohorts.Cohort(patients=readable)))


def section(name: str, this, preset: Preset | None = None) -> Iterator[Row]:
    """Files, versions, counts, scale, image and gene panel of one section.

    Parameters
    ----------
    name
        Patient.
    this
        A :class:`sparsity_trap.data.sections.Section`.
    preset
        Names the gene panel; without one, genes are not checked.
    """
    from sparsity_trap.data.spaceranger import MATRIX

    slide = this.open()
    rows, cols = slide.array_shape
    found = f"{_versions(slide.outs / MATRIX)}; grid of {rows} x {cols} bins"
    yield Row(f"{name} files", "ok", found)
    yield from guarded(f"{name} alignment", partial(_alignment, slide.outs / MATRIX))
    yield from guarded(f"{name} counts", partial(_counts, name, slide))
    if preset is not None:
        yield from guarded(f"{name} genes", partial(_genes, slide.genes, preset))
    yield from guarded(f"{name} image", partial(_image, slide))
    yield from guarded(f"{name} bins", partial(_geometry, name, this, slide))


def _alignment(matrix: Path) -> Iterator[Row]:
    """Whether this version of Space Ranger is one that misplaces counts; see `book/methods.md`."""
    import h5py

    with h5py.File(matrix) as file:
        written = file.attrs.get("software_version", "")
    written = written.decode() if isinstance(written, bytes) else str(written)
    number = re.search(r"spaceranger[^0-9]*(\d+)\.(\d+)(?:\.(\d+))?", written)
    if number and tuple(int(part or 0) for part in number.groups()) < _ALIGNED:
        yield Row(
            "", "warn",
            f"{written} does not correct CytAssist images of instrument software 2.1, from which "
            "counts come to lie 16 µm beside their place",
            f"look for that software's version in web_summary.html; if it begins with 2.1, run "
            f"Space Ranger {'.'.join(map(str, _ALIGNED))} or later",
        )  # fmt: skip


def _counts(name: str, slide) -> Iterator[Row]:
    from sparsity_trap.data.sections import check_raw

    check_raw(slide)
    yield Row(f"{name} counts", "ok", "whole numbers in 2 µm bins")


def _genes(genes: Sequence[str], preset: Preset) -> Iterator[Row]:
    wanted = panel_genes(preset)
    if wanted is None:
        yield Row("", "ok", f"chosen at the data step among {len(set(genes))}")
        return
    missing = [gene for gene in wanted if gene not in set(genes)]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise UserError(
            f"{len(missing)} of the {len(wanted)} panel genes are not among the section's "
            f"{len(genes)} ({shown}): use a matrix of the human transcriptome with gene symbols, "
            "or another genes.panel"
        )
    yield Row("", "ok", f"all {len(wanted)} panel genes are among {len(genes)}")


def panel_genes(preset: Preset) -> list[str] | None:
    """Symbols of the panel; None for variable genes that are not chosen yet."""
    from sparsity_trap.data import genes

    if preset.genes.panel == "variable" and not preset.panel_file.is_file():
        return None
    return list(genes.panel(preset)["gene"])


def _image(slide) -> Iterator[Row]:
    from sparsity_trap.data.image import check_scale, check_stain, open_image

    check_scale(slide.microns_per_pixel, slide.image)
    with open_image(slide.image) as image:
        height, width = image.shape[:2]
        check_stain(image, slide.image)
    found = f"{height} x {width} pixels of {slide.microns_per_pixel:.4g} µm: {slide.image}"
    yield Row("", "ok", found)


def _geometry(name: str, this, slide) -> Iterator[Row]:
    from sparsity_trap.data import guards

    geometry = guards.read_geometry(slide, this.mask)
    um = geometry.step * slide.microns_per_pixel
    tissue = int(geometry.tissue.positions.in_tissue.sum())

    def width_of_bins() -> Iterator[Row]:
        guards.check_names(slide)
        guards.check_geometry(slide, geometry)
        yield Row("", "ok", f"{um[0]:.3f} x {um[1]:.3f} µm apart by their pixel positions")

    def fit_of_image() -> Iterator[Row]:
        guards.check_image(slide, geometry)
        yield Row("", "ok", f"those of {tissue} tissue bins fit the image")

    def placement() -> Iterator[Row]:
        correlation = guards.check_placement(slide, geometry)
        if correlation < _FOLLOWS:
            mend = "check that this is the image of this section, and its alignment"
            found = f"counts hardly follow the image (correlation {correlation:.2f})"
            yield Row("", "warn", found, mend)
        elif correlation == correlation:
            yield Row("", "ok", f"counts follow the image (correlation {correlation:.2f})")
        else:
            yield Row("", "ok", "too few bins to compare counts with the image")

    yield from guarded(f"{name} bins", width_of_bins)
    yield from guarded(f"{name} positions", fit_of_image)
    yield from guarded(f"{name} placement", placement)
    yield from _left_out(name, geometry.tissue.left_out, tissue, this.mask)


def _left_out(name: str, left_out: dict[str, int], tissue: int, mask: Path | None) -> Iterator[Row]:
    """What `left_out` says, and the number of bins in tissue that remain."""
    lost = {why: bins for why, bins in left_out.items() if bins and why != "dark in the mask"}
    found = "; ".join(f"{bins} bins {why}" for why, bins in lost.items())
    if sum(lost.values()) > _LOST * tissue:
        mend = "give matrix, positions and image of one run, with its empty bins: zeros count too"
        yield Row(f"{name} left out", "warn", found, mend)
    else:
        yield Row(f"{name} left out", "ok", found or "no bin in tissue")
    if mask is not None:
        dark = left_out["dark in the mask"]
        found = f"{mask}: leaves out {dark} of {tissue + dark} bins in tissue"
        mend = "" if dark else "a mask that is bright everywhere changes nothing"
        yield Row(f"{name} mask", "ok" if dark else "warn", found, mend)


def _versions(matrix: Path) -> str:
    """What a matrix says of the software and references it was made with."""
    from sparsity_trap.data.matrix import open_matrix

    with open_matrix(matrix) as group:
        file = group.file
        versions = [
            f"{label} {value.decode() if isinstance(value, bytes) else value}"
            for key, label in (("software_version", "written by"), ("version", "matrix version"))
            if (value := file.attrs.get(key)) is not None
        ]
        features = file["matrix/features"]
        genome = [features["genome"][0].decode()] if len(features.get("genome", ())) else []
        barcodes = len(file["matrix/barcodes"])
    return "; ".join([*(versions or ["versions not recorded"]), *genome, f"{barcodes} barcodes"])


def _distinct(cohort) -> Iterator[Row]:
    from sparsity_trap.data.sections import check_distinct

    for name in cohort.patients:
        check_distinct(name, cohort.patients)
    yield Row("", "ok", f"{len(cohort.patients)} sections and images, all different")
