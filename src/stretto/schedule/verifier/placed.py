"""Placed: every operation is one that the flow asks for, stands once, and on the rank that holds its stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.arrows import REPEATABLE, Places
from stretto.schedule.op import Kind
from stretto.schedule.verifier.fault import fault

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

OF_BACKWARD = (Kind.B, Kind.I, Kind.W, Kind.R, Kind.O, Kind.L, Kind.SEND_B, Kind.RECV_B)
"""Kinds that only a stage with a backward has."""


def check_placed(places: Places) -> None:
    """Raise ScheduleError for the first operation that may not stand where it does."""
    import numpy as np

    schedule, rank = places.schedule, places.rank
    kind, stage, microbatch = schedule.kind, schedule.stage, schedule.microbatch
    repeatable = np.isin(kind, list(REPEATABLE))
    shard = (kind == Kind.S) | (kind == Kind.T)
    plain = ~(repeatable | shard)
    where, held = np.where(plain, stage, 0), np.where(repeatable, stage, 0)
    flow = places.flows.of[np.where(plain, microbatch, 0)]
    faults = {
        "but it holds the vocabulary shard {rank} alone": shard & (stage != rank),
        "but doesn't hold stage {stage}": repeatable & (kind != Kind.OPT) & ~_held(places)[rank, held],
        "which has run already; each operation runs once": ~repeatable & (_first(places) != np.arange(len(kind))),
        "but micro-batch {m} doesn't visit stage {stage}": plain & (places.flows.position[flow, where] < 0),
        "but stage {stage} lies on rank {holder} for micro-batch {m}": plain
        & (places.flows.holder[flow, where] != rank),
        "but {why}": plain & np.isin(kind, OF_BACKWARD) & ~places.flows.backward[where],
    }
    broken = np.logical_or.reduce(list(faults.values()))
    if broken.any():
        row = int(broken.argmax())
        reason = next(reason for reason, rows in faults.items() if rows[row])
        holder = places.flows.holder[flow[row], where[row]]
        why = "the schedule is forward only" if schedule.forward_only else f"stage {stage[row]} is frozen"
        reason = reason.format(stage=stage[row], m=microbatch[row], rank=rank[row], holder=holder, why=why)
        raise fault(schedule, row, reason)


def _held(places: Places) -> npt.NDArray[np.bool_]:
    """Whether a rank holds a stage of any replica (R, S)."""
    import numpy as np

    schedule = places.schedule
    held = np.zeros((schedule.num_ranks, schedule.num_stages), dtype=bool)
    for replica in schedule.placement:
        held[list(replica), np.arange(schedule.num_stages)] = True
    return held


def _first(places: Places) -> npt.NDArray[np.int32]:
    """The first row that runs the same operation as each row; -1 for those that may occur several times."""
    import numpy as np

    schedule = places.schedule
    first = np.full(schedule.num_ops, -1, dtype=np.int32)
    for kind in Kind:
        if places.has(kind):
            rows = np.flatnonzero(schedule.kind == kind)
            first[rows] = places.find(kind, schedule.stage[rows], schedule.microbatch[rows])
    return first
