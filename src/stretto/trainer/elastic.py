"""A runtime for steps that have as many micro-batches as their documents need.

Where documents are placed anew for every step, so is the number of micro-batches; it is equal on all ranks.  A schedule
and what plays it are made once for each number and used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.selective import SelectiveStage
from stretto.parallel.pipeline.stage import Stage
from stretto.resilience.recorder import Recorder
from stretto.schedule.schedule import Schedule
from stretto.spec.contract import Batch
from stretto.spec.run import RunSpec
from stretto.trainer.recording import held_of
from stretto.trainer.schedules import schedules_of


class Elastic(Runtime):
    """Plays a step of any number of micro-batches.

    Args:
        stages: see Runtime.
        schedule: the one of the usual number.
        seat: see Runtime.
        run: what schedules of other numbers are made for.
    """

    def __init__(self, stages: Mapping[int, Stage], schedule: Schedule, seat: Seat, *, run: RunSpec) -> None:
        super().__init__(stages, schedule, seat)
        self._recorder = seat.observer if isinstance(seat.observer, Recorder) else None
        self._usual, self._run, self._forward_only = schedule.num_microbatches, run, schedule.forward_only
        self._make: Callable[[Schedule], Runtime] = lambda other: Runtime(stages, other, seat)
        self._others: dict[int, Runtime] = {}
        selective = (stage for stage in stages.values() if isinstance(stage, SelectiveStage))
        self.offloader = next((stage.offloader for stage in selective), None)

    def step(
        self,
        batches: Sequence[Batch],
        context_of: Callable[[Batch], Any],
        scale: Callable[[], Tensor] | None,
        *,
        confirm: Callable[[], bool] | None = None,
    ) -> Tensor | None:
        """See Runtime."""
        number = len(batches)
        if self._recorder is not None and self._recorder.noting:
            self._recorder.placed += held_of(batches)
        if number == self._usual:
            return super().step(batches, context_of, scale, confirm=confirm)
        if number not in self._others:
            schedules = schedules_of(with_micro_batches(self._run, number))
            self._others[number] = self._make(schedules[self._forward_only])
        return self._others[number].step(batches, context_of, scale, confirm=confirm)


def with_micro_batches(run: RunSpec, number: int) -> RunSpec:
    """The run, with a global batch of so many micro-batches a rank."""
    size = number * run.plan.dp * run.plan.micro_batch_size
    return replace(run, training=replace(run.training, global_batch_size=size))
