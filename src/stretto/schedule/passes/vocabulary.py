"""Vocabulary parallelism: the output layer as passes S and T on every rank (Yeung et al. 2024, figures 4 and 10).

The last stage's output layer costs as much as several blocks where the vocabulary is large, and all ranks wait
for it.  Here it is cut along the vocabulary: rank r holds shard r, one of R, and runs ``rSm`` and ``rTm`` for each
micro-batch m (the shard stands where other operations have their stage; it is always the rank).

*S* multiplies the last stage's output with the shard, and takes the maximum and the sum of exponentials over
the shard's part of the vocabulary.  *T* uses those of the whole vocabulary, known after an all-reduce.

    algorithm 1   S: logits                       ─► all-reduce ─► T: both gradients ─► reduce ─► B of the last stage
    algorithm 2   S: logits, gradient of inputs   ─► all-reduce ─► B of the last stage
                                                               └─► T: gradient of weights, at any time

Algorithm 2 sums the gradient of the inputs over the shards with the same all-reduce that makes the softmax
whole, so that one barrier lies between the forward and the backward of the last stage instead of two.

**Arrows** (what ``dependencies`` and the simulator hold a schedule to; l is the last stage of m's path, and b the
first backward of m: its B or I on the last stage that has one):

    rSm needs lFm                             for each rank r: l's output is broadcast
    rTm needs qSm of all ranks q              both algorithms: the all-reduce
    b   needs qTm of all ranks q              where b's rank runs its own T of m before b: algorithm 1
    b   needs qSm of all ranks q              elsewhere: algorithm 2

An arrow between two ranks takes the latency of the largest boundary, one inside a rank none.  The collectives are
not part of the order, lowered or not; the arrows stand for them.  A schedule says nowhere which algorithm it
is of: the order of T and b on b's rank does, for each micro-batch.

**Complete** means: where any S or T appears, each rank r has rSm and rTm once for each micro-batch that has a
backward, rSm alone for the others, and no rank has another's shard.  All ranks run S in the same order of
micro-batches, and T likewise, because collectives must meet.

**Costs**: a scalar S or T is the time of one rank's shard, not divided by chunks; a list is indexed by the shard.
They keep no activation that counts: the shard's logits live from S to T only.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.dependencies import Dependencies, Key
from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs

BARRIERS = {1: 2, 2: 1}
"""Barriers between the forward and the backward of the last stage, by algorithm; what activation memory grows by."""
UNKNOWN = 0.5
"""Time that S and T are planned with where the costs give them none, as a fraction of a rank's forward."""
PASSES = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.R})
"""What a schedule may consist of before S and T come in."""


def vocabulary(schedule: Schedule, *, algorithm: int = 1, waiting: int = 2, costs: Costs | None = None) -> Schedule:
    """S and T come in, forwards keep their order and all others theirs; memory grows by at most 2 or 1.

    No rank keeps more than two micro-batches (algorithm 1) or one (algorithm 2) more than it did, over its whole
    share of the layers.  ``waiting`` is how many T of algorithm 2 a rank may put off (each keeps the shard's
    logits alive).  ``costs`` are what S and T are placed by, not a part of the result.
    Raises ScheduleError for a schedule that has more than F, B, I, W, R and messages.
    """
    if algorithm not in BARRIERS:
        raise ScheduleError(f"Vocabulary parallelism has no algorithm {algorithm!r}; it has 1 and 2.")
    if not isinstance(waiting, int) or waiting < 0:
        raise ScheduleError(f"Vocabulary parallelism can't let {waiting!r} T passes wait; give a number of at least 0.")
    bare = without_messages(schedule)
    _check(bare)
    plan = _Plan.of(bare, algorithm=algorithm, waiting=waiting, costs=costs)
    most = BARRIERS[algorithm] * bare.num_chunks
    tries = [(0, ahead) for ahead in range(most + 1)] + [(shift, shift) for shift in range(1, most + 1)]
    if bare.joined is not None:
        tries = [(0, 0)]
    best: _Weaver | None = None
    for shift, ahead in tries:
        weaver = _Weaver(plan, shift=shift, ahead=ahead)
        if weaver.run() and (best is None or weaver.now < best.now * (1 - 1e-9)):
            best = weaver
    assert best is not None, "in its own order a schedule that can finish can finish with S and T"
    woven = bare.with_orders(best.orders)
    return lower(woven) if schedule.lowered else woven


def _check(schedule: Schedule) -> None:
    """Raise ScheduleError where the schedule has operations that S and T can't be woven between."""
    foreign = sorted(Kind(kind).name for kind in set(schedule.kind.tolist()) - PASSES)
    if foreign:
        raise ScheduleError(
            f"{schedule.name} has {', '.join(foreign)}; the vocabulary passes come first: weave them into a schedule "
            "of forwards and backwards, then offload or shard that."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What all tries to weave one schedule share."""

    algorithm: int
    waiting: int
    dependencies: Dependencies
    """Of the schedule without S and T."""
    durations: list[list[float]]
    """Time of each kind (rows) on each stage or, for S and T, shard."""
    latency: float
    """Of an arrow between two ranks."""
    last: tuple[int, ...]
    """Rank of the last stage of each micro-batch's path."""
    first: tuple[Key | None, ...]
    """First backward of each micro-batch, None where it has none."""

    @classmethod
    def of(cls, schedule: Schedule, *, algorithm: int, waiting: int, costs: Costs | None) -> _Plan:
        """The plan for a schedule without messages; S and T get a time where the costs know none."""
        from stretto.schedule.simulate.costs import Costs

        stage_costs = (costs or Costs()).of(schedule)
        durations = stage_costs.durations().tolist()
        if not any(durations[Kind.S]) and not any(durations[Kind.T]):
            guess = UNKNOWN * float(stage_costs.F.sum()) / schedule.num_ranks
            durations[Kind.S] = durations[Kind.T] = [guess] * schedule.num_stages
        dependencies = Dependencies(schedule)
        last, first = [], []
        for microbatch in range(schedule.num_microbatches):
            path = schedule.path(microbatch)
            last.append(schedule.rank_of(path[-1], schedule.voice[microbatch]))
            backward = [stage for stage in path if schedule.has_backward(stage)]
            first.append(dependencies.backward(backward[-1], microbatch) if backward else None)
        return cls(
            algorithm=algorithm,
            waiting=waiting,
            dependencies=dependencies,
            durations=durations,
            latency=float(stage_costs.comm.max(initial=0.0)),
            last=tuple(last),
            first=tuple(first),
        )


class _Lanes:
    """One rank's operations in two lanes that keep their own orders, and how far each has come."""

    def __init__(self, order: list[Op], *, shift: int, ahead: int) -> None:
        """``shift``: forwards by which all others come later; ``ahead``: by which they may come later."""
        self.ahead = ahead - shift
        self.forwards: list[list[Op]] = []
        self.others: list[list[Op]] = []
        self.before: list[int] = []
        """Forwards that come before each of the others."""
        group: list[Op] = []
        for op in order:
            group.append(op)
            if op.joined:
                continue
            if all(member.kind is Kind.F for member in group):
                self.forwards.append(group)
            else:
                self.others.append(group)
                self.before.append(len(self.forwards) + shift)
            group = []
        self.at = [0, 0]

    def heads(self) -> list[tuple[int, list[Op]]]:
        """Lane and operations that may run next, the preferred one first."""
        forward, other = self.at
        found: list[tuple[int, list[Op]]] = []
        if forward < len(self.forwards):
            turn = other == len(self.others) or forward < self.before[other]
            if turn or forward - self.before[other] < self.ahead:
                found.append((0, self.forwards[forward]))
            if turn and (other == len(self.others) or self.others[other][0].kind is Kind.R):
                return found  # an R that came early would take memory early
        if other < len(self.others):
            preferred = forward == len(self.forwards) or forward >= self.before[other]
            found.insert(0 if preferred else len(found), (1, self.others[other]))
        return found


@dataclass(slots=True)
class _Barrier:
    """How many shards have run a pass of a micro-batch, and when the last two of them did."""

    missing: int
    last: tuple[float, int] = (0.0, -1)
    """Time and rank."""
    before: float = -math.inf

    def arrive(self, rank: int, now: float) -> bool:
        """Note one shard; whether it was the last."""
        self.missing -= 1
        self.before, self.last = self.last[0] if self.last[1] >= 0 else self.before, (now, rank)
        return self.missing == 0

    def known(self, rank: int, latency: float) -> float:
        """When a rank knows that all have, infinity where some haven't."""
        if self.missing:
            return math.inf
        time, slowest = self.last
        return max(time, self.before + latency) if rank == slowest else time + latency


class _Weaver:
    """Runs the schedule with a clock; each rank takes S and T when they can run, and its own operations between.

    Always runs something where it can, so it stands still only where the shifted lanes wait for each other.
    """

    def __init__(self, plan: _Plan, *, shift: int, ahead: int) -> None:
        schedule = plan.dependencies.schedule
        self.plan, self.schedule = plan, schedule
        self.ranks = range(schedule.num_ranks)
        self.lanes = [_Lanes(schedule.ops(rank), shift=shift, ahead=ahead) for rank in self.ranks]
        self.orders: list[list[Op]] = [[] for _ in self.ranks]
        self.now = 0.0
        self.busy = [False] * schedule.num_ranks
        self.ended: dict[Key, float] = {}
        self.arrived: list[int] = []
        """Micro-batches whose last forward is over, in that order: the order of S on all ranks."""
        self.scored: list[int] = []
        """Micro-batches whose S are over, likewise: the order of T."""
        self.next = {Kind.S: [0 for _ in self.ranks], Kind.T: [0 for _ in self.ranks]}
        microbatches = range(schedule.num_microbatches)
        self.barriers = {kind: [_Barrier(schedule.num_ranks) for _ in microbatches] for kind in (Kind.S, Kind.T)}
        self.events: list[tuple[float, int, int, list[Op]]] = []
        self.count = 0

    def run(self) -> bool:
        """Weave; whether all operations have run."""
        for rank in self.ranks:
            self._event(0.0, rank, [])
        while self.events:
            self.now = self.events[0][0]
            touched: set[int] = set()
            while self.events and self.events[0][0] <= self.now:
                _, _, rank, group = heapq.heappop(self.events)
                touched.add(rank)
                for op in group:
                    touched |= self._finish(rank, op)
            for rank in sorted(touched):
                if not self.busy[rank] and (group := self._choose(rank)):
                    self._start(rank, group)
        passes = sum(1 if first is None else 2 for first in self.plan.first) * len(self.ranks)
        return sum(map(len, self.orders)) == self.schedule.num_ops + passes

    def _event(self, time: float, rank: int, group: list[Op]) -> None:
        """A rank may find something to run at that time, where ``group`` ends."""
        heapq.heappush(self.events, (time, self.count, rank, group))
        self.count += 1

    def _start(self, rank: int, group: list[Op]) -> None:
        """Run operations on an idle rank."""
        self.busy[rank] = True
        self.orders[rank] += group
        if group[0].kind in self.next:
            self.next[group[0].kind][rank] += 1
        self._event(self.now + sum(self.plan.durations[op.kind][op.stage] for op in group), rank, group)

    def _finish(self, rank: int, op: Op) -> set[int]:
        """Note that an operation is over; the ranks that may go on now, while others are woken when they hear of it."""
        self.busy[rank] = False
        microbatch = op.microbatch
        concerned: set[int] = set()
        if op.kind in (Kind.S, Kind.T):
            if self.barriers[op.kind][microbatch].arrive(rank, self.now):
                concerned = set(self.ranks)
                if op.kind is Kind.S and self.plan.first[microbatch] is not None:
                    self.scored.append(microbatch)
        else:
            self.ended[op.kind, op.stage, microbatch] = self.now
            concerned = self._readers(op)
        if self.plan.latency > 0:
            for other in concerned:
                self._event(self.now + self.plan.latency, other, [])
            return {rank}
        return concerned

    def _readers(self, op: Op) -> set[int]:
        """Ranks that need an operation of a stage."""
        schedule, voice = self.schedule, self.schedule.voice[op.microbatch]
        if op.kind is Kind.F:
            reader = schedule.next_stage(op.stage, op.microbatch)
            if reader is None:
                self.arrived.append(op.microbatch)
                return set(self.ranks)
        elif op.kind in (Kind.B, Kind.I):
            reader = schedule.gradient_target(op.stage, op.microbatch)
        else:
            reader = None
        return set() if reader is None else {schedule.rank_of(reader, voice)}

    def _choose(self, rank: int) -> list[Op]:
        """What an idle rank runs now; nothing where nothing can run."""
        first, second = self._vocabulary(rank, Kind.S), self._vocabulary(rank, Kind.T)
        if self.plan.algorithm == 1 and second is not None:
            return [second]
        if first is not None:
            return [first]
        if second is not None and len(self.scored) - self.next[Kind.T][rank] > self.plan.waiting:
            return [second]
        lanes = self.lanes[rank]
        for lane, group in lanes.heads():
            if all(self._ready(rank, op, group) for op in group):
                lanes.at[lane] += 1
                return group
        return [] if second is None else [second]

    def _vocabulary(self, rank: int, kind: Kind) -> Op | None:
        """The next S or T of a rank, where it can run now."""
        queue, at = (self.arrived if kind is Kind.S else self.scored), self.next[kind][rank]
        if at == len(queue):
            return None
        microbatch, latency = queue[at], self.plan.latency
        if kind is Kind.S:
            last = self.schedule.path(microbatch)[-1]
            known = self.ended[Kind.F, last, microbatch] + (latency if self.plan.last[microbatch] != rank else 0.0)
        else:
            known = self.barriers[Kind.S][microbatch].known(rank, latency)
            first = self.plan.first[microbatch]
            if self.plan.algorithm == 2 and first is not None and self._rank(first) == rank:
                known = max(known, self.ended.get(first, math.inf))  # T before b would make it algorithm 1
        return Op(kind, stage=rank, microbatch=microbatch) if known <= self.now else None

    def _ready(self, rank: int, op: Op, group: list[Op]) -> bool:
        """Whether what an operation of a stage needs is there; operations joined with it count as there."""
        key = (int(op.kind), op.stage, op.microbatch)
        together = [(int(other.kind), other.stage, other.microbatch) for other in group]
        for need in self.plan.dependencies.needs(*key):
            if need in together:
                continue
            end = self.ended.get(need, math.inf)
            if end + (self.plan.latency if self._rank(need) != rank else 0.0) > self.now:
                return False
        if key != self.plan.first[op.microbatch]:
            return True
        barrier = self.barriers[Kind.T if self.plan.algorithm == 1 else Kind.S][op.microbatch]
        return barrier.known(rank, self.plan.latency) <= self.now

    def _rank(self, key: Key) -> int:
        """Rank that runs an operation of a stage."""
        return self.schedule.rank_of(key[1], self.schedule.voice[key[2]])
