"""Whether the parts of a schedule fit each other: its shape, its flow and its columns.

This is what every Schedule is checked for when it is made; whether its order is right is for ``validate`` to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.op import PER_BLOCK, Kind, text
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.schedule import Schedule


def check_flow(schedule: Schedule) -> None:
    """Raise ScheduleError where placement, voice, paths or frozen stages don't fit the shape."""
    ranks, stages, microbatches = schedule.num_ranks, schedule.num_stages, schedule.num_microbatches
    for count, what in ((ranks, "ranks"), (stages, "stages"), (microbatches, "micro-batches")):
        if count < 1:
            raise ScheduleError(f"A schedule has at least one of its {what}; this one has {count}.")
    if not schedule.placement:
        raise ScheduleError("placement is empty; it has one list of ranks per model replica.")
    for voice, replica in enumerate(schedule.placement):
        if len(replica) != stages:
            raise ScheduleError(f"placement[{voice}] places {len(replica)} stages, but there are {stages}.")
        for stage, rank in enumerate(replica):
            if not 0 <= rank < ranks:
                raise ScheduleError(
                    f"placement[{voice}] puts stage {stage} on rank {rank}; ranks are 0 to {ranks - 1}."
                )
    if len(schedule.voice) != microbatches:
        raise ScheduleError(f"voice has {len(schedule.voice)} entries, but there are {microbatches} micro-batches.")
    for microbatch, voice in enumerate(schedule.voice):
        if not 0 <= voice < len(schedule.placement):
            raise ScheduleError(
                f"voice[{microbatch}] is {voice}; placement has the replicas 0 to {len(schedule.placement) - 1}."
            )
    if schedule.paths is not None and len(schedule.paths) != microbatches:
        raise ScheduleError(f"paths has {len(schedule.paths)} entries, but there are {microbatches} micro-batches.")
    for microbatch, path in enumerate(schedule.paths or ()):
        if not path or len(set(path)) != len(path) or not set(path) <= set(range(stages)):
            raise ScheduleError(
                f"paths[{microbatch}] is {list(path)}; a path visits one or more of the stages 0 to {stages - 1}, "
                "each at most once."
            )
    if not schedule.frozen <= set(range(stages)):
        raise ScheduleError(f"frozen names stages {sorted(schedule.frozen)}; stages are 0 to {stages - 1}.")


def check_rows(schedule: Schedule) -> None:
    """Raise ScheduleError where a column has another length or an operation names what isn't there."""
    import numpy as np

    offsets, rows = schedule.offsets, len(schedule.kind)
    if any(len(getattr(schedule, name)) != rows for name in ("stage", "microbatch", "peer")):
        raise ScheduleError("The columns kind, stage, microbatch and peer have different lengths.")
    if schedule.joined is not None and len(schedule.joined) != rows:
        raise ScheduleError(f"The column joined has {len(schedule.joined)} rows, the others have {rows}.")
    if len(offsets) != schedule.num_ranks + 1 or offsets[0] != 0 or offsets[-1] != rows or np.any(np.diff(offsets) < 0):
        raise ScheduleError(f"offsets must rise from 0 to {rows} in {schedule.num_ranks + 1} entries.")
    vocabulary = (schedule.kind == Kind.S) | (schedule.kind == Kind.T)
    per_block = (schedule.kind >= min(PER_BLOCK)) & (schedule.kind <= max(PER_BLOCK))
    alone = schedule.kind == Kind.OPT
    inside = {
        "kind": (schedule.kind >= 0) & (schedule.kind < len(Kind)),
        "stage": (schedule.stage >= 0) & ((schedule.stage < schedule.num_stages) | vocabulary) | alone,
        "micro-batch": (schedule.microbatch >= 0) & ((schedule.microbatch < schedule.num_microbatches) | per_block)
        | alone,
        "peer": schedule.peer < schedule.num_ranks,
    }
    for what, good in inside.items():
        if not good.all():
            row = int(np.argmin(good))
            rank = int(np.searchsorted(offsets, row, side="right")) - 1
            kind = int(schedule.kind[row])
            token = text(kind, int(schedule.stage[row]), int(schedule.microbatch[row])) if what != "kind" else kind
            raise ScheduleError(
                f"Rank {rank}, operation {row - int(offsets[rank])}: {token} has a {what} that isn't there; "
                f"there are {schedule.num_stages} stages, {schedule.num_microbatches} micro-batches "
                f"and {schedule.num_ranks} ranks."
            )
    _check_pairs(schedule)


def _check_pairs(schedule: Schedule) -> None:
    """Raise ScheduleError where a joined operation has none behind it on its rank, or one that is joined itself."""
    import numpy as np

    if schedule.joined is None:
        return
    rows = np.flatnonzero(schedule.joined)
    alone = np.isin(rows + 1, schedule.offsets) | np.isin(rows + 1, rows)
    if alone.any():
        row = int(rows[alone.argmax()])
        rank = int(np.searchsorted(schedule.offsets, row, side="right")) - 1
        token = text(int(schedule.kind[row]), int(schedule.stage[row]), int(schedule.microbatch[row]))
        raise ScheduleError(
            f"Rank {rank}, operation {row - int(schedule.offsets[rank])}: {token} is joined to what follows it; "
            "a pair has two operations, both on one rank."
        )
