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
from stretto.parallel.mesh import COPY, DATA, Mesh
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
    stop: bool
    """True where any rank asked to stop after this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the mesh, equal on every rank."""

    loss: float
    """Over the valid tokens of the global batch."""
    squared_norm: float
    """Of the whole model's gradient."""
    tokens: int
    """Valid tokens."""
    stop: bool
    """Whether any rank wants to stop."""


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
        self.updates = 0
        """Updates of the run so far; a step whose gradient was not finite makes none."""

    def gradients(self, step: int, batches: Sequence[Batch], *, stop: bool = False) -> Totals:
        """Sums over the mesh; the gradients are then in the masters."""
        mesh = self._model.mesh
        batches = self._model.share(batches)
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
        held = squared_norm_held(self._masters, device=tokens.device)
        totals = self._sum(loss, held, stop=stop, tokens=tokens)
        self._observer.end()
        return totals

    def _sum(self, loss: Tensor | None, squared: Tensor, *, stop: bool, tokens: Tensor) -> Totals:
        """One all-reduce: the loss and the wish to stop over all ranks, the norm over one whole copy of the model."""
        mesh = self._model.mesh
        sums = torch.zeros(3, dtype=torch.float64, device=tokens.device)
        if loss is not None and mesh.index("tp") == 0:
            sums[0] = loss
        sums[1], sums[2] = float(stop), squared
        all_reduce(sums, mesh.group(*COPY)).wait()
        everywhere = sums[:2].clone()
        all_reduce(everywhere, mesh.group("dp_replicate")).wait()
        total, wishes = everywhere.tolist()
        return Totals(loss=total, squared_norm=float(sums[2]), tokens=int(tokens), stop=wishes > 0)

    def run(self, step: int, batches: Sequence[Batch], *, stop: bool = False) -> StepResult:
        """One whole step (``step`` from 1) on this rank's micro-batches."""
        totals = self.gradients(step, batches, stop=stop)
        loss = totals.loss / max(1, totals.tokens)
        norm = math.sqrt(totals.squared_norm) if totals.squared_norm >= 0 else math.nan
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self._observer.begin("OPT")
            limit = self._training.clip_norm
            if limit and norm > limit:
                scale_gradients(self._masters, limit / norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(self._training, step)
            self._optimizer.step()
            self.updates += 1
            self._model.publish()
            self._observer.end()
        return StepResult(loss=loss, grad_norm=norm, tokens=totals.tokens, updated=finite, stop=totals.stop)

    def evaluate(self, runtime: Runtime, batches: Sequence[Batch]) -> tuple[float, int]:
        """Summed loss and tokens of a global batch; ``runtime`` plays a forward-only schedule."""
        mesh = self._model.mesh
        batches = self._model.share(batches)
        tokens, pending = count_tokens(batches, mesh)

        def context(batch: Batch) -> Any:
            return self._model.context(batch, seed=self._seed, step=0, training=False)

        loss = runtime.step(batches, context, None)
        pending.wait()
        nothing = torch.zeros((), dtype=torch.float64, device=tokens.device)
        totals = self._sum(loss, nothing, stop=False, tokens=tokens)
        return totals.loss, totals.tokens


def count_tokens(batches: Sequence[Batch], mesh: Mesh) -> tuple[Tensor, Any]:
    """Valid tokens of the global batch, int64 scalar, once the second value has been waited for."""
    counts = [(batch.labels != IGNORE).sum() for batch in batches]
    total = torch.stack(counts).sum()
    return total, all_reduce(total, mesh.group(*DATA))
