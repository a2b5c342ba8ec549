"""Whatever is killed, and whenever: the next start ends with the results of an undisturbed run.

``SPARSITY_TRAP_KILLS`` sets how often the chain of steps is killed (default 5), and
``SPARSITY_TRAP_KILL_SEED`` at which moments. Where it is set, the whole book is made too, and
killed in analyses and while it is rendered, which takes some minutes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, copy_program

from sparsity_trap import files, progress
from sparsity_trap.settings import UserError

TINY = """
patients: [P1, P5]
main_patient: P5
simulation: {side_um: 512, pixel_um: 1, seed: 3}
encoder: {name: filterbank, dihedral: false, jitter_views: 0}
decoder: {hidden: 16, heads: 2, layers: 1, neighbours: 4}
training: {epochs: 2, batch_size: 1, accumulate: 1, lr: 3.0e-3, warmup_epochs: 1}
runs:
  - {arms: [D, E], test_patients: [P5]}
"""
FOLDER = Path("results/tiny")
#: Files that hold the times at which something ran; of the log, all but these is compared.
_MOMENTS = "provenance.json", "log.jsonl", ".snakemake_timestamp"
#: What is being written while a phase goes on, beside the results of the step.
PHASES = {
    "simulation": "sections/*/.outs.*.partial",
    "store": "stores/.*.partial",
    "tokens": "tokens/.*.partial",
    "training": "checkpoints/*",
    "scoring": "runs/.*.partial",
}

#: The chain of one run, without workflow and notebooks. Libraries are loaded once; each line read
#: from stdin starts the chain anew in a child, whose process number is the answer.
CHAIN = """
import os, sys
import scipy.ndimage, scipy.sparse, pandas, tifffile, h5py, pyarrow.parquet, zarr
from sparsity_trap import runs
from sparsity_trap.simulation import section
from sparsity_trap.presets import load_preset
import torch
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        preset = load_preset("tiny")
        runs.run(preset, preset.all_runs()[-1])
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def copy_of_the_program(folder: Path) -> Path:
    """What the steps need of the checkout, and the tiny preset."""
    copy_program(folder, "sparsity_trap", "workflow", "notebooks", "presets", "published", "book")
    for name in ("Makefile", "pyproject.toml", "requirements.lock.txt", "_config.yml", "_toc.yml"):
        shutil.copyfile(ROOT / name, folder / name)
        os.utime(folder / name, (0, 0))  # older than the environment, which is there already
    (folder / ".venv").symlink_to(ROOT / ".venv")
    (folder / "presets" / "tiny.yaml").write_text(TINY)
    return folder


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SPARSITY", "PYTEST", "MAKE"))}
    return kept | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class Chain:
    """The chain in a program's copy, to be started and killed again and again."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHAIN], cwd=folder, env=environment(folder), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> int:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline() or pytest.fail(self.process.stderr.read()))

    def status(self) -> int:
        return int(self.process.stdout.readline())


def content(results: Path) -> dict[str, bytes]:
    """Bytes of everything that is promised to be the same: all but times and moments."""
    found = {}
    for part in ("sections", "stores", "tokens", "runs"):
        for path in sorted((results / part).rglob("*")):
            if path.is_file() and path.name not in _MOMENTS:
                found[str(path.relative_to(results))] = path.read_bytes()
    for path in (results / "runs").glob("*/log.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            del row["seconds"]
        found[f"{path.parent.name}/log"] = json.dumps(rows).encode()
    return found


def half_written(folder: Path) -> list[str]:
    results = folder / FOLDER
    return [str(p) for p in results.rglob(".*") if p.suffix in (".partial", ".old")] + [
        str(p) for p in results.glob("checkpoints/*")
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Iterator[Callable[[], dict[str, bytes]]]:
    """Results of a chain that nobody kills; it works while the other one is being killed."""
    folder = copy_of_the_program(tmp_path_factory.mktemp("undisturbed"))
    with Chain(folder) as chain:
        chain.start()

        @functools.cache
        def results() -> dict[str, bytes]:
            assert chain.status() == 0
            made = content(folder / FOLDER)
            assert {"runs/E-P5-s0/genes.parquet", "tokens/P5/tokens.npy"} <= set(made)
            return made

        yield results


def differences(made: dict[str, bytes], reference: dict[str, bytes]) -> list[str]:
    return sorted(
        name for name in made.keys() | reference.keys() if made.get(name) != reference.get(name)
    )


@pytest.mark.slow
def test_chain_killed_at_any_moment(tmp_path, undisturbed):
    kills = int(os.environ.get("SPARSITY_TRAP_KILLS", "5"))
    draw = random.Random(int(os.environ.get("SPARSITY_TRAP_KILL_SEED", "7")))
    # As many in each phase, in the order of phases: the next start gets beyond the one before.
    moments = [
        (phase, draw.expovariate(6))
        for i, phase in enumerate(PHASES)
        for _ in range(kills // len(PHASES) + (i < kills % len(PHASES)))
    ]
    folder = copy_of_the_program(tmp_path / "program")
    faults, hit = 0, []
    with Chain(folder) as chain:
        for phase, delay in moments:
            child = chain.start()
            # When the phase is over already, the last one is as good; all may be over, too.
            while Path(f"/proc/{child}").exists() and not any(
                any((folder / FOLDER).glob(glob)) for glob in (PHASES[phase], PHASES["scoring"])
            ):
                time.sleep(0.002)
            time.sleep(delay)
            under_way = [name for name, glob in PHASES.items() if any((folder / FOLDER).glob(glob))]
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            killed = chain.status() == signal.SIGKILL
            faults += killed
            hit += under_way * killed
        chain.start()
        assert chain.status() == 0
    lost = differences(content(folder / FOLDER), undisturbed())
    print(f"{faults} faults, {faults * (not lost)} recovered, {len(lost)} lost; hit: {hit}")
    assert lost == [] and half_written(folder) == []
    assert faults >= kills // 2 and len(set(hit)) >= min(3, kills)


# --- the same through make, Snakemake and notebooks -----------------------------------------------


def descendants(process: int) -> list[int]:
    """Numbers of a process and all that it started: kernels have sessions of their own."""
    found = [process]
    for number in found:
        for task in Path(f"/proc/{number}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue  # it has just ended
    return found


def with_target(folder: Path) -> Path:
    """Add `make runs` to a copy: sections, stores, tokens and arm E, without analyses and book."""
    target = FOLDER / "notebooks" / "02_train_E.ipynb"
    with (folder / "Makefile").open("a") as file:
        file.write(f"runs: $(STAMP)\n\t@$(SNAKEMAKE) --logger sparsity-trap -- {target}\n")
    return folder


def make(folder: Path, target: str = "runs") -> subprocess.Popen:
    env = {k: v for k, v in environment(folder).items() if k != "PYTHONPATH"}
    return subprocess.Popen(
        ["make", target, "PRESET=tiny", "CORES=2", "GPUS=2"], cwd=folder, env=env, text=True,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def kill_while(process: subprocess.Popen, under_way: Callable[[], bool], delay: float) -> None:
    """Kill a process and all that it started, some seconds after something has begun."""
    while process.poll() is None and not under_way():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    time.sleep(delay)
    for number in descendants(process.pid):
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate()


@pytest.mark.slow
def test_make_killed_and_started_again_twice_at_once(tmp_path, undisturbed):
    """Killed in a data and in a training notebook; then two at once, of which one waits."""
    folder = with_target(copy_of_the_program(tmp_path / "a b'ü"))
    draw = random.Random(5)
    for glob in (PHASES["store"], PHASES["training"]):
        begun = functools.partial(any_file, folder / FOLDER, glob)
        kill_while(make(folder), begun, draw.random() / 4)
    both = [make(folder), make(folder)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("another make works in this checkout" in text for text in said) == 1, said
    lost = differences(content(folder / FOLDER), undisturbed())
    print(f"2 faults, {2 * (not lost)} recovered, {len(lost)} lost")
    assert lost == [] and half_written(folder) == []


def any_file(folder: Path, glob: str) -> bool:
    return any(folder.glob(glob))


def pages(folder: Path) -> dict[str, bytes]:
    """What a reader gets, but for times: names of all files, the numbers, tables and pictures."""
    html = folder / "_build" / "html"
    found = {str(path.relative_to(html)): b"" for path in html.rglob("*") if path.is_file()}
    for path in html.rglob("*"):
        if path.suffix in (".csv", ".png"):
            found[str(path.relative_to(html))] = path.read_bytes()
    numbers = json.loads((folder / "book" / "executed" / "numbers.json").read_text())
    kept = {key: value for key, value in numbers.items() if "seconds" not in key}
    return found | {"numbers": json.dumps(kept).encode()}


@pytest.mark.slow
@pytest.mark.skipif("SPARSITY_TRAP_KILLS" not in os.environ, reason="set SPARSITY_TRAP_KILLS")
def test_book_killed_in_analyses_and_while_it_is_rendered(tmp_path):
    """Each of these begins several seconds after the one before."""
    moments = {
        "progress/03_results": FOLDER, "progress/06_controls": FOLDER, "viewer": FOLDER,
        ".executed.*.partial": Path("book"), "_build/.doctrees": Path(),
        "_build/html/*.html": Path(),
    }  # fmt: skip
    whole, killed = (copy_of_the_program(tmp_path / name) for name in ("whole", "killed"))
    for folder in (whole, killed):
        shutil.copytree(ROOT / "results" / "bench", folder / "results" / "bench")
        for name in ("requirements.in", "cohort.example.yaml", "CITATION.cff", "LICENSE"):
            shutil.copyfile(ROOT / name, folder / name)
    reference = make(whole, "book")
    said = reference.communicate()[1]
    assert reference.returncode == 0, said
    draw, faults = random.Random(3), 0
    for glob, place in moments.items():
        process = make(killed, "book")
        kill_while(process, functools.partial(any_file, killed / place, glob), draw.random())
        faults += 1
    process = make(killed, "book")
    said = process.communicate()[1]
    assert process.returncode == 0, said
    lost = differences(pages(killed), pages(whole))
    print(f"{faults} faults, {faults * (not lost)} recovered, {len(lost)} lost")
    assert lost == [] and half_written(killed) == []
    assert not any((killed / "book").glob(".*.partial"))


# --- leftovers, and folders that cannot be used ---------------------------------------------------


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    """Half a result, and an old one that was set aside for the new one that did not come."""
    path, other = tmp_path / "store", tmp_path / ".store2.7.partial"
    for left in (tmp_path / ".store.7.partial", tmp_path / ".store.7.old.partial", other):
        left.mkdir()
        (left / "half").write_text("half")
    with files.building(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert set(tmp_path.iterdir()) == {path, other}


def test_a_failed_block_leaves_the_result_as_it_was(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data").write_text("whole")
    with pytest.raises(ZeroDivisionError), files.building(tmp_path / "store") as partial:
        partial.mkdir()
        raise ZeroDivisionError
    assert (tmp_path / "store" / "data").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["missing", "long" * 30])
def test_temporary_folder_that_is_unusual(tmp_path, monkeypatch, capsys, folder):
    """One that is not there ends in a sentence; one whose path is long for a socket serves."""
    sys.path.insert(0, str(ROOT / "workflow"))
    import execute_notebook

    script, output = tmp_path / "script.py", tmp_path / "out.ipynb"
    script.write_text("# %% tags=['parameters']\npreset = ''\n# %%\n1 + 1\n")
    if folder != "missing":
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / folder))
    monkeypatch.setattr(sys, "argv", ["execute_notebook.py", str(script), str(output)])
    code = execute_notebook.main()
    if folder == "missing":
        assert code == 1 and "or set TMPDIR to another folder" in capsys.readouterr().err
    assert output.exists() == (code == 0) == (folder != "missing")


@pytest.fixture
def not_root():
    """Root may write everywhere, so act as nobody."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield
    os.seteuid(os.getuid())


def test_results_folder_that_may_only_be_read(tmp_path, not_root):
    folder = Path("/usr")
    for path in (folder / "store", folder / "results" / "store"):
        with (
            pytest.raises(UserError, match=r"cannot be written \(.*\): make .* writable for you"),
            files.building(path) as partial,
        ):
            partial.mkdir()


def test_file_system_that_may_only_be_read(tmp_path, monkeypatch):
    """It refuses to remove a file, too, even one that is not there."""

    def refuse(path: object, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "unlink", refuse)
    with (
        pytest.raises(UserError, match="Read-only file system.*make .* writable for you"),
        files.building(tmp_path / "store") as partial,
    ):
        partial.write_text("half")
        refuse(partial)


def test_bars_that_cannot_be_written_are_left_out(tmp_path, monkeypatch):
    """The step meets the same folder when it writes its results, and names it then."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "file" / "step"))
    assert list(progress.track(range(3), "counting", "number")) == [0, 1, 2]
