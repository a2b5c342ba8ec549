"""Files and folders that appear only when complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsity_trap.settings import UserError

_FULL = "free some space, or make {} a link to a folder on a larger disk"
_CLOSED = "make {} writable for you, or a link to a folder that is"

#: What the user can do about an error of the operating system while writing to a folder.
_REMEDY = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit on file size (ulimit -f), or make {} a link to another disk",
    errno.EROFS: _CLOSED,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
}

_HOST = re.sub(r"\W", "-", socket.gethostname())


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; rename it to ``path`` when the block succeeds.

    Works for a file or a folder, which the block creates under the name it is given. A failed
    block leaves ``path`` as it was and the temporary removed. What a killed process left under way
    to the same path is removed first.

    Raises
    ------
    UserError
        The disk is full, a limit on size is reached, or the folder may not be written to.
    """
    partial = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        _remove(partial)
        yield partial
        if path.is_dir():
            # A folder cannot replace another in one step: set the old one aside first.
            old = partial.with_suffix(".old")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    except BaseException as error:
        _wait_for_zarr()
        code = _os_error(error, path.parent)
        if code is None:
            raise
        raise UserError(unwritable(path, code)) from error
    finally:
        with suppress(OSError):  # what is left is removed by the next to write here
            _remove(partial)


def unwritable(path: Path, code: int) -> str | None:
    """Sentence on a file that cannot be written, with the remedy.

    Parameters
    ----------
    path
        The file or folder that was to appear.
    code
        Number of the operating system's error, as in `errno`.

    Returns
    -------
    None where the user can do nothing about it.
    """
    if code not in _REMEDY:
        return None
    return f"{path} cannot be written ({os.strerror(code)}): {_REMEDY[code].format(path.parent)}"


def to_present(paths: Iterable[Path]) -> list[Path]:
    """Give files whose time lies in the future the present one.

    Snakemake tells by times what has to be done. Where a step read a file from the future, all it
    made looks older: Snakemake calls the step failed and removes what it made, at every start until
    that time has come. Clocks that were set back and archives from elsewhere leave such files.

    Parameters
    ----------
    paths
        Files, and folders with all that is in them but the chunks of zarr arrays.

    Returns
    -------
    Files that were changed.

    Raises
    ------
    UserError
        A file from the future belongs to somebody else.
    """
    now, changed = time.time(), []
    for file in _files(paths):
        then = file.stat().st_mtime
        if then <= now:
            continue
        try:
            os.utime(file, (now, now))
        except OSError as error:
            raise UserError(
                f"{file} was last changed on {time.ctime(then)}, which is in the future, and its "
                f"time cannot be set ({error.strerror}): mend this machine's clock or `touch` it"
            ) from None
        changed.append(file)
    return changed


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_file():
            yield path
        for folder, inside, names in os.walk(path):
            if folder.endswith(".zarr"):
                inside.clear()
            yield from (file for name in names if (file := Path(folder, name)).exists())


def _os_error(error: BaseException | None, folder: Path) -> int | None:
    """Number of the operating system's error behind an exception, if ``_REMEDY`` knows it.

    Not one about a file elsewhere, such as an input that may not be read.
    """
    while error is not None and not isinstance(error, UserError):
        code = getattr(error, "errno", None)
        if code is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
            code = int(match[1])  # safetensors says it in words only
        if re.fullmatch(r"\d+ requested and \d+ written", str(error)):
            code = errno.ENOSPC  # numpy does not say why
        if code in _REMEDY:
            file = Path(getattr(error, "filename", None) or folder)
            return code if folder.is_relative_to(file) or file.is_relative_to(folder) else None
        # anndata and others raise errors of their own on the way.
        error = error.__cause__ or error.__context__
    return None


def _wait_for_zarr() -> None:
    """Wait for chunks that zarr is still writing.

    When one chunk fails, zarr raises at once and goes on writing the others in its own thread,
    which would make a folder that was just removed again. It has no public function to wait with.
    """
    if "zarr" not in sys.modules:
        return
    import asyncio

    from zarr.core.sync import sync

    async def others() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)

    sync(others())


def _sweep(path: Path) -> None:
    """Remove what processes of this machine that are gone left beside ``path``.

    A name holds process and machine, so that a job on another node of a cluster keeps its own. A
    folder that was set aside by a process killed before the new one took its place is put back.
    """
    pattern = rf"\.{re.escape(path.name)}\.{_HOST}\.(\d+)\.(partial|old)"
    for left in list(path.parent.iterdir()):
        found = re.fullmatch(pattern, left.name)
        if not found or _runs(int(found[1])):
            continue
        if found[2] == "old" and not path.exists():
            left.rename(path)
        else:
            _remove(left)


def _runs(process: int) -> bool:
    """Whether a process of this number exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # a read-only file system refuses to remove what is not there
        path.unlink()
