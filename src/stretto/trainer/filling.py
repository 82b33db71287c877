"""Steps whose frozen front was computed in the step before: which schedule each plays, and on what (DiffusionPipe).

    step 1    primed: the front of its own micro-batches        filled: itself, and the front of step 2
    step 2                                                      filled: itself, and the front of step 3
    last                                                        drained: itself alone

Frozen weights never change, so what is computed a step early is what would be computed in the step, bit by bit; dropout
is keyed by the step that it is for.  Where a step doesn't find what it needs (the first one, the first after a
checkpoint was read, one that nobody announced) it computes its own front first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stretto.assemble.rank_model import RankModel
from stretto.parallel.pipeline.landing import Landing
from stretto.schedule.passes.hand_over import Front, drained, primed
from stretto.schedule.schedule import Schedule
from stretto.spec.contract import Batch, Observer
from stretto.spec.run import RunSpec
from stretto.trainer.ahead import front_of
from stretto.trainer.schedules import lowered_and_valid

if TYPE_CHECKING:
    from stretto.parallel.pipeline.runtime import Runtime

PRIMING = "FRONT"
"""What an observer is told that a rank does before a step that doesn't find its front."""


def land(model: RankModel, schedule: Schedule, front: Front) -> None:
    """Give this rank a landing, where micro-batches enter the pipeline here."""
    rank, units = model.mesh.index("pp"), range(front.microbatches, schedule.num_microbatches)
    if any(schedule.rank_of(front.landing, schedule.voice[unit]) == rank for unit in units):
        model.stages[front.landing] = Landing(front.landing, front.microbatches)


def last_and_first(run: RunSpec, schedule: Schedule) -> tuple[Schedule, ...]:
    """The last step's schedule and that of a first step's frozen work, with messages; none where nothing is filled."""
    front = front_of(run)
    if front is None:
        return ()
    return lowered_and_valid(drained(schedule, front)), lowered_and_valid(primed(schedule, front))


class Filling:
    """Plays training steps in a Runtime's place.

    Args:
        model: what this rank holds.
        filled, last, first: play the three schedules.
        seed: run.seed, for dropout.
        observer: hears when a step has to compute its own front.
    """

    def __init__(
        self, model: RankModel, *, filled: Runtime, last: Runtime, first: Runtime, seed: int, observer: Observer
    ) -> None:
        self._model, self._seed, self._observer = model, seed, observer
        self._filled, self._last, self._first = filled, last, first
        self._landing = next((stage for stage in model.stages.values() if isinstance(stage, Landing)), None)
        self._ready: int | None = None
        """The step whose front has been computed."""
        self._step: int | None = None
        self._ahead: Sequence[Batch] = ()
        self.as_scheduled = False
        """Whether the last step was neither primed nor drained."""

    def expect(self, step: int, ahead: Sequence[Batch]) -> None:
        """The next call plays ``step``; ``ahead`` are the micro-batches of the one after it, none where there is none.

        The same on all ranks.
        """
        self._step, self._ahead = step, self._model.share(ahead)

    def step(
        self,
        batches: Sequence[Batch],
        context_of: Callable[[Batch], Any],
        scale: Callable[[], Tensor] | None,
        *,
        confirm: Callable[[], bool] | None = None,
    ) -> Tensor | None:
        """See Runtime."""
        assert confirm is None, "a step that may begin again would have used up its front"
        step, ahead = self._step, self._ahead
        self._step, self._ahead = None, ()
        found = step is not None and step == self._ready
        self.as_scheduled = found and bool(ahead)
        if not found:
            self._prime(batches, context_of)
        self._turn()
        if step is None or not ahead:
            self._ready = None
            return self._last.step(batches, context_of, scale)
        later, following = {id(batch) for batch in ahead}, step + 1

        def context(batch: Batch) -> Any:
            if id(batch) not in later:
                return context_of(batch)
            return self._model.context(batch, seed=self._seed, step=following, training=True)

        loss = self._filled.step([*batches, *ahead], context, scale)
        self._ready = following
        return loss

    def _prime(self, batches: Sequence[Batch], context_of: Callable[[Batch], Any]) -> None:
        """Compute the front of a step right before it; what was computed for another is let go."""
        if self._landing is not None:
            self._landing.forget()
        self._observer.begin(PRIMING)
        self._first.step(batches, context_of, None)
        self._observer.end()

    def _turn(self) -> None:
        if self._landing is not None:
            self._landing.turn()
