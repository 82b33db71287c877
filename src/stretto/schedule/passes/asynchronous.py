"""Asynchronous pipelining: every backward is followed at once by an update of its stage (PipeDream, 2019; PB, 2020).

    rank 0 │ 0F0 0F1 0F2     0B0 OPT 0F3 0B1 OPT 0F4 ...      micro-batch 3 is the first that sees an update
    rank 1 │     1F0 1F1 1B0 OPT 1F2 1B1 OPT 1F3 ...
    rank 2 │         2F0 2B0 OPT 2F1 2B1 OPT ...              no delay: its weights are never old

The order is that of 1F1B, whose steady state needs no flush; what changes is what is computed: between F and B of a
micro-batch the stage's weights change ``delays`` times, so that its gradient is that of weights so many updates old.
The verifier can say that such a schedule is complete, ordered and free of deadlock; it can't say that it trains like
one rank, because it doesn't.
"""

from __future__ import annotations

from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError


def asynchronous(schedule: Schedule) -> Schedule:
    """An OPT behind every B; all else stays.

    Raises ScheduleError where a rank holds several stages, or backwards are split: then an update isn't one stage's.
    """
    if schedule.num_stages != schedule.num_ranks or len(schedule.placement) > 1 or (schedule.kind == Kind.I).any():
        raise ScheduleError(
            f"{schedule.name} can't be made asynchronous: a rank updates after each B, so it must hold one stage and "
            "run whole backwards; take 1f1b."
        )
    orders = [
        [step for op in schedule.ops(rank) for step in ([op, Op(Kind.OPT)] if op.kind is Kind.B else [op])]
        for rank in range(schedule.num_ranks)
    ]
    return schedule.with_orders(orders)


def delays(schedule: Schedule, rank: int) -> list[int]:
    """For each micro-batch, how many updates happen on a rank between its F and its B.

    >>> from stretto.schedule.families import build
    >>> delays(asynchronous(build("1f1b", ranks=4, microbatches=6)), 1)
    [0, 1, 2, 2, 2, 2]
    """
    found, forward, updates = [0] * schedule.num_microbatches, {}, 0
    for kind, _, microbatch, _ in schedule.rows(rank):
        if kind == Kind.F:
            forward[microbatch] = updates
        elif kind == Kind.B:
            found[microbatch] = updates - forward[microbatch]
        updates += kind == Kind.OPT
    return found
