"""Run a command once no other one that was started so works in this checkout:

python workflow/alone.py .snakemake/running snakemake ...

Snakemake's own lock outlives a killed process and must then be removed by hand. The lock used here
is the operating system's: it ends with the process that holds it, however that ended.
"""

import fcntl
import os
import sys
from pathlib import Path


def main() -> None:
    path, *command = sys.argv[1:]
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        folder = Path(path).parent.resolve()
        sys.exit(f"error: {folder} cannot be written ({error.strerror}): make it writable for you")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode().strip() or "unknown"
        print(
            f"another make works in this checkout (process {holder}): waiting for it to end",
            file=sys.stderr,
            flush=True,
        )
        fcntl.flock(lock, fcntl.LOCK_EX)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    os.set_inheritable(lock, True)  # held by the command until it ends
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
