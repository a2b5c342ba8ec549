"""Of several GPUs, each notebook takes one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "workflow"))
from execute_notebook import cards, own_card  # noqa: E402 - lies beside the Snakefile

HOLD = """
from execute_notebook import own_card
with own_card() as card:
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
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/workflow"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder, own_card() as mine:
        other = holder.stdout.readline().strip()
        assert {mine, other} == {"4", "7"}
        taken: list[str | None] = []

        def take() -> None:
            with own_card(pause=0.05) as card:
                taken.append(card)

        third = threading.Thread(target=take)
        third.start()
        third.join(0.3)
        assert taken == []
        holder.kill()  # its lock ends with it
        third.join(10)
    assert taken == [other]


@pytest.mark.parametrize("named", ["", "5"])
def test_there_is_nothing_to_choose_with_one_card_or_none(machine, monkeypatch, named):
    """On a cluster each job sees its own card alone, under the same name."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with own_card() as first, own_card() as second:
        assert first is None and second is None
