"""Hanayo: waves (Liu et al. 2023).

2 ranks, 3 micro-batches:

    rank 0 │0F0-0F1-    3F0-3B0-----0F2-3F1-3B1-----    0B0-----3F2-3B2-----0B1-----        0B2-----
    rank 1 │    1F0-2F0-1F1-2F1-    2B0-----1F2-1B0-----2F2-2B1-----1B1-----2B2-----1B2-----
    time   │0                                                                                     11

Stages lie in a zigzag: w waves go down the ranks and up again, 2w chunks per rank.  A micro-batch turns on the
rank where it is, so no message goes around, and each turn fills a rank earlier than a loop would.

The order comes from a count of slots, each as long as one F and one B.  Micro-batch j of a group does F of stage
s in slot s + 2j and, once the last stage is through, comes back one stage a slot.  On a rank, what runs down has
even slots and what runs up has odd ones (or the other way around), so that nothing collides;
with two ranks, one wave and a group of two:

    slot      0    1    2    3    4    5    6    7    8
    rank 0  F 0F0       0F1  3F0       3F1
            B                3B0       3B1  0B0       0B1
    rank 1  F      1F0  2F0  1F1  2F1
            B                     2B0  1B0  2B1  1B1

Groups of R micro-batches follow each other without a gap: where R divides their number and B takes twice as long
as F, the bubble is 2 (R - 1) / w times the F of a rank's share, and no rank keeps more than R micro-batches alive.
Elsewhere groups are as even as can be, the larger ones first; a group of more than R waits a little before each
wave.  Where that needs more memory than there is, groups have R, or as many as fit, and the last one is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stretto.schedule import placement
from stretto.schedule.families.interleaved import groups
from stretto.schedule.families.option import whole
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.simulate.costs import Costs

    Slots = npt.NDArray[np.int64]

TOLERANCE = 1e-6
"""How far above its limit memory may come out, for the sake of rounding."""


def hanayo(
    *, ranks: int, microbatches: int, costs: Costs, memory_limit: float | None, waves: int | str = 1
) -> Schedule:
    """``waves`` times down the ranks and up; any number of ranks and micro-batches.

    Raises ScheduleError where even one micro-batch at a time needs more than ``memory_limit``.
    """
    stages = 2 * whole("waves", waves) * ranks
    places = [placement.zigzag(ranks, stages)]
    best = float("inf")
    for sizes in _groupings(ranks, microbatches):
        schedule = in_waves(sizes, name="hanayo", placement=places, microbatches=microbatches)
        if memory_limit is None:
            return schedule
        peak = max(_peaks(schedule, costs))
        if peak <= memory_limit + TOLERANCE:
            return schedule
        best = min(best, peak)
    raise ScheduleError(
        f"Schedule hanayo keeps {best:.9g} micro-batches of activations on a rank at least, with {ranks} ranks, "
        f"{stages // ranks // 2} waves and {microbatches} micro-batches; the memory limit is {memory_limit:.9g}."
    )


def _groupings(ranks: int, microbatches: int) -> Iterator[list[int]]:
    """Sizes of the groups, from the fastest to the one that needs the least memory."""
    yield groups(ranks, microbatches)
    for size in range(min(ranks, microbatches), 0, -1):
        full, left = divmod(microbatches, size)
        yield [size] * full + [left] * (left > 0)


def _peaks(schedule: Schedule, costs: Costs) -> tuple[float, ...]:
    """Largest activation memory of each rank."""
    from stretto.schedule.simulate.memory import peak_activation

    return peak_activation(schedule, costs)


def in_waves(
    sizes: Sequence[int],
    *,
    name: str,
    placement: Sequence[Sequence[int]],
    microbatches: int,
    eager_sync: bool = False,
) -> Schedule:
    """Replicas with zigzag placements, each micro-batch a wave, in slots that don't collide; one replica or two.

    Group after group enters, ``sizes`` micro-batches in each replica; replica v has micro-batches v, v + voices, and
    so on.  A second replica lies on the ranks in reverse, and takes the slots that the first one leaves free.
    ``eager_sync`` reduces the gradients of a stage right after its last B, where its rank has time to spare then, and
    at the rank's end elsewhere.
    """
    import numpy as np

    places = np.array(placement)
    voices, stages = places.shape
    ranks = int(places.max()) + 1
    forward, backward = _slots(sizes, voices=voices, stages=stages, ranks=ranks)
    turn, stage, voice = (axis.ravel() for axis in np.indices((len(forward), stages, voices)))
    keep = turn * voices + voice < microbatches
    turn, stage, voice = turn[keep], stage[keep], voice[keep]
    rank, microbatch = places[voice, stage], turn * voices + voice
    rows = np.concatenate(
        [
            np.stack([rank, forward[turn, stage], np.full_like(rank, Kind.F), stage, microbatch]),
            np.stack([rank, backward[turn, stage], np.full_like(rank, Kind.B), stage, microbatch]),
        ],
        axis=1,
    )
    if eager_sync:
        rows = np.concatenate([rows, _reductions(rows[:, len(rank) :], places)], axis=1)
    rows = rows[:, np.lexsort((rows[2], rows[1], rows[0]))]
    return Schedule.from_columns(
        kind=rows[2],
        stage=rows[3],
        microbatch=rows[4],
        offsets=np.searchsorted(rows[0], np.arange(ranks + 1)),
        name=name,
        num_stages=stages,
        num_microbatches=microbatches,
        placement=placement,
        voice=[microbatch % voices for microbatch in range(microbatches)],
    )


def _slots(sizes: Sequence[int], *, voices: int, stages: int, ranks: int) -> tuple[Slots, Slots]:
    """Slot of F and slot of B for each micro-batch of a replica and each stage (N, S)."""
    import numpy as np

    chunks, stage = stages // ranks, np.arange(stages)
    width = np.maximum(sizes, max(1, ranks // voices))  # a group that is smaller leaves its last slots empty
    period = chunks * voices * width
    index = np.arange(sum(sizes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    enters = np.repeat(np.cumsum(period) - period, sizes) + 2 * index
    # One replica comes back up in the slots between; of two, each takes all slots of its parity.
    chunk = np.arange(chunks)
    start = (chunk // 2 * 2, chunk % 2 * ranks) if voices == 1 else (chunk * 2, 0 * chunk)
    after = np.repeat(width, sizes)[:, None] * start[0][stage // ranks] + start[1][stage // ranks] + stage % ranks
    return enters[:, None] + after, enters[:, None] + 2 * after[:, -1:] - after


def _reductions(backward: Slots, places: Slots) -> Slots:
    """Rows of REDUCE_GRAD for ``backward`` rows (rank, slot, kind, stage, micro-batch) of all replicas.

    A rank reduces its last stage first, so that ranks that share stages reduce them in one order.
    """
    import numpy as np

    rows = []
    for rank in range(places.max() + 1):
        _, slots, _, stages, microbatches = backward[:, backward[0] == rank]
        end, at = slots.max(initial=0), -1
        for stage, voice in sorted(np.argwhere(np.equal(places.T, rank)).tolist(), reverse=True):
            last = slots[(stages == stage) & (microbatches % len(places) == voice)].max(initial=-1)
            spare = 0 <= last < end - np.count_nonzero(slots > last)
            at = max(at, last if spare else end)
            rows.append((rank, at, Kind.REDUCE_GRAD, stage, 0))
    return np.array(rows).T
