"""1F1B: one forward, one backward in turn (PipeDream-Flush, Narayanan et al. 2021, figure 3).

4 ranks, 6 micro-batches, backward twice as long as forward; warm-up, steady state, cool-down:

    rank 0 │F0-F1-F2-F3-                  B0----F4-B1----F5-B2----   B3----   B4----   B5----
    rank 1 │   F0-F1-F2-            B0----F3-B1----F4-B2----F5-B3----   B4----   B5----
    rank 2 │      F0-F1-      B0----F2-B1----F3-B2----F4-B3----F5-B4----   B5----
    rank 3 │         F0-B0----F1-B1----F2-B2----F3-B3----F4-B4----F5-B5----
    time   │0                                                                              27

As fast as GPipe, but rank r never keeps more than R - r micro-batches alive.
"""

from __future__ import annotations

from stretto.schedule import placement
from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule


def one_f_one_b(*, ranks: int, microbatches: int) -> Schedule:
    """One stage per rank; rank r runs R - r - 1 forwards ahead of its first backward."""
    orders = []
    for rank in range(ranks):
        forwards = [Op(Kind.F, stage=rank, microbatch=m) for m in range(microbatches)]
        backwards = [Op(Kind.B, stage=rank, microbatch=m) for m in range(microbatches)]
        orders.append(alternate(forwards, backwards, ahead=ranks - rank - 1))
    return Schedule.from_orders(
        orders,
        name="1f1b",
        num_stages=ranks,
        num_microbatches=microbatches,
        placement=[placement.loop(ranks, ranks)],
    )


def alternate(forwards: list[Op], backwards: list[Op], *, ahead: int) -> list[Op]:
    """``ahead`` forwards, then forward and backward in turn, then the backwards that are left.

    >>> F, B = ([Op(kind, stage=0, microbatch=m) for m in range(3)] for kind in (Kind.F, Kind.B))
    >>> alternate(F, B, ahead=1)
    [0F0, 0F1, 0B0, 0F2, 0B1, 0B2]
    """
    ahead = min(ahead, len(forwards))
    paired = len(forwards) - ahead
    steady = [op for pair in zip(forwards[ahead:], backwards[:paired], strict=True) for op in pair]
    return forwards[:ahead] + steady + backwards[paired:]
