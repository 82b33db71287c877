"""Freeze: the first stages don't train, so nothing is differentiated there.

    rank 0 │0F0 0F1 0B0 0B1                rank 0 │0F0 0F1
    rank 1 │    1F0 1B0 1F1 1B1    ──►     rank 1 │    1F0 1B0 1F1 1B1

**Arrows**: none that there was not; those of what is left out are gone.
**Memory**: F of a frozen stage gives back at its end what it took at its start.
**Complete**: a frozen stage has F alone, and no gradient is sent to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.chosen import Stages, chosen_stages, together
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

LEFT_OUT = frozenset({Kind.B, Kind.I, Kind.W, Kind.R, Kind.O, Kind.L, Kind.REDUCE_GRAD})
"""What a frozen stage has none of."""


def freeze(schedule: Schedule, *, stages: Stages = 0) -> Schedule:
    """The chosen stages lose all that is for their gradients, all else stays in its order.

    Raises ScheduleError for stages that aren't there or are frozen already, and where a gradient would have to
    pass one: only the first stages of each micro-batch's path may be frozen.
    """
    chosen = chosen_stages(schedule, stages)
    frozen = schedule.frozen | chosen
    _check_first(schedule, frozen)
    bare = without_messages(schedule)
    orders = [_frozen(bare.ops(rank), chosen) for rank in range(bare.num_ranks)]
    result = replace(bare.with_orders(orders), frozen=frozen)
    return lower(result) if schedule.lowered else result


def _check_first(schedule: Schedule, frozen: Iterable[int]) -> None:
    """Raise ScheduleError where a micro-batch visits a frozen stage after one that trains."""
    frozen = frozenset(frozen)
    for microbatch in range(schedule.num_microbatches):
        trained = None
        for stage in schedule.path(microbatch):
            if stage not in frozen:
                trained = stage
            elif trained is not None:
                raise ScheduleError(
                    f"Stage {stage} can't be frozen, since micro-batch {microbatch} visits it after stage {trained}, "
                    "whose gradient comes through it; freeze the first stages alone."
                )
        if trained is None:
            raise ScheduleError(
                f"Micro-batch {microbatch} visits frozen stages alone, so it trains nothing; freeze fewer stages."
            )


def _frozen(order: list[Op], stages: frozenset[int]) -> list[Op]:
    """One rank's order; what was joined to an operation that is gone stands alone."""
    result: list[Op] = []
    for group in together(order):
        kept = [op for op in group if op.stage not in stages or op.kind not in LEFT_OUT]
        result += [replace(op, joined=at + 1 < len(kept)) for at, op in enumerate(kept)]
    return result
