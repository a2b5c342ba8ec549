"""Run a command, and again after each change of files:

python workflow/watch.py notebooks book presets -- make book

Times of change are looked at once a second, which works on every file system, mounted ones too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

INTERVAL_S = 1.0

#: Folders that builds and interpreters write to.
WRITTEN = {"executed", "__pycache__"}


def state(places: list[Path]) -> dict[Path, int]:
    """Time of change, ns, of every file at or under ``places``; none of hidden and backup files."""
    found = {}
    for place in places:
        for path in [place, *place.rglob("*")]:
            parts = path.relative_to(place.parent).parts
            if WRITTEN.intersection(parts) or any(p[0] == "." or p[-1] == "~" for p in parts):
                continue
            with suppress(FileNotFoundError):  # gone since it was listed
                if path.is_file():
                    found[path] = path.stat().st_mtime_ns
    return found


def watch(places: list[Path], command: list[str]) -> None:
    """Run ``command`` at once and after every change; never returns.

    A change during a run is seen after it. An editor that writes several files is let finish: two
    looks in a row must agree.
    """
    built: dict[Path, int] = {}
    last = state(places)
    while True:
        now = state(places)
        if now == last != built:
            built = now
            failed = subprocess.run(command).returncode
            print("failed; waiting for the next change" if failed else "waiting for changes")
            sys.stdout.flush()
        last = now
        time.sleep(INTERVAL_S)


if __name__ == "__main__":
    split = sys.argv.index("--")
    with suppress(KeyboardInterrupt):
        watch([Path(name) for name in sys.argv[1:split]], sys.argv[split + 1 :])
