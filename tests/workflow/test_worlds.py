"""Other worlds of a preset: folders and results of their own, and steps of the workflow."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from cells import run_cells
from conftest import ROOT, copy_program

from sparsity_trap import presets, recipes, runs
from sparsity_trap import settings as config
from sparsity_trap.analysis.claims import read_claims
from sparsity_trap.analysis.families import FAMILIES
from sparsity_trap.data.sections import open_preset
from sparsity_trap.presets import in_world, load_preset, other_worlds
from sparsity_trap.settings import UserError

PAIR = ["D-linear", "E-linear"]
WORLDS = {
    "zeros": {
        "title": "Counts that are lost",
        "simulation": {"dropout": 0.4},
        "runs": [{"arms": PAIR, "test_patients": ["P5"], "seeds": [0, 1]}],
    },
    "weak": {
        "title": "Expression that the image does not show",
        "simulation": {"image_link": 0.5, "patient_sd": 0.1},
        "runs": [{"arms": ["E-linear"], "test_patients": ["P5"]}],
    },
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the smoke preset with worlds, changed, as preset ``tiny``; results go to tmp_path."""
    content = yaml.safe_load((presets.PRESETS / "smoke.yaml").read_text())
    content["patients"] = ["P1", "P5"]
    content["simulation"] |= {"side_um": 512, "pixel_um": 1}
    content["encoder"]["dihedral"] = False
    content["decoder"]["hidden"] = 8
    content["training"]["epochs"] = 1
    content["runs"] = [{"arms": ["D", "E", *PAIR], "test_patients": ["P5"]}]
    content["worlds"] = copy.deepcopy(WORLDS)

    def run(change=lambda content: None) -> None:
        change(content)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    monkeypatch.setattr(presets, "PRESETS", tmp_path)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    run()
    return run


def test_a_world_is_its_preset_but_for_sections_runs_and_folder(write, tmp_path):
    home, world = load_preset("tiny"), load_preset("tiny/zeros")
    assert (world.name, world.world, home.world) == ("tiny/zeros", "zeros", "")
    assert world.folder == tmp_path / "results" / "tiny" / "worlds" / "zeros"
    assert world.simulation == home.simulation.model_copy(update={"dropout": 0.4})
    assert [run.name for run in world.all_runs()] == [
        "D-linear-P5-s0", "E-linear-P5-s0", "D-linear-P5-s1", "E-linear-P5-s1",
    ]  # fmt: skip
    ours = {"name", "simulation", "runs", "worlds"}
    assert world.model_dump(exclude=ours) == home.model_dump(exclude=ours)
    assert other_worlds(home) == {name: load_preset(f"tiny/{name}") for name in WORLDS}
    mapped = open_preset("tiny/zeros", "tissue-map")
    assert mapped.folder == tmp_path / "results" / "tiny-tissue-map" / "worlds" / "zeros"


def test_real_sections_have_one_world(write):
    assert other_worlds(load_preset("tiny", "spaceranger")) == {}
    with pytest.raises(UserError, match="has real sections, world 'zeros' is a simulated one"):
        open_preset("tiny/zeros", "spaceranger")
    with pytest.raises(UserError, match="'tiny/zeros' is a simulated world: leave one out"):
        open_preset("tiny/zeros", cohort="cohort.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(simulation={"drop": 1}), "worlds.zeros: unknown key 'simulation.drop'"),
        (lambda w: w.update(simulation={"dropout": 2}), "worlds.zeros: key 'simulation.dropout'"),
        (lambda w: w.update(simulation={}), "key 'worlds.zeros.simulation'"),
        (lambda w: w["runs"][0].update(arms=["Z"]), "worlds.zeros: runs: arm 'Z' does not exist"),
        (lambda w: w.pop("title"), "key 'worlds.zeros.title' is missing"),
        (lambda w: w.update(training={}), "unknown key 'worlds.zeros.training'"),
    ],
)
def test_mistakes_in_a_world_name_it(write, change, message):
    write(lambda content: change(content["worlds"]["zeros"]))
    with pytest.raises(UserError, match=re.escape(message)):
        load_preset("tiny")


def test_an_unknown_world_lists_the_choices(write):
    with pytest.raises(UserError, match="world 'x' does not exist .*'tiny': .* zeros, weak"):
        load_preset("tiny/x")
    with pytest.raises(UserError, match="choose one of none, or add it under worlds"):
        in_world(load_preset("tiny/zeros"), "weak")


def test_results_of_a_world_have_recipes_of_their_own(write):
    write(lambda content: content["simulation"].update(side_um=128))
    home, world = load_preset("tiny"), load_preset("tiny/zeros")
    notes = []
    for preset in (home, world):
        runs.section(preset, "P5")
        notes.append((preset.folder / "recipes" / "section-P5").read_text())
        assert preset.outs("P5").is_relative_to(preset.folder)
    assert notes[0] != notes[1]
    run = world.all_runs()[0]
    assert recipes.of_run(home, run) != recipes.of_run(world, run)
    # A change of one world leaves the other's results, and those at home.
    write(lambda content: content["worlds"]["zeros"]["simulation"].update(dropout=0.5))
    kept = [recipes.of_run(load_preset(name), run) for name in ("tiny", "tiny/weak")]
    write(lambda content: content["worlds"]["zeros"]["simulation"].update(dropout=0.4))
    assert kept == [recipes.of_run(load_preset(name), run) for name in ("tiny", "tiny/weak")]


@pytest.fixture
def checkout(write, tmp_path) -> Path:
    """A copy of the program, with the preset ``tiny`` among its own."""
    folder = tmp_path / "checkout"
    copy_program(folder, "sparsity_trap", "workflow", "notebooks", "presets", "published", "book")
    for name in ("_config.yml", "_toc.yml", "requirements.in", "CITATION.cff"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(tmp_path / "tiny.yaml", folder / "presets")
    return folder


def command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder), str(folder / "workflow")])
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip


def planned(folder: Path, preset: str, source: str = "") -> subprocess.CompletedProcess:
    config = [f"preset={preset}", f"source={source}", "cohort="]
    options = ["--snakefile", "workflow/Snakefile", "--cores", "1", "--dry-run", "--quiet", "host"]
    return command(folder, "-m", "snakemake", *options, "--config", *config, "--", "book")


def test_the_plan_lists_the_steps_of_worlds(checkout):
    done = planned(checkout, "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    steps = {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)}
    # Two patients in three worlds; four arms at home, two and one elsewhere.
    assert (steps["section"], steps["data"], steps["data_page"]) == (6, 6, 2)
    assert steps["train"] == 4 + 2 + 1
    assert "02 training arm D-linear in world zeros" in said
    assert "00 simulated section of patient P1 in world weak" in said
    assert "02 training arm D-linear in world weak" not in said
    mapped = planned(checkout, "tiny", "tissue-map")
    assert "results/tiny-tissue-map/worlds/zeros" in mapped.stdout + mapped.stderr


def test_a_world_has_no_book_of_its_own(checkout):
    done = planned(checkout, "tiny/zeros")
    assert done.returncode != 0
    assert "PRESET=tiny, which runs its worlds too" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_steps_of_a_world_write_into_its_folder(checkout):
    given = ["preset=tiny/weak", "source=", "cohort="]
    done = command(checkout, "workflow/compute.py", "section", "P5", *given)
    assert done.returncode == 0, done.stderr
    output = "results/tiny/worlds/weak/notebooks/02_train_E-linear.ipynb"
    words = ["workflow/execute_notebook.py", "notebooks/02_train.py", output, *given]
    done = command(checkout, *words, "arm=E-linear")
    assert done.returncode == 0, done.stderr
    results = checkout / "results" / "tiny"
    assert [path.name for path in results.iterdir()] == ["worlds"]
    assert {path.name for path in (results / "worlds" / "weak").iterdir()} >= {
        "sections", "stores", "tokens", "runs", "numbers", "notebooks", "recipes",
    }  # fmt: skip
    trained = {path.name for path in (results / "worlds" / "weak" / "runs").iterdir()}
    assert trained == {"E-linear-P5-s0"}


@pytest.mark.slow
def test_the_page_compares_worlds(write, monkeypatch):
    quoted = {}
    monkeypatch.setattr(
        runs,
        "Quotes",
        lambda *_: lambda prefix, **n: quoted.update({f"{prefix}.{k}": v for k, v in n.items()}),
    )
    page = run_cells("08d_worlds", {"preset": "tiny", "source": "", "cohort": ""})
    assert quoted["worlds.n"] == 2
    assert page["by_seed"].groupby(["world", "pair"]).size().to_dict() == {
        ("at home", "linear"): 1, ("zeros", "linear"): 2,
    }  # fmt: skip
    gains = []
    for seed in (0, 1):
        scores = [
            runs.read(page["worlds"]["zeros"].folder / "runs" / f"{arm}-P5-s{seed}", None).genes
            for arm in PAIR
        ]
        gains.append((scores[1]["pcc_8um"] - scores[0]["pcc_8um"]).mean())
    assert quoted["worlds.zeros.linear.gain"] == pytest.approx(np.mean(gains))
    low, high = (quoted[f"worlds.zeros.linear.{end}"] for end in ("ci_low", "ci_high"))
    assert (low + high) / 2 == pytest.approx(np.mean(gains)) and low < high
    # One run of each arm at home shows no variance between runs: it is that of the other world.
    assert np.isfinite(quoted["worlds.at-home.linear.ci_low"])
    assert quoted["worlds.at-home.linear.n_seeds"] == 1
    counts = page["counts"]
    assert counts.loc["mean_count", "zeros"] / counts.loc["mean_count", "at home"] == pytest.approx(
        0.6, abs=0.03
    )
    assert counts.loc["fano_around_rate", "at home"] == pytest.approx(1, abs=0.05)
    assert counts.loc["agreement", "at home"] == pytest.approx(1)
    assert counts.loc["agreement", "weak"] < 0.95
    # Of the two claims only that of the pair that a world trains has evidence.
    claims = page["claims"].set_index("key")
    assert list(claims.index) == list(read_claims(FAMILIES["worlds"].script))
    assert claims["value"].isna().to_dict() == {
        "rescue_in_worlds": True, "rescue_linear_in_worlds": False,
    }  # fmt: skip
    assert claims.loc["rescue_linear_in_worlds", "value"] == pytest.approx(np.mean(gains))


def test_a_preset_without_worlds_has_a_page(write, monkeypatch):
    write(lambda content: content.pop("worlds"))
    page = run_cells("08d_worlds", {"preset": "tiny", "source": "", "cohort": ""})
    assert set(page["claims"]["verdict"]) == {"undetermined"} and not page["elsewhere"]
    real = run_cells("08d_worlds", {"preset": "tiny", "source": "spaceranger", "cohort": ""})
    assert not real["elsewhere"]
