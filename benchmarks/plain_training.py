"""Training on a CPU as `sparsity_trap` does it, against the same run by torch's own operations.

    python -m benchmarks.plain_training ARM RUN

The peer is the same code with what was made for a CPU taken out: losses by autograd, up-sampling by
the library's transposed convolution, a head whose gradient is copied to the layout below, and
denormal numbers kept. Steps of both ways alternate on the same batches; RUN, one of the two, is
carried out whole. One thread, in the time of the process, which other programs disturb least. Large
pages of memory are the allocator's: `against_plain` starts a process without and one with them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.processes import run_alone
from benchmarks.training import GENES, PATCHES, costs_of_a_patch, matmul_rate, synthetic
from sparsity_trap import decoders, losses, training
from sparsity_trap.encoders import views
from sparsity_trap.presets import load_preset
from sparsity_trap.scores import GeneScores
from sparsity_trap.settings import Arm, Preset
from sparsity_trap.trainer import Trainer, draw
from sparsity_trap.training_data import TrainingSet, batches

#: Arms of `against_plain`: each decoder, and an arm whose model collapses; how the workflow trains.
ARMS = ("E", "D", "E-linear", "E-img2st")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
STEPS, DISCARDED = 40, 4
WAYS = ("before", "after")


def _head(self: decoders.Head, x: Tensor) -> Tensor:
    if x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    weight = self.weight.flatten(1).expand(len(x), -1, -1)
    return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


@contextmanager
def way(name: str) -> Iterator[None]:
    """Operations of one of `WAYS`."""
    if name == "after":
        yield
        return
    with (
        mock.patch.object(losses, "applies", lambda *maps: False),
        mock.patch.object(decoders.Doubling, "forward", nn.ConvTranspose2d.forward),
        mock.patch.object(decoders.Head, "forward", _head),
        mock.patch.object(training, "_without_denormals", nullcontext),
    ):
        yield


def against_plain() -> dict[str, object]:
    """Process time of steps and runs, by plain operations in small pages and as they are now."""
    found: dict[str, object] = {}
    for arm in ARMS:
        small = run_alone("benchmarks.plain_training", arm, "before", **ONE_THREAD)
        large = run_alone("benchmarks.plain_training", arm, "after", **ONE_THREAD, **LARGE_PAGES)
        before, after = small["step_milliseconds"]["before"], large["step_milliseconds"]["after"]
        runs = {"before": small["run_seconds"], "after": large["run_seconds"]}
        found[arm] = {
            "step_milliseconds": {"before": before, "after": after},
            "step_ratio": before / after,
            "step_ratio_of_code_alone": small["step_ratio"],
            "run_seconds": runs,
            "run_ratio": runs["before"] / runs["after"],
            "floor_milliseconds": large["floor_milliseconds"],
            "step_over_floor": after / large["floor_milliseconds"],
        }
    return found


def main() -> None:
    """Measure one arm and print JSON."""
    name, run = sys.argv[1:]
    torch.set_num_threads(1)
    preset = load_preset("laptop")
    data = synthetic(preset, *PATCHES, GENES, len(views(preset.encoder)))
    flops = preset.training.batch_size * costs_of_a_patch(preset, data, name)[0]
    steps = step_seconds(preset, data, preset.arm(name))
    found = {
        "step_milliseconds": {key: 1e3 * median(times) for key, times in steps.items()},
        "step_ratio": float(np.median(np.divide(steps["before"], steps["after"]))),
        "run_seconds": run_seconds(preset, data, preset.arm(name), run),
        "floor_milliseconds": 1e3 * flops / matmul_rate("float32"),
    }
    print(json.dumps(found))


def step_seconds(preset: Preset, data: TrainingSet, arm: Arm) -> dict[str, list[float]]:
    """Process time of steps, the two ways in turn on two trainers of one state."""
    trainers = {name: Trainer(data, arm, preset, 0, None) for name in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    queues = {}
    for name, trainer in trainers.items():
        order, turns = draw(trainer.data.train, len(trainer.data.views), 0)
        order, turns = order.repeat(4), turns.repeat(4)
        queues[name] = batches(trainer.data, order, turns, trainer.size, trainer.device)
    for number in range(STEPS):
        for name, trainer in trainers.items():
            flushing = training._without_denormals if name == "after" else nullcontext
            with way(name), training._deterministic(), flushing():
                start = time.process_time()
                trainer.train(queues[name], [trainer.lr(number)])
                seconds[name].append(time.process_time() - start)
    return {name: times[DISCARDED:] for name, times in seconds.items()}


def run_seconds(preset: Preset, data: TrainingSet, arm: Arm, name: str) -> float:
    """Process time of a whole run of the preset: epochs, validation, checkpoints and scores."""
    settings = preset.training.model_copy(update={"patience": preset.training.epochs})
    preset = preset.model_copy(update={"training": settings})
    with way(name), tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        model = training.fit(data, arm, preset, 0, None, Path(folder) / "checkpoint").model
        scores = GeneScores()
        counts, mask = data.counts.numpy(), data.mask.numpy()
        for piece, rate in training.predict(model, data.tokens, mask, torch.device("cpu")):
            scores.update(counts[piece], rate.numpy(), mask[piece])
        scores.compute()
        return time.process_time() - start


if __name__ == "__main__":
    main()
