"""Many runs, sections and genes: everything goes through, in memory that the cohort does not set.

Sixty runs are always tried. ``SPARSITY_TRAP_LOAD=1`` adds a cohort of 30 sections and a panel of
2,000 genes, which take some minutes, and prints what each took.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from cells import run_cells
from conftest import ROOT
from spaceranger import paint, turned_grid, write_outs

from sparsity_trap import runs as results
from sparsity_trap import settings as config
from sparsity_trap.analysis import mechanism
from sparsity_trap.data.genes import PANEL, panel_table
from sparsity_trap.decoders import build_decoder
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import Run

asked = pytest.mark.skipif(
    "SPARSITY_TRAP_LOAD" not in os.environ, reason="takes minutes: set SPARSITY_TRAP_LOAD=1"
)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def preset(tmp_path, monkeypatch) -> config.Preset:
    """The laptop preset, in a folder of its own."""
    monkeypatch.setattr(config, "ROOT", tmp_path)
    return load_preset("laptop")


def write_store(preset: config.Preset, patient: str, seed: int) -> None:
    """A store of 2 × 2 patches, whose tokens are not needed."""
    draw = np.random.default_rng(seed)
    shape = 4, len(PANEL), 128, 128
    rate = draw.gamma(1.0, 0.1, (*shape[:2], 16, 16)).repeat(8, 2).repeat(8, 3)
    corner = 128 * np.array([(0, 0), (0, 1), (1, 0), (1, 1)], np.int32)
    arrays = {
        "counts": draw.poisson(rate).astype(np.uint16),
        "truth": rate.astype(np.float16),
        "mask": draw.random((4, 128, 128)) > 0.1,
        "images": np.zeros((4, 224, 224, 3), np.uint8),
        "origin": corner,
        "overview": np.zeros((64, 64, 3), np.uint8),
        "total": np.zeros((64, 64), np.uint32),
        "row_factor": np.ones(256, np.float32),
        "col_factor": np.ones(256, np.float32),
    }
    group = zarr.open_group(preset.store(patient), mode="w")
    for name, values in arrays.items():
        group.create_array(name, data=values)
    group.attrs.update(
        genes=list(PANEL), patient=patient, source="simulated", bin_um=2.0, grid_shape=[256, 256],
        microns_per_pixel=0.5, registration={},
    )  # fmt: skip


def write_run(preset: config.Preset, run: Run, rate: np.ndarray) -> None:
    """A finished run with scores that are drawn, and the predictions given."""
    draw = np.random.default_rng(zlib.crc32(run.name.encode()))
    folder = preset.run_dir(run)
    folder.mkdir(parents=True)
    genes = panel_table()[["gene", "category"]].assign(sparsity=np.linspace(0.7, 0.99, 50))
    genes["mean_count"] = -np.log(genes["sparsity"])
    genes["rate_cv"] = genes["calibration"] = 1.0
    for column in (*results.SCORES, "pcc_4um", "pcc_16um", "spearman_8um", "d2", "auprc"):
        genes[column] = draw.normal(0.3, 0.1, 50).clip(0, 1)
    genes.to_parquet(folder / "genes.parquet")
    log = {"epoch": 1, "train_loss": 1.0, "validation_loss": 1.0, "validation_pcc_8um": 0.1}
    (folder / "log.jsonl").write_text(json.dumps(log) + "\n")
    pooled = {f"pooled_pcc_{key}": 0.3 for key in ("2um", "8um", "2um_unmasked", "8um_unmasked")}
    (folder / "scores.json").write_text(json.dumps({"pooled": pooled, "undefined": {}}))
    record = {
        "preset": preset.model_dump(mode="json"), "parameters": 1, "epochs": 1, "seconds": 1.0,
        "training_patches": 6, "validation_patches": 2, "commit": "none", "hardware": "none",
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(record))
    group = zarr.open_group(folder / "predictions.zarr", mode="w")
    group.create_array("rate", data=rate, chunks=(1, *rate.shape[1:]))


@pytest.mark.slow
def test_many_runs_become_tables(preset):
    for seed, patient in enumerate(preset.patients):
        write_store(preset, patient, seed)
    # One prediction, of which every run's folder holds the same bytes.
    rate = np.random.default_rng(1).gamma(1.0, 0.1, (4, 50, 128, 128)).astype(np.float16)
    for run in preset.all_runs():
        write_run(preset, run, rate)
    runs = [results.read(preset.run_dir(run), run) for run in preset.all_runs()]
    table = results.run_table(preset, runs)
    assert len(table) == len(runs) > 100 and table["pcc_8um"].between(0.2, 0.4).all()
    assert table["undefined_pcc_8um"].eq(0).all()
    constant = runs[0].genes.assign(pcc_8um=lambda t: t["pcc_8um"].where(t.index > 1))
    few = results.run_table(preset, [dataclasses.replace(runs[0], genes=constant)])
    assert few["undefined_pcc_8um"].tolist() == [2] and few["pcc_8um"].notna().all()
    long = results.long_table(preset, runs)
    assert len(long) == len(runs) * 50 and not long["bin_um"].isna().all()
    assert long.groupby("run").size().eq(50).all()


# --- genes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["hist2st", "img2st", "linear"])
def test_gradient_share_of_each_gene_equals_autograd_through_the_head(decoder):
    torch.manual_seed(0)
    sizes = {"hidden": 8, "heads": 2, "layers": 1}
    model = torch.nn.Module()
    model.decoder = build_decoder(decoder, 5, 3, bias=-1.0, **sizes)
    model.forward = lambda tokens: model.decoder(tokens)
    tokens, counts = torch.randn(2, 5, 16, 16), torch.poisson(torch.full((2, 3, 128, 128), 0.3))
    mask = torch.rand(2, 128, 128) > 0.4
    seen = []
    head = model.decoder.head
    hook = head.register_forward_pre_hook(lambda _, x: seen.append(x[0].requires_grad_()))
    eta = model.eval()(tokens)
    hook.remove()
    losses = ((eta - counts).square() * mask[:, None]).sum((0, 2, 3))
    gradients = [torch.autograd.grad(loss, seen, retain_graph=True)[0] for loss in losses]
    norms = [gradient.double().square().sum().item() for gradient in gradients]

    def objective(eta, y, inside):
        return ((eta - y).square() * inside[:, None]).sum()

    found = mechanism.gradient_share(model, tokens, counts, mask, objective)
    np.testing.assert_allclose(found, np.array(norms) / sum(norms), rtol=1e-5)


# --- sections and genes, each in a process of its own ---------------------------------------------


def child(function: str, folder: Path, number: int) -> dict[str, float]:
    """Call a function of this file in a new process; what it returns, with the peak of memory."""
    code = (
        "import json, sys; from pathlib import Path; import test_load\n"
        "done = getattr(test_load, sys.argv[1])(Path(sys.argv[2]), int(sys.argv[3]))\n"
        "print(json.dumps(done))"
    )
    # Freed memory goes back at once: the peak is what is held, not how the heap is fragmented.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code, function, str(folder), str(number)], cwd=ROOT, text=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent))),
            "OMP_NUM_THREADS": "1",
        }
        | allocator,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{function}({number}): " + ", ".join(f"{k} {v:,.0f}" for k, v in found.items()))
    return found


def peak_mb() -> float:
    """Largest resident size of this process so far; that of its parent does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def write_section(outs: Path, genes: list[str], side: int, seed: int) -> None:
    """Space Ranger's folder of a square section, its image dark where counts are many."""
    draw = np.random.default_rng(seed)
    coarse = draw.gamma(1.0, 1.0, (8, side // 32 + 1, side // 32 + 1))
    level = draw.dirichlet(np.ones(8), len(genes)) * draw.uniform(0.02, 0.4, (len(genes), 1))
    counts = np.empty((len(genes), side, side), np.uint8)
    for gene, weight in zip(counts, level, strict=True):
        rate = np.tensordot(weight, coarse, 1).repeat(32, 0).repeat(32, 1)
        gene[:] = draw.poisson(rate[:side, :side])
    y, x, image_shape = turned_grid((side, side), (False, False, False))
    noise = draw.uniform(60, 240, (3, *(n // 16 + 1 for n in image_shape)))
    picture = noise.repeat(16, 1).repeat(16, 2)[:, : image_shape[0], : image_shape[1]]
    image = paint(image_shape, lambda *_: picture)
    write_outs(outs, counts, genes, y=y, x=x, image=image, data_dtype="uint16")


def small(preset: config.Preset, **changes: object) -> config.Preset:
    """One epoch, with few augmented views."""
    training = preset.training.model_copy(update={"epochs": 1, "warmup_epochs": 0})
    encoder = preset.encoder.model_copy(update={"dihedral": False})
    return preset.model_copy(update={"training": training, "encoder": encoder, **changes})


def cohort(folder: Path, number: int) -> dict[str, float]:
    """Check the first sections of a cohort, cut and encode them, train on all but one."""
    from sparsity_trap import training_data
    from sparsity_trap.data.sections import check_section, load_cohort, with_cohort

    training_data.CPU_BYTES = 2**20  # so that these sections are many
    config.ROOT = folder / f"of{number}"
    config.ROOT.mkdir()
    lines = [f"  S{i}: {{outs: ../sections/S{i}}}\n" for i in range(number)]
    file = config.ROOT / "cohort.yaml"
    file.write_text("patients:\n" + "".join(lines))
    preset = small(with_cohort(load_preset("smoke"), file))
    peaks = {"start": peak_mb()}
    for name, section in load_cohort(file).patients.items():
        check_section(name, section)
    peaks["checked"] = peak_mb()
    for patient in preset.patients:
        results.tokens(preset, patient)
    peaks["encoded"] = peak_mb()
    results.run(preset, Run(arm="E", test_patient=preset.main_patient, seed=0))
    peaks["trained"] = peak_mb()
    return peaks


@asked
def test_memory_does_not_grow_with_the_cohort(tmp_path):
    for i in range(30):
        write_section(tmp_path / "sections" / f"S{i}", list(PANEL), 288, seed=i)
    # Fewer than ten would not fill what is read ahead.
    few, many = (child("cohort", tmp_path, number) for number in (10, 30))
    counts = 20 * 4 * len(PANEL) * 128**2 / 2**20  # of the other sections, a byte each: 62 MB
    # Tokens that were read are mapped, and counted, though they are the page cache's: 8 MB.
    for step in ("encoded", "trained"):
        assert many[step] < few[step] + counts / 4


def panel(folder: Path, number: int) -> dict[str, float]:
    """The whole chain on two sections and a panel of many genes, tables and figures too."""
    from sparsity_trap.show import interactive, style

    config.ROOT = folder
    names = [f"G{i:04d}" for i in range(number)]
    colours = list(style.CATEGORY_COLOURS)
    categories = [colours[i % len(colours)] for i in range(number)]
    table = pd.DataFrame({"gene": names, "category": categories})
    table.to_csv(folder / "panel.csv", index=False)
    for seed, patient in enumerate(("P1", "P5")):
        write_section(folder / "data" / "sections" / patient / "outs", names, 256, seed)
    preset = small(
        load_preset("smoke", "spaceranger"),
        patients=["P1", "P5"],
        genes=config.Genes(panel=str(folder / "panel.csv")),
        runs=[config.Runs(arms=["D", "E"], test_patients=["P5"])],
    )
    peaks = {"sections": peak_mb()}
    for patient in preset.patients:
        results.tokens(preset, patient)
    peaks["encoded"] = peak_mb()
    results.load_all(preset)
    peaks["trained and scored"] = peak_mb()
    # Pages, as they stand in their notebooks.
    results.open_preset = lambda *_: preset
    chosen = {"preset": "", "source": "", "cohort": ""}
    genes = run_cells("04_sparsity", dict(chosen))["genes"]
    assert len(genes) == number and genes["pcc_8um_poisson"].notna().all()
    peaks["association"] = peak_mb()
    chosen["genes"] = ""
    pages = [run_cells(page, dict(chosen)) for page in ("03_results", "05_rescue")]
    pictures = [page["figure"]._repr_jpeg_() for page in pages]
    peaks["pages"] = peak_mb()
    ledger = run_cells("10_claims", dict(chosen))["ledger"]
    assert list(ledger.claims) == list(ledger.listed)
    peaks["claims"] = peak_mb()
    page = run_cells("07_factorial", dict(chosen))
    assert page["shares_of_genes"].groupby("panel")["share"].sum().round(6).eq(1).all()
    peaks["gradient shares"] = peak_mb()
    pictures.append(page["figure"]._repr_png_())
    assert all(len(picture) > 10_000 for picture in pictures)
    scores = {"gain": genes["delta_pcc_8um"]}
    interactive.gene_scatter(genes, scores, scores, "spaceranger")[0].to_json()
    peaks["figures"] = peak_mb()
    return peaks


@asked
def test_panel_of_two_thousand_genes(tmp_path):
    found = child("panel", tmp_path, 2000)
    assert found["figures"] < 8000
