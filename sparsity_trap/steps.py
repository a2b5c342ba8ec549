"""The steps of a preset, each computed once and then read back from its folder.

The workflow calls them in order through the notebooks. A notebook opened on its own calls the same
functions, so whatever it needs and does not find is computed first.
"""

from __future__ import annotations

import os
from pathlib import Path

from sparsity_trap.config import ROOT, Preset, Run, UserError
from sparsity_trap.encoders import cache_tokens
from sparsity_trap.genes import PANEL
from sparsity_trap.patches import PatchStore, write_store
from sparsity_trap.training import train
from sparsity_trap.visium_hd import open_slide

#: Folder of the cell-type maps of the source ``tissue-map``, relative to the repository.
LABELS_VARIABLE = "SPARSITY_TRAP_LABELS"
LABELS = ROOT / "data" / "crc_8um_labels"


def section(preset: Preset, patient: str) -> Path:
    """Space Ranger folder of a patient; simulated first where the source is a simulation."""
    _check_patient(preset, patient)
    outs = preset.outs(patient)
    if not outs.is_dir():
        if preset.source == "spaceranger":
            raise UserError(
                f"{outs} does not exist: put the Space Ranger output of patient {patient} there "
                "(or a link to it), with its full-resolution image, or choose SOURCE=simulated"
            )
        from sparsity_trap.simulate import simulate_section

        simulate_section(
            outs,
            patient,
            preset.simulation,
            source=preset.source,
            labels=Path(os.environ.get(LABELS_VARIABLE, LABELS)),
        )
    return outs


def store(preset: Preset, patient: str) -> PatchStore:
    """Patch store of a patient."""
    path = preset.store(patient)
    if not path.is_dir():
        slide = open_slide(section(preset, patient))
        write_store(
            slide, PANEL, path, patient=patient, source=preset.source, settings=preset.patches
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
    _check_patient(preset, this.test_patient)
    folder = preset.run_dir(this)
    if not folder.is_dir():
        for patient in preset.patients:
            tokens(preset, patient)
        train(preset, this)
    return folder


def _check_patient(preset: Preset, patient: str) -> None:
    if patient not in preset.patients:
        raise UserError(
            f"patient '{patient}' is not in preset '{preset.name}': choose one of "
            f"{', '.join(preset.patients)}"
        )
