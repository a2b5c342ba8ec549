"""Training: seconds a step against the floor, against the published way, and how both grow.

    python -m benchmarks.training [--out FILE]

On a CPU the sizes are those of the preset ``laptop``; on a GPU those of ``paper``, in float32 and
in bfloat16. Tokens, counts and images are synthetic: no number here says anything about learning.
Nothing but this program should run meanwhile.

*Floor.* FLOPs of forward and backward pass (`torch.utils.flop_counter`) over the rate of a large
matrix product, and bytes over the rate of a large copy, both measured in the same run; the larger
is the floor. Bytes are the least that this sequence of operations moves: every tensor kept for the
backward pass is written and read once, tokens and counts are read once, and an optimiser step
reads parameters, gradients and two moments and writes all but the gradients.

*The published way.* Each step opens PNGs, jitters and turns them on the host, encodes them with the
frozen encoder, moves counts to the device and reads the loss.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.processes import peak_mb
from sparsity_trap import losses, training
from sparsity_trap.bins import PATCH_BINS, TOKEN_GRID
from sparsity_trap.data.patches import PATCH_PIXELS
from sparsity_trap.decoders import build_decoder
from sparsity_trap.devices import launch
from sparsity_trap.encoders import (
    FilterBank,
    TimmTokens,
    declare_torchvision_ops,
    dihedral,
    load_encoder,
    views,
)
from sparsity_trap.files import building, commit, hardware
from sparsity_trap.presets import load_preset
from sparsity_trap.settings import POISSON_ARM, Preset

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
GENES, MEAN_COUNT = 50, 0.06  # of the published panel: 94 % of the bins are empty
#: Training and validation patches of a run.
PATCHES = (1180, 208) if GPU else (60, 12)
VIRCHOW2_CHANNELS = 1280
PUBLISHED_EPOCHS = 40
PUBLISHED_STEPS = 10  # measured
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward
#: Growth along one axis, the others as in the first row; sizes that a laptop does in a minute.
GROWTH = {
    "patches": (295, 1180) if GPU else (15, 30, 60),
    "genes": (50, 2000) if GPU else (50, 500, 2000),
    "views": (1, 16) if GPU else (1, 8, 16),
}
#: Kinds of operations and parts of their names in torch.
KINDS = {
    "convolutions": ("conv",),
    "matrix products": ("mm", "linear", "attention"),
    "recurrent layers": ("lstm", "rnn"),
    "normalisation": ("norm",),
}
GROWTH_PATCHES = 64 if GPU else 6  # where genes or views grow


def main() -> None:
    """Measure, write JSON, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    name = "training_gpu" if GPU else "training"
    parser.add_argument("--out", type=Path, default=Path(f"results/bench/{name}.json"))
    parser.add_argument("--grow", nargs=3, type=int, metavar=("PATCHES", "GENES", "VIEWS"),
                        help=argparse.SUPPRESS)  # fmt: skip
    options = parser.parse_args()
    preset = load_preset("paper" if GPU else "laptop")
    if options.grow:
        print(json.dumps(grow(preset, *options.grow)))
        return
    report = measure(preset)
    with building(options.out) as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    print_summary(report)
    print(f"written to {options.out}")


def measure(preset: Preset) -> dict[str, object]:
    """Everything the program measures."""
    from benchmarks.plain_training import against_plain  # which needs this module

    precisions = ("float32", "bfloat16") if GPU else ("float32",)
    torch.set_float32_matmul_precision("high")  # as training does: on a GPU, products by TF32
    machine = {
        "copy_gb_per_s": copy_rate() / 1e9,
        **{f"matmul_{p}_tflop_per_s": matmul_rate(p) / 1e12 for p in precisions},
    }
    data = synthetic(preset, *PATCHES, GENES, len(views(preset.encoder)))
    runs = {p: run_cost(preset, data, p, machine) for p in precisions}
    return {
        "commit": commit(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "preset": preset.name,
        "arm": POISSON_ARM,
        "note": "synthetic tokens, counts and images",
        "machine": machine,
        "run": runs,
        "before_and_after": None if GPU else against_plain(),
        "published_way": published_way(preset, data, runs[preset.training.precision]),
        "encoder": encoder_rate(machine) if GPU else None,
        "growth": growth(),
    }


def synthetic(
    preset: Preset, train: int, held_out: int, genes: int, n_views: int
) -> training.TrainingSet:
    """Tokens, counts and masks of the right size, made on the device."""
    n = train + held_out
    torch.manual_seed(0)
    channels = VIRCHOW2_CHANNELS if GPU else FilterBank().channels
    shape = (n, n_views, channels, TOKEN_GRID, TOKEN_GRID)
    tokens = torch.empty(shape, dtype=torch.float16, device=DEVICE)
    counts = torch.empty((n, genes, PATCH_BINS, PATCH_BINS), dtype=torch.uint8, device=DEVICE)
    for patch in range(n):
        tokens[patch] = torch.randn(shape[1:], device=DEVICE)
        # Binomial, because drawing Poisson numbers takes minutes on a CPU.
        counts[patch] = (torch.rand(counts.shape[1:], device=DEVICE) < MEAN_COUNT).byte()
    mask = torch.rand((n, PATCH_BINS, PATCH_BINS), device=DEVICE) < 0.8
    validation = torch.arange(n) >= train
    kinds = views(preset.encoder)[:n_views]
    return training.TrainingSet(tokens, kinds, counts, mask, validation)


def matmul_rate(precision: str) -> float:
    """FLOP per second of a large square matrix product, the best of several."""
    side = 8192 if GPU else 2048
    a, b = (torch.randn(side, side, device=DEVICE, dtype=getattr(torch, precision)) for _ in "ab")
    return 2 * side**3 / best_seconds(lambda: a @ b)


def copy_rate() -> float:
    """Bytes per second read and written by a copy too large for any cache."""
    a = torch.ones(2**30 if GPU else 2**26, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.nbytes / best_seconds(lambda: b.copy_(a))


def best_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Fastest of some repetitions, after a first that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def wait() -> None:
    """Until the device has done what it was given."""
    if GPU:
        torch.cuda.synchronize()


def run_cost(
    preset: Preset, data: training.TrainingSet, precision: str, machine: dict[str, float]
) -> dict[str, object]:
    """Seconds of a run's epochs and batches, beside their floor."""
    epochs = 3
    # Noise cannot be learned: early stopping would end the run.
    update = {"precision": precision, "epochs": epochs, "patience": epochs}
    preset = preset.model_copy(update={"training": preset.training.model_copy(update=update)})
    arm, settings = preset.arm(POISSON_ARM), preset.training
    fabric = launch(precision)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fitted = training.fit(data, arm, preset, 0, fabric, Path(folder) / "checkpoint")
    seconds = time.perf_counter() - start
    marks = [row["seconds"] for row in fitted.history]
    epoch = median(np.diff(marks))
    batches = -(-PATCHES[0] // settings.batch_size)
    flops, kept = costs_of_a_patch(preset, data)
    weights = sum(p.numel() for p in fitted.model.parameters())
    # Activations in bfloat16 take half the bytes that were counted in float32.
    kept = kept * (0.5 if precision == "bfloat16" else 1)
    inputs = data.tokens[0, 0].nbytes + data.counts[0].nbytes + data.mask[0].nbytes
    per_step = 4 * 7 * weights / settings.accumulate
    moved = settings.batch_size * (2 * kept + inputs) + per_step
    compute = settings.batch_size * flops / (machine[f"matmul_{precision}_tflop_per_s"] * 1e12)
    memory = moved / (machine["copy_gb_per_s"] * 1e9)
    # Validation runs forward only: a third of the work of a training patch.
    share = PATCHES[0] / (PATCHES[0] + PATCHES[1] / 3)
    batch = epoch * share / batches
    work = decoder_and_loss(fitted, data, preset, fabric)
    return {
        "parameters": weights,
        "patches": PATCHES[0],
        "batch_size": settings.batch_size,
        "epochs": epochs,
        "seconds": seconds,
        "seconds_per_epoch": epoch,
        "seconds_of_published_epochs": seconds - marks[-1] + PUBLISHED_EPOCHS * epoch,
        "milliseconds_per_batch": 1e3 * batch,
        "milliseconds_of_decoder_and_loss": 1e3 * best_seconds(work),
        "shares_of_decoder_and_loss": shares_of_kinds(work),
        "gflop_per_batch": settings.batch_size * flops / 1e9,
        "gb_per_batch": moved / 1e9,
        "floor_compute_milliseconds": 1e3 * compute,
        "floor_memory_milliseconds": 1e3 * memory,
        "measured_over_floor": batch / max(compute, memory),
        "bound_by": "arithmetic" if compute > memory else "memory",
    }


def costs_of_a_patch(
    preset: Preset, data: training.TrainingSet, arm_name: str = POISSON_ARM
) -> tuple[int, int]:
    """FLOPs, and bytes kept for the backward pass, of one patch; counted on the CPU in float32."""
    arm = preset.arm(arm_name)
    channels, genes = data.tokens.shape[2], data.counts.shape[1]
    decoder = build_decoder(arm.decoder, channels, genes, **preset.decoder.model_dump())
    tokens, counts, mask = (
        x[:1].cpu() for x in (data.tokens[:, 0].float(), data.counts, data.mask)
    )
    objective = losses.Objective(arm.loss, arm.link, genes, arm.resolutions_um, arm.masked)
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()} | {tokens.data_ptr()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Fused recurrent layers and attention are unknown to the counter; their plain forms are not.
    plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    counted = FlopCounterMode(display=False, custom_mapping={CONVOLUTION_BACKWARD: backward_flops})
    with plain[0], plain[1], counted as counter:
        objective(decoder(tokens), counts, mask).backward()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(decoder(tokens), counts, mask)
    del loss
    return counter.get_total_flops(), sum(kept.values())


def backward_flops(above, x, weight, *options, out_shape=None, **more) -> int:
    """FLOPs of a convolution's gradients; torch counts every group with every other's channels."""
    *_, transposed, _, _, mask = options
    channels_first = x if transposed else above  # of those, each meets every weight of its channel
    products = math.prod(channels_first) * math.prod(weight[1:])
    return 2 * products * (bool(mask[0]) + bool(mask[1]))


def decoder_and_loss(
    fitted: training.Fitted, data: training.TrainingSet, preset: Preset, fabric
) -> Callable[[], None]:
    """Forward and backward pass of one batch and nothing else."""
    size = preset.training.batch_size
    tokens, counts, mask = data.tokens[:size, 0], data.counts[:size], data.mask[:size]
    model, objective = fitted.model.train(), fitted.objective

    def work() -> None:
        with fabric.autocast() if fabric else nullcontext():
            eta = model(tokens)
        objective(eta.float(), counts, mask).backward()
        model.zero_grad()

    return work


def shares_of_kinds(work: Callable[[], None]) -> dict[str, float]:
    """Share of each kind of operation in the time of all, from torch's profiler."""
    work()
    with torch.profiler.profile() as profile:
        work()
        wait()
    seconds = dict.fromkeys((*KINDS, "all others"), 0.0)
    for event in profile.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), None)
        spent = event.self_device_time_total if GPU else event.self_cpu_time_total
        seconds[kind or "all others"] += spent
    return {kind: spent / sum(seconds.values()) for kind, spent in seconds.items()}


def virchow2() -> TimmTokens:
    """Its architecture on the device, with random weights, which a CPU takes a minute to draw."""
    with DEVICE:
        return TimmTokens("virchow2", pretrained=False).to(DEVICE).eval()


def published_way(
    preset: Preset, data: training.TrainingSet, ours: dict[str, object]
) -> dict[str, object]:
    """Seconds per epoch with images decoded and encoded in every step; same model and patches."""
    from PIL import Image

    declare_torchvision_ops()
    from torchvision.transforms import ColorJitter

    encoder = virchow2() if GPU else load_encoder("filterbank").eval()
    arm, settings = preset.arm(POISSON_ARM), preset.training
    size = settings.batch_size
    files = [png(seed) for seed in range(size * 2)]
    counts, mask = data.counts[: 2 * size].cpu(), data.mask[: 2 * size].cpu()
    channels, genes = data.tokens.shape[2], data.counts.shape[1]
    decoder = build_decoder(
        arm.decoder, channels, genes, bias=arm.bias, **preset.decoder.model_dump()
    ).to(DEVICE)
    objective = losses.Objective(arm.loss, arm.link, genes, arm.resolutions_um, arm.masked)
    objective.to(DEVICE)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=settings.lr)
    jitter = ColorJitter(*preset.encoder.jitter)
    draw = np.random.default_rng(0)
    encoding = []

    def step(number: int) -> None:
        chosen = draw.permutation(len(files))[:size]
        turns = draw.integers(8, size=size).tolist()
        images, batch_counts, batch_mask = [], [], []
        for patch, turn in zip(chosen.tolist(), turns, strict=True):
            image = jitter(Image.open(io.BytesIO(files[patch])).convert("RGB"))
            images.append(dihedral(torch.from_numpy(np.array(image)), turn, (0, 1)))
            batch_counts.append(dihedral(counts[patch].float(), turn, (1, 2)))
            batch_mask.append(dihedral(mask[patch], turn, (0, 1)))
        start = time.perf_counter()
        with torch.no_grad():
            tokens = encoder(torch.stack(images).to(DEVICE))
        wait()
        encoding.append(time.perf_counter() - start)
        eta = decoder(tokens)
        loss = objective(eta, *(torch.stack(x).to(DEVICE) for x in (batch_counts, batch_mask)))
        (loss / settings.accumulate).backward()
        if (number + 1) % settings.accumulate == 0:
            nn.utils.clip_grad_norm_(decoder.parameters(), settings.clip)
            optimiser.step()
            optimiser.zero_grad()
        loss.item()

    times = []
    for number in range(PUBLISHED_STEPS + 1):
        start = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - start)
    batch = median(times[1:])
    batches = -(-PATCHES[0] // size)
    once = median(encoding[1:]) / size * sum(PATCHES) * len(data.views)
    epoch = batch * batches
    training_epoch = ours["milliseconds_per_batch"] / 1e3 * batches
    return {
        "encoder": "virchow2, no weights" if GPU else "filterbank",
        "milliseconds_per_batch": 1e3 * batch,
        "of_which_encoding": 1e3 * median(encoding[1:]),
        "seconds_per_epoch": epoch,
        "times_slower_per_epoch": epoch / training_epoch,
        "encoding_all_views_once_seconds": once,
        # Encoding counted in full for one run, though all runs share it.
        "times_slower_first_run": PUBLISHED_EPOCHS
        * epoch
        / (once + PUBLISHED_EPOCHS * training_epoch),
    }


def png(seed: int) -> bytes:
    """A smooth coloured picture with some noise, of about the size of an H&E patch's PNG."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(120, 240, (28, 28, 3), np.uint8))
    smooth = np.asarray(coarse.resize((PATCH_PIXELS, PATCH_PIXELS), Image.Resampling.BICUBIC))
    noisy = smooth + draw.normal(0, 6, smooth.shape)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def encoder_rate(machine: dict[str, float]) -> dict[str, object]:
    """Patches per second of the Virchow2 architecture in bfloat16, without weights."""
    size = 64
    encoder = virchow2()
    images = torch.randint(0, 256, (size, PATCH_PIXELS, PATCH_PIXELS, 3), device=DEVICE).byte()

    def work() -> None:
        with torch.no_grad():
            encoder(images)  # in bfloat16 of its own accord

    with FlopCounterMode(display=False) as counter:
        work()
    rate = size / best_seconds(work)
    gflop = counter.get_total_flops() / size / 1e9
    return {
        "batch_size": size,
        "patches_per_second": rate,
        "gflop_per_patch": gflop,
        "share_of_matmul_rate": rate * gflop / 1e3 / machine["matmul_bfloat16_tflop_per_s"],
    }


def growth() -> list[dict[str, object]]:
    """Seconds per patch and peak memory as one size grows; a process for each."""
    rows = []
    for axis, sizes in GROWTH.items():
        for size in sizes:
            shape = {"patches": GROWTH_PATCHES, "genes": GENES, "views": 8, axis: size}
            command = [sys.executable, "-m", "benchmarks.training", "--grow"]
            done = subprocess.run(
                [*command, *map(str, shape.values())], capture_output=True, text=True
            )
            measured = (
                json.loads(done.stdout)
                if done.returncode == 0
                else {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
            )
            rows.append({"axis": axis, **shape, **measured})
    return rows


def grow(preset: Preset, patches: int, genes: int, n_views: int) -> dict[str, float]:
    """Second epoch of a run, validation included: time per training patch, and peak memory."""
    held_out = max(1, patches // 6)
    data = synthetic(preset, patches, held_out, genes, n_views)
    settings = preset.training.model_copy(update={"epochs": 2})
    preset = preset.model_copy(update={"training": settings})
    fabric = launch(settings.precision)
    history = training.fit(data, preset.arm(POISSON_ARM), preset, 0, fabric).history
    seconds = history[1]["seconds"] - history[0]["seconds"]
    peak = torch.cuda.max_memory_allocated() if GPU else 1e6 * peak_mb()
    return {
        "milliseconds_per_patch": 1e3 * seconds / patches,
        "peak_gb": peak / 1e9,
        "tokens_and_counts_gb": (data.tokens.nbytes + data.counts.nbytes) / 1e9,
    }


def print_summary(report: dict) -> None:
    """Print what was measured."""
    print(f"\n{report['hardware']}, {report['threads']} threads")
    print(", ".join(f"{k} {v:.3g}" for k, v in report["machine"].items()))
    for precision, run in report["run"].items():
        print(
            f"{precision}: {run['seconds_per_epoch']:.2f} s per epoch, "
            f"{run['milliseconds_per_batch']:.1f} ms per batch "
            f"({run['milliseconds_of_decoder_and_loss']:.1f} decoder and loss), "
            f"{run['measured_over_floor']:.1f} x floor, bound by {run['bound_by']}"
        )
    for arm, found in (report["before_and_after"] or {}).items():
        steps, runs = found["step_milliseconds"], found["run_seconds"]
        print(
            f"{arm}: {steps['before']:.0f} -> {steps['after']:.0f} ms per step "
            f"({found['step_ratio']:.2f} x, floor {found['floor_milliseconds']:.0f} ms), "
            f"{runs['before']:.1f} -> {runs['after']:.1f} s per run ({found['run_ratio']:.2f} x)"
        )
    way = report["published_way"]
    print(
        f"published way: {way['milliseconds_per_batch']:.0f} ms per batch, "
        f"{way['times_slower_per_epoch']:.1f} x slower per epoch, "
        f"{way['times_slower_first_run']:.1f} x with encoding counted"
    )
    if report["encoder"]:
        print(
            f"Virchow2: {report['encoder']['patches_per_second']:.0f} patches per second, "
            f"{report['encoder']['share_of_matmul_rate']:.0%} of the matrix rate"
        )
    for row in report["growth"]:
        size = f"{row['patches']} patches, {row['genes']} genes, {row['views']} views"
        print(
            f"{size}: {row['failed']}"
            if "failed" in row
            else f"{size}: {row['milliseconds_per_patch']:.0f} ms per patch, "
            f"peak {row['peak_gb']:.2f} GB"
        )


if __name__ == "__main__":
    main()
