"""One optimizer step: play the schedule, reduce, clip, update.

count tokens ──all-reduce──┐ (hidden under the first forward)
schedule: F B F B ...  ◄───┘ every gradient is scaled by 1 / tokens of the whole batch
settle units ─► [loss, squared norm] ──one all-reduce──► clip ─► AdamW ─► publish
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stretto.assemble.rank_model import RankModel
from stretto.parallel.clip import scale_gradients, squared_norm_held
from stretto.parallel.collectives import all_reduce
from stretto.parallel.mesh import Mesh
from stretto.parallel.pipeline.runtime import Runtime
from stretto.parallel.unit import settle_all
from stretto.spec.contract import IGNORE, Batch, Observer
from stretto.spec.training import TrainingSpec
from stretto.trainer.rate import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step found, equal on every rank."""

    loss: float
    """Mean loss over the valid tokens of the global batch."""
    grad_norm: float
    """Norm of the whole model's gradient before clipping."""
    tokens: int
    """Valid tokens of the global batch."""
    updated: bool
    """False where the gradient was not finite and the update was left out."""


class TrainStep:
    """Runs steps of one rank."""

    def __init__(
        self,
        model: RankModel,
        runtime: Runtime,
        optimizer: torch.optim.Optimizer,
        *,
        training: TrainingSpec,
        seed: int,
        observer: Observer,
    ) -> None:
        self._model, self._runtime, self._optimizer = model, runtime, optimizer
        self._training, self._seed, self._observer = training, seed, observer
        self._masters = model.masters

    def gradients(self, step: int, batches: Sequence[Batch]) -> tuple[float, float, int]:
        """Loss, gradient norm and tokens; the gradients are then in the masters."""
        mesh = self._model.mesh
        tokens, pending = count_tokens(batches, mesh)

        def scale() -> Tensor:
            pending.wait()
            return tokens.clamp(min=1).to(torch.float64).reciprocal()

        def context(batch: Batch) -> Any:
            return self._model.context(batch, seed=self._seed, step=step, training=True)

        loss = self._runtime.step(batches, context, scale)
        pending.wait()
        self._observer.begin("REDUCE_GRAD")
        settle_all(self._model.units)
        totals = torch.zeros(2, dtype=torch.float64, device=tokens.device)
        if loss is not None and mesh.index("tp") == 0:
            totals[0] = loss
        totals[1] = squared_norm_held(self._masters, device=tokens.device)
        count = int(tokens)
        total, squared = sum_totals(totals, mesh)
        self._observer.end()
        return total / max(1, count), math.sqrt(squared) if squared >= 0 else math.nan, count

    def run(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """One whole step (``step`` from 1) on this rank's micro-batches."""
        loss, norm, tokens = self.gradients(step, batches)
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self._observer.begin("OPT")
            limit = self._training.clip_norm
            if limit and norm > limit:
                scale_gradients(self._masters, limit / norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self._training, step)
            self._optimizer.step()
            self._model.publish()
            self._observer.end()
        return StepResult(loss=loss, grad_norm=norm, tokens=tokens, updated=finite)

    def evaluate(self, runtime: Runtime, batches: Sequence[Batch]) -> tuple[float, int]:
        """Summed loss and tokens of a global batch; ``runtime`` plays a forward-only schedule."""
        mesh = self._model.mesh
        tokens, pending = count_tokens(batches, mesh)

        def context(batch: Batch) -> Any:
            return self._model.context(batch, seed=self._seed, step=0, training=False)

        loss = runtime.step(batches, context, None)
        pending.wait()
        totals = torch.zeros(2, dtype=torch.float64, device=tokens.device)
        if loss is not None and mesh.index("tp") == 0:
            totals[0] = loss
        return sum_totals(totals, mesh)[0], int(tokens)


def count_tokens(batches: Sequence[Batch], mesh: Mesh) -> tuple[Tensor, Any]:
    """Valid tokens of the global batch, int64 scalar, once the second value has been waited for."""
    counts = [(batch.labels != IGNORE).sum() for batch in batches]
    total = torch.stack(counts).sum()
    return total, all_reduce(total, mesh.group("dp_replicate", "dp_shard"))


def sum_totals(totals: Tensor, mesh: Mesh) -> tuple[float, float]:
    """Sum of [loss, squared norm]: the loss over all data, the norm over one whole copy of the model."""
    all_reduce(totals, mesh.group("pp", "dp_shard", "tp")).wait()
    loss = totals[0].clone()
    all_reduce(loss, mesh.group("dp_replicate")).wait()
    return float(loss), float(totals[1])
