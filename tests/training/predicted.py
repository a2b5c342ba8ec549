"""What the tests of predictions share: a simulated section, and runs of random decoders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from safetensors.torch import save_file

from sparsity_trap import settings as config
from sparsity_trap.data.genes import PANEL, panel_table
from sparsity_trap.data.patches import PatchStore, write_store
from sparsity_trap.data.spaceranger import POSITIONS, Slide, open_slide
from sparsity_trap.decoders import build_decoder
from sparsity_trap.encoders import load_encoder
from sparsity_trap.files import record
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Patches, Preset, Run, Simulation
from sparsity_trap.simulation.section import simulate_section
from sparsity_trap.training import Model

RUN = Run(arm="E", test_patient="P5", seed=0)
FEW = ["ACTB", "KRT8", "JCHAIN"]


def cut(outs: Path, path: Path, genes=PANEL, patient: str = "P5") -> tuple[PatchStore, Slide]:
    slide = open_slide(outs)
    write_store(slide, genes, path, patient=patient, source="simulated", settings=Patches())
    return PatchStore(path), slide


def write_run(preset: Preset, images: np.ndarray, genes=PANEL, coarse: bool = False) -> Path:
    """A run folder of a random decoder, whose tokens are standardised on some images.

    A coarse decoder gives all bins of a token one rate.
    """
    torch.manual_seed(0)
    arm = preset.arm("E")
    tokens = load_encoder("filterbank")(torch.from_numpy(images))
    sizes = preset.decoder.model_dump()
    decoder = build_decoder(arm.decoder, tokens.shape[1], len(genes), bias=arm.bias, **sizes)
    model = Model(
        decoder, tokens.mean((0, 2, 3), keepdim=True), tokens.std((0, 2, 3), keepdim=True), arm.link
    )
    if coarse:
        weight = model.decoder.head.weight.data.unflatten(0, (len(genes), -1))
        weight[:] = weight[:, :1].clone()
    folder = preset.run_dir(RUN)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "checkpoint.safetensors")
    table = panel_table().set_index("gene").loc[list(genes)].reset_index()
    table[["gene", "category"]].to_parquet(folder / "genes.parquet")
    details = {**RUN.model_dump(), "training_patients": ["P1", "P2"]}
    (folder / "provenance.json").write_text(json.dumps(record(preset, 0.0, **details)))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("root")
        patch.setattr(config, "ROOT", folder)
        yield folder


@pytest.fixture(scope="module")
def preset(root) -> Preset:
    preset = load_preset("smoke")
    arms = {k: arm.model_copy(update={"decoder": "linear"}) for k, arm in preset.arms.items()}
    return preset.model_copy(update={"arms": arms})


@pytest.fixture(scope="module")
def simulated(preset) -> tuple[PatchStore, Slide]:
    outs = preset.outs("P5")
    simulate_section(outs, "P5", Simulation(side_um=320, seed=20))
    return cut(outs, preset.store("P5"))


@pytest.fixture(scope="module")
def run_dir(preset, simulated) -> Path:
    """A run whose stored predictions are the true rates."""
    store, _ = simulated
    folder = write_run(preset, store.images[:])
    zarr.open_group(folder / "predictions.zarr", mode="w").create_array("rate", data=store.truth[:])
    return folder


def position_table(slide: Slide) -> pd.DataFrame:
    return pd.read_parquet(slide.outs / POSITIONS).set_index("barcode")
