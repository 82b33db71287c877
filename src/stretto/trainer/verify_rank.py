"""What a rank does in a verification: a few real steps of the runtime, and a record of what they gave.

Everything is recorded as *patches*: an array and where it lies in the global one.  All copies are recorded, not
only those that a checkpoint would write, so that a copy that goes its own way is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stretto.parallel.mesh import Mesh
from stretto.parallel.pipeline.segment import Segment, tensors_of
from stretto.spec.contract import Batch, Piece
from stretto.spec.run import RunSpec
from stretto.trainer.session import Session
from stretto.trainer.structure import make_stack
from stretto.trainer.verify_documents import PlacedOutputs
from stretto.trainer.verify_inputs import lively, micro_batches
from stretto.trainer.verify_modules import Heard, ModuleWatch
from stretto.trainer.verify_sequence import place_in_clip, runs_of, with_whole_losses

Around = Callable[[], AbstractContextManager[Any]]
"""Entered on each rank around all that it does there; importable, since it travels to the rank."""


@dataclass(frozen=True, slots=True)
class Patch:
    """A rectangle of a global array."""

    name: str
    """Parameter, or part of the model."""
    offset: tuple[int, ...]
    """Where the rectangle starts, per dim."""
    values: np.ndarray
    """float64, shaped like the rectangle."""


@dataclass(slots=True, kw_only=True)
class RankStep:
    """What one step gave on one rank."""

    loss: float = float("nan")
    grad_norm: float = float("nan")
    tokens: int = 0
    outputs: list[Patch] = field(default_factory=list)
    """Outputs [B, T/tp, D] of its parts for each micro-batch; of ``outputs`` the loss of [B] rows, summed."""
    gradients: list[Patch] = field(default_factory=list)
    """Before clipping, after all reductions."""
    weights: list[Patch] = field(default_factory=list)
    """Masters after the step."""
    modules: list[Heard] = field(default_factory=list)
    """What the modules inside the watched part were given and gave, in the last step."""


class Recorder:
    """An Observer that copies the gradients where they are complete and not yet clipped."""

    step = 0

    def __init__(self) -> None:
        self.session: Session | None = None
        self.gradients: list[Patch] = []
        self._operation = ""

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        """Remember what is under way."""
        self._operation = operation

    def end(self) -> None:
        """Copy after the reduction."""
        if self._operation == "REDUCE_GRAD" and self.session is not None:
            masters = [m for m in self.session.model.masters if m.tensor.grad is not None]
            self.gradients = patches(p for m in masters for p in m.pieces("gradient", gradient_of(m.tensor)))
        self._operation = ""


def gradient_of(tensor: Tensor) -> Tensor:
    """The gradient of a tensor that has one."""
    assert tensor.grad is not None
    return tensor.grad


def patches(pieces: Iterable[Piece]) -> list[Patch]:
    """Copies of pieces without the kind in their names; cloned first, since ``numpy()`` pins a unit's storage."""
    return [Patch(p.name.split(".", 1)[1], p.offset, p.tensor.detach().clone().numpy()) for p in pieces]


class Outputs:
    """Records what each segment of a rank gives in the forward pass of one step."""

    def __init__(self, segments: Sequence[Segment], mesh: Mesh, *, rows: int) -> None:
        self._mesh, self._rows = mesh, rows
        self._found: dict[tuple[str, int], list[Patch]] = {}
        self.first_sample = 0
        self.modules: ModuleWatch | None = None
        for segment in segments:
            segment.run = self._watched(segment.name, segment.run)

    def _watched(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Any, context: Any, batch: Batch) -> Any:
            sample = int(batch.samples[0])
            row = (sample - self.first_sample) % self._rows  # a frozen front runs for rows of the next step
            if self.modules is not None:
                self.modules.row = row
            y = run(x, context, batch)
            if name == "outputs" and tensors_of(y)[0].ndim:
                return y  # the head is elsewhere, and gives the loss (``losses_of``)
            # A segment that is recomputed runs again in the backward pass; the first time counts.
            if (name, sample) not in self._found:
                self._found[name, sample] = self._patches(name, row, tensors_of(y)[0].detach(), batch)
            return y

        return call

    def _patches(self, name: str, row: int, y: Tensor, batch: Batch) -> list[Patch]:
        if y.ndim == 0:
            return [Patch(name, (row, len(batch.samples)), y.numpy().copy())]
        if batch.clips is not None:
            return [Patch(name, (row, *place_in_clip(name, batch.clips)), y.numpy().copy())]
        start = batch.tokens.shape[1] // self._mesh.size("tp") * self._mesh.index("tp")
        rest = (0,) * (y.ndim - 2)
        return [
            Patch(name, (row, at, *rest), y[:, part].numpy().copy()) for at, part in runs_of(batch, start, y.shape[1])
        ]

    def take(self) -> list[Patch]:
        """What was recorded of this step since the last time; what was of the next stays."""
        over, found = self.first_sample + self._rows, self._found
        self._found = {key: patches for key, patches in found.items() if key[1] >= over}
        return [patch for (_, sample), patches in found.items() if sample < over for patch in patches]


def train_on_rank(
    rank: int, world: int, run: RunSpec, steps: int, around: Around | None = None, inside: str | None = None
) -> list[RankStep]:
    """Train ``run`` for some steps as one of ``world`` ranks; torch.distributed is up.

    ``inside``: the part of the model whose modules are watched in the last step.
    """
    assert world == run.plan.num_ranks
    torch.manual_seed(run.run.seed)
    with around() if around is not None else nullcontext():
        recorder = Recorder()
        stack = lively(make_stack(run), run)
        session = Session.start(run, rank, device=torch.device("cpu"), observer=recorder, stack=stack)
        recorder.session = session
        stages = session.model.stages.values()
        segments = [segment for stage in stages for segment in stage.segments]
        outputs = outputs_of(segments, session)
        found = []
        for step in range(1, steps + 1):
            if step == steps and inside is not None and isinstance(outputs, Outputs):
                outputs.modules = ModuleWatch(stack, inside)
            # The step whose modules are watched computes a frozen front itself, not the one before it.
            ahead = step + (inside is not None) < steps
            found.append(record_step(session, step, outputs, recorder, ahead=ahead))
    return found


def outputs_of(segments: Sequence[Segment], session: Session) -> Outputs | PlacedOutputs:
    """What records the outputs of the segments."""
    rows = session.run.training.global_batch_size
    if session.model.documents is not None:
        return PlacedOutputs(segments, session.mesh, rows=rows, make=Patch)
    return Outputs(segments, session.mesh, rows=rows)


def record_step(
    session: Session, step: int, outputs: Outputs | PlacedOutputs, recorder: Recorder, *, ahead: bool
) -> RankStep:
    """Run one step and collect what was recorded; ``ahead``: part of the next one may be computed in it."""
    run = session.run
    outputs.first_sample = (step - 1) * run.training.global_batch_size
    recorder.gradients = []
    batches = micro_batches(run, step, session.mesh.dp_index)
    fills = session.filling is not None and ahead
    following = micro_batches(run, step + 1, session.mesh.dp_index) if fills else []
    result = session.train_step(step, batches, ahead=following)
    return RankStep(
        loss=result.loss,
        grad_norm=result.grad_norm,
        tokens=result.tokens,
        outputs=outputs_found(session, batches, outputs),
        gradients=recorder.gradients,
        weights=patches(p for m in session.model.masters for p in m.pieces("model", m.tensor)),
        modules=outputs.modules.take() if outputs.modules is not None else [],
    )


def outputs_found(session: Session, batches: Sequence[Batch], outputs: Outputs | PlacedOutputs) -> list[Patch]:
    """What was recorded of the step's parts, and the losses."""
    found = outputs.take()
    if isinstance(outputs, PlacedOutputs):
        return found
    return with_whole_losses([*found, *losses_of(session, batches, outputs.first_sample)], session.mesh)


def losses_of(session: Session, batches: Sequence[Batch], first_sample: int) -> Iterator[Patch]:
    """The losses of the micro-batches where no segment gives them, since the vocabulary is split over the ranks."""
    passes = session.runtime.vocabulary
    for microbatch, loss in (passes.losses if passes is not None else {}).items():
        samples = batches[microbatch].samples
        yield Patch("outputs", (int(samples[0]) - first_sample, len(samples)), loss.numpy().copy())
