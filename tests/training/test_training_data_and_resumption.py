"""The engine of training: data on the device or streamed, resumption, several processes."""
# ruff: noqa: F811 - the fixture `preset` is imported

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import GENES, RUN, preset, write_patient  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity_trap import checkpoints, devices, trainer, training, training_data
from sparsity_trap import settings as config
from sparsity_trap.decoders import build_decoder
from sparsity_trap.model import Model
from sparsity_trap.settings import Arm, Preset, Run, load_preset

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
E = {"title": "", "loss": "poisson", "link": "exp", "bias": -3.0}
LINEAR = {**E, "decoder": "linear"}


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


def test_single_views_are_read_as_they_lie_on_the_disk(preset):
    files = training.load_training_set(preset, RUN).tokens
    every = np.concatenate([np.load(preset.tokens(p) / "tokens.npy") for p in ("P1", "P2")])
    assert files.shape == every.shape and files.nbytes == every.nbytes
    patches, views = torch.tensor([17, 0, 8, 9, 9]), torch.tensor([0, 7, 3, 3, 5])
    np.testing.assert_array_equal(files.read(patches, views), every[patches, views])
    np.testing.assert_array_equal(files.load(torch.device("cpu")), every)


def test_streamed_tokens_give_the_same_model_as_resident_ones(preset, monkeypatch):
    data = training.load_training_set(preset, RUN)
    resident = training.fit(data, preset.arm("E"), preset, 0)
    monkeypatch.setattr(training_data, "CPU_BYTES", data.tokens.nbytes - 1)
    monkeypatch.setattr(training_data.PatchFiles, "load", None)
    streamed = training.fit(data, preset.arm("E"), preset, 0)
    assert history(resident) == history(streamed)
    assert same_state(resident.model, streamed.model)


@pytest.mark.parametrize("keep", [1, 0.25])
def test_streamed_maps_give_the_same_model_as_resident_ones(preset, monkeypatch, keep):
    now = changed(preset, {"X": {**LINEAR, "keep": keep, "bias": "gene-mean"}})
    run = Run(arm="X", test_patient="P5", seed=0)
    data = training.load_training_set(now, run)
    assert all(isinstance(maps, torch.Tensor) for maps in (data.counts, data.mask))
    resident = training.fit(data, now.arm("X"), now, 0)
    monkeypatch.setattr(training_data, "CPU_BYTES", 0)
    monkeypatch.setattr(training_data.PatchFiles, "load", None)
    files = training.load_training_set(now, run)
    assert not any(isinstance(m, torch.Tensor) for m in (files.counts, files.mask))
    assert files.counts.nbytes == data.counts.nbytes
    streamed = training.fit(files, now.arm("X"), now, 0)
    assert history(resident) == history(streamed)
    assert same_state(resident.model, streamed.model)


def test_counts_above_255_are_read_whole(preset):
    zarr.open_group(preset.store("P1"), mode="a")["counts"][3, 1, 5, 5] = 300
    counts = training.load_training_set(preset, RUN).counts
    assert counts.dtype == torch.int32 and counts[3, 1, 5, 5] == 300
    stored = [training_data.PatchStore(preset.store(patient)).counts[:] for patient in ("P1", "P2")]
    np.testing.assert_array_equal(counts, np.concatenate(stored))


def interrupted(monkeypatch, after: int, *arguments, **options) -> None:
    """Call `fit` and let it fail in the epoch that follows ``after`` whole ones."""
    original, epochs = trainer.Trainer.epoch, iter(range(after))

    def fail(this):
        if next(epochs, None) is None:
            raise KeyboardInterrupt
        return original(this)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "epoch", fail)
        with pytest.raises(KeyboardInterrupt):
            training.fit(*arguments, **options)


@pytest.mark.parametrize(
    "arm", [E, {**E, "loss": "nb", "decoder": "linear"}], ids=["hist2st", "nb"]
)
def test_interrupted_training_goes_on_to_the_same_result(preset, arm, monkeypatch, tmp_path):
    """With dropout, batch normalisation, and parameters of the loss; twice interrupted."""
    preset = changed(preset, {"X": arm}, epochs=5, accumulate=2)
    data = training.load_training_set(preset, RUN)
    arguments = (data, preset.arm("X"), preset, 3)
    whole = training.fit(*arguments)
    file = tmp_path / "checkpoints" / "run.safetensors"
    interrupted(monkeypatch, 2, *arguments, checkpoint=file)
    interrupted(monkeypatch, 1, *arguments, checkpoint=file)
    resumed = training.fit(*arguments, checkpoint=file)
    assert history(resumed) == history(whole)
    assert same_state(resumed.model, whole.model)
    assert same_state(resumed.objective, whole.objective)
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    # Once at its end, a run trains no further epoch.
    monkeypatch.setattr(trainer.Trainer, "epoch", None)
    again = training.fit(*arguments, checkpoint=file)
    assert history(again) == history(whole) and same_state(again.model, whole.model)


def test_early_stopping_is_remembered(preset, monkeypatch, tmp_path):
    preset = changed(preset, epochs=50, lr=1e-12, patience=2)
    data = training.load_training_set(preset, RUN)
    arguments = (data, preset.arm("E"), preset, 0)
    whole = training.fit(*arguments, checkpoint=tmp_path / "run")
    assert len(whole.history) < 50
    monkeypatch.setattr(trainer.Trainer, "epoch", None)
    assert history(training.fit(*arguments, checkpoint=tmp_path / "run")) == history(whole)


def test_checkpoint_of_something_else_is_left_aside(preset, monkeypatch, tmp_path):
    preset = changed(preset, epochs=3)
    data = training.load_training_set(preset, RUN)
    file = tmp_path / "run"
    arm = preset.arm("E")
    interrupted(monkeypatch, 1, data, arm, preset, 0, checkpoint=file)
    saved = file.read_bytes()

    def goes_on(*arguments) -> bool:
        file.write_bytes(saved)
        original, key = checkpoints.load, []
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "load", lambda *a: key.append(original(*a)) or key[-1])
            training.fit(*arguments, checkpoint=file)
        return key[0] is not None

    assert goes_on(data, arm, preset, 0)
    assert goes_on(data, arm.model_copy(update={"title": "renamed"}), preset, 0)
    assert not goes_on(data, arm, preset, 1)
    assert not goes_on(data, arm.model_copy(update={"link": "softplus"}), preset, 0)
    assert not goes_on(data, arm, changed(preset, lr=0.5), 0)
    counts = data.counts.clone()
    counts[0, 0, 0, 0] += 1
    assert not goes_on(replace(data, counts=counts), arm, preset, 0)
    tokens = data.tokens.load(torch.device("cpu"))
    tokens[data.train[0]] += 0.5
    assert not goes_on(replace(data, tokens=tokens), arm, preset, 0)
    saved = saved[: len(saved) // 2]
    assert not goes_on(data, arm, preset, 0)


def start(preset, root, *arms, launcher=(), **options):
    arguments = ["-c", WORKER] if not launcher else [str(root / "worker.py")]
    (root / "worker.py").write_text(WORKER)
    command = [sys.executable, *launcher, *arguments, str(root), preset.model_dump_json(), *arms]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, **options)


@pytest.mark.slow
def test_killed_run_ends_as_an_uninterrupted_one(preset, threads):
    """Killed by the system, where nothing can tidy up."""
    threads(1)  # as in the process of `start`
    preset = changed(preset, {"X": E}, epochs=14, patience=14)
    run = Run(arm="X", test_patient="P5", seed=0)
    file = preset.folder / "checkpoints" / f"{run.name}.safetensors"
    process = start(preset, config.ROOT, "X")
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not preset.run_dir(run).exists()
    with safe_open(file, "pt") as saved:
        assert 0 < len(json.loads(saved.metadata()["history"])) < 14
    resumed = training.train(preset, run)
    assert not file.exists()
    whole = training.fit(training.load_training_set(preset, run), preset.arm("X"), preset, 0)
    assert history(resumed) == history(whole)
    weights = load_file(resumed / "checkpoint.safetensors")
    assert all(torch.equal(weights[k], v) for k, v in whole.model.state_dict().items())


@pytest.mark.slow
def test_two_processes_learn_nearly_as_one(preset):
    """Each mean is over a process's own tissue; batches of 6 and of 3 patches per process."""
    preset = changed(preset, {"linear": LINEAR, "deep": E}, batch_size=6, accumulate=1, epochs=6)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(
        preset, config.ROOT, "linear", "deep", launcher=launcher,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    # Dropout and batch normalisation are each process's own.
    for arm, tolerance in (("linear", 0.01), ("deep", 0.2)):
        run = Run(arm=arm, test_patient="P5", seed=0)
        folder = preset.run_dir(run)
        assert json.loads((folder / "provenance.json").read_text())["processes"] == 2
        data = training.load_training_set(preset, run)
        alone = column(training.fit(data, preset.arm(arm), preset, 0), "validation_loss")
        np.testing.assert_allclose(column(folder, "validation_loss"), alone, rtol=tolerance)
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_processes_are_those_of_the_launcher(monkeypatch):
    for key in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(key, raising=False)
    assert devices._processes() == (1, 1)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # an allocation, without srun
    assert devices._processes() == (1, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert devices._processes() == (4, 2)


def test_accumulated_batches_are_one_large_batch(preset):
    """Exact where every bin counts; batches of 2 × 3 and of 6, both with a rest of 12 % 9."""
    fits = []
    for size, accumulate in ((2, 3), (6, 1), (3, 3), (9, 1)):
        now = changed(preset, {"X": {**LINEAR, "masked": False}}, batch_size=size,
                      accumulate=accumulate, epochs=3)  # fmt: skip
        data = training.load_training_set(now, RUN)
        fits.append(column(training.fit(data, now.arm("X"), now, 0), "validation_loss"))
    np.testing.assert_allclose(fits[0], fits[1], rtol=1e-4)
    np.testing.assert_allclose(fits[2], fits[3], rtol=1e-4)
    assert abs(fits[0][0] / fits[2][0] - 1) > 1e-3


def test_learning_rate_is_warmed_up_and_annealed_as_torch_does(preset):
    preset = changed(preset, epochs=5, warmup_epochs=2, batch_size=4, accumulate=1)
    data = training.load_training_set(preset, RUN)
    steps = -(-int((~data.validation).sum()) // 4)
    assert steps == 3
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=preset.training.lr)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 1 / 6, 1, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=9)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [warm, cosine], milestones=[6])
    expected = []
    for _ in range(15):
        optimiser.step()
        schedule.step()
        expected.append(optimiser.param_groups[0]["lr"])
    found = column(training.fit(data, preset.arm("E"), preset, 0), "lr")
    np.testing.assert_allclose(found, expected[2::3], atol=1e-12)


def test_bias_starts_every_gene_at_its_training_mean(preset):
    write_patient(preset, "P2", seed=7, scale=(0.1, 1.0, 10.0))
    now = changed(preset, {"X": {**LINEAR, "bias": "gene-mean"}})
    data = training.load_training_set(now, RUN)
    train = ~data.validation
    inside = np.broadcast_to(data.mask[train][:, None], data.counts[train].shape)
    counts = data.counts[train].numpy()
    expected = [counts[:, g][inside[:, g]].mean() for g in range(3)]
    held_out_too = [data.counts[:, g][data.mask].float().mean() for g in range(3)]
    step = trainer.initial_step(data, now.arm("X"), now, 0, torch.device("cpu"))
    for weight in step.model.decoder.parameters():
        if weight.dim() > 1:
            torch.nn.init.zeros_(weight)
    rate = step.model.rate(torch.zeros(1, 3, 16, 16))[0, :, 0, 0].detach()
    np.testing.assert_allclose(rate, expected, rtol=1e-4)
    assert not np.allclose(rate, held_out_too, rtol=1e-3)


def test_a_gene_without_a_count_starts_low_but_finite(preset):
    data = training.load_training_set(preset, RUN)
    counts = data.counts.clone()
    counts[:, 1] = 0
    rate = training_data.gene_rate(replace(data, counts=counts))
    assert 0 < rate[1] < 1e-4


def test_thinning_is_binomial_and_repeats(preset):
    keep = 0.25  # at a half, keeping could not be told from dropping
    now = changed(preset, {"quarter": {**LINEAR, "keep": keep}})
    full = training.load_training_set(now, RUN)
    thin, again, other = (
        training.load_training_set(now, Run(arm="quarter", test_patient="P5", seed=seed))
        for seed in (0, 0, 1)
    )
    assert thin.counts.equal(again.counts) and not thin.counts.equal(other.counts)
    for part in (full.validation, ~full.validation):
        n, k = (x.counts[part].long().flatten() for x in (full, thin))
        assert (k <= n).all()
        assert abs(k.sum() - keep * n.sum()) < 4.5 * (n.sum() * keep * (1 - keep)).sqrt()
        # One of a pair is kept in ⅜ of all pairs; in half or none if counts were scaled.
        share, expected = (k[n == 2] == 1).double().mean(), 2 * keep * (1 - keep)
        assert abs(share - expected) < 4.5 * (expected * (1 - expected) / (n == 2).sum()).sqrt()
    for patches in ((0, 9), (9, 18)):  # patients are thinned independently
        assert thin.counts[slice(*patches)].any()


def cubic_matrix(bins: int, factor: int) -> np.ndarray:
    """Cubic convolution (Keys 1981, a = -0.75) on half-pixel centres with edges repeated."""
    matrix = np.zeros((bins * factor, bins))
    for i in range(bins * factor):
        x = (i + 0.5) / factor - 0.5
        for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            t, a = abs(x - j), -0.75
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[i, min(max(j, 0), bins - 1)] += near if t <= 1 else far
    return matrix


def test_bicubic_prediction_is_the_coarse_sum_interpolated(preset):
    torch.manual_seed(0)
    decoder = build_decoder("linear", 3, 2, bias=-3.0)
    mean, std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    tokens = 3 * torch.randn(2, 3, 16, 16)
    fine = Model(decoder, mean, std, "exp").rate(tokens).detach().numpy()
    found = Model(decoder, mean, std, "exp", 8).rate(tokens).detach().numpy()
    coarse = fine.reshape(2, 2, 32, 4, 32, 4).sum((3, 5))
    cubic = cubic_matrix(32, 4)
    expected = (cubic @ coarse @ cubic.T) / 16
    assert expected.min() < 0
    np.testing.assert_allclose(found, expected.clip(0), rtol=1e-4, atol=1e-6)


def test_interpolation_takes_nothing_from_beyond_the_tissue():
    """Whatever stands off the tissue, where no loss was taken, rates within stay as they are."""
    torch.manual_seed(0)
    mean, std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    mask = torch.rand(2, 128, 128) < 0.9
    mask[0, :, 50:] = mask[1, 90:] = False

    class Fixed(torch.nn.Module):
        def forward(self, eta):
            return self.eta

    model = Model(Fixed(), mean, std, "softplus", 8)
    tokens, eta = torch.zeros(2, 3, 16, 16), torch.randn(2, 2, 128, 128) - 3
    model.decoder.eta = eta
    before = model.rate(tokens, mask)
    model.decoder.eta = torch.where(mask[:, None], eta, 5.0)
    after = model.rate(tokens, mask)
    inside = mask[:, None].expand_as(before)
    torch.testing.assert_close(before[inside], after[inside])
    # A constant rate stays what it is up to the edge; mixed with the bins beyond, it did not.
    model.decoder.eta = torch.where(mask[:, None], torch.full_like(eta, -2.0), 5.0)
    flat = model.rate(tokens, mask)[inside]
    expected = torch.nn.functional.softplus(torch.tensor(-2.0))
    torch.testing.assert_close(flat, expected.expand_as(flat))
    assert (model.rate(tokens)[inside] > 2 * expected).any()


@pytest.mark.slow
def test_mixed_precision_learns_the_same(preset):
    data = training.load_training_set(preset, RUN)
    full = training.fit(data, preset.arm("E"), preset, 0)
    fabric = devices.launch("bfloat16")
    mixed = training.fit(data, preset.arm("E"), preset, 0, fabric)
    assert history(full) != history(mixed)
    np.testing.assert_allclose(
        column(mixed, "validation_loss"), column(full, "validation_loss"), rtol=0.02
    )
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())


def test_single_precision_products_use_tf32_on_a_gpu(monkeypatch):
    """As far as it can be tried without one: what is set before Fabric looks for the card."""
    import lightning_fabric

    def no_card(**options):
        raise RuntimeError(options["precision"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lightning_fabric, "Fabric", no_card)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    try:
        for precision, asked in (("float32", "32-true"), ("bfloat16", "bf16-mixed")):
            torch.set_float32_matmul_precision("highest")
            with pytest.raises(RuntimeError, match=asked):
                devices.launch(precision)
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_paper_trains_in_bfloat16_and_no_other_preset():
    precisions = {
        name: load_preset(name).training.precision for name in ("smoke", "laptop", "paper")
    }
    assert precisions == {"smoke": "float32", "laptop": "float32", "paper": "bfloat16"}


def test_other_deterministic_settings_are_restored(preset):
    assert not torch.are_deterministic_algorithms_enabled()
    data = training.load_training_set(changed(preset, epochs=1), RUN)
    training.fit(data, preset.arm("E"), changed(preset, epochs=1), 0)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_step_never_waits_for_the_device(preset):
    """What makes the host wait on a GPU: reading a scalar, or the size of a selection."""
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}
    seen = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            name = operation.overloadpacket.__name__
            seen[name] += 1
            assert name not in waits
            indices = arguments[1] if name == "index" else []
            assert not any(index is not None and index.dtype == torch.bool for index in indices)
            return operation(*arguments, **(keywords or {}))

    class Likeness(torch.nn.Module):  # the real objective reads its own loss on a CPU
        def forward(self, eta, count, mask):
            return (eta - count).square().mul(mask[:, None]).mean()

    preset = changed(preset, accumulate=2)
    this = trainer.Trainer(
        training.load_training_set(preset, RUN), preset.arm("E"), preset, 0, None
    )
    this.step.objective = Likeness()
    order, views = trainer.draw(this.data.train, len(this.data.views), 0)
    with Watch():
        queue = training_data.batches(this.data, order, views, 3, this.device)
        total = this.train(queue, [1e-3, 1e-3])
    assert seen["_fused_adamw_"] == 2 and seen["gather"] == 2 * 4
    assert np.isfinite(total.item())
