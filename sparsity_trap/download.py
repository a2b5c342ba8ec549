"""Download the public colorectal sections: ``python -m sparsity_trap.download [P1 P2 P5]``.

Per patient, the full-resolution H&E (11 to 14 GB) and, out of an archive of about 16 GB, the 2 µm
matrix and its ``spatial`` folder. The archive is unpacked while it arrives and never stored. Last,
where the server has it, ``feature_slice.h5``: maps of single genes, which are read faster than the
matrix and hold nothing else.

A download that breaks off goes on where it stopped. Single files do so in a later call too; the
archive only within one call, since a gzip stream cannot be entered in the middle: a later call reads
it from its beginning, but members that were finished are not written again.

SHA-256 checksums are recorded in ``download.json`` beside the ``outs`` folder when a file is first
complete (10x Genomics publishes none that we could record beforehand) and are checked by each later
call.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

from tqdm import tqdm

from sparsity_trap.files import building
from sparsity_trap.progress import display_options
from sparsity_trap.settings import ROOT, UserError

#: Folder of all data sets on 10x Genomics' server.
BASE = "https://cf.10xgenomics.com/samples/spatial-exp/3.0.0"


class DataSet(NamedTuple):
    """A public section. Its files lie at ``<base>/<name>/<name>_<file>``."""

    name: str
    confirmed: bool  # public download scripts use this address for image and archive


#: The one table of addresses. They could not be tried from where this was written. Public download
#: scripts use those of P5 and P2; for P1 they use that of the archive, and the image's follows the
#: same pattern and is not certain. Public scripts also use "Visium_HD_Human_Colon_Cancer", without
#: a suffix: that is P2 again, not a fourth patient.
DATA_SETS = {
    "P1": DataSet("Visium_HD_Human_Colon_Cancer_P1", confirmed=False),
    "P2": DataSet("Visium_HD_Human_Colon_Cancer_P2", confirmed=True),
    "P5": DataSet("Visium_HD_Human_Colon_Cancer_P5", confirmed=True),
}
IMAGE, ARCHIVE = "tissue_image.btf", "binned_outputs.tar.gz"

#: Public scripts list this file for all three sections, with the same pattern. Its address is the
#: least certain of all, and a section is whole without it.
SLICES = "feature_slice.h5"

_KEPT_FOLDER = "binned_outputs/square_002um/"
_REQUIRED = tuple(
    _KEPT_FOLDER + name
    for name in (
        "filtered_feature_bc_matrix.h5",
        "spatial/tissue_positions.parquet",
        "spatial/scalefactors_json.json",
    )
)
_BLOCK = 1 << 20  # bytes
_ATTEMPTS = 5
_PAUSE = 2.0  # seconds before the second attempt, doubled for each further one
_TIMEOUT = 60  # seconds without a byte
_HEADERS = {"User-Agent": "sparsity-trap"}  # the server refuses urllib's own name


def download(patient: str, to: Path, base: str = BASE) -> Path:
    """Download one section, or what is missing of it, and check what is there.

    Parameters
    ----------
    patient
        A key of :data:`DATA_SETS`.
    to
        Parent of the patients' folders.
    base
        Folder of all data sets on the server; a mirror of it can be given.

    Returns
    -------
    The ``outs`` folder, ``to/<patient>/outs``, laid out as
    :func:`sparsity_trap.data.spaceranger.open_slide` expects it.

    Raises
    ------
    UserError
        Unknown patient; a file that is needed cannot be had; no space; a file differs from its recorded checksum;
        the archive is unsafe or incomplete.
    """
    if patient not in DATA_SETS:
        raise UserError(
            f"patient '{patient}' is not a public section: choose among {', '.join(DATA_SETS)}"
        )
    data_set = DATA_SETS[patient]
    outs = to / patient / "outs"
    outs.mkdir(parents=True, exist_ok=True)
    record = Record(to / patient / "download.json")
    address = f"{base.rstrip('/')}/{data_set.name}/{data_set.name}_"
    hint = "" if data_set.confirmed else _uncertain(patient, outs)
    _get_file(outs, IMAGE, record, address + IMAGE, hint)
    _get_matrix(outs, record, address + ARCHIVE, hint)
    _get_slices(outs, record, address + SLICES)
    return outs


def _uncertain(patient: str, outs: Path) -> str:
    return (
        f"; the address of {patient} is not certain: look up 'Visium HD Human Colorectal Cancer' "
        f"at 10xgenomics.com/datasets and put the files into {outs} by hand, or give --base"
    )


class Absent(UserError):
    """The server does not have a file."""


class Record:
    """Size and SHA-256 of each finished file, kept in a JSON file.

    Entries are written just before a file gets its final name, so a file without an entry was
    never finished by this program.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.entries = json.loads(path.read_text()) if path.is_file() else {}
        except json.JSONDecodeError:
            raise UserError(
                f"{path} is damaged: delete it, and the files beside it that you do not trust"
            ) from None

    def set(self, key: str, entry: Any) -> None:
        """Store one entry on disk."""
        self.entries[key] = entry
        with building(self.path) as partial:
            partial.write_text(json.dumps(self.entries, indent=1) + "\n")

    def finish(self, outs: Path, key: str, partial: Path, sha256: str) -> None:
        """Record a file on first sight, or compare it with its record; then give it its name."""
        found = {"bytes": partial.stat().st_size, "sha256": sha256}
        known = self.entries.get(key)
        if known is not None and known != found:
            partial.unlink()
            raise UserError(
                f"{outs / key} as downloaded now differs from the first download (SHA-256 in "
                f"{self.path}): if the publisher replaced it, delete that file and download again"
            )
        self.set(key, found)
        partial.replace(outs / key)

    def has(self, outs: Path, key: str, size: int | None = None) -> bool:
        """Tell whether a file is there and sound; record one that was put there by hand."""
        path = outs / key
        if not path.is_file():
            return False
        found = {"bytes": path.stat().st_size, "sha256": _sha256_of(path)}
        if key not in self.entries:
            if size is not None and found["bytes"] != size:
                raise UserError(
                    f"{path} has {found['bytes']} bytes, the published file {size}: delete it and "
                    "download again"
                )
            self.set(key, found)
        if self.entries[key] != found:
            raise UserError(
                f"{path} has changed since it was downloaded (SHA-256 in {self.path}): delete it "
                "and download again"
            )
        return True


def _get_file(outs: Path, name: str, record: Record, url: str, hint: str = "") -> None:
    target, partial = outs / name, outs / f"{name}.part"
    if name in record.entries and record.has(outs, name):
        return
    with Remote(url, hint) as remote:
        if record.has(outs, name, remote.size):
            return
        # A part of another version of the file must not be continued.
        if record.entries.get(partial.name) != remote.version:
            partial.unlink(missing_ok=True)
            record.set(partial.name, remote.version)
        have = partial.stat().st_size if partial.is_file() else 0
        if have > remote.size:
            partial.unlink()
            have = 0
        _check_space(outs, remote.size - have, target)
        digest = hashlib.sha256()
        if have:
            _update(digest, partial)
        remote.skip_to(have)
        with partial.open("ab") as file:
            _copy(remote, file, digest)
    record.finish(outs, name, partial, digest.hexdigest())


def _get_slices(outs: Path, record: Record, url: str) -> None:
    """Get the optional file; a server without it is noted, and not asked again."""
    absent = f"{SLICES} absent"
    if record.entries.get(absent) == url:
        return
    try:
        _get_file(outs, SLICES, record, url)
    except Absent as error:
        record.set(absent, url)
        print(f"note: {error}; the matrix holds all that is needed", file=sys.stderr)


def _get_matrix(outs: Path, record: Record, url: str, hint: str) -> None:
    done = f"{ARCHIVE} unpacked"
    if done in record.entries:
        present = [record.has(outs, name) for name in record.entries[done]]
        if all(present):
            return
    kept: list[str] = []
    with Remote(url, hint) as remote:
        try:
            # A stream is only read from.
            with tarfile.open(fileobj=cast(IO[bytes], remote), mode="r|gz") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if name in _REQUIRED or name.startswith(_KEPT_FOLDER + "spatial/"):
                        _check_member(member, outs, url)
                        if member.isreg():
                            _extract(archive, member, outs, name, record)
                            kept.append(name)
                    elif set(_REQUIRED) <= set(kept) and not name.startswith(_KEPT_FOLDER):
                        break  # tar keeps folders together: the other bin sizes are not needed
        except (tarfile.TarError, EOFError) as error:
            raise UserError(
                f"{url} is not a sound archive ({error}): download again; what was finished is kept"
            ) from None
    if missing := [name for name in _REQUIRED if name not in kept]:
        raise UserError(f"{url} has no {missing[0]}: give the archive of a whole Visium HD run")
    record.set(done, kept)


def _check_member(member: tarfile.TarInfo, outs: Path, url: str) -> None:
    """Refuse what would land outside the folder: absolute names, '..', links, devices."""
    try:
        tarfile.data_filter(member, str(outs))
        # The filter looks at where a name ends up; one that leaves the kept folder and stays in
        # outs would still overwrite what it should not.
        unsafe = ".." in Path(member.name).parts
    except tarfile.FilterError:
        unsafe = True
    if unsafe:
        raise UserError(
            f"{url} holds the unsafe name '{member.name}' and was not unpacked further: do not use "
            "this archive; get it from 10x Genomics"
        )


def _extract(
    archive: tarfile.TarFile, member: tarfile.TarInfo, outs: Path, name: str, record: Record
) -> None:
    target = outs / name
    if record.has(outs, name, member.size):
        return
    _check_space(outs, member.size, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    digest = hashlib.sha256()
    regular = cast(IO[bytes], archive.extractfile(member))  # as the caller made sure
    with regular as source, partial.open("wb") as file:
        _copy(source, file, digest)
    record.finish(outs, name, partial, digest.hexdigest())


class Remote:
    """A file on a server, read forwards; a broken connection is taken up where it broke.

    Attributes
    ----------
    size : int
        Length, bytes.
    version : dict
        Changes when the file on the server changes.
    """

    def __init__(self, url: str, hint: str = ""):
        self.url, self._hint = url, hint
        self._answer: http.client.HTTPResponse | None = None
        with self._retried(self._request, method="HEAD") as answer:
            length = answer.headers.get("Content-Length")
            self.version = {"bytes": length, "etag": answer.headers.get("ETag"), "url": url}
        if length is None:
            raise UserError(f"{url}: the server tells no length: give another --base")
        self.size, self._at = int(length), 0
        self._bar = tqdm(
            desc=url.rsplit("/", 1)[1], total=self.size, unit="B", unit_scale=True,
            mininterval=0.5, **display_options(),
        )  # fmt: skip

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._disconnect()

    def skip_to(self, offset: int) -> None:
        """Go on reading at an offset."""
        self._at = offset
        self._bar.update(offset - self._bar.n)

    def read(self, size: int = _BLOCK) -> bytes:
        """Read up to ``size`` bytes; nothing only at the end of the file."""
        if self._at == self.size:
            return b""
        data = self._retried(self._read_once, size)
        self._at += len(data)
        self._bar.update(len(data))
        return data

    def _read_once(self, size: int) -> bytes:
        if self._answer is None:
            self._answer = self._request(self._at)
        data = self._answer.read(min(size, self.size - self._at))
        if not data:
            raise ConnectionError(f"connection closed at byte {self._at} of {self.size}")
        return data

    def _request(self, offset: int = 0, method: str = "GET") -> http.client.HTTPResponse:
        headers = dict(_HEADERS)
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self.version["etag"]:
                headers["If-Range"] = self.version["etag"]
        request = urllib.request.Request(self.url, headers=headers, method=method)
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
        if offset and answer.status != 206:
            answer.close()
            raise UserError(
                f"{self.url} changed on the server, or the server cannot resume: delete the .part "
                "file and download again"
            )
        return answer

    def _disconnect(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _retried(self, call, *args, **kwargs):
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            try:
                return call(*args, **kwargs)
            except urllib.error.HTTPError as error:
                if error.code < 500:  # asking again would give the same answer
                    # Storage behind such servers often says 403 of a file that does not exist.
                    kind = Absent if error.code in (403, 404, 410) else UserError
                    raise kind(
                        f"{self.url} cannot be had (HTTP {error.code} {error.reason})"
                        f"{self._hint or ': check the address in sparsity_trap/download.py'}"
                    ) from None
                reason = f"HTTP {error.code} {error.reason}"
            except urllib.error.URLError as error:
                reason = str(error.reason)
            except (OSError, http.client.HTTPException) as error:
                reason = str(error)
            except ValueError as error:
                raise UserError(f"{self.url} is no address ({error}): correct --base") from None
            self._disconnect()
        raise UserError(
            f"{self.url} could not be read ({reason}): check the connection and download again; "
            "what arrived is kept"
        )


def _copy(source: Remote | IO[bytes], file: BinaryIO, digest) -> None:
    while data := source.read(_BLOCK):
        try:
            file.write(data)
        except OSError as error:
            raise UserError(f"{file.name} cannot be written ({error}): free some space") from None
        digest.update(data)


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    _update(digest, path)
    return digest.hexdigest()


def _update(digest, path: Path) -> None:
    size = path.stat().st_size
    options = {"unit": "B", "unit_scale": True, "mininterval": 0.5, "leave": False}
    with (
        path.open("rb") as file,
        tqdm(desc=f"checking {path.name}", total=size, **options, **display_options()) as bar,
    ):
        while data := file.read(_BLOCK):
            digest.update(data)
            bar.update(len(data))


def _check_space(folder: Path, needed: int, target: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{target} needs {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: free "
            "some space, or give another folder with --to"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Download sections from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsity_trap.download", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("patients", nargs="*", metavar="PATIENT", help="default: P1 P2 P5")
    parser.add_argument("--to", type=Path, default=ROOT / "data" / "sections", metavar="FOLDER")
    parser.add_argument("--base", default=BASE, metavar="URL", help="a mirror of 10x's folder")
    given = parser.parse_args(arguments)
    try:
        for patient in given.patients or DATA_SETS:
            print(download(patient, given.to, given.base))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
