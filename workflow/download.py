"""Download the public colorectal sections: python workflow/download.py [P1 P2 P5] [--tiles]

Per patient, the full-resolution H&E (11 to 14 GB) and, out of an archive of about 16 GB, the 2 µm
matrix and its ``spatial`` folder. curl fetches: what broke off goes on where it stopped, in this
call or in a later one. tar unpacks; the archive is deleted afterwards.

SHA-256 checksums are recorded in ``download.json`` beside the ``outs`` folder when a file is first
complete (10x Genomics publishes none), and compared by every later call.

``--tiles`` fetches, instead of sections, the 19 figures of real tiles (16 MB) and decodes them.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparsity_trap.files import building
from sparsity_trap.progress import say
from sparsity_trap.settings import ROOT, UserError

#: Folder of all data sets on 10x Genomics' server; a file's address is <base>/<name>/<name>_<file>.
BASE = "https://cf.10xgenomics.com/samples/spatial-exp/3.0.0"

#: Name of each patient's data set. Public download scripts use the address of P5; those of P1 and
#: P2 follow the same pattern and were not tried. The data set without a suffix is P2 again.
DATA_SETS = {p: f"Visium_HD_Human_Colon_Cancer_{p}" for p in ("P1", "P2", "P5")}
CONFIRMED = ("P5",)

#: Figures of real tiles, and the genes that they are of.
FIGURES = (
    "https://raw.githubusercontent.com/vanbelkummax/sparsity-trap-publication/"
    "e945c68aa040be0fa91d486702673b0dc31974b2/figures/tiles"
)
FIGURE_GENES = (
    "CD24", "CEACAM5", "CEACAM6", "EPCAM", "FCGBP", "HSPA8", "JCHAIN", "KRT8", "LGALS3", "MT-ND5",
    "MUC12", "OLFM4", "PHGR1", "PYGB", "S100A10", "SYNGR2", "TMSB10", "TSPAN8", "VIM",
)  # fmt: skip
#: Where the tiles lie in the section.
PLACES = ROOT / "published" / "tile_places.csv"

IMAGE, ARCHIVE = "tissue_image.btf", "binned_outputs.tar.gz"
SQUARE = "binned_outputs/square_002um"
NEEDED = (
    f"{SQUARE}/filtered_feature_bc_matrix.h5",
    f"{SQUARE}/spatial/tissue_positions.parquet",
    f"{SQUARE}/spatial/scalefactors_json.json",
)
#: Bytes that must be free before a section is begun: image, archive, and what is unpacked of it.
_ROOM = 35e9
# curl waits 1, 2, 4 ... seconds between attempts, and gives up on a connection that moves nothing.
_CURL = ["curl", "--fail", "--location", "--retry", "8", "--retry-all-errors", "--retry-max-time",
         "600", "--speed-time", "60", "--speed-limit", "1"]  # fmt: skip
#: Exit codes of curl for a refusal by the server (22) and for a disk that takes no more (23).
_REFUSED, _NOT_WRITTEN = 22, 23


def download(patient: str, to: Path, base: str = BASE) -> Path:
    """Download one section, or what is missing of it, and check what is there.

    Parameters
    ----------
    patient
        A key of `DATA_SETS`.
    to
        Parent of the patients' folders.
    base
        Folder of all data sets on the server; a mirror of it can be given.

    Returns
    -------
    The ``outs`` folder, ``to/<patient>/outs``, laid out as Space Ranger does.

    Raises
    ------
    UserError
        Unknown patient, no curl, no space, no such file on the server, a file that differs from its
        recorded checksum, or an archive that lacks what is needed.
    """
    if patient not in DATA_SETS:
        raise UserError(
            f"patient '{patient}' is not a public section: choose among {', '.join(DATA_SETS)}"
        )
    outs = to / patient / "outs"
    outs.mkdir(parents=True, exist_ok=True)
    record = to / patient / "download.json"
    known = json.loads(record.read_text()) if record.is_file() else {}
    _compare(outs, known)
    address = f"{base.rstrip('/')}/{DATA_SETS[patient]}/{DATA_SETS[patient]}_"
    hint = "" if patient in CONFIRMED else (
        f"; the address of {patient} is not certain: look up 'Visium HD Human Colorectal Cancer' "
        f"at 10xgenomics.com/datasets and put the files into {outs} by hand"
    )  # fmt: skip
    wanted = [name for name in (IMAGE, *NEEDED) if not (outs / name).is_file()]
    if wanted and shutil.disk_usage(outs).free < _ROOM:
        raise UserError(f"{outs} has less than {_ROOM / 1e9:.0f} GB free: free some, or give --to")
    if IMAGE in wanted:
        _fetch(address + IMAGE, outs / IMAGE, hint)
    if set(NEEDED) & set(wanted):
        archive = to / patient / ARCHIVE
        if not archive.is_file():
            _fetch(address + ARCHIVE, archive, hint)
        _unpack(archive, outs)
    found = {str(f.relative_to(outs)): _sha256(f) for f in outs.rglob("*") if f.is_file()}
    changed = [name for name, digest in known.items() if found.get(name, digest) != digest]
    if changed:
        raise UserError(
            f"{outs / changed[0]} differs from the first download (SHA-256 in {record}): if the "
            "publisher replaced it, delete its line there and download again"
        )
    with building(record) as partial:
        partial.write_text(json.dumps(known | found, indent=1) + "\n")
    return outs


def download_tiles(to: Path, base: str = FIGURES) -> Path:
    """Download the figures of real tiles, and decode them.

    Parameters
    ----------
    to
        Folder of the file that `sparsity_trap.tiles.read_tiles` reads.
    base
        Folder of the figures on a server.

    Raises
    ------
    UserError
        No curl, no space, no such file on the server, or another figure than expected.
    """
    import figure_tiles  # here, so that who wants sections does without matplotlib and torch
    import numpy as np

    from sparsity_trap.tiles import FILE

    with PLACES.open() as file:
        places = {
            row["tile"]: (int(row["row"]), int(row["column"])) for row in csv.DictReader(file)
        }
    to.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory(dir=to) as folder:
        for gene in FIGURE_GENES:
            url = f"{base.rstrip('/')}/{gene}_tile_comparison.pdf"
            path = Path(folder, f"{gene}.pdf")
            _fetch(url, path, "")
            try:
                found += figure_tiles.tiles(gene, path.read_bytes())
            except ValueError as error:
                raise UserError(
                    f"{url} is not the figure that it was ({error}): fetch the tiles from the "
                    "repository's state of commit e945c68"
                ) from error
    arrays = figure_tiles.arrays(found, places)
    with building(to / FILE) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return to / FILE


def _compare(outs: Path, known: dict[str, str]) -> None:
    for name, digest in known.items():
        if (outs / name).is_file() and _sha256(outs / name) != digest:
            raise UserError(
                f"{outs / name} has changed since it was downloaded: delete it and download again"
            )


def _fetch(url: str, target: Path, hint: str) -> None:
    partial = target.with_name(target.name + ".part")
    code = _run([*_CURL, "--continue-at", "-", "--output", str(partial), url]).returncode
    if code == _REFUSED:
        raise UserError(f"{url} cannot be had{hint or ': check the address, or give --base'}")
    if code == _NOT_WRITTEN:
        raise UserError(f"{target} cannot be written: free some space, or give --to")
    if code:
        raise UserError(
            f"{url} could not be read (curl says {code}): check the connection and download again; "
            "what arrived is kept"
        )
    partial.replace(target)


def _unpack(archive: Path, outs: Path) -> None:
    """Move what is needed of the archive into ``outs``: nothing appears before all is sound."""
    folder = archive.with_name("unpacking")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    # Names begin with "./" or not. tar itself refuses absolute names and "..".
    pattern = ["--wildcards", f"*{NEEDED[0]}", f"*{SQUARE}/spatial/*"]
    command = ["tar", "--extract", "--gzip", "--file", archive, "--directory", folder, *pattern]
    done = _run(list(map(str, command)), capture_output=True, text=True)
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if done.returncode or links or missing:
        reason = (
            f"{links[0].name} is a link" if links
            else f"it lacks {missing[0]}" if missing
            else done.stderr.strip().splitlines()[0]
        )  # fmt: skip
        shutil.rmtree(folder)
        archive.unlink()
        raise UserError(f"{archive.name} is not a whole, sound archive ({reason}): download again")
    shutil.copytree(folder / SQUARE, outs / SQUARE, dirs_exist_ok=True, copy_function=shutil.move)
    shutil.rmtree(folder)
    archive.unlink()


def _run(command: list[str], **options) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, check=False, **options)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed: install it, then download again") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Download sections from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("patients", nargs="*", metavar="PATIENT", help="default: P1 P2 P5")
    parser.add_argument("--to", type=Path, default=ROOT / "data" / "sections", metavar="FOLDER")
    parser.add_argument("--base", default=BASE, metavar="URL", help="a mirror of 10x's folder")
    parser.add_argument("--tiles", type=Path, metavar="FOLDER", help="fetch the real tiles instead")
    given = parser.parse_args(arguments)
    try:
        if given.tiles:
            say(str(download_tiles(given.tiles, FIGURES if given.base == BASE else given.base)))
            return
        for patient in given.patients or DATA_SETS:
            say(str(download(patient, given.to, given.base)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
