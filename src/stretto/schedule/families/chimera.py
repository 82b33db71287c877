"""Chimera: two replicas in opposite directions (Li & Hoefler 2021, figure 3).

4 ranks, 4 micro-batches:

    rank 0 │0F0-0F2-    3F1-3B1-----3F3-3B3-----    0B0-----        0B2-----
    rank 1 │    1F0-2F1-1F2-2F3-    2B1-----1B0-----2B3-----1B2-----
    rank 2 │    1F1-2F0-1F3-2F2-    2B0-----1B1-----2B2-----1B3-----
    rank 3 │0F1-0F3-    3F0-3B0-----3F2-3B2-----    0B1-----        0B3-----
    time   │0                                                             16

Rank r holds stage r of the replica that runs down the ranks and stage R - 1 - r of the one that runs up; even
micro-batches run down, odd ones up.  Each fills the slots that the other leaves free: a micro-batch enters every
second slot (one F and one B), so that with an even number of ranks the two directions never meet in a slot.
Where B takes twice as long as F, the bubble is 2 (R - 2) times the F of a rank's share; that of 1F1B is 3 (R - 1).

The paper makes units of R micro-batches and appends them to each other, with bubbles between the units where B
takes longer than F, or doubles forwards to avoid them at twice the memory.  Counted in slots, the units follow
each other without a gap, whatever their number, and no rank keeps more than R micro-batches alive.

Eager gradient synchronisation: the gradients of a stage are reduced over its replicas right after its last B on
the ranks that idle then; in the middle, where nothing is idle, at the end.

The price: a rank holds two copies of its share of the weights.
"""

from __future__ import annotations

from stretto.schedule.families.option import flag
from stretto.schedule.families.wave import in_waves
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError


def chimera(*, ranks: int, microbatches: int, eager_sync: bool | str = True) -> Schedule:
    """Two replicas of R stages; an even number of ranks, any number of micro-batches."""
    check_even("chimera", ranks)
    down = tuple(range(ranks))
    return in_waves(
        [(microbatches + 1) // 2],
        name="chimera",
        placement=[down, down[::-1]],
        microbatches=microbatches,
        eager_sync=flag("eager_sync", eager_sync),
    )


def check_even(name: str, ranks: int) -> None:
    """Raise ScheduleError for an odd number of ranks."""
    if ranks % 2:
        can = f"{ranks - 1} or {ranks + 1}" if ranks > 1 else "2"
        raise ScheduleError(
            f"Schedule {name} can't have {ranks} ranks: its two replicas run in opposite directions, and with an odd "
            f"number both would have their middle stage on one rank; take {can} ranks, or "
            "hanayo, which has one replica."
        )
