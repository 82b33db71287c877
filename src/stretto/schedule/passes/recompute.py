"""Recompute: keep nothing but the input of a stage and run its forward again before its backward (Chen et al. 2016).

    0F0 0F1 0F2 0B0       ──►      0F0 0F1 0F2 0R0 0B0

**Arrows**: sRm needs sFm; sBm or sIm needs sRm.
**Memory**: where a stage has R for a micro-batch, its F gives back at its end what it took at its start, and R takes it
again at its start.
**Complete**: R at most once for each F, on the rank of the stage; a stage without backward has none.
"""

from __future__ import annotations

from itertools import pairwise

from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.chosen import Stages, chosen_stages, together
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError


def recompute(schedule: Schedule, *, stages: Stages | None = None) -> Schedule:
    """An R comes right before each B or I of the chosen stages, all else stays; no rank keeps more than it did.

    ``stages`` left out are all that gain by it: those with a backward that doesn't always follow its forward at once.
    R needs no gradient, so a rank runs it while it waits for one.
    Raises ScheduleError for stages that aren't there and for a schedule that recomputes or offloads already.
    """
    for kind in (Kind.R, Kind.O):
        if (schedule.kind == kind).any():
            raise ScheduleError(f"{schedule.name} has {kind.name} already; recompute comes once, and before offload.")
    bare = without_messages(schedule)
    orders = [bare.ops(rank) for rank in range(bare.num_ranks)]
    chosen = chosen_stages(bare, stages)
    if stages is None:
        chosen &= frozenset().union(*map(_waiting, orders))
    result = bare.with_orders([_recompute(order, chosen) for order in orders])
    return lower(result) if schedule.lowered else result


def _waiting(order: list[Op]) -> frozenset[int]:
    """Stages of a rank with a backward that doesn't follow its forward at once."""
    before = {(op.stage, op.microbatch): last for last, op in pairwise(order) if _starts(op)}
    return frozenset(key[0] for key, last in before.items() if (last.stage, last.microbatch) != key)


def _starts(op: Op) -> bool:
    """Whether an operation starts a backward."""
    return op.kind in (Kind.B, Kind.I)


def _recompute(order: list[Op], chosen: frozenset[int]) -> list[Op]:
    """One rank's order with R."""
    result: list[Op] = []
    for group in together(order):
        result += [
            Op(Kind.R, stage=op.stage, microbatch=op.microbatch) for op in group if _starts(op) and op.stage in chosen
        ]
        result += group
    return result
