"""What a pass is told to work on: stages, written as a person would, and operations that belong together.

2          stage 2
0-3        stages 0, 1, 2 and 3
0-1+6      stages 0, 1 and 6, for a command line, where a comma has another meaning
[0, 1, 6]  the same
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stretto.schedule.op import Op
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

Stages = int | str | Sequence[int]
"""A choice of stages, as above."""


def chosen_stages(schedule: Schedule, stages: Stages | None) -> frozenset[int]:
    """Stages of a schedule that were chosen; None chooses all that have a backward.

    Raises ScheduleError for stages that aren't there or have no backward.
    """
    if stages is None:
        return frozenset(filter(schedule.has_backward, range(schedule.num_stages)))
    found = frozenset(_read(stages, schedule.num_stages))
    for stage in sorted(found):
        if not 0 <= stage < schedule.num_stages:
            raise ScheduleError(f"There is no stage {stage} to choose; stages are 0 to {schedule.num_stages - 1}.")
        if not schedule.has_backward(stage):
            raise ScheduleError(f"Stage {stage} has no backward, so it keeps no activations; choose another.")
    return found


def _read(stages: Stages, count: int) -> Iterator[int]:
    """The numbers of a choice; of a range that goes beyond ``count`` stages no more than the first too many."""
    wrong = ScheduleError(f"stages={stages!r} is no choice of stages; write 2, 0-3 or 0-1+6.")
    if isinstance(stages, str):
        for part in stages.split("+"):
            first, dash, last = (piece.strip() for piece in part.partition("-"))
            if not first.isdecimal() or not (last or first).isdecimal() or bool(dash) != bool(last):
                raise wrong
            if int(last or first) < int(first):
                raise wrong
            yield from range(int(first), min(int(last or first), max(int(first), count)) + 1)
    else:
        for stage in stages if isinstance(stages, Sequence) else [stages]:
            if type(stage) is not int:
                raise wrong
            yield stage


def together(order: Sequence[Op]) -> Iterator[list[Op]]:
    """A rank's operations, those that overlap (``2F7+5B3``) in one list: nothing may come between them."""
    group: list[Op] = []
    for op in order:
        group.append(op)
        if not op.joined:
            yield group
            group = []
