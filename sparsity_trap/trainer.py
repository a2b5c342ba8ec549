"""One run under way: its modules, its optimiser, and what an epoch does.

A step launches work and never waits for it: draws are made on the CPU for a whole epoch, turned
counts are gathered by index, and losses are read once per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsity_trap import losses
from sparsity_trap.bins import bin_mask
from sparsity_trap.decoders import build_decoder
from sparsity_trap.metrics import Moments
from sparsity_trap.model import Model
from sparsity_trap.settings import Arm, Preset, UserError
from sparsity_trap.training_data import (
    Batch,
    TrainingSet,
    batches,
    channel_moments,
    gene_rate,
    gene_weight,
)  # fmt: skip

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Learning rate of the likelihood's own parameters (dispersion): a decoder's would leave them where
#: they start.
LIKELIHOOD_LR = 1e-2

#: What Adam adds to the root of its second moment. Its usual 1e-8 stops losses whose gradients are
#: as small, such as squared error on thinned counts, and would turn their size into an effect.
EPS = 1e-15


class Step(nn.Module):
    """Model and objective as one module, as a strategy of several processes needs them."""

    def __init__(self, model: Model, objective: losses.Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and η in single precision."""
        eta = self.model(batch.tokens).float()
        return self.objective(eta, batch.counts, batch.mask), eta


def initial_step(
    data: TrainingSet, arm: Arm, preset: Preset, seed: int, device: torch.device
) -> Step:
    """Model and objective in their initial state, which data and seed alone determine."""
    channels, genes = data.tokens.shape[2], data.counts.shape[1]
    mean, std = channel_moments(data, device)
    bias: float | Tensor = (
        losses.initial_eta(gene_rate(data), arm.link) if arm.bias == "gene-mean" else arm.bias
    )
    torch.manual_seed(seed)
    decoder = build_decoder(arm.decoder, channels, genes, bias=bias, **preset.decoder.model_dump())
    model = Model(decoder, mean, std, arm.link, arm.bicubic_from_um)
    depth = gene_rate(data).sum().item() if arm.loss.endswith("-depth") else None
    weight = gene_weight(data, arm.gene_weight)
    return Step(
        model,
        losses.Objective(
            arm.loss, arm.link, genes, arm.resolutions_um, arm.masked, weight, mean_depth=depth
        ),
    )


class Trainer:
    """Modules, optimiser and history of a run, on its device.

    Parameters
    ----------
    data, arm, preset, seed, fabric
        As for `training.fit`.

    Attributes
    ----------
    step : Step
        The modules that are trained.
    history : list of dict
        One record per epoch so far.
    best : dict
        State of ``step``, on the host, after the epoch with the lowest validation loss.
    """

    def __init__(
        self, data: TrainingSet, arm: Arm, preset: Preset, seed: int, fabric: Fabric | None
    ):
        self.settings, self.seed, self.fabric = arm.training(preset.training), seed, fabric
        self.device = fabric.device if fabric else torch.device("cpu")
        self.rank, self.ranks = (fabric.global_rank, fabric.world_size) if fabric else (0, 1)
        self.data = data.on(self.device)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.size, rest = divmod(self.settings.batch_size, self.ranks)
        if rest:
            raise UserError(
                f"training.batch_size {self.settings.batch_size} cannot be dealt out to "
                f"{self.ranks} processes: start as many processes as divide it"
            )
        #: Patches of an epoch that this process takes.
        self.patches = len(self.data.train) // self.ranks
        self.steps = math.ceil(math.ceil(self.patches / self.size) / self.settings.accumulate)
        self.step = initial_step(self.data, arm, preset, seed, self.device).to(self.device)
        self.optimiser = self._optimiser()
        #: ``step`` as it runs: with Fabric, wrapped for its precision and processes.
        self.run: Any = self.step
        if fabric:
            self.run, self.optimiser = fabric.setup(self.step, self.optimiser)

    def _optimiser(self) -> Any:
        lr, decay = self.settings.lr, self.settings.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": list(self.step.model.parameters()), "weight_decay": decay},
            {"params": list(self.step.objective.parameters()), "faster": LIKELIHOOD_LR / lr},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr, weight_decay=0, eps=EPS, fused=True)

    def lr(self, step: int) -> float:
        """Learning rate after some steps: a warm-up, then half a cosine."""
        warmup = self.settings.warmup_epochs * self.steps
        total = self.settings.epochs * self.steps
        return self.settings.lr * cosine(step, warmup, total)

    def best_epoch(self) -> int:
        """First epoch with the lowest validation loss, counted from 1; 0 before the first."""
        return best_epoch(self.history) if self.history else 0

    def epoch(self) -> None:
        """Train on every patch once, validate, and add to the history."""
        number = len(self.history)
        # Seeding every epoch anew makes a resumed run draw what an uninterrupted one does.
        torch.manual_seed(_derived(self.seed, number, self.rank))
        order, views = draw(self.data.train, len(self.data.views), _derived(self.seed, number))
        own = slice(self.rank, self.patches * self.ranks, self.ranks)
        queue = batches(self.data, order[own], views[own], self.size, self.device)
        rates = [self.lr(step) for step in range(number * self.steps, (number + 1) * self.steps)]
        total = self.train(queue, rates)
        record: dict[str, float] = {}
        if self.rank == 0:
            validation_loss, pcc = self.validate()
            record = {
                "epoch": number + 1,
                "train_loss": total.item() / self.patches,
                "validation_loss": validation_loss,
                "validation_pcc_8um": pcc,
                "lr": self.lr((number + 1) * self.steps),
            }
        # The first process's word counts, so that all stop after the same epoch.
        self.history.append(self.fabric.broadcast(record) if self.fabric else record)

    def train(self, queue: Iterator[Batch], rates: Sequence[float]) -> Tensor:
        """Take one step per learning rate; return the sum of losses over this process's patches."""
        self.run.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        whole = self.size * self.settings.accumulate
        for rate in rates:
            group = list(islice(queue, self.settings.accumulate))
            for i, batch in enumerate(group):
                with self._exchange(last=i == len(group) - 1):
                    loss, _ = self.run(batch)
                    # A smaller last batch or group of batches weighs as its patches do.
                    part = loss * (len(batch.tokens) / whole)
                    if self.fabric:
                        self.fabric.backward(part)
                    else:
                        part.backward()
                total += loss.detach() * len(batch.tokens)
            nn.utils.clip_grad_norm_(self.step.parameters(), self.settings.clip)
            for parameters in self.optimiser.param_groups:
                parameters["lr"] = rate * parameters.get("faster", 1)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return total

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Processes exchange their gradients once a step, with its last batch."""
        if self.fabric is None or self.ranks == 1 or last:
            return nullcontext()
        return self.fabric.no_backward_sync(self.run)

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Loss and mean PCC at 8 µm of the held-out blocks, without augmentation."""
        self.step.eval()
        held_out = self.data.held_out
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        moments = []
        size = self.settings.batch_size
        for batch in batches(self.data, held_out, torch.zeros_like(held_out), size, self.device):
            with self.fabric.autocast() if self.fabric else nullcontext():
                loss, eta = self.step(batch)
            total += loss * len(batch.tokens)
            tissue = batch.mask[:, None]
            truth, rate = (
                F.avg_pool2d((maps * tissue).float(), 4, divisor_override=1).cpu()
                for maps in (batch.counts, losses.rate(eta, self.step.model.link))
            )
            inside = bin_mask(batch.mask, 4).cpu()
            moments += [Moments.of(*maps) for maps in zip(truth, rate, inside, strict=True)]
        pcc = reduce(Moments.__add__, moments).pcc()
        mean = float(np.nanmean(pcc)) if np.isfinite(pcc).any() else math.nan
        return total.item() / len(held_out), mean


def best_epoch(history: Sequence[dict[str, float]]) -> int:
    """First epoch with the lowest validation loss, counted from 1."""
    return int(min(history, key=lambda record: record["validation_loss"])["epoch"])


def cosine(step: int, warmup: int, total: int) -> float:
    """Share of the full learning rate at a step: a linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _derived(*numbers: int) -> int:
    """Seed of one purpose, from the run's seed and, say, the epoch."""
    return int(np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1)[0])


def draw(train: Tensor, views: int, seed: int) -> tuple[Tensor, Tensor]:
    """Order of the patches in one epoch, and the view of each."""
    draw = torch.Generator().manual_seed(seed)
    order = train[torch.randperm(len(train), generator=draw)]
    return order, torch.randint(views, (len(train),), generator=draw)
