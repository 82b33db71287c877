"""One optimizer step: play the schedule, reduce, clip, update.

count tokens ──all-reduce──┐ (hidden under the first forward)
schedule: F B F B ...  ◄───┘ every gradient is scaled by 1 / tokens of the whole batch
settle units ─► [loss, squared norm] ──one all-reduce──► clip ─► AdamW ─► publish
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from stretto.trainer.filling import Filling


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step found, equal on every rank."""

    step: int
    """Its number, from 1."""
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

    @property
    def norm(self) -> float:
        """Of the whole model's gradient."""
        return math.sqrt(self.squared_norm) if self.squared_norm >= 0 else math.nan


class TrainStep:
    """Runs steps of one rank."""

    def __init__(
        self,
        model: RankModel,
        runtime: Runtime | Filling,
        optimizer: torch.optim.Optimizer,
        *,
        training: TrainingSpec,
        seed: int,
        observer: Observer,
    ) -> None:
        self.model, self._runtime, self.optimizer = model, runtime, optimizer
        self.training, self._seed, self.observer = training, seed, observer
        self._masters = model.masters
        self.updates = 0
        """Updates of the run so far; a step whose gradient was not finite makes none."""

    def gradients(self, step: int, batches: Sequence[Batch], *, stop: bool = False) -> Totals:
        """Sums over the mesh; the gradients are then in the masters."""
        loss, tokens = self.play(step, batches)
        self.observer.begin("REDUCE_GRAD")
        held = self.held(loss, stop=stop, tokens=tokens)
        totals = self.sum_up(held, tokens=tokens)
        self.observer.end()
        return totals

    def play(
        self,
        step: int,
        batches: Sequence[Batch],
        *,
        confirm: Callable[[], bool] | None = None,
        scale: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Play the schedule: this rank's loss, if it has one, and the valid tokens of the global batch.

        ``confirm``, ``scale``: see Runtime.step; without ``scale`` it is one over the number of tokens.
        """
        mesh = self.model.mesh
        batches = self.model.share(batches)
        tokens, pending = count_tokens(batches, mesh)

        def mean() -> Tensor:
            pending.wait()
            return tokens.clamp(min=1).to(torch.float64).reciprocal()

        def context(batch: Batch) -> Any:
            return self.model.context(batch, seed=self._seed, step=step, training=True)

        loss = self._runtime.step(batches, context, scale or mean, confirm=confirm)
        pending.wait()
        return loss, tokens

    def held(self, loss: Tensor | None, *, stop: bool, tokens: Tensor) -> Tensor:
        """Finish the reduction of gradients; then what this rank adds to the sums: loss, wish to stop, squared norm."""
        settle_all(self.model.units)
        return self.own(loss, squared_norm_held(self._masters, device=tokens.device), stop=stop)

    def own(self, loss: Tensor | None, squared: Tensor, *, stop: bool) -> Tensor:
        """What this rank adds to the sums, as a vector of three."""
        own = torch.zeros(3, dtype=torch.float64, device=squared.device)
        if loss is not None and self.model.mesh.index("tp") == 0:
            own[0] = loss
        own[1], own[2] = float(stop), squared
        return own

    def sum_up(self, sums: Tensor, *, tokens: Tensor) -> Totals:
        """One all-reduce: the loss and the wish to stop over all ranks, the norm over one whole copy of the model."""
        mesh = self.model.mesh
        all_reduce(sums, mesh.group(*COPY)).wait()
        everywhere = sums[:2].clone()
        all_reduce(everywhere, mesh.group("copies")).wait()
        total, wishes = everywhere.tolist()
        return Totals(loss=total, squared_norm=float(sums[2]), tokens=int(tokens), stop=wishes > 0)

    def run(self, step: int, batches: Sequence[Batch], *, stop: bool = False) -> StepResult:
        """One whole step (``step`` from 1) on this rank's micro-batches."""
        totals = self.gradients(step, batches, stop=stop)
        norm = totals.norm
        finite = math.isfinite(norm) and math.isfinite(totals.loss)
        if finite:
            self.observer.begin("OPT")
            limit = self.training.clip_norm
            self.update(step, limit / norm if limit and norm > limit else 1.0)
            self.updates += 1
            self.observer.end()
        return self.result(step, totals, updated=finite)

    def update(self, step: int, factor: float = 1.0) -> None:
        """Update the masters with ``factor`` times their gradients, and bring them into the parameters."""
        if factor != 1.0:
            scale_gradients(self._masters, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.training, step)
        self.optimizer.step()
        self.model.publish()

    def result(self, step: int, totals: Totals, *, updated: bool) -> StepResult:
        """What the sums say of a step."""
        return StepResult(
            step=step,
            loss=totals.loss / max(1, totals.tokens),
            grad_norm=totals.norm,
            tokens=totals.tokens,
            updated=updated,
            stop=totals.stop,
        )

    def evaluate(self, runtime: Runtime, batches: Sequence[Batch]) -> tuple[float, int]:
        """Summed loss and tokens of a global batch; ``runtime`` plays a forward-only schedule."""
        mesh = self.model.mesh
        batches = self.model.share(batches)
        tokens, pending = count_tokens(batches, mesh)

        def context(batch: Batch) -> Any:
            return self.model.context(batch, seed=self._seed, step=0, training=False)

        loss = runtime.step(batches, context, None)
        pending.wait()
        nothing = torch.zeros((), dtype=torch.float64, device=tokens.device)
        totals = self.sum_up(self.own(loss, nothing, stop=False), tokens=tokens)
        return totals.loss, totals.tokens


def count_tokens(batches: Sequence[Batch], mesh: Mesh) -> tuple[Tensor, Any]:
    """Valid tokens of the global batch, int64 scalar, once the second value has been waited for."""
    counts = [(batch.labels != IGNORE).sum() for batch in batches]
    total = torch.stack(counts).sum()
    return total, all_reduce(total, mesh.group(*DATA))
