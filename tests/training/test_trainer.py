"""What an epoch does: steps, learning rates, initial bias, nothing that waits."""
# ruff: noqa: F811 - the fixture `preset` is imported

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from small_runs import (  # noqa: F401 - a fixture
    LINEAR,
    RUN,
    changed,
    column,
    preset,
    write_patient,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sparsity_trap import trainer, training, training_data


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
