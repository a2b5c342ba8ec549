"""Build the book with warnings as errors, showing its progress; if it fails, say why."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sparsity_trap.files import commit, unwritable
from sparsity_trap.progress import track
from sparsity_trap.settings import ROOT

BUILT = ROOT / "_build" / "html"
#: What the footer says; the commit is that of the chapters, whichever made the pages.
ABOUT = ROOT / "book" / "executed" / "run.json"


def main() -> int:
    command = [
        str(Path(sys.executable).parent / "jupyter-book"),
        "build",
        ".",
        "--all",
        "-W",
        "--keep-going",
    ]
    about = json.loads(ABOUT.read_text(encoding="utf8"))
    ABOUT.write_text(json.dumps(about | {"commit": commit()}, indent=1), encoding="utf8")
    # Pages and pictures of an earlier book would stay among the new ones.
    shutil.rmtree(BUILT, ignore_errors=True)
    log = []
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        bar = track(range(100), "building the book", "%")
        for line in process.stdout:
            log.append(line)
            # Sphinx reads all pages, then writes them; each phase prints its percentage.
            plain = re.sub(r"\x1b\[[\d;]*m", "", line)
            found = re.search(r"(reading sources|writing output)\.\.\. \[ *(\d+)%\]", plain)
            if found:
                now = int(found[2]) // 2 + 50 * found[1].startswith("writing")
                bar.update(max(0, now - bar.n))
        bar.close()
    if process.returncode:
        codes = re.findall(r"^OSError: \[Errno (\d+)\]", "".join(log), re.MULTILINE)
        said = next(filter(None, (unwritable(BUILT, int(code)) for code in codes)), None)
        sys.stderr.writelines([f"error: {said}\n"] if said else log)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
