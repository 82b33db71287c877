"""Optimizer steps without a barrier: update first, validate later, roll back where that was wrong.

The norm that clips a gradient and the check that it is finite need all ranks, so that the update at the end of a
step makes every rank wait for the slowest: the parallelogram of a zero-bubble schedule becomes a rectangle again.
But clipping and non-finite gradients are rare, and whoever knows a part of the sum of squares knows a lower bound of
the whole.  (Qi et al. 2023, section 4, "Bypassing optimizer synchronizations".)

    rank 0 │ ... W W ┊ own ► update ┊ F F F (warm-up of the next step) ┊ whole? ┊ I W F I W ...
    rank 1 │   ... W W ┊ + own ► update ┊ F F F                        ┊ whole? ┊ I W ...
    rank 2 │     ... W W ┊ + own = whole ► update ┊ F F                ┊        ┊ I W ...

    at the end of a step   the partial sum comes from the rank before; if it is finite and below the limit, the
                           state is copied (rollback.py) and updated as if nothing had to be clipped
    in the next warm-up    the whole sum comes from the last rank: nearly always it confirms the update.  Else
                           every rank takes its update back, does it again with the right factor (or not at all,
                           where it isn't finite), and begins the step again

So the weights are those of a run with a barrier: bit for bit where nothing is clipped, and up to the order in which the
squares of the norm are added where something is.  While gradients are being clipped, speculation would lose: only
after PATIENCE steps without it are updates made early, as in the authors' code.

A step's figures are known when the whole sum is, that is in the next step, or when ``settle`` is called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from stretto.parallel.collectives import Pending, all_reduce
from stretto.parallel.mesh import SHARDS
from stretto.parallel.pipeline.relay import Relay
from stretto.spec.contract import Batch
from stretto.trainer.rollback import Rollback, changed_by
from stretto.trainer.step import StepResult, Totals, TrainStep

PATIENCE = 10
"""Steps without clipping after which updates are made before they are validated."""


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A step that is over but not validated."""

    step: int
    tokens: int
    whole: Tensor
    """Loss, wishes to stop, squared norm over all ranks, once ``arriving`` has been waited for."""
    arriving: Pending
    rollback: Rollback | None
    """What takes the update back; None where it wasn't made."""


class PostValidation:
    """Runs steps of one rank of a pipeline without a barrier between them.

    Args:
        step: what plays a step and updates.
        relay: sums along the pipeline.
        patience: steps without clipping after which updates are made early.
    """

    def __init__(self, step: TrainStep, relay: Relay, *, patience: int = PATIENCE) -> None:
        self._step, self._relay = step, relay
        self.patience = patience
        self._calm = 0 if step.training.clip_norm else patience
        self._pending: _Pending | None = None
        self._found: StepResult | None = None
        self.rollbacks = 0
        """Updates that were taken back so far."""

    @property
    def num_bytes(self) -> int:
        """Memory of the copies that live from an update until it is validated."""
        return sum(t.numel() * t.element_size() for t in changed_by(self._step.optimizer))

    def advance(self, step: int, batches: Sequence[Batch], *, stop: bool = False) -> list[StepResult]:
        """Run one step (from 1); returns the steps whose figures are known by now and were not before, in order."""
        confirm = None if self._pending is None else self._confirm_in_warm_up
        found = self._step.play(step, batches, confirm=confirm)
        results = self._take()
        self._pending = self._begin(step, found, stop=stop)
        if self._pending.rollback is None and self._calm < self.patience:
            results += self.settle()
        return results

    def settle(self) -> list[StepResult]:
        """Wait for the step that isn't validated yet, and make its update right; its result, if there is one."""
        if self._pending is not None:
            self._confirm()
        return self._take()

    def _take(self) -> list[StepResult]:
        found, self._found = self._found, None
        return [] if found is None else [found]

    def _begin(self, step: int, found: tuple[Tensor | None, Tensor], *, stop: bool) -> _Pending:
        """Pass the partial sums on; update where they allow it."""
        loss, tokens = found
        observer, mesh = self._step.observer, self._step.model.mesh
        observer.begin("REDUCE_GRAD")
        own = self._step.held(loss, stop=stop, tokens=tokens)
        for axes in (SHARDS, ("tp",)):
            all_reduce(own, mesh.group(*axes)).wait()
        everywhere = own[:2].clone()
        all_reduce(everywhere, mesh.group("copies")).wait()
        own[:2] = everywhere
        observer.end()
        observer.begin("NORM", peer=self._relay.previous)
        partial, whole, arriving = self._relay.add(own)
        observer.end()
        rollback = None
        if self._calm >= self.patience and self._factor(partial) == 1.0:
            observer.begin("OPT")
            rollback = Rollback(self._step.optimizer)
            self._step.update(step)
            observer.end()
        return _Pending(step=step, tokens=int(tokens), whole=whole, arriving=arriving, rollback=rollback)

    def _factor(self, sums: Tensor) -> float | None:
        """What the gradient is multiplied by, as far as ``sums`` tells; None: it isn't finite."""
        loss, _, squared = sums.tolist()
        if not (math.isfinite(squared) and math.isfinite(loss)):
            return None
        norm = math.sqrt(squared)
        limit = self._step.training.clip_norm
        return limit / norm if limit and norm > limit else 1.0

    def _confirm_in_warm_up(self) -> bool:
        right = self._confirm()
        if not right:
            self._step.observer.step = self._step.observer.step  # what a recorder noted of the step begins again too
        return right

    def _confirm(self) -> bool:
        """Whether the pending update was right; afterwards it is."""
        pending, observer = self._pending, self._step.observer
        assert pending is not None
        self._pending = None
        observer.begin("VALIDATE", peer=self._relay.teller)
        pending.arriving.wait()
        observer.end()
        factor = self._factor(pending.whole)
        right = factor == 1.0 and pending.rollback is not None
        if not right:
            self._redo(pending, factor)
        self._calm = self._calm + 1 if factor == 1.0 else 0
        if factor is not None:
            self._step.updates += 1
        self._found = self._result(pending, updated=factor is not None)
        return right

    def _redo(self, pending: _Pending, factor: float | None) -> None:
        """Take the update back, if it was made, and make it with the right factor, if at all."""
        observer, model = self._step.observer, self._step.model
        observer.begin("OPT")
        if pending.rollback is not None:
            self.rollbacks += 1
            for unit in model.units:
                unit.ready()
            pending.rollback.undo()
        if factor is not None:
            self._step.update(pending.step, factor)
        elif pending.rollback is not None:
            model.publish()
        observer.end()

    def _result(self, pending: _Pending, *, updated: bool) -> StepResult:
        total, wishes, squared = pending.whole.tolist()
        totals = Totals(loss=total, squared_norm=squared, tokens=pending.tokens, stop=wishes > 0)
        return self._step.result(pending.step, totals, updated=updated)
