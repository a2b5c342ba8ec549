"""The steps of a preset, each computed once and then read back from its folder.

The workflow calls them in order through the notebooks. A notebook opened on its own calls the same
functions, so whatever it needs and does not find is computed first.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd

from sparsity_trap.data.genes import choose_variable_genes, moments_of_totals
from sparsity_trap.data.genes import panel as read_panel
from sparsity_trap.data.patches import PatchStore, write_store
from sparsity_trap.data.sections import Cohort, Section, check_distinct, check_section, real_section
from sparsity_trap.encoders import cache_tokens
from sparsity_trap.files import building
from sparsity_trap.settings import ROOT, Preset, Run, UserError
from sparsity_trap.training import train

#: Folder of the cell-type maps of the source ``tissue-map``, relative to the repository.
LABELS_VARIABLE = "SPARSITY_TRAP_LABELS"
LABELS = ROOT / "data" / "crc_8um_labels"


def section(preset: Preset, patient: str) -> Section:
    """Files of a patient's section; simulated first where the source is a simulation."""
    preset.check_patient(patient)
    if preset.source == "spaceranger":
        return real_section(preset, patient)
    outs = preset.outs(patient)
    if not outs.is_dir():
        from sparsity_trap.simulation.section import simulate_section

        simulate_section(
            outs,
            patient,
            preset.simulation,
            source=preset.source,
            labels=Path(os.environ.get(LABELS_VARIABLE, LABELS)),
        )
    return Section(outs=outs)


def panel(preset: Preset) -> pd.DataFrame:
    """Genes of the preset; variable ones are chosen first, without looking at the main patient."""
    path = preset.panel_file
    if preset.genes.count is not None and not path.is_file():  # of variable genes alone
        patients = preset.training_patients(preset.main_patient)
        moments = {}
        for patient in patients:
            slide = section(preset, patient).open()
            moments[patient] = moments_of_totals(slide.genes, slide.counts_and_totals([])[1])
        chosen = choose_variable_genes(
            moments, preset.genes.count, patients=patients, test_patient=preset.main_patient
        )
        with building(path) as partial:
            chosen.to_csv(partial, index=False)
    return read_panel(preset)


def store(preset: Preset, patient: str) -> PatchStore:
    """Patch store of a patient; real sections pass the guards of `cohort` first."""
    path = preset.store(patient)
    if not path.is_dir():
        files = section(preset, patient)
        if preset.source == "spaceranger":
            check_section(patient, files)
            check_distinct(Cohort(patients={p: section(preset, p) for p in preset.patients}))
        write_store(
            files.open(),
            panel(preset)["gene"],
            path,
            patient=patient,
            source=preset.source,
            settings=preset.patches,
            mask=files.mask,
        )
    return PatchStore(path)


def tokens(preset: Preset, patient: str) -> Path:
    """Token cache of a patient."""
    path = preset.tokens(patient)
    if not path.is_dir():
        cache_tokens(store(preset, patient).path, path, preset.encoder)
    return path


def run(preset: Preset, this: Run) -> Path:
    """Folder of a finished training run."""
    preset.arm(this.arm)
    preset.check_patient(this.test_patient)
    folder = preset.run_dir(this)
    if not folder.is_dir():
        for patient in preset.patients:
            tokens(preset, patient)
        train(preset, this)
    _check_settings(preset, this, folder)
    return folder


def _check_settings(preset: Preset, this: Run, folder: Path) -> None:
    """Refuse a run that was computed with other settings than the preset now has."""
    then = json.loads((folder / "provenance.json").read_text())["preset"]
    now = json.loads(preset.model_dump_json())
    for settings in (then, now):
        settings["arm"] = {k: v for k, v in settings["arms"][this.arm].items() if k != "title"}
    for key in (
        "source",
        "simulation",
        "genes",
        "patches",
        "encoder",
        "decoder",
        "training",
        "arm",
    ):
        if then[key] != now[key]:
            raise UserError(
                f"{folder} was computed with another '{key}' than preset '{preset.name}' has now: "
                "run `make book`, which computes again what has changed"
            )
