"""Vocabulary passes: every rank runs S and T of its own shard for each micro-batch, all ranks in the same order.

rank 0 │ 0S0 0S1 0T0        rank 1 │ 1S1 1S0 1T0        refused: the all-reduces of S would not meet
"""

from __future__ import annotations

from stretto.schedule.arrows import Places
from stretto.schedule.op import Kind
from stretto.schedule.verifier.fault import fault, fault_at


def check_vocabulary(places: Places) -> None:
    """Raise ScheduleError where a shard's pass is missing, not asked for, or out of the order of rank 0."""
    import numpy as np

    schedule, flows = places.schedule, places.flows
    if not (places.has(Kind.S) or places.has(Kind.T)):
        return
    learning = flows.turn[flows.of] >= 0
    for kind, asked in ((Kind.S, np.ones(schedule.num_microbatches, dtype=bool)), (Kind.T, learning)):
        rows = np.flatnonzero(schedule.kind == kind)
        needless = rows[~asked[schedule.microbatch[rows]]]
        if len(needless):
            m = schedule.microbatch[needless[0]]
            raise fault(schedule, int(needless[0]), f"but micro-batch {m} has no backward that could use it")
        expected: list[int] | None = None
        for rank in range(schedule.num_ranks):
            own = rows[places.rank[rows] == rank]
            order = schedule.microbatch[own].tolist()
            left_out = sorted(set(np.flatnonzero(asked).tolist()) - set(order))
            if left_out:
                sentence = f"{rank}{kind.name}{left_out[0]} is missing from rank {rank}."
                raise fault_at(schedule, rank, int(np.diff(schedule.offsets)[rank]), sentence)
            expected = expected or order
            for row, m, first in zip(own.tolist(), order, expected, strict=True):
                if m != first:
                    raise fault(
                        schedule,
                        row,
                        f"where rank 0 runs 0{kind.name}{first}; their collectives meet in one order on all ranks",
                    )
