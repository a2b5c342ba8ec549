"""Execute one notebook script with papermill: jupytext script in, executed .ipynb out.

    python workflow/execute_notebook.py notebooks/02_train.py out.ipynb preset=smoke arm=E

The output appears only when the whole notebook ran. A problem the user can mend ends in one sentence.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
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

from sparsity_trap.files import building
from sparsity_trap.progress import display_options
from sparsity_trap.settings import UserError, parse_yaml

#: Longest folder, bytes, for sockets in it: their paths may have 103 (macOS), of which 15 are ours.
_SOCKET_FOLDER = 88


def parse(pairs: list[str], allowed: dict) -> dict:
    """Read ``name=value`` pairs; refuse names the notebook does not declare."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"parameter '{pair}' has no value: write {pair}=VALUE")
        if name not in allowed:
            raise UserError(f"parameter '{name}' does not exist: choose from {', '.join(allowed)}")
        try:
            values[name] = parse_yaml(value) if value else ""
        except ValueError:
            raise UserError(
                f"parameter '{name}' has the malformed value {value[:80]!r}: put quotes around text"
            ) from None
        if type(values[name]) is not type(parse_yaml(allowed[name]["default"])):
            raise UserError(
                f"parameter '{name}' must be like its default {allowed[name]['default']}, "
                f"not {value!r}"
            )
    return values


@contextmanager
def _scratch() -> Iterator[str]:
    """Temporary folder, also of the sockets through which the kernel is talked to."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            if len(os.fsencode(folder)) > _SOCKET_FOLDER:
                raise UserError(
                    f"{folder} is too long a path for sockets: set TMPDIR to a shorter one"
                )
            yield folder
    except OSError as error:
        if "No usable temporary directory" in str(error):
            raise UserError(
                "no folder for temporary files can be written to: set TMPDIR to one that can"
            ) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{tempfile.gettempdir()} is full: free some space, or set TMPDIR to a folder on "
                "another disk"
            ) from None
        raise


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
    with building(output) as partial:
        partial.write_bytes(_executed(notebook, script, pairs))


def _executed(notebook: nbformat.NotebookNode, script: Path, pairs: list[str]) -> bytes:
    """Run the notebook of a script; return the executed one, as its file."""
    with _scratch() as folder:
        source = Path(folder) / f"{script.stem}.ipynb"
        nbformat.write(notebook, source)
        declared = papermill.inspect_notebook(str(source))
        try:
            parameters = parse(pairs, declared)
        except UserError as error:
            raise UserError(f"{script}: {error}") from None
        executed = Path(folder) / "executed.ipynb"
        try:
            papermill.execute_notebook(
                str(source),
                str(executed),
                parameters,
                kernel_name="python3",
                progress_bar={"desc": "cells", **display_options()},
                cwd=str(script.resolve().parent),
                # Kernel and client share a machine: no open port, and no log of the kernel's own.
                extra_arguments=["--log-level=50"],
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}}),
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
