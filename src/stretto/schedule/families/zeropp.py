"""ZeroPP: units of micro-batches, each chunk after chunk with F, I and W staggered (Tang et al. 2024).

2 ranks, 4 micro-batches, 2 chunks:

    rank 0 │0F0-0F1-2F0-2F1-    2I0-2W0-2I1-2W1-0I0-0I1-0W0-0F2-0F3-2F2-2F3-0W1-2I2-2W2-2I3-2W3-0I2-0I3-0W2-0W3-
    rank 1 │    1F0-1F1-3F0-3I0-3F1-3I1-3W0-1I0-1I1-3W1-1W0-1W1-1F2-1F3-3F2-3I2-3F3-3I3-3W2-1I2-1I3-3W3-1W2-1W3-
    time   │0                                                                                               12.5

A unit of U micro-batches goes through a rank's chunks breadth first, so that a sharded stage is gathered once for
U forwards and once for U backwards, and its gradients are reduced once: U trades communication against memory.
Within a unit, and with each operation as one slot, rank r of R does, without a pause,

    F of all chunks but the last                (V - 1) U
    F of the last chunk, ahead                  w = 2 (R - 1 - r) + 1
    I of the last chunk, every other slot       U    between them the other F of the last chunk, then w times W
    I of the other chunks, backwards            (V - 1) U
    W that are left, in the order of the I      V U - w

The first W come early because the last chunk's gradients arrive every other slot; all others can wait until no
one waits for the rank.  Rank r begins r slots after rank 0, and the next unit begins when the last W is over: the
only bubble is the start, R - 1 slots of 1/V of a rank's share.  A unit of fewer than w micro-batches has a gap
before its first I; W of the unit before are kept for it.

Where operations take other times than one slot, the same order with W moved to where ranks wait (``late_weights``)
is taken if it is faster.

``unit`` is at most 2R - 1 unless it is given, the least without a gap, and less where the memory limit asks for
it.  With R or more and at least two chunks there is no further bubble; below R every unit waits for messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stretto.schedule import placement
from stretto.schedule.families.gathering import gathered
from stretto.schedule.families.late_weights import late_weights
from stretto.schedule.families.option import flag, whole
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


def zeropp(
    *,
    ranks: int,
    microbatches: int,
    chunks: int,
    costs: Costs,
    memory_limit: float | None,
    unit: int | str | None = None,
    sharded: bool | str = True,
) -> Schedule:
    """Stage s on rank s mod R; any number of chunks and micro-batches.

    Raises ScheduleError where the given unit, or units of one micro-batch, need more than ``memory_limit``.
    """

    def build(size: int) -> Schedule:
        return _in_units(units(ranks, microbatches, size), ranks=ranks, chunks=chunks)

    gathers, limit = flag("sharded", sharded), float("inf") if memory_limit is None else memory_limit
    size = min(microbatches, 2 * ranks - 1 if unit is None else whole("unit", unit))
    schedule = build(size)
    peak = _peak(schedule, costs)
    if peak > limit + TOLERANCE and unit is None:
        size = _largest(lambda size: _peak(build(size), costs) <= limit + TOLERANCE, below=size)
        schedule = build(size)
        peak = _peak(schedule, costs)
    if peak > limit + TOLERANCE:
        raise ScheduleError(
            f"Schedule zeropp in units of {size}{', its smallest,' * (unit is None)} keeps {peak:.9g} micro-batches of "
            f"activations on a rank; the memory limit is {limit:.9g}."
        )
    schedule = _faster(schedule, late_weights(schedule, costs, limit=max(peak, memory_limit or 0)), costs)
    return gathered(_reducing(schedule, units(ranks, microbatches, size))) if gathers else schedule


def _largest(fits: Callable[[int], bool], *, below: int) -> int:
    """Largest unit under ``below`` that fits, 1 where none does."""
    low, high = 1, below - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _peak(schedule: Schedule, costs: Costs) -> float:
    """Largest activation memory of any rank."""
    from stretto.schedule.simulate.memory import peak_activation

    return max(peak_activation(schedule, costs))


def _faster(schedule: Schedule, other: Schedule, costs: Costs) -> Schedule:
    """Whichever ends first; the first one where both do."""
    from stretto.schedule.simulate.clock import run

    return other if run(other, costs).makespan < run(schedule, costs).makespan - TOLERANCE else schedule


def units(ranks: int, microbatches: int, size: int) -> list[int]:
    """Sizes of the units, as even as can be, the larger ones first.

    At most ``size``; but where that is R or more, rather a little more than units smaller than R, which idle.

    >>> units(4, 12, 7), units(4, 5, 2), units(4, 9, 4)
    ([6, 6], [2, 2, 1], [5, 4])
    """
    count = -(-microbatches // size)
    if size >= ranks > microbatches // count:
        count = max(1, microbatches // ranks)
    small, larger = divmod(microbatches, count)
    return [small + 1] * larger + [small] * (count - larger)


class _Unit(NamedTuple):
    """A unit of micro-batches on ranks that hold ``chunks`` stages each."""

    ranks: int
    chunks: int
    first: int
    """Its first micro-batch."""
    size: int
    following: int
    """Size of the next unit, 0 where there is none."""


def _in_units(sizes: Sequence[int], *, ranks: int, chunks: int) -> Schedule:
    """Unit after unit, F, I and W alone."""
    import numpy as np

    parts, first = [], 0
    for size, following in zip(sizes, [*sizes[1:], 0], strict=True):
        rank, chunk, turn = np.indices((ranks, chunks, size))
        slots = _slots(_Unit(ranks, chunks, first, size, following))
        for kind, slot in zip((Kind.F, Kind.I, Kind.W), slots, strict=True):
            part = (rank, slot, np.full_like(rank, kind), chunk * ranks + rank, first + turn)
            parts.append([column.ravel() for column in part])
        first += size
    rows = np.concatenate(parts, axis=1)
    rows = rows[:, np.lexsort((rows[1], rows[0]))]
    return Schedule.from_columns(
        kind=rows[2],
        stage=rows[3],
        microbatch=rows[4],
        offsets=np.arange(ranks + 1) * 3 * chunks * first,
        name="zeropp",
        num_stages=ranks * chunks,
        num_microbatches=first,
        placement=[placement.loop(ranks, ranks * chunks)],
    )


def _slots(unit: _Unit) -> tuple[Slots, Slots, Slots]:
    """Slots of a unit's F, I and W by rank, chunk and micro-batch of the unit (R, V, U)."""
    import numpy as np

    ranks, chunks, first, size, following = unit
    rank, chunk = np.arange(ranks)[:, None, None], np.arange(chunks)[None, :, None]
    turn, reversed_chunk = np.arange(size)[None, None, :], chunks - 1 - chunk
    due = 2 * (ranks - 1 - rank) + 1
    ahead = np.minimum(due, size)
    stride = max(size, ranks)  # of the chunks: a micro-batch is back on rank 0 after R slots
    start = 3 * chunks * first + rank
    meets = start + (chunks - 1) * stride + due  # first I
    late = (reversed_chunk == 0) & (turn >= ahead)
    forward = np.where(late, meets + 1 + 2 * (turn - ahead), start + chunk * stride + turn)
    rest = meets + max(2 * size, ranks + size - 1)  # first I of the other chunks
    inputs = np.where(reversed_chunk == 0, meets + 2 * turn, rest + (reversed_chunk - 1) * stride + turn)
    tail = rest + (chunks - 1) * stride  # first W that is left
    index = reversed_chunk * size + turn
    weights = np.where(index < ahead, meets + 1 + 2 * (size - ahead + index), tail + index - ahead)
    if following:
        left = chunks * size - np.clip(due - following, 0, chunks * size - ahead)
        gap = start + 3 * chunks * size + (chunks - 1) * max(following, ranks) + following  # of the next unit
        weights = np.where(index >= left, np.maximum(gap + index - left, weights), weights)
    return forward, inputs, weights


def _reducing(schedule: Schedule, sizes: Sequence[int]) -> Schedule:
    """A REDUCE_GRAD of each stage behind its last W in each unit, all else stays."""
    import numpy as np

    rows = np.flatnonzero(schedule.kind == Kind.W)
    unit = np.repeat(np.arange(len(sizes)), sizes)[schedule.microbatch[rows]]
    last = np.zeros((len(sizes), schedule.num_stages), dtype=np.int64)
    last[unit, schedule.stage[rows]] = rows  # ascending, so that the last one remains
    behind = np.sort(last.ravel()) + 1
    return schedule.with_columns(
        kind=np.insert(schedule.kind, behind, Kind.REDUCE_GRAD),
        stage=np.insert(schedule.stage, behind, schedule.stage[behind - 1]),
        microbatch=np.insert(schedule.microbatch, behind, 0),
        offsets=schedule.offsets + np.searchsorted(behind, schedule.offsets, side="right"),
    )
