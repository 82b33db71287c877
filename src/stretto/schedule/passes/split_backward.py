"""Split the backward in the gradient of the inputs and that of the weights.

    1B0 1SEND_B0 1F1   ──►   1I0 1SEND_B0 1W0 1F1

I is what the rank before waits for; W can wait (Qi et al. 2023, zero bubble).  This pass puts W right
behind I, which gains the time of W on the way back; families that move W further gain more.
"""

from __future__ import annotations

from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.schedule import Schedule


def split_backward(schedule: Schedule) -> Schedule:
    """Every B becomes I and W in its place, all else stays; no rank waits for more than it did."""
    bare = without_messages(schedule)
    split = bare.with_orders([_split(bare.ops(rank)) for rank in range(bare.num_ranks)])
    return lower(split) if schedule.lowered else split


def _split(order: list[Op]) -> list[Op]:
    """One rank's order with I and W for each B."""
    result: list[Op] = []
    for op in order:
        kinds = (Kind.I, Kind.W) if op.kind is Kind.B else (op.kind,)
        result.extend(Op(kind, stage=op.stage, microbatch=op.microbatch, peer=op.peer) for kind in kinds)
    return result
