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
from typing import TYPE_CHECKING, NamedTuple

from stretto.schedule.arrows import Places, arrows
from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.progress import check_progress
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
    if algorithm not in tuple(BARRIERS):
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
    woven = bare.with_orders([[plan.op(item) for item in order] for order in best.orders])
    return lower(woven) if schedule.lowered else woven


def _check(schedule: Schedule) -> None:
    """Raise ScheduleError where S and T can't be woven in: other operations than expected, or no end at all."""
    foreign = sorted(Kind(kind).name for kind in set(schedule.kind.tolist()) - PASSES)
    if foreign:
        raise ScheduleError(
            f"{schedule.name} has {', '.join(foreign)}; the vocabulary passes come first: weave them into a schedule "
            "of forwards and backwards, then offload or shard that."
        )
    check_progress(schedule)


class _Item(NamedTuple):
    """An operation in the weaving."""

    kind: int
    stage: int
    """For S and T the shard."""
    microbatch: int
    row: int = -1
    """Of the schedule without S and T; -1 for those two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What all tries to weave one schedule share."""

    schedule: Schedule
    """Without S, T and messages."""
    algorithm: int
    waiting: int
    items: tuple[_Item, ...]
    """One per row."""
    rank: tuple[int, ...]
    """Of each row."""
    needs: tuple[tuple[int, ...], ...]
    """Rows that each row needs."""
    readers: tuple[frozenset[int], ...]
    """Ranks that need each row; all of them for the F of a last stage."""
    last: tuple[int, ...]
    """Row of each micro-batch's F on its last stage."""
    first: tuple[int, ...]
    """Row of each micro-batch's first backward, -1 where it has none."""
    durations: list[list[float]]
    """Time of each kind (rows) on each stage or, for S and T, shard."""
    latency: float
    """Of an arrow between two ranks."""

    @classmethod
    def of(cls, schedule: Schedule, *, algorithm: int, waiting: int, costs: Costs | None) -> _Plan:
        """The plan for a schedule without messages; S and T get a time where the costs know none."""
        import numpy as np

        from stretto.schedule.simulate.costs import Costs

        stage_costs = (costs or Costs()).of(schedule)
        durations = stage_costs.durations().tolist()
        if not any(durations[Kind.S]) and not any(durations[Kind.T]):
            guess = UNKNOWN * float(stage_costs.F.sum()) / schedule.num_ranks
            durations[Kind.S] = durations[Kind.T] = [guess] * schedule.num_stages
        places = Places(schedule)
        flows, microbatches, everyone = places.flows, np.arange(schedule.num_microbatches), range(schedule.num_ranks)
        last = places.find(Kind.F, flows.last[flows.of], microbatches).tolist()
        turn = flows.turn[flows.of]
        first = np.where(turn >= 0, places.backward(turn, microbatches), -1).tolist()
        drawn, rank = arrows(places), places.rank.tolist()
        parts = np.split(drawn.need, drawn.start[1:-1])
        readers: list[set[int]] = [set() for _ in rank]
        for row, needed in enumerate(parts):
            for other in needed.tolist():
                readers[other].add(rank[row])
        for row in last:
            readers[row].update(everyone)
        columns = (schedule.kind, schedule.stage, schedule.microbatch)
        rows = zip(*(column.tolist() for column in columns), range(schedule.num_ops), strict=True)
        return cls(
            schedule=schedule,
            algorithm=algorithm,
            waiting=waiting,
            items=tuple(_Item(*row) for row in rows),
            rank=tuple(rank),
            needs=tuple(tuple(part.tolist()) for part in parts),
            readers=tuple(map(frozenset, readers)),
            last=tuple(last),
            first=tuple(first),
            durations=durations,
            latency=float(stage_costs.comm.max(initial=0.0)),
        )

    def op(self, item: _Item) -> Op:
        """The operation of an item."""
        joined = self.schedule.joined is not None and item.row >= 0 and bool(self.schedule.joined[item.row])
        return Op(Kind(item.kind), stage=item.stage, microbatch=item.microbatch, joined=joined)


class _Lanes:
    """One rank's operations in two lanes that keep their own orders, and how far each has come."""

    def __init__(self, plan: _Plan, rank: int, *, shift: int, ahead: int) -> None:
        """``shift``: forwards by which all others come later; ``ahead``: by which they may come later."""
        self.ahead = ahead - shift
        self.forwards: list[list[_Item]] = []
        self.others: list[list[_Item]] = []
        self.before: list[int] = []
        """Forwards that come before each of the others."""
        schedule = plan.schedule
        group: list[_Item] = []
        for row in range(schedule.offsets[rank], schedule.offsets[rank + 1]):
            group.append(plan.items[row])
            if schedule.joined is not None and schedule.joined[row]:
                continue
            if all(item.kind == Kind.F for item in group):
                self.forwards.append(group)
            else:
                self.others.append(group)
                self.before.append(len(self.forwards) + shift)
            group = []
        self.at = [0, 0]

    def heads(self) -> list[tuple[int, list[_Item]]]:
        """Lane and operations that may run next, the preferred one first."""
        forward, other = self.at
        found: list[tuple[int, list[_Item]]] = []
        turn = forward < len(self.forwards) and (other == len(self.others) or forward < self.before[other])
        if turn or (forward < len(self.forwards) and forward - self.before[other] < self.ahead):
            found.append((0, self.forwards[forward]))
        if other < len(self.others) and not (turn and self.others[other][0].kind == Kind.R):
            # an R before its turn would take memory before its turn
            found.insert(1 if turn else 0, (1, self.others[other]))
        return found


@dataclass(slots=True)
class _Barrier:
    """How many shards have run a pass of a micro-batch, and when the last two of them did."""

    missing: int
    slowest: int = -1
    """Rank of the last one."""
    last: float = -math.inf
    before: float = -math.inf

    def arrive(self, rank: int, now: float) -> bool:
        """Note one shard; whether it was the last."""
        self.missing -= 1
        self.slowest, self.before, self.last = rank, self.last, now
        return self.missing == 0

    def known(self, rank: int, latency: float) -> float:
        """When a rank knows that all have, infinity where some haven't."""
        if self.missing:
            return math.inf
        return max(self.last, self.before + latency) if rank == self.slowest else self.last + latency


class _Weaver:
    """Runs the schedule with a clock; each rank takes S and T when they can run, and its own operations between.

    A rank runs something whenever it can, so that all stand still only where shifted lanes wait for each other.
    """

    def __init__(self, plan: _Plan, *, shift: int, ahead: int) -> None:
        ranks, microbatches = plan.schedule.num_ranks, plan.schedule.num_microbatches
        self.plan = plan
        self.ranks = range(ranks)
        self.lanes = [_Lanes(plan, rank, shift=shift, ahead=ahead) for rank in self.ranks]
        self.orders: list[list[_Item]] = [[] for _ in self.ranks]
        self.now = 0.0
        self.busy = [False] * ranks
        self.ended = [math.inf] * plan.schedule.num_ops
        self.queues: dict[int, list[int]] = {Kind.S: [], Kind.T: []}
        """Micro-batches whose last forward, and whose S are over: the order of S and of T on all ranks."""
        self.next = {kind: [0] * ranks for kind in self.queues}
        self.barriers = {kind: [_Barrier(ranks) for _ in range(microbatches)] for kind in self.queues}
        self.events: list[tuple[float, int, int, list[_Item]]] = []
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
                for item in group:
                    touched |= self._finish(rank, item)
            for rank in sorted(touched):
                if not self.busy[rank] and (group := self._choose(rank)):
                    self._start(rank, group)
        passes = sum(1 if row < 0 else 2 for row in self.plan.first) * len(self.ranks)
        return sum(map(len, self.orders)) == len(self.plan.items) + passes

    def _event(self, time: float, rank: int, group: list[_Item]) -> None:
        """At that time ``group`` ends on a rank, or the rank may find something to run."""
        heapq.heappush(self.events, (time, self.count, rank, group))
        self.count += 1

    def _start(self, rank: int, group: list[_Item]) -> None:
        """Run operations on an idle rank."""
        self.busy[rank] = True
        self.orders[rank] += group
        if group[0].row < 0:
            self.next[group[0].kind][rank] += 1
        self._event(self.now + sum(self.plan.durations[item.kind][item.stage] for item in group), rank, group)

    def _finish(self, rank: int, item: _Item) -> set[int]:
        """Note that an operation is over; ranks that may go on now.  Those that hear of it later are woken then."""
        self.busy[rank] = False
        concerned: frozenset[int] | set[int] = frozenset()
        if item.row >= 0:
            self.ended[item.row] = self.now
            concerned = self.plan.readers[item.row]
            if item.row == self.plan.last[item.microbatch]:
                self.queues[Kind.S].append(item.microbatch)
        elif self.barriers[item.kind][item.microbatch].arrive(rank, self.now):
            concerned = set(self.ranks)
            if item.kind == Kind.S and self.plan.first[item.microbatch] >= 0:
                self.queues[Kind.T].append(item.microbatch)
        if self.plan.latency == 0:
            return set(concerned)
        for other in concerned:
            self._event(self.now + self.plan.latency, other, [])
        return {rank}

    def _choose(self, rank: int) -> list[_Item]:
        """What an idle rank runs now; nothing where nothing can run."""
        score, gradient = self._pass(rank, Kind.S), self._pass(rank, Kind.T)
        if self.plan.algorithm == 1 and gradient:
            return gradient
        if score:
            return score
        if gradient and len(self.queues[Kind.T]) - self.next[Kind.T][rank] > self.plan.waiting:
            return gradient
        lanes = self.lanes[rank]
        for lane, group in lanes.heads():
            if self._ready(rank, group):
                lanes.at[lane] += 1
                return group
        return gradient

    def _pass(self, rank: int, kind: Kind) -> list[_Item]:
        """The next S or T of a rank, where it can run now."""
        plan, queue, at = self.plan, self.queues[kind], self.next[kind][rank]
        if at == len(queue):
            return []
        microbatch = queue[at]
        if kind is Kind.S:
            last = plan.last[microbatch]
            known = self.ended[last] + (plan.latency if plan.rank[last] != rank else 0.0)
        else:
            known = self.barriers[Kind.S][microbatch].known(rank, plan.latency)
            first = plan.first[microbatch]
            if plan.algorithm == 2 and plan.rank[first] == rank:
                known = max(known, self.ended[first])  # T before the first backward would make it algorithm 1
        return [_Item(kind, rank, microbatch)] if known <= self.now else []

    def _ready(self, rank: int, group: list[_Item]) -> bool:
        """Whether all that a group of joined operations needs is there."""
        plan, together = self.plan, {item.row for item in group}
        for item in group:
            for need in plan.needs[item.row]:
                latency = plan.latency if plan.rank[need] != rank else 0.0
                if need not in together and self.ended[need] + latency > self.now:
                    return False
            if item.row == plan.first[item.microbatch]:
                barrier = self.barriers[Kind.T if plan.algorithm == 1 else Kind.S][item.microbatch]
                if barrier.known(rank, plan.latency) > self.now:
                    return False
        return True
