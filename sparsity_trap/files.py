"""Results as files: complete or not there at all, and with a record of what made them."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path

from sparsity_trap.settings import ROOT, Preset, UserError

#: Packages whose versions can change a result.
_PACKAGES = (
    "torch", "timm", "numpy", "scipy", "pandas", "scanpy", "squidpy", "statsmodels", "zarr",
)  # fmt: skip

#: What the user can do about an error of the operating system while writing to a folder.
_FULL = "free some space, or make {} a link to a folder on a larger disk"
_CLOSED = "make {} writable for you, or a link to a folder that is"
_REMEDY = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL} | dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM), _CLOSED
)


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; rename it to ``path`` when the block succeeds.

    Works for a file or a folder, which the block creates under the name it is given. A failed
    block leaves ``path`` as it was and the temporary removed. One process at a time makes a result
    (see `alone`), so whatever lies under way to the same path was left by one that was killed, and
    is removed.

    Raises
    ------
    UserError
        The disk is full, or the folder may not be written to.
    """
    # The process in the name tells whoever looks on what is at work.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _remedy(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in [*path.parent.glob(f".{path.name}.*.partial")]:
                _remove(left)
            yield partial
            if path.is_dir():
                # A folder cannot replace another in one step: set the old one aside first. Killed
                # between the two steps, the result is missing and computed again.
                old = partial.with_suffix(".old.partial")
                path.rename(old)
                partial.rename(path)
                shutil.rmtree(old)
            else:
                os.replace(partial, path)
    finally:
        with suppress(OSError):  # what is left is removed by the next to write here
            _remove(partial)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is in a block with this lock.

    The lock is the operating system's: it ends with the process that holds it, however that ended.
    """
    with ExitStack() as stack:
        with _remedy(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("w"))
        with suppress(OSError):  # some network file systems know no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _remedy(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if said := unwritable(path, error.errno):
            raise UserError(said) from error
        raise


def unwritable(path: Path, code: int | None) -> str | None:
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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- what ran, on what, with what -----------------------------------------------------------------


@functools.cache
def code_digest(*patterns: str) -> str:
    """SHA-256 of the module's files that match the patterns, such as ``data/*.py``."""
    module = Path(__file__).parent
    digest = hashlib.sha256()
    found = {path for pattern in patterns for path in module.glob(pattern) if path.is_file()}
    for path in sorted(found):  # without folders: Python keeps its bytecode in one
        digest.update(path.relative_to(module).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """Short commit of the checkout, with ``-dirty`` when files were changed; "unknown" outside git.

    New measurements among the results that are committed change nothing.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        # Of this checkout, also where the user's variables name another.
        own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":(exclude)results")
        return git("describe", "--always", "--abbrev=10") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """Processor, cores and accelerator in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{name}, {cores} cores"

    # Where no driver is, torch need not be asked: it takes seconds to import.
    if shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        import torch

        if torch.cuda.is_available():
            text += f", {torch.cuda.get_device_name()}"
    return text


def _version(package: str) -> str | None:
    """Version of a package; None where it is not installed, as what only figures need may be."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def record(preset: Preset, seconds: float, **details: object) -> dict[str, object]:
    """Provenance of one result.

    Parameters
    ----------
    preset
        The preset it was computed with; stored whole.
    seconds
        Wall time.
    details
        Further entries, such as seed or arm.
    """
    return {
        "commit": commit(),
        "preset": preset.model_dump(mode="json"),
        "seconds": round(seconds, 2),
        "hardware": hardware(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        **details,
    }
