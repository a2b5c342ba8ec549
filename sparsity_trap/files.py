"""Files and folders that appear only when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; rename it to ``path`` when the block succeeds.

    Works for a file or a folder, which the block creates under the name it is given. A failed
    block leaves ``path`` as it was and the temporary removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove(partial)
    try:
        yield partial
        if path.is_dir():
            # A folder cannot replace another in one step: set the old one aside first.
            old = partial.with_suffix(".old")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
