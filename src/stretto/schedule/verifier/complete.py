"""Complete: every micro-batch passes its stages forward, and backward where they have one."""

from __future__ import annotations

from stretto.schedule.arrows import Places
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.schedule.verifier.fault import fault, fault_at


def check_forwards(schedule: Schedule) -> None:
    """Raise ScheduleError where there are fewer F than the flow asks for.

    Where each F is one that the flow asks for and stands once (``check_placed``), that is enough.
    """
    import numpy as np

    forward = schedule.kind == Kind.F
    asked = schedule.num_stages * schedule.num_microbatches if schedule.paths is None else sum(map(len, schedule.paths))
    if np.count_nonzero(forward) >= asked:
        return
    there = set(zip(schedule.stage[forward].tolist(), schedule.microbatch[forward].tolist(), strict=True))
    stage, microbatch = next(
        (stage, m) for m in range(schedule.num_microbatches) for stage in schedule.path(m) if (stage, m) not in there
    )
    rank = schedule.rank_of(stage, schedule.voice[microbatch])
    behind = int(schedule.offsets[rank + 1] - schedule.offsets[rank])
    raise fault_at(schedule, rank, behind, f"{stage}F{microbatch} is missing from rank {rank}.")


def check_backwards(places: Places) -> None:
    """Raise ScheduleError where the backward of an F is neither B, nor I and W."""
    import numpy as np

    schedule = places.schedule
    forwards = np.flatnonzero(schedule.kind == Kind.F)
    forwards = forwards[places.flows.backward[schedule.stage[forwards]]]
    stage, microbatch = schedule.stage[forwards], schedule.microbatch[forwards]
    there = {kind: places.find(kind, stage, microbatch) >= 0 for kind in (Kind.B, Kind.I, Kind.W)}
    whole = there[Kind.B] & ~there[Kind.I] & ~there[Kind.W]
    split = ~there[Kind.B] & there[Kind.I] & there[Kind.W]
    broken = ~(whole | split)
    if broken.any():
        at = int(np.lexsort((forwards, microbatch, ~broken))[0])
        present = " and ".join(kind.name for kind, found in there.items() if found[at])
        has = f"the backward operations {present}" if present else "no backward"
        rank = int(places.rank[forwards[at]])
        sentence = (
            f"stage {stage[at]}, micro-batch {microbatch[at]} has {has} on rank {rank}; it needs either B, or I and W."
        )
        raise fault_at(schedule, rank, int(forwards[at] - schedule.offsets[rank]), sentence)


def check_offload(places: Places) -> None:
    """Raise ScheduleError where O moves away what no L brings back."""
    import numpy as np

    schedule = places.schedule
    rows = np.flatnonzero(schedule.kind == Kind.O)
    lost = places.find(Kind.L, schedule.stage[rows], schedule.microbatch[rows]) < 0
    if lost.any():
        row = int(rows[lost.argmax()])
        raise fault(
            schedule, row, f"but no rank runs {schedule.stage[row]}L{schedule.microbatch[row]}, which brings it back"
        )
