"""What each result of a preset depends on, as a digest.

A recipe holds the settings that a result depends on, a digest of the code that makes it, and the
recipes of what it is made from. A result of another recipe is not the present one.
"""

from __future__ import annotations

import hashlib
import json

from pydantic import BaseModel

from sparsity_trap.data.genes import panel as read_panel
from sparsity_trap.data.sections import real_section
from sparsity_trap.files import code_digest
from sparsity_trap.settings import Preset, Run, as_json

#: Code that each kind of result depends on, beside that of what it is made from.
CODE = {
    "table": (
        "analysis/controls.py",
        "analysis/ceilings.py",
        "evaluation/nulls.py",
        "evaluation/ceilings.py",
        "metrics.py",
        "scores.py",
        "_loops.py",
        "bins.py",
    ),
    "section": ("bins.py", "simulation/*"),
    "store": ("bins.py", "data/*", "frames.py", "inputs.py"),
    "tokens": ("encoders.*", "filterbank.py"),
    "run": (
        "decoders.py",
        "*losses.py",
        "metrics.py",
        "scores.py",
        "_*.py",
        "bins.py",
        "train*.py",
        "model.py",
        "devices.py",
        "checkpoints.py",
        "evaluation/*",
    ),
}


def recipe(kind: str, *depends_on: object) -> str:
    """Digest of what a result depends on, and of the code that makes it."""
    texts = [_stable(part) for part in depends_on]
    return hashlib.sha256("\n".join([code_digest(*CODE[kind]), *texts]).encode()).hexdigest()


def _stable(part: object) -> str:
    """The same text for the same settings; titles change no result."""
    return as_json(part) if isinstance(part, BaseModel) else json.dumps(part, default=str)


def of_section(preset: Preset, patient: str) -> str:
    """Of a patient's section."""
    if preset.source != "spaceranger":
        return recipe("section", preset.source, preset.simulation, patient)
    # Content is not read: a section is tens of gigabytes.
    files = real_section(preset, patient).files()
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return recipe("section", preset.source, stats)


def of_panel(preset: Preset) -> str:
    """Of the genes: their names in a file of the user's may change under the same path."""
    if preset.genes.count is None:
        return recipe("store", read_panel(preset)["gene"].tolist())
    patients = preset.training_patients(preset.main_patient)
    return recipe("store", preset.genes, [of_section(preset, p) for p in patients])


def of_store(preset: Preset, patient: str) -> str:
    """Of a patch store."""
    made_from = of_section(preset, patient), of_panel(preset)
    return recipe("store", preset.patches, *made_from)


def of_tokens(preset: Preset, patient: str) -> str:
    """Of a token cache."""
    return recipe("tokens", preset.encoder, of_store(preset, patient))


def of_run(preset: Preset, this: Run) -> str:
    """Of a training run."""
    made_from = [of_tokens(preset, patient) for patient in preset.patients]
    settings = (preset.arm(this.arm), preset.decoder, preset.training, this, preset.patients)
    return recipe("run", *settings, made_from)
