"""Execute one notebook script with papermill: jupytext script in, executed .ipynb out.

    python workflow/execute_notebook.py notebooks/02_train.py out.ipynb preset=smoke arm=E

The output appears only when the whole notebook ran. A problem the user can mend ends in one
sentence. Of several GPUs, each notebook takes one that no other notebook has.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jupytext
import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from sparsity_trap.files import building, commit, hardware
from sparsity_trap.progress import display_options
from sparsity_trap.settings import ROOT, UserError

#: Where the kernel called python3 is that of this environment.
KERNELS = ROOT / "workflow" / "jupyter"


def parse(pairs: list[str], allowed: dict) -> dict:
    """Read ``name=value`` pairs; refuse names the notebook does not declare.

    A value has the type of the notebook's default. Text is taken as it is, whatever is in it.
    """
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"parameter '{pair}' has no value: write {pair}=VALUE")
        if name not in allowed:
            raise UserError(f"parameter '{name}' does not exist: choose from {', '.join(allowed)}")
        default = ast.literal_eval(allowed[name]["default"])
        try:
            if isinstance(default, bool):  # any text is true to Python
                value = {"true": "1", "false": ""}[value.lower()]
            values[name] = type(default)(value)
            if isinstance(default, float) and not math.isfinite(values[name]):
                raise ValueError
        except (KeyError, ValueError):
            kind = "true or false" if isinstance(default, bool) else "a number"
            raise UserError(
                f"parameter '{name}' must be {kind} like its default {default}, not '{value[:80]}'"
            ) from None
    return values


def cards() -> list[str]:
    """Names of the GPUs that may be used, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [card for card in chosen.split(",") if card]
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False
    )
    return [str(i) for i in range(done.stdout.count("GPU "))]


@contextmanager
def own_card(pause: float = 1.0) -> Iterator[str | None]:
    """Wait for a GPU that no other step of this user has, and show this process no other.

    It gives None where there is no choice. The lock is the operating system's: it ends with the
    process that holds it, however that ended.
    """
    names = cards()
    if len(names) < 2:
        yield None
        return
    while True:
        for name in names:
            place = Path(tempfile.gettempdir()) / f"sparsity-trap-{os.getuid()}-gpu-{name}"
            with place.open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                os.environ["CUDA_VISIBLE_DEVICES"] = name
                yield name
                return
        time.sleep(pause)


@contextmanager
def own_kernel() -> Iterator[None]:
    """Let Jupyter find our kernel first, whatever else is called python3 on this computer."""
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(KERNELS), before]))
    try:
        yield
    finally:
        del os.environ["JUPYTER_PATH"]
        if before is not None:
            os.environ["JUPYTER_PATH"] = before


def execute(script: Path, output: Path, pairs: list[str]) -> None:
    """Run ``script`` and write the executed notebook to ``output``."""
    if not script.is_file():
        raise UserError(f"notebook {script} does not exist")
    notebook = jupytext.read(script)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    with building(output) as partial, own_card(), own_kernel():
        # What the page says of itself, whatever made the results that it shows.
        notebook.metadata["sparsity_trap"] = {"commit": commit(), "hardware": hardware()}
        partial.write_bytes(_executed(notebook, script, pairs))


def _executed(notebook: nbformat.NotebookNode, script: Path, pairs: list[str]) -> bytes:
    """Run the notebook of a script; return the executed one, as its file."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / f"{script.stem}.ipynb"
        nbformat.write(notebook, source)
        declared = papermill.inspect_notebook(str(source))
        try:
            parameters = parse(pairs, declared)
        except UserError as error:
            raise UserError(f"{script}: {error}") from None
        executed, own = Path(folder) / "executed.ipynb", Path(folder) / "ipython"
        own.mkdir()
        # Kernel and client share a machine, so no port is opened; paths of sockets have a limit.
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"} if len(folder) < 80 else {}
        try:
            papermill.execute_notebook(
                str(source),
                str(executed),
                parameters,
                kernel_name="python3",
                progress_bar={"desc": "cells", **display_options()},
                cwd=str(script.resolve().parent),
                # Without what the user has IPython do at its start.
                extra_arguments=["--log-level=50", f"--ipython-dir={own}"],
                config=Config({"KernelManager": sockets}),
            )
        except DeadKernelError:
            raise UserError(
                f"the kernel of {script} was killed, most likely for lack of memory: give it more, "
                "or run fewer steps at a time (make CORES=1)"
            ) from None
        except PapermillExecutionError as error:
            if error.ename == "UserError":
                raise UserError(error.evalue) from None
            raise
        return executed.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("parameters", nargs="*", metavar="NAME=VALUE")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        execute(arguments.script, arguments.output, arguments.parameters)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # results have sentences of their own: what is left is temporary
        print(
            f"error: temporary files cannot be written ({error}): free some space there, or set "
            "TMPDIR to another folder",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
