"""Results are computed once, and again when what they were made from has changed."""

from __future__ import annotations

import ast
import json
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from sparsity_trap import encoders, files, presets, recipes, runs, training
from sparsity_trap import settings as config
from sparsity_trap.data.sections import Section
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Run, UserError

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


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Write the tiny preset, with a part of its text replaced, and read it."""
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "arms.yaml").write_text(presets.ARMS.read_text())
    monkeypatch.setattr(config, "ROOT", tmp_path)
    monkeypatch.setattr(presets, "PRESETS", tmp_path / "presets")
    monkeypatch.setattr(presets, "ARMS", tmp_path / "presets" / "arms.yaml")

    def write(old: str = "", new: str = "") -> config.Preset:
        assert old in TINY
        (tmp_path / "presets" / "tiny.yaml").write_text(TINY.replace(old, new) if old else TINY)
        return load_preset("tiny")

    return write


@pytest.fixture
def computed(monkeypatch) -> Counter:
    """How often each kind of result was computed."""
    count: Counter = Counter()

    def counted(kind: str, function):
        def wrapper(*arguments, **options):
            count[kind] += 1
            return function(*arguments, **options)

        return wrapper

    homes = {"store": (runs, "write_store"), "tokens": (encoders, "cache_tokens")}
    for kind, (home, name) in (homes | {"run": (training, "train")}).items():
        monkeypatch.setattr(home, name, counted(kind, getattr(home, name)))
    return count


@pytest.mark.slow
def test_a_preset_edited_by_hand_is_followed_and_told_truly(edited, computed):
    this = Run(arm="E", test_patient="P5", seed=0)

    def told(preset: config.Preset) -> dict:
        folder = runs.run(preset, this)
        return json.loads((folder / "provenance.json").read_text())["preset"]

    assert told(edited())["patches"]["min_tissue"] == 0.05
    assert computed == {"store": 2, "tokens": 2, "run": 1}
    told(edited())
    told(edited("D, E", "E, D"))
    assert computed == {"store": 2, "tokens": 2, "run": 1}
    assert told(edited("epochs: 2", "epochs: 3"))["training"]["epochs"] == 3
    assert computed == {"store": 2, "tokens": 2, "run": 2}
    assert told(edited("jitter_views: 0", "jitter_views: 1"))["encoder"]["jitter_views"] == 1
    assert computed == {"store": 2, "tokens": 4, "run": 3}
    wider = edited("patients: [P1, P5]", "patches: {min_tissue: 0.1}\npatients: [P1, P5]")
    assert told(wider)["patches"]["min_tissue"] == 0.1
    assert computed == {"store": 4, "tokens": 6, "run": 4}
    section = wider.outs("P5").stat().st_mtime_ns
    other = edited("seed: 3", "seed: 4")
    runs.store(other, "P5")
    assert computed == {"store": 5, "tokens": 6, "run": 4}
    assert wider.outs("P5").stat().st_mtime_ns != section
    assert recipes.of_run(other, this) != recipes.of_run(edited(), this)


def test_a_result_of_other_code_is_made_again(edited, computed, monkeypatch):
    runs.store(edited(), "P1")
    monkeypatch.setattr(recipes, "code_digest", lambda *patterns: "edited")
    runs.store(edited(), "P1")
    assert computed == {"store": 2}


def test_digest_of_code_is_that_of_files(tmp_path, monkeypatch):
    """Whether or not Python has put its bytecode beside them."""
    (tmp_path / "data").mkdir()
    code = tmp_path / "data" / "patches.py"
    code.write_text("SIZE = 128")
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    digest = files.code_digest.__wrapped__
    before = digest("data/*")
    (tmp_path / "data" / "__pycache__").mkdir()
    assert digest("data/*") == before
    code.write_text("SIZE = 64")
    assert digest("data/*") != before


def imported(module: str) -> set[str]:
    """Files of the package that a module loads, itself among them."""
    found, left = set(), [module]
    while left:
        name = left.pop().replace(".", "/")
        path = next(
            (p for p in (ROOT / f"{name}.py", ROOT / name / "__init__.py") if p.exists()), None
        )
        if path is None or path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsity_trap"):
                left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {str(path.relative_to(ROOT / "sparsity_trap")) for path in found}


@pytest.mark.parametrize(
    ("kind", "module", "made_from"),
    [
        ("section", "simulation.section", ()),
        ("store", "data.patches", ()),
        ("tokens", "encoders", ("store",)),
        ("run", "training", ("store", "tokens")),
    ],
)
def test_recipes_know_all_code_behind_a_result(kind, module, made_from):
    """But for what reads presets, writes files, shows progress, and gives the sizes of maps."""
    known = {"settings.py", "presets.py", "files.py", "progress.py", "__init__.py"}
    known |= {"decoders.py"} if kind != "run" else set()
    for part in (kind, *made_from):
        for pattern in recipes.CODE[part]:
            files_of_part = (ROOT / "sparsity_trap").glob(pattern)
            known |= {str(path.relative_to(ROOT / "sparsity_trap")) for path in files_of_part}
    assert imported(f"sparsity_trap.{module}") <= known


def test_real_sections_depend_on_their_files_and_not_on_the_simulation(
    edited, tmp_path, monkeypatch
):
    outs = tmp_path / "outs"
    matrix = outs / "binned_outputs" / "square_002um" / "filtered_feature_bc_matrix.h5"
    matrix.parent.mkdir(parents=True)
    matrix.write_text("counts")
    monkeypatch.setattr(recipes, "real_section", lambda preset, patient: Section(outs=outs))

    def recipe(*edit: str) -> str:
        real = edited(*edit).model_copy(update={"source": "spaceranger"})
        return recipes.of_run(real, Run(arm="E", test_patient="P5", seed=0))

    assert recipe() == recipe("side_um: 512", "side_um: 800")
    assert recipe() != recipe("epochs: 2", "epochs: 3")
    before = recipe()
    matrix.write_text("more counts")
    assert recipe() != before


def test_two_that_miss_one_result_make_it_once(edited):
    preset, begun, made = edited(), threading.Event(), []

    def make() -> None:
        begun.set()
        made.append(threading.current_thread().name)
        path.touch()

    path = preset.folder / "result"
    arguments = (preset, "store", "P1", path, "recipe", make)
    with files.alone(preset.folder / "recipes" / ".store-P1.lock"):
        both = [threading.Thread(target=runs._make, args=arguments) for _ in range(2)]
        for one in both:
            one.start()
        assert not begun.wait(0.2)
    for one in both:
        one.join()
    assert len(made) == 1


def test_runs_of_an_arm_are_those_asked_for(edited):
    preset = edited()

    def names(*asked: str) -> list[str]:
        return [this.name for this in runs.of_arm(preset, *asked)]

    assert names("E") == ["E-P5-s0"]
    assert names("E", "", "0,2") == ["E-P5-s0", "E-P5-s2"]
    assert names("E", "P1") == ["E-P1-s0"] and names("E", "P1,P5", "1") == ["E-P1-s1", "E-P5-s1"]
    assert names("V7") == ["V7-P5-s0"]  # the preset does not train it
    with pytest.raises(UserError, match="patient 'P9' is not in preset"):
        names("E", "P9")


def test_quoted_numbers_are_those_of_the_last_execution(edited):
    preset = edited()
    quote = runs.Quotes(preset, "04_sparsity")
    quote("sparsity", rho=np.float32(0.5), p_value=float("nan"), n=np.int64(50))
    quote("sparsity", rho=0.5)
    quote("patches", **{"prefix": 1, "self": 2})  # names of patients
    path = Path(preset.folder, "numbers", "04_sparsity.json")
    written = {"sparsity.rho": 0.5, "sparsity.p_value": None, "sparsity.n": 50}
    written |= {"patches.prefix": 1, "patches.self": 2}
    assert json.loads(path.read_text()) == written
    with pytest.raises(ValueError, match=r"'sparsity.rho' is quoted twice, as 0.5 and 0.6"):
        quote("sparsity", rho=0.6)
    runs.Quotes(preset, "04_sparsity")
    assert json.loads(path.read_text()) == {}


@pytest.mark.parametrize("made_from", [Run(arm="E", test_patient="P5", seed=0), "P5"])
def test_a_kept_table_is_computed_again_when_its_source_has_changed(made_from, edited):
    preset = edited()
    computed = []

    def compute() -> pd.DataFrame:
        computed.append(len(computed))
        return pd.DataFrame({"number": computed[-1:]})

    def number(preset: config.Preset) -> int:
        return runs.kept_table(preset, "numbers", made_from, compute)["number"].item()

    assert [number(preset), number(preset)] == [0, 0]
    wider = preset.model_copy(update={"patches": config.Patches(min_tissue=0.1)})
    assert [number(wider), number(wider)] == [1, 1]
    (preset.folder / "tables" / "numbers.parquet").unlink()
    assert number(wider) == 2
