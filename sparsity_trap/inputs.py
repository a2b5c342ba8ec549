"""Files that a user brings: found, read as text, and if they cannot be read, why and what helps.

A sound file behind a lock, without permission or packed is not mended by copying it again. What can
be told of the cause is looked for before a reader's own words are repeated.
"""

from __future__ import annotations

import codecs
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

from sparsity_trap.settings import UserError

#: First bytes of what lies under another name, what it is, and what helps.
_UNPACK = "unpack it ({}), and give what was in it under this name"
_AGAIN = "copy it again"
_CONTENTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "packed with gzip", _UNPACK.format("gunzip")),
    (b"BZh", "packed with bzip2", _UNPACK.format("bunzip2")),
    (b"\xfd7zXZ", "packed with xz", _UNPACK.format("unxz")),
    (b"\x28\xb5\x2f\xfd", "packed with zstd", _UNPACK.format("unzstd")),
    (b"7z\xbc\xaf\x27\x1c", "packed with 7-Zip", _UNPACK.format("7z x")),
    (b"PK\x03\x04", "a zip archive or an Office file", "unpack it, or save the sheet as CSV"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself (git lfs pull)"),
    (b"<!doctype", "a web page", "download it again, signed in where the site asks for it"),
    (b"<html", "a web page", "download it again, signed in where the site asks for it"),
    (b"\x89HDF", "an HDF5 file", "give the right file under this name"),
    (b"PAR1", "a parquet table", "give the right file under this name"),
)
_TAR = (257, b"ustar")

_LOCKED = "close the other program, or set HDF5_USE_FILE_LOCKING=FALSE where no program has it open"
_CLOSED = "make it readable for you, or ask its owner to"
_DISK = "see whether its disk is connected and sound, and try again"

#: Numbers of the operating system's errors, what they mean for a file, and what helps.
_ERRORS: dict[int, tuple[str, str]] = {
    errno.EACCES: ("may not be read by you", _CLOSED),
    errno.EPERM: ("may not be read by you", _CLOSED),
    errno.EAGAIN: ("is open for writing in another program", _LOCKED),
    errno.EISDIR: ("is a folder", "give the file"),
    errno.ELOOP: ("is a link to itself", "give the file"),
    errno.ENAMETOOLONG: ("has too long a name", "move it to a folder of a shorter path"),
    errno.EMFILE: ("is one file too many", "raise the number of open files (ulimit -n)"),
    errno.ENFILE: ("is one file too many", "raise the number of open files (ulimit -n)"),
    errno.ENOMEM: ("needs more memory than there is", "give this process more"),
} | dict.fromkeys(
    (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENXIO),
    ("cannot be read from its disk", _DISK),
)
#: A disk without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # which begins as that of UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_dir(path: Path) -> bool:
    """Whether a folder is there; ``UserError`` where that may not be seen."""
    return _is(path, stat.S_ISDIR)


def is_file(path: Path) -> bool:
    """Whether a file is there; ``UserError`` where that may not be seen."""
    return _is(path, stat.S_ISREG)


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(path.stat().st_mode)
    except PermissionError as error:
        raise unreadable(path, "a file or folder", error) from None
    except (OSError, ValueError):  # a name that cannot be
        return False


def check_file(path: Path, remedy: str, what: str = "") -> None:
    """Raise ``UserError`` where a file is missing or may not be read.

    Parameters
    ----------
    path
        The file.
    remedy
        Where it is missing, and nothing of a like name lies beside it.
    what
        It should be, such as "an image", of which nothing begins as packed files and web pages do.
    """
    if not is_file(path):
        if is_dir(path):
            raise UserError(f"{path} is a folder: give the file")
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist: connect its disk, "
                "or put the file itself there"
            )
        if near := _near(path):
            packed = Path(near).suffix in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
            same = path.name.lower() in near.lower()
            do = "rename that to" if same else f"write that as {path.suffix[1:]}, into"
            do = "unpack that and name it" if packed else do
            raise UserError(f"{path} does not exist, but {near} does: {do} {path.name}")
        raise UserError(f"{path} does not exist: {remedy}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise unreadable(path, "readable", error) from None
    if what and (found := _content(path, b"")):
        raise UserError(f"{path} is {found[0]}, not {what}: {found[1]}")


def _near(path: Path) -> str:
    """Name of a file beside a missing one that differs in case, prefix, packing or format."""
    try:
        names = sorted(file.name for file in path.parent.iterdir() if file.is_file())
    except OSError:
        return ""
    whole = [name for name in names if path.name.lower() in name.lower()]
    stem = [name for name in names if name.lower().startswith((f"{path.stem}.", f"{path.stem}_"))]
    return next(iter([*whole, *stem]), "")


def unreadable(
    path: Path, what: str, error: BaseException, *, own: bytes = b"", remedy: str = _AGAIN
) -> UserError:
    """One sentence on a file that cannot be read: its cause, as far as it can be told.

    Parameters
    ----------
    path
        The file.
    what
        It should be, such as "a whole parquet table".
    error
        What its reader raised.
    own
        First bytes of a file of this kind.
    remedy
        Where nothing better is known.
    """
    reason = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    elif "already open for" in reason:  # a mark in a file of HDF5 while it is written
        number = errno.EAGAIN
    elif number in (errno.EACCES, errno.EPERM):
        closed = [folder for folder in path.absolute().parents if not _open_to_us(folder)]
        path = closed[-1] if closed else path  # the outermost
    if number in _ERRORS:
        said, helps = _ERRORS[number]
    elif known := _content(path, own):
        said, helps = f"is {known[0]}, not {what}", known[1]
    else:
        said = f"is not {what} ({reason})"
        helps = "save it as UTF-8" if isinstance(error, UnicodeError) else remedy
    return UserError(f"{path} {said}: {helps}")


def _open_to_us(folder: Path) -> bool:
    return os.access(folder, os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def _content(path: Path, own: bytes) -> tuple[str, str] | None:
    """What a file holds in place of what it should hold, and what helps."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if not head:
        return "empty", _AGAIN
    if not head.strip(b"\0"):
        return "filled with zeros", _AGAIN
    if own and head.startswith(own):
        return None
    if head[_TAR[0] :].startswith(_TAR[1]):
        return "a tar archive", _UNPACK.format("tar xf")
    start = head.lstrip().lower() if head.lstrip().startswith(b"<") else head
    for first, said, helps in _CONTENTS:
        if start.startswith(first):
            return said, helps
    first, *more = head.split(b"\n")
    plain = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    if own in (b"PAR1", b"\x89HDF") and plain and more and any(sign in first for sign in b",;\t"):
        return "text", "write its table in this format, which another name does not do"
    return None


def read_text(path: Path, what: str = "text in UTF-8") -> str:
    """Text of a file in UTF-8, or in whatever a mark at its start says (an editor's BOM).

    Raises
    ------
    UserError
        It cannot be read, or is no such text.
    """
    try:
        content = path.read_bytes()
        coding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
        return content.decode(coding)
    except (OSError, UnicodeError) as error:
        raise unreadable(path, what, error) from None
