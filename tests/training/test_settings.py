"""Presets: the shipped ones are valid, mistakes end in one sentence."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import yaml

from sparsity_trap import presets
from sparsity_trap.losses import LOSSES
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import PUBLISHED_BIAS, Arm, UserError


@pytest.mark.parametrize("name", ["smoke", "laptop", "study", "paper"])
def test_shipped_presets_hold_the_published_contrast(name):
    preset = load_preset(name)
    d, e = preset.arm("D"), preset.arm("E")
    assert (d.loss, d.link, d.bias) == ("mse", "softplus", 0)
    assert (e.loss, e.link, e.bias) == ("poisson", "exp", -3)
    assert {r.arm for r in preset.all_runs() if r.test_patient == preset.main_patient} >= {"D", "E"}


def test_test_patient_is_not_among_its_training_patients():
    preset = load_preset("laptop")
    for run in preset.all_runs():
        assert run.test_patient not in preset.training_patients(run.test_patient)
        assert len(preset.training_patients(run.test_patient)) == len(preset.patients) - 1


def test_sources_do_not_share_a_folder():
    folders = {load_preset("laptop", s).folder for s in (None, "simulated", "tissue-map")}
    assert len(folders) == 2


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a changed copy of the smoke preset and return its name."""
    original = yaml.safe_load((presets.PRESETS / "smoke.yaml").read_text())

    def run(change) -> str:
        changed = change(original)
        text = changed if isinstance(changed, str) else yaml.safe_dump(original)
        (tmp_path / "mine.yaml").write_text(text)
        monkeypatch.setattr(presets, "PRESETS", tmp_path)
        return "mine"

    return run


ARM = {"title": "mine", "loss": "poisson", "link": "softplus", "bias": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["training"].update(epoch=3), "unknown key 'training.epoch'"),
        (lambda c: c["training"].update(lr=-1), "key 'training.lr'"),
        (lambda c: c.pop("patients"), "key 'patients' is missing"),
        (lambda c: c["runs"][0].update(arms=["Z"]), "arm 'Z' does not exist; arms are D, E"),
        (lambda c: c["runs"][0].update(test_patients=["P9"]), "test patient 'P9'"),
        (lambda c: c.update(arms={"mine": ARM | {"loss": "mae"}}), "key 'arms.mine.loss'"),
        (lambda c: c.update(arms={"D": ARM}), "arms.D: loss must be 'mse'"),
        (
            lambda c: c.update(arms={"D-matched": ARM | {"loss": "mse"}}),
            "arms.D-matched: must be arm E with loss 'mse'",
        ),
        (lambda c: c["decoder"].update(heads=3), "heads (3) must divide hidden (32)"),
        (lambda c: c["runs"][0].update(arms=["E"]), "runs: add arm 'D' with test patient 'P5'"),
        (lambda c: c.update(patients=["P5"]), "patients: name at least two"),
        (lambda c: c.update(patients=["../P1", "P5"]), "key 'patients.0'"),
        (lambda c: c["runs"][0].update(seeds=[]), "key 'runs.0.seeds'"),
        (lambda c: "a: [", "not valid YAML"),
        (lambda c: "just text", "must be a mapping"),
    ],
)
def test_mistakes_name_file_and_key(write, change, message):
    with pytest.raises(UserError) as error:
        load_preset(write(change))
    assert "mine.yaml" in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value).split("not valid YAML")[0]


def test_unknown_preset_and_arm_list_the_choices():
    with pytest.raises(
        UserError, match="preset 'huge' does not exist.*: choose one of laptop, paper, smoke"
    ):
        load_preset("huge")
    with pytest.raises(UserError, match=r"preset '\[' does not exist"):  # not a glob, nor YAML
        load_preset("[")
    with pytest.raises(UserError, match="arm 'Q' does not exist.*D, E"):
        load_preset("smoke").arm("Q")


def test_a_preset_may_add_an_arm(write):
    preset = load_preset(write(lambda c: c.update(arms={"mine": ARM})))
    assert preset.arm("mine").link == "softplus" and preset.arm("D").loss == "mse"


def test_losses_of_arms_are_those_there_are():
    assert set(get_args(Arm.model_fields["loss"].annotation)) == set(LOSSES)


def test_arms_of_the_factorial_are_all_combinations_once():
    arms = load_preset("smoke").arms.values()
    crossed = ("mse", "mse-log1p", "poisson", "nb")
    cells = [
        (arm.loss, arm.link, arm.bias)
        for arm in arms
        if arm.loss in crossed
        and arm.bias in (PUBLISHED_BIAS[arm.link], "gene-mean")
        and arm.model_copy(update={"title": ""})
        == Arm(title="", loss=arm.loss, link=arm.link, bias=arm.bias)
    ]  # fmt: skip
    biases = {link: (bias, "gene-mean") for link, bias in PUBLISHED_BIAS.items()}
    assert sorted(cells, key=str) == sorted(
        [(loss, link, bias) for loss in crossed for link in biases for bias in biases[link]],
        key=str,
    )


def test_the_published_contrast_can_be_taken_apart():
    cells = {
        (arm.loss, arm.link, arm.bias)
        for arm in load_preset("laptop").arms.values()
        if arm.decoder == "hist2st" and arm.resolutions_um == (2,) and arm.keep == 1
    }
    assert cells >= set(
        itertools.product(("mse", "poisson"), PUBLISHED_BIAS, PUBLISHED_BIAS.values())
    )


def test_a_rehearsal_of_the_paper_needs_no_weights():
    assert load_preset("paper").encoder.name == "virchow2"
    assert load_preset("paper", "simulated").encoder.name == "filterbank"
