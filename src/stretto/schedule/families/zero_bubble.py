"""ZB-H1 and ZB-H2: W fills the bubbles (Qi et al. 2023, Zero Bubble Pipeline Parallelism, figures 2 and 3).

The backward is split: I is what the rank before waits for, W can wait.  ZB-H1 is 1F1B whose rank r runs
its W r micro-batches late, 4 ranks, 6 micro-batches:

    rank 0 │F0-F1-F2-F3-         I0-W0-F4-I1-W1-F5-I2-W2-I3-W3-I4-W4-I5-W5-
    rank 1 │   F0-F1-F2-      I0-F3-I1-W0-F4-I2-W1-F5-I3-W2-I4-W3-I5-W4-W5-
    rank 2 │      F0-F1-   I0-F2-I1-F3-I2-W0-F4-I3-W1-F5-I4-W2-I5-W3-W4-W5-
    rank 3 │         F0-I0-F1-I1-F2-I2-F3-I3-W0-F4-I4-W1-F5-I5-W2-W3-W4-W5-
    time   │0                                                            21

The bubble is a third of 1F1B's where F = I = W, and every rank keeps at most R micro-batches alive, as many as
rank 0 of 1F1B.  ZB-H2 fills the way down with further forwards and runs W 2r micro-batches late, up to
2R - 1 alive:

    rank 0 │F0-F1-F2-F3-F4-F5-F6-I0-W0-F7-I1-W1-I2-W2-I3-W3-I4-W4-I5-W5-I6-W6-I7-W7-
    rank 1 │   F0-F1-F2-F3-F4-I0-F5-I1-F6-I2-W0-F7-I3-W1-I4-W2-I5-W3-I6-W4-I7-W5-W6-W7-
    rank 2 │      F0-F1-F2-I0-F3-I1-F4-I2-F5-I3-F6-I4-W0-F7-I5-W1-I6-W2-I7-W3-W4-W5-W6-W7-
    rank 3 │         F0-I0-F1-I1-F2-I2-F3-I3-F4-I4-F5-I5-F6-I6-W0-F7-I7-W1-W2-W3-W4-W5-W6-W7-
    time   │0                                                                              27

Each rank is busy without a gap from its first operation to its last (the ranks only start one after the
other), where F = I = W, latency is 0 and there are at least 2R - 1 micro-batches.
"""

from __future__ import annotations

from stretto.schedule import placement
from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule


def zb_h1(*, ranks: int, microbatches: int) -> Schedule:
    """One stage per rank; rank r runs R - r - 1 forwards ahead, and W r micro-batches late."""
    return _handcrafted("zb-h1", ranks, microbatches, depth=1)


def zb_h2(*, ranks: int, microbatches: int) -> Schedule:
    """One stage per rank; rank r runs 2 (R - r - 1) forwards ahead, and W 2r micro-batches late."""
    return _handcrafted("zb-h2", ranks, microbatches, depth=2)


def _handcrafted(name: str, ranks: int, microbatches: int, *, depth: int) -> Schedule:
    """``depth`` is the number of times that the forwards of the warm-up go down the ranks."""
    orders = [
        _order(rank, microbatches=microbatches, ahead=depth * (ranks - rank - 1), late=depth * rank)
        for rank in range(ranks)
    ]
    return Schedule.from_orders(
        orders,
        name=name,
        num_stages=ranks,
        num_microbatches=microbatches,
        placement=[placement.loop(ranks, ranks)],
    )


def _order(rank: int, *, microbatches: int, ahead: int, late: int) -> list[Op]:
    """F of micro-batch t, I of t - ahead and W of t - ahead - late, for each turn t."""
    return [
        Op(kind, stage=rank, microbatch=turn - behind)
        for turn in range(microbatches + ahead + late)
        for kind, behind in ((Kind.F, 0), (Kind.I, ahead), (Kind.W, ahead + late))
        if 0 <= turn - behind < microbatches
    ]
