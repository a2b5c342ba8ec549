"""Check everything a run needs: ``python workflow/doctor.py [--preset NAME] [--cohort FILE]``.

Prints one table of what was found and how to mend it. The exit status is 1 if anything fails.
No check stops another, and nothing is downloaded or written. Only the access to an encoder's
weights is asked for over the network.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from sparsity_trap.bins import BIN_UM, PATCH_BINS
from sparsity_trap.inputs import is_dir
from sparsity_trap.presets import load_preset, other_worlds
from sparsity_trap.progress import say
from sparsity_trap.settings import ROOT, Preset, UserError

#: Packages whose version can change a result or whether a file can be read.
PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "scipy", "pandas", "scanpy", "squidpy", "anndata",
    "statsmodels", "zarr", "h5py", "pyarrow", "tifffile", "imagecodecs", "pydantic", "snakemake",
    "papermill", "jupyter-book",
)  # fmt: skip
LOCK = ROOT / "requirements.lock.txt"

#: GB that sections, stores and tokens of a world may take. With real ones, the tokens of about 600
#: patches in 16 views take 6 GB per patient.
_DISK_GB = {"simulated": 1.0, "tissue-map": 1.0, "spaceranger": 50.0}
#: GB of a run's maps of a patch of 50 genes, and patches of a real section, about.
_MAP_GB, _REAL_PATCHES = 1.4e-3, 600
_LEAST_DISK_GB = 1
_GPU_GB = 8

#: First version of Space Ranger that corrects images of CytAssist software 2.1.
_ALIGNED = (3, 1, 2)

#: Correlation of counts with the darkness of the image below which they hardly belong together, and
#: share of bins in tissue that may be left out without a warning.
_FOLLOWS, _LOST = 0.1, 0.01

#: Widths of the text columns, in characters, and how many missing genes are named.
_WIDTH = 58
_SHOWN = 50

State = Literal["ok", "warn", "FAIL"]


class Row(NamedTuple):
    """One line of the table."""

    check: str
    state: State
    found: str
    mend: str = ""


def examine(
    preset: Callable[[], Preset], cohort: Path | None = None, online: bool = True
) -> Iterator[Row]:
    """Carry out every check.

    Parameters
    ----------
    preset
        Gives the preset to be run, or raises ``UserError``.
    cohort
        Cohort file; its sections are checked. Default: those of the preset, where it reads real
        ones.
    online
        Ask Hugging Face whether the encoder's weights can be had. Otherwise nothing leaves this
        computer.
    """
    yield from _guarded("Python", python)
    yield from _guarded("packages", packages)
    yield from _guarded("GPU", gpu)
    settings: Preset | None = None
    try:
        settings = preset()
    except UserError as error:
        yield _failed("preset", error)
    if settings is not None:
        yield from _guarded("preset", partial(_preset, settings))
        yield from _guarded("disk", partial(disk, settings.folder, _needed_gb(settings)))
        yield from _guarded("encoder", partial(encoder, settings.encoder.name, online))
        yield from _guarded("gene panel", partial(panel, settings))
        yield from _guarded("cell-type maps", partial(label_maps, settings))
    yield from _guarded("cohort", partial(_sections, settings, cohort))


def python() -> Iterator[Row]:
    """Version of Python against the one the lock was made for."""
    found = f"Python {platform.python_version()}"
    sound = (3, 11) <= tuple(sys.version_info[:2]) <= (3, 12)
    yield Row(
        "Python",
        *(("ok", found) if sound else ("FAIL", found, "install Python 3.11 or 3.12, make env")),
    )


def packages(lock: Path = LOCK) -> Iterator[Row]:
    """Installed versions against the lock; a build suffix such as ``+cpu`` does not count."""
    if not lock.is_file():
        raise UserError(f"{lock} does not exist: restore it from the repository")
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;+]+)", lock.read_text(), re.MULTILINE))
    missing, other = [], []
    for name in PACKAGES:
        try:
            installed = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if installed != locked.get(name, installed):
            other.append(f"{name} {installed} (lock: {locked[name]})")
    if missing:
        yield Row("packages", "FAIL", f"not installed: {', '.join(missing)}", "make env")
    if other:
        mend = "make env; results of other versions may differ"
        yield Row("packages", "warn", ", ".join(other), mend)
    if not missing and not other:
        yield Row("packages", "ok", f"{len(PACKAGES)} key packages are those of {lock.name}")


def gpu() -> Iterator[Row]:
    """Whether torch works, and with which accelerator."""
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = (size / 1e9 for size in torch.cuda.mem_get_info(i))
            name = torch.cuda.get_device_name(i)
            found = f"torch {torch.__version__}, {name}, {free:.0f} of {total:.0f} GB free"
            if free < _GPU_GB:
                mend = f"end what else runs on it: {_GPU_GB} GB or more; else lower batch_size"
                yield Row("GPU", "warn", found, mend)
            else:
                yield Row("GPU", "ok", found)
    else:
        yield Row("GPU", *_no_gpu(torch.__version__, torch.version.cuda))


def _no_gpu(version: str, cuda: str | None) -> tuple[State, str, str]:
    """Why torch sees no GPU: hidden, none there, a driver that fails, or a torch without CUDA."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        found = f"torch {version}, no GPU: CUDA_VISIBLE_DEVICES is '{hidden}'"
        return "warn", found, "unset it, or name a GPU of this machine, where one is to be used"
    if not shutil.which("nvidia-smi"):
        mend = "enough for the laptop preset; full sections need an NVIDIA GPU"
        return "warn", f"torch {version}, no GPU", mend
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if done.returncode or "GPU " not in done.stdout:
        said = " ".join((done.stdout + done.stderr).split())[:200] or "it lists none"
        mend = "start or update the driver; on a cluster, ask for a job with a GPU"
        return "warn", f"torch {version}, no GPU, though nvidia-smi is present ({said})", mend
    if cuda is None:
        mend = "remove .venv and say make env, which installs torch with CUDA"
        return "FAIL", f"torch {version} is built without CUDA, though there is a GPU", mend
    mend = f"update the driver to one for CUDA {cuda}"
    return "FAIL", f"torch {version} sees no GPU, though nvidia-smi does", mend


def _needed_gb(preset: Preset) -> float:
    """What the results of a preset and its other worlds may take."""
    real = preset.source == "spaceranger"
    patches = _REAL_PATCHES if real else int(preset.simulation.side_um / (PATCH_BINS * BIN_UM)) ** 2
    places = [preset, *other_worlds(preset).values()]
    maps = sum(len(place.all_runs()) for place in places) * patches * _MAP_GB
    return len(places) * _DISK_GB[preset.source] + maps


def disk(folder: Path, needed: float) -> Iterator[Row]:
    """Free space where results go, GB."""
    existing = next(f for f in (folder, *folder.parents) if f.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} cannot be written: change its owner or permissions")
    free = shutil.disk_usage(existing).free / 1e9
    found = f"{free:.0f} GB free in {existing}"
    mend = f"free some space: the results may take {needed:.0f} GB"
    if free < _LEAST_DISK_GB:
        yield Row("disk", "FAIL", found, mend)
    elif free < needed:
        yield Row("disk", "warn", found, mend)
    else:
        yield Row("disk", "ok", found)


def encoder(name: str, online: bool = True) -> Iterator[Row]:
    """Whether the encoder's weights can be had. A token is looked for, never shown."""
    from sparsity_trap import encoders

    card = encoders.encoder_card(name)
    found = f"{name} ({card.licence or 'licence not stated'})"
    if card.architecture is None:
        yield Row("encoder", "ok", f"{found}, which needs no weights")
        return
    if card.hub is None:
        yield Row("encoder", "ok", f"{found}: timm downloads its weights at first use")
        return
    try:
        here = encoders.check_access(name, online)
    except encoders.Unreachable as error:
        row = _failed("encoder", error)
        yield row._replace(state="warn", found=f"access unknown; {row.found}")
        return
    if here:
        yield Row("encoder", "ok", f"{found}: its weights are on this computer")
    elif online:
        yield Row("encoder", "ok", f"{found}: open to you, downloaded at first use")
    else:
        mend = "leave --offline out to try the access"
        yield Row("encoder", "warn", f"{found}: its weights are not on this computer", mend)


def panel(preset: Preset) -> Iterator[Row]:
    """Genes that the preset predicts; `section` compares them with each matrix."""
    genes = _panel(preset)
    if genes is None:
        found = f"the {preset.genes.count} most variable genes, chosen at the data step"
        yield Row("gene panel", "ok", found)
    else:
        yield Row("gene panel", "ok", f"{preset.genes.panel}: {len(genes)} genes")


def _panel(preset: Preset) -> list[str] | None:
    """Symbols of the panel; None for variable genes that are not chosen yet."""
    from sparsity_trap.data import genes

    if preset.genes.panel == "variable" and not preset.panel_file.is_file():
        return None
    return list(genes.panel(preset)["gene"])


def label_maps(preset: Preset) -> Iterator[Row]:
    """Cell-type maps of the source ``tissue-map``; missing ones are downloaded at first use."""
    from sparsity_trap.runs import LABELS, LABELS_VARIABLE
    from sparsity_trap.simulation.label_map import LABEL_SHA256, find_labels

    folder = Path(os.environ.get(LABELS_VARIABLE, LABELS))
    present = [
        p for p in LABEL_SHA256 if (folder / f"DeconvolutionResults_{p}CRC.csv.gz").is_file()
    ]
    for patient in present:
        find_labels(patient, folder)  # compares checksums
    missing = [p for p in LABEL_SHA256 if p not in present]
    found = f"{', '.join(present) or 'none'} in {folder}"
    if preset.source != "tissue-map":
        yield Row("cell-type maps", "ok", f"{found}; this preset needs none")
    elif missing:
        mend = f"{', '.join(missing)} will be downloaded; without a connection, put them there"
        yield Row("cell-type maps", "warn", found, mend)
    else:
        yield Row("cell-type maps", "ok", found)


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
    yield from _guarded(f"{name} alignment", partial(_alignment, slide.outs / MATRIX))
    yield from _guarded(f"{name} counts", partial(_counts, name, slide))
    if preset is not None:
        yield from _guarded(f"{name} genes", partial(_genes, slide.genes, preset))
    yield from _guarded(f"{name} image", partial(_image, slide))
    yield from _guarded(f"{name} bins", partial(_geometry, name, this, slide))


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
    wanted = _panel(preset)
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

    yield from _guarded(f"{name} bins", width_of_bins)
    yield from _guarded(f"{name} positions", fit_of_image)
    yield from _guarded(f"{name} placement", placement)
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


def _sections(preset: Preset | None, cohort_file: Path | None) -> Iterator[Row]:
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
            yield _failed(f"{name} files", error)
            continue
        rows = list(_guarded(f"{name} files", partial(section, name, this, preset)))
        yield from rows
        if all(row.state == "ok" for row in rows[:2]):
            readable[name] = this
    if len(readable) > 1:
        yield from _guarded("duplicates", partial(_distinct, cohorts.Cohort(patients=readable)))


def _distinct(cohort) -> Iterator[Row]:
    from sparsity_trap.data.sections import check_distinct

    for name in cohort.patients:
        check_distinct(name, cohort.patients)
    yield Row("", "ok", f"{len(cohort.patients)} sections and images, all different")


def _preset(preset: Preset) -> Iterator[Row]:
    found = f"{preset.name}: {preset.source}, {', '.join(preset.patients)}, "
    yield Row("preset", "ok", found + f"{len(preset.all_runs())} runs")


def _guarded(check: str, rows: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Rows of a check, under its name where they have none; an error becomes a row."""
    try:
        for row in rows():
            yield row if row.check else row._replace(check=check)
    except Exception as error:  # a table that stops at the first surprise would hide the rest
        yield _failed(check, error)


def _failed(check: str, error: Exception) -> Row:
    if not isinstance(error, UserError):
        return Row(check, "FAIL", f"{type(error).__name__}: {error}", "make env, or report this")
    # Messages read "what is wrong: what to do".
    found, _, mend = str(error).rpartition(": ")
    return Row(check, "FAIL", found or mend, mend if found else "")


def table(rows: Sequence[Row]) -> str:
    """Aligned plain text of the rows."""
    cells = [("check", "state", "found", "how to mend"), *rows]
    # Paths stay whole, so that they can be copied.
    wrapper = textwrap.TextWrapper(_WIDTH, break_long_words=False, break_on_hyphens=False)
    wrapped = [[wrapper.wrap(cell) or [""] for cell in row] for row in cells]
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(cells[0]))]
    lines = []
    for row in wrapped:
        for i in range(max(map(len, row))):
            parts = [cell[i] if i < len(cell) else "" for cell in row]
            joined = "  ".join(p.ljust(w) for p, w in zip(parts, widths, strict=True))
            lines.append(joined.rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description="Check everything a run needs.")
    parser.add_argument("--preset", default="laptop", help="name in presets/; default: laptop")
    parser.add_argument("--source", choices=sorted(_DISK_GB), help="in place of the preset's")
    parser.add_argument("--cohort", type=Path, metavar="FILE", help="a cohort file")
    parser.add_argument("--offline", action="store_true", help="ask nothing over the network")
    given = parser.parse_args(arguments)
    preset = partial(load_preset, given.preset, given.source)
    rows = list(examine(preset, given.cohort, not given.offline))
    say(table(rows))
    warned, failed = (sum(row.state == state for row in rows) for state in ("warn", "FAIL"))
    say(f"\n{len(rows)} checks: {failed} failed, {warned} with a warning")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
