"""SkipPipe: each micro-batch visits only a part of the stages, some in another order (Blagoev et al. 2025, section 4).

4 ranks, 6 micro-batches, a quarter of the stages skipped: 20 slots instead of the 27 of 1F1B.

    rank 0 │F0-F1-F2-F3-F5-B1----B0----B3----B2----               B5----
    rank 1 │F1-F0-F4-F2-   B0----B1----B2----B4----F5-B5----
    rank 2 │F3-F4-F0-B0----F2-B2----         B3----B4----
    rank 3 │      F1-B1----F3-B3----F4-B4----F5-            B5----
    time   │0                                                         20

A transformer bears that a micro-batch skips stages or visits two neighbours the other way round, and a step that
skips a quarter of the work takes a quarter less time, if no stage becomes the bottleneck and no micro-batch waits
for another.  So paths are chosen such that

    equal      every stage is visited equally often, give or take one
    free       no two micro-batches are on a rank in the same slot, there or on the way back

A forward takes one slot and a backward two.  Micro-batches are taken in turn; each tries some sets of stages that keep
the visits equal, each set in order and with any one pair of neighbours swapped, and reserves, stage after stage and
back again, the first slots that no one has taken.  It takes the path on which it is back first.  Backwards come
before the forwards of later micro-batches that way, and without skipping this is 1F1B.

A micro-batch that skips stage 0 or the last stage skips what lies there; ``keep`` names the stages that none may skip
(embedding and loss, usually) and that aren't swapped.  They are visited more often than the others then.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict, Unpack

from stretto.schedule import placement
from stretto.schedule.families.option import flag
from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs

TOLERANCE = 1e-6
"""How far above its limit memory may come out, for the sake of rounding."""
TRIES = 8
"""Sets of stages that each micro-batch tries."""
ALIVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Micro-batches under way at once that are tried, in multiples of R: the more, the less time and the more memory."""
FORWARD, BACKWARD = 1, 2
"""Slots that an operation takes."""


class Choices(TypedDict, total=False):
    """What may be chosen."""

    skip: float
    """Fraction of the stages that each micro-batch leaves out; 0.25."""
    swap: bool | str
    """Whether paths may visit two neighbours in reversed order; true."""
    keep: str | int | Sequence[int]
    """Stages that all visit (``0+3``); none."""
    seed: int
    """Equal seeds give equal schedules; 0."""


def skip_pipe(
    *,
    ranks: int,
    microbatches: int,
    chunks: int = 1,
    costs: Costs | None = None,
    memory_limit: float | None = None,
    **choices: Unpack[Choices],
) -> Schedule:
    """Stage s on rank s mod R; each micro-batch visits some of the stages.

    ``memory_limit`` is what a rank may keep (the fastest keep up to 1.6 R micro-batches); the costs' activations are
    held against it.  Raises ScheduleError for choices that can't be and for a limit that can't be kept.
    """
    from stretto.schedule.simulate.memory import peak_activation

    seed, stages = choices.get("seed", 0), ranks * chunks
    if type(seed) is not int:
        raise ScheduleError(f"skip-pipe can't draw with the seed {seed!r}; it is a whole number.")
    length = _length(choices.get("skip", 0.25), stages)
    kept = _kept(choices.get("keep", ()), stages=stages, length=length)
    swapping, holders = flag("swap", choices.get("swap", True)), placement.loop(ranks, stages)
    limit = math.inf if memory_limit is None else memory_limit
    best: Schedule | None = None
    fastest, least = math.inf, math.inf
    for alive in sorted({max(1, round(multiple * ranks)) for multiple in ALIVE}):
        if alive < ranks and memory_limit is None:
            continue
        visits = _Visits(stages, microbatches=microbatches, length=length, kept=kept)
        trips = _plan(visits, _Track(ranks, holders), random.Random(seed), alive=alive, swap=swapping)
        schedule = _schedule(trips, ranks, holders)
        end, peak = max(trip.end for trip in trips), max(peak_activation(schedule, costs))
        least = min(least, peak)
        if end < fastest and peak <= limit + TOLERANCE:
            best, fastest = schedule, end
    if best is None:
        raise ScheduleError(
            f"skip-pipe can't keep its activations below {limit:.9g} micro-batches; the least it reaches is "
            f"{least:.9g}."
        )
    return best


def _schedule(trips: list[_Trip], ranks: int, holders: tuple[int, ...]) -> Schedule:
    """The schedule of some trips: each rank's operations by slot."""
    orders: list[list[tuple[int, Op]]] = [[] for _ in range(ranks)]
    for microbatch, trip in enumerate(trips):
        ways = ((Kind.F, trip.path, trip.forward), (Kind.B, trip.path[::-1], trip.backward))
        for kind, path, slots in ways:
            for stage, slot in zip(path, slots, strict=True):
                orders[holders[stage]].append((slot, Op(kind, stage=stage, microbatch=microbatch)))
    return Schedule.from_orders(
        [[op for _, op in sorted(order, key=lambda at: at[0])] for order in orders],
        name="skip-pipe",
        num_stages=len(holders),
        num_microbatches=len(trips),
        placement=[holders],
        paths=[trip.path for trip in trips],
    )


class _Trip(NamedTuple):
    """One micro-batch's way there and back."""

    path: tuple[int, ...]
    times: tuple[int, ...]
    """The slot from which it goes, and the first slot after each of its operations: forwards, then backwards."""

    @property
    def forward(self) -> Iterator[int]:
        """Slot of the F of each stage of the path."""
        return (time - FORWARD for time in self.times[1 : len(self.path) + 1])

    @property
    def backward(self) -> Iterator[int]:
        """First slot of the B of each stage of the path, back to front."""
        return (time - BACKWARD for time in self.times[len(self.path) + 1 :])

    @property
    def end(self) -> int:
        """First slot after it."""
        return self.times[-1]


class _Track:
    """Which slots of which rank are taken: bit t of ``taken[rank]`` is slot t."""

    def __init__(self, ranks: int, holders: tuple[int, ...]) -> None:
        self.taken = [0] * ranks
        self.short = [0] * ranks
        """Bit t: no backward can begin in slot t, which is taken or the last before one that is."""
        self.holders = holders

    def trip(self, path: tuple[int, ...], start: int) -> _Trip:
        """The way along a path from a slot on, each operation in the first slots that no one has taken."""
        times = [start]
        for stage in path:
            times.append(self.forward(stage, times[-1]))
        for stage in reversed(path):
            times.append(self.backward(stage, times[-1]))
        return _Trip(path, tuple(times))

    def forward(self, stage: int, at: int) -> int:
        """The slot after a forward that may begin in slot ``at``."""
        return _first(self.taken[self.holders[stage]], at) + FORWARD

    def backward(self, stage: int, at: int) -> int:
        """The slot after a backward that may begin in slot ``at``."""
        return _first(self.short[self.holders[stage]], at) + BACKWARD

    def swapped(self, trip: _Trip, at: int, within: int) -> int:
        """When a trip is back if its stages ``at`` and ``at + 1`` change places; ``within`` where not before that.

        Both ways are the same up to the swap, and again from where they are at one stage in the same slot; later at a
        stage is never earlier at the next.  So only the steps between are walked, which are few.
        """
        path, times = trip.path, trip.times
        first, second, turn = path[at], path[at + 1], len(path)
        time = self.forward(first, self.forward(second, times[at]))
        for step in range(at + 2, turn):
            if time == times[step]:
                time = times[turn]
                break
            time = self.forward(path[step], time)
        again = 2 * turn - 2 - at
        if time + BACKWARD * turn >= within:
            return within
        for step in range(turn, again):
            if time == times[step]:
                time = times[again]
                break
            time = self.backward(path[2 * turn - 1 - step], time)
        time = self.backward(second, self.backward(first, time))
        for step in range(again + 2, 2 * turn):
            if time >= min(times[step], within):
                return within
            time = self.backward(path[2 * turn - 1 - step], time)
        return min(time, within)

    def take(self, trip: _Trip) -> None:
        """Reserve the slots of a trip."""
        for stage, slot in zip(trip.path, trip.forward, strict=True):
            self.taken[self.holders[stage]] |= 1 << slot
        for stage, slot in zip(reversed(trip.path), trip.backward, strict=True):
            self.taken[self.holders[stage]] |= 0b11 << slot
        for rank in {self.holders[stage] for stage in trip.path}:
            self.short[rank] = self.taken[rank] | self.taken[rank] >> 1


def _first(taken: int, start: int) -> int:
    """The first slot from ``start`` on that isn't taken.

    >>> _first(0b10110, 1)
    3
    """
    later = taken >> start
    return start + (~later & (later + 1)).bit_length() - 1


def _plan(visits: _Visits, track: _Track, draw: random.Random, *, alive: int, swap: bool) -> list[_Trip]:
    """The trips of all micro-batches, at most ``alive`` of them under way at once."""
    trips: list[_Trip] = []
    ends: list[int] = []
    while visits.microbatches:
        start = sorted(ends)[-alive] if len(ends) >= alive else 0
        trip = _soonest(visits, track, visits.choices(draw), start=start, swap=swap)
        track.take(trip)
        visits.take(trip.path)
        trips.append(trip)
        ends.append(trip.end)
    return trips


def _soonest(visits: _Visits, track: _Track, choices: Iterator[tuple[int, ...]], *, start: int, swap: bool) -> _Trip:
    """The trip from a slot on that is back first, of some sets of stages in all orders; of equals the first."""
    best: _Trip | None = None
    for chosen in choices:
        ordered = track.trip(chosen, start)
        if best is None or ordered.end < best.end:
            best = ordered
        for at in _swaps(chosen, visits.kept) if swap else ():
            if track.swapped(ordered, at, best.end) < best.end:
                best = track.trip((*chosen[:at], chosen[at + 1], chosen[at], *chosen[at + 2 :]), start)
    assert best is not None
    return best


class _Visits:
    """How often each stage must still be visited."""

    def __init__(self, stages: int, *, microbatches: int, length: int, kept: frozenset[int]) -> None:
        others = [stage for stage in range(stages) if stage not in kept]
        each, more = divmod(microbatches * (length - len(kept)), len(others) or 1)
        self.left = {stage: each + (at < more) for at, stage in enumerate(others)} | dict.fromkeys(kept, microbatches)
        self.microbatches = microbatches
        """That are still to come."""
        self.length = length
        self.kept = kept

    def choices(self, draw: random.Random) -> Iterator[tuple[int, ...]]:
        """Sets of stages for the next micro-batch, ascending, after which the visits can still come out equal."""
        must = [stage for stage, left in self.left.items() if left == self.microbatches]
        may = [stage for stage, left in self.left.items() if 0 < left < self.microbatches]
        for _ in range(TRIES if len(must) < self.length else 1):
            ahead = sorted(may, key=lambda stage: -self.left[stage] - draw.random() * 2)
            yield tuple(sorted(must + ahead[: self.length - len(must)]))

    def take(self, path: tuple[int, ...]) -> None:
        """Count the visits of a path."""
        self.microbatches -= 1
        for stage in path:
            self.left[stage] -= 1


def _length(skip: float, stages: int) -> int:
    """Stages that each micro-batch visits."""
    if isinstance(skip, bool) or not isinstance(skip, (int, float)) or not 0 <= skip < 1:
        raise ScheduleError(f"skip-pipe can't skip {skip!r} of the stages; give a fraction of at least 0 and below 1.")
    return max(1, round((1 - skip) * stages))


def _kept(keep: str | int | Sequence[int], *, stages: int, length: int) -> frozenset[int]:
    """The stages that no micro-batch may skip."""
    if isinstance(keep, str):
        parts = [part.strip() for part in keep.split("+") if part.strip()]
        named = [int(part) if part.isdecimal() else -1 for part in parts]
    else:
        named = [keep] if isinstance(keep, int) else list(keep)
    if any(type(stage) is not int or not 0 <= stage < stages for stage in named):
        raise ScheduleError(
            f"skip-pipe can't keep {keep!r}; name stages of 0 to {stages - 1}, such as 0 or 0+{stages - 1}."
        )
    if len(set(named)) > length:
        raise ScheduleError(
            f"skip-pipe can't keep {len(set(named))} stages on paths that visit {length} of {stages}; "
            "skip less or keep fewer."
        )
    return frozenset(named)


def _swaps(chosen: tuple[int, ...], kept: frozenset[int]) -> list[int]:
    """Where a set of stages in order has two neighbours that may be swapped: the positions of the first.

    >>> _swaps((0, 1, 3), frozenset({0}))
    [1]
    """
    return [at for at in range(len(chosen) - 1) if not {chosen[at], chosen[at + 1]} & kept]
