"""What the tests of training share: patients of nine patches, and runs on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from sparsity_trap import settings as config
from sparsity_trap import training
from sparsity_trap.encoders import dihedral, views
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Arm, Preset, Run

GENES = ["PIGR", "DES", "VIM"]
RUN = Run(arm="E", test_patient="P5", seed=0)
E = {"title": "", "loss": "poisson", "link": "exp", "bias": -3.0}
LINEAR = {**E, "decoder": "linear"}

#: Trains runs of a preset in a process of its own: ROOT, preset as JSON, arms.
WORKER = """
import sys
from pathlib import Path
from sparsity_trap import settings as config, training
config.ROOT = Path(sys.argv[1])
preset = config.Preset.model_validate_json(sys.argv[2])
for arm in sys.argv[3:]:
    training.train(preset, config.Run(arm=arm, test_patient="P5", seed=0))
"""


def write_patient(
    preset, patient: str, seed: int, source: str = "simulated", scale: tuple[float, ...] = (1.0,)
) -> None:
    """A patient of 3 × 3 patches whose tokens tell the rate of each token's bins.

    ``scale`` multiplies the rates of each gene.
    """
    draw = np.random.default_rng(seed)
    n = 9
    signal = draw.gamma(1.0, 1.0, (n, len(GENES), 16, 16)).astype(np.float32)
    rate = np.repeat(np.repeat(0.2 * signal, 8, 2), 8, 3) * np.reshape(scale, (-1, 1, 1))
    origin = 128 * np.stack(np.meshgrid(range(3), range(3), indexing="ij"), -1).reshape(-1, 2)
    arrays = {
        "images": np.zeros((n, 224, 224, 3), np.uint8),
        "counts": draw.poisson(rate).astype(np.uint16),
        "mask": draw.random((n, 128, 128)) > 0.1,
        "origin": origin.astype(np.int32),
        "truth": rate.astype(np.float16),
        "overview": np.zeros((96, 96, 3), np.uint8),
        "total": np.zeros((96, 96), np.uint32),
        "row_factor": np.where(np.arange(384) % 2, 1.2, 0.8).astype(np.float32),
        "col_factor": np.ones(384, np.float32),
    }
    store = zarr.open_group(preset.store(patient), mode="w")
    for name, values in arrays.items():
        store.create_array(name, data=values)
    store.attrs.update(
        genes=GENES, patient=patient, source=source, bin_um=2.0, grid_shape=[384, 384],
        microns_per_pixel=0.5, registration={},
    )  # fmt: skip
    tokens = np.log(np.maximum(signal, 1e-3))
    turned = [
        np.ascontiguousarray(dihedral(torch.from_numpy(tokens), element, (2, 3)))
        for _, element in views(preset.encoder)
    ]
    preset.tokens(patient).mkdir(parents=True, exist_ok=True)
    np.save(preset.tokens(patient) / "tokens.npy", np.stack(turned, 1).astype(np.float16))
    about = {"encoder": preset.encoder.name, "views": views(preset.encoder)}
    (preset.tokens(patient) / "about.json").write_text(json.dumps(about))


def written(folder: Path) -> Path:
    """Folder of the patients, made once, of which every test has a copy."""
    if not folder.exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, "ROOT", folder)
            preset = load_preset("smoke")
            for seed, patient in enumerate(preset.patients):
                write_patient(preset, patient, seed)
    return folder


@pytest.fixture
def preset(tmp_path, monkeypatch, tmp_path_factory):
    patients = written(tmp_path_factory.getbasetemp() / "patients")
    shutil.copytree(patients, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(config, "ROOT", tmp_path)
    preset = load_preset("smoke")
    update = {"epochs": 10, "batch_size": 3, "lr": 0.02}
    arms = {n: arm.model_copy(update={"decoder": "linear"}) for n, arm in preset.arms.items()}
    return preset.model_copy(
        update={
            "training": preset.training.model_copy(update=update),
            "arms": arms,
        }
    )


def changed(preset: Preset, arms: dict[str, dict] | None = None, **training) -> Preset:
    update = {"training": preset.training.model_copy(update=training)}
    if arms:
        update["arms"] = {**preset.arms, **{k: Arm.model_validate(v) for k, v in arms.items()}}
    return preset.model_copy(update=update)


def history(fitted_or_folder) -> list[dict]:
    """History of a run without its times."""
    if isinstance(fitted_or_folder, training.Fitted):
        rows = fitted_or_folder.history
    else:
        text = (fitted_or_folder / "log.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def column(fitted_or_folder, key: str) -> list[float]:
    return [row[key] for row in history(fitted_or_folder)]


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(preset, root, *arms, launcher=(), **options):
    arguments = ["-c", WORKER] if not launcher else [str(root / "worker.py")]
    (root / "worker.py").write_text(WORKER)
    command = [sys.executable, *launcher, *arguments, str(root), preset.model_dump_json(), *arms]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, **options)
