"""Of several GPUs, each notebook takes one of its own."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
from execute_notebook import cards, own_card  # noqa: E402 - lies beside the Snakefile

HOLD = """
import os
from execute_notebook import own_card
with own_card(pause=0.1) as card:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == card
    print(card, flush=True)
    input()
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Three GPUs, one of them in two parts, as NVIDIA's program lists them."""
    program = tmp_path / "nvidia-smi"
    lines = [f"GPU {i}: NVIDIA H100 (UUID: GPU-{i}{i})" for i in range(3)]
    lines[1:1] = ["  MIG 3g.40gb Device 0: (UUID: MIG-1)", "  MIG 3g.40gb Device 1: (UUID: MIG-2)"]
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_cards_are_those_of_the_machine_or_those_that_the_user_names(machine, monkeypatch):
    assert cards() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-00")
    assert cards() == ["2", "GPU-00"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cards() == []


def test_processes_have_a_card_each_and_the_next_waits(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/workflow"}
    with contextlib.ExitStack() as stack:

        def start() -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, "-c", HOLD], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        first, second = start(), start()
        taken = [process.stdout.readline().strip() for process in (first, second)]
        assert sorted(taken) == ["4", "7"]
        third = start()
        ready, _, _ = select.select([third.stdout], [], [], 5)
        assert not ready
        first.kill()  # its lock ends with it
        assert third.stdout.readline().strip() == taken[0]


@pytest.mark.parametrize("named", ["", "5"])
def test_there_is_nothing_to_choose_with_one_card_or_none(machine, monkeypatch, named):
    """On a cluster each job sees its own card alone, under the same name."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with own_card() as first, own_card() as second:
        assert first is None and second is None
