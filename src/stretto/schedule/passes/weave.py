"""Weaving S and T into a schedule: run it with a clock, and let each rank take its vocabulary passes as they come.

    lanes     forwards    F0 F1 F2 F3 ...      each keeps its order; the others may come later among the forwards
              others      B0 W0 B1 W1 ...      than they did: by ``shift`` always, by ``ahead`` where they'd wait
    queues    S 0 1 2 ...                      in the order in which last forwards end, the same on all ranks
              T 0 1 2 ...                      in the order in which their S are over everywhere

Several shifts are tried and the fastest taken.  What a rank runs beside its arithmetic stays with the operation next
to it.  Where that matters (parameters that are gathered and let go, activations that are away) or where pairs
overlap, the two lanes are one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from stretto.schedule.arrows import Places, arrows
from stretto.schedule.op import COMPUTE, Kind, Op
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs

BARRIERS = {1: 2, 2: 1}
"""Barriers between the forward and the backward of the last stage, by algorithm; what activation memory grows by."""
UNKNOWN = 0.05
"""Time that S and T are planned with where the costs give them none, as a fraction of a rank's forward.

Short is safe: ranks come to S and T in the order of the families' own operations, which stays right where the passes
take longer.  Planned too long, they drift apart: with 0.5 a step of 1F1B whose passes took 0.1 was 17% longer.
"""
BACKWARD = (Kind.B, Kind.I)
"""Kinds that a micro-batch's way back is made of."""
PLACED = (Kind.UNSHARD, Kind.RESHARD, Kind.O, Kind.L)
"""Kinds whose place between forwards and backwards means something: where there are any, no lane moves."""


def weave(schedule: Schedule, *, algorithm: int, waiting: int, costs: Costs | None) -> Schedule:
    """A schedule that can finish, without messages, with S and T; see ``vocabulary``.

    Where the costs tell times of S, T or messages, it is woven by them and without them, and the faster one is taken.
    """
    from stretto.schedule.simulate.clock import run

    woven = _woven(Plan.of(schedule, algorithm=algorithm, waiting=waiting, costs=costs))
    if costs is None or (bare := replace(costs, S=0.0, T=0.0, comm=0.0)) == costs:
        return woven
    other = _woven(Plan.of(schedule, algorithm=algorithm, waiting=waiting, costs=bare))
    return min(woven, other, key=lambda found: run(found, costs).makespan)


def _woven(plan: Plan) -> Schedule:
    """The fastest try, by the clock of the weaving."""
    schedule = plan.schedule
    most = 0 if plan.rigid else BARRIERS[plan.algorithm] * schedule.num_chunks
    tries = [(0, ahead, True) for ahead in range(most + 1)] + [(shift, shift, True) for shift in range(1, most + 1)]
    best: Weaver | None = None
    for shift, ahead, eager in [*tries, (0, most, False)]:
        weaver = Weaver(plan, shift=shift, ahead=ahead, eager=eager)
        if weaver.run() and (best is None or weaver.makespan < best.makespan * (1 - 1e-9)):
            best = weaver
    assert best is not None, "in its own order a schedule that can finish can finish with S and T"
    return schedule.with_orders([[plan.op(item) for item in best.order(rank)] for rank in range(schedule.num_ranks)])


class Item(NamedTuple):
    """An operation in the weaving."""

    kind: int
    stage: int
    """For S and T the shard."""
    microbatch: int
    row: int = -1
    """Of the schedule without S and T; -1 for those two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What all tries to weave one schedule share."""

    schedule: Schedule
    """Without S, T and messages."""
    algorithm: int
    waiting: int
    items: tuple[Item, ...]
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
    rigid: bool
    """Whether all operations of a rank must keep their order."""

    @classmethod
    def of(cls, schedule: Schedule, *, algorithm: int, waiting: int, costs: Costs | None) -> Plan:
        """The plan for a schedule without messages; S and T get a time where the costs know none."""
        import numpy as np

        from stretto.schedule.simulate.costs import Costs

        stage_costs = (costs or Costs()).of(schedule)
        durations = stage_costs.durations().tolist()
        for kind in set(Kind) - COMPUTE:
            durations[kind] = [0.0] * schedule.num_stages  # runs beside the arithmetic
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
            items=tuple(Item(*row) for row in rows),
            rank=tuple(rank),
            needs=tuple(tuple(part.tolist()) for part in parts),
            readers=tuple(map(frozenset, readers)),
            last=tuple(last),
            first=tuple(first),
            durations=durations,
            latency=float(stage_costs.comm.max(initial=0.0)),
            rigid=schedule.joined is not None or bool(np.isin(schedule.kind, PLACED).any()),
        )

    def op(self, item: Item) -> Op:
        """The operation of an item."""
        joined = self.schedule.joined is not None and item.row >= 0 and bool(self.schedule.joined[item.row])
        return Op(Kind(item.kind), stage=item.stage, microbatch=item.microbatch, joined=joined)


def _groups(plan: Plan, rank: int) -> Iterator[list[Item]]:
    """A rank's operations, with what overlaps and what runs beside the arithmetic at their sides.

    UNSHARD and L stand with the operation behind them, all others that run beside with the one in front.
    """
    schedule = plan.schedule
    ahead: list[Item] = []
    group: list[Item] = []
    whole = True
    """Whether the group may end."""
    for row in range(schedule.offsets[rank], schedule.offsets[rank + 1]):
        item = plan.items[row]
        if item.kind in (Kind.UNSHARD, Kind.L) and whole:
            ahead.append(item)
        elif item.kind == Kind.OPT:
            continue  # comes behind all T
        elif item.kind in COMPUTE:
            if group and whole:
                yield group
                group = []
            group += [*ahead, item]
            ahead = []
            whole = schedule.joined is None or not schedule.joined[row]
        else:
            group.append(item)
    if group or ahead:
        yield group + ahead


class Lanes:
    """One rank's operations in two lanes that keep their own orders, and how far each has come.

    Where the order is rigid, all are in one lane.
    """

    def __init__(self, plan: Plan, rank: int, *, shift: int, ahead: int) -> None:
        """``shift``: forwards by which all others come later; ``ahead``: by which they may come later."""
        self.ahead = ahead - shift
        self.forwards: list[list[Item]] = []
        self.others: list[list[Item]] = []
        self.before: list[int] = []
        """Forwards that come before each of the others."""
        for group in _groups(plan, rank):
            if not plan.rigid and all(item.kind == Kind.F for item in group):
                self.forwards.append(group)
            else:
                self.others.append(group)
                self.before.append(len(self.forwards) + shift)
        self.at = [0, 0]

    def heads(self) -> list[tuple[int, list[Item]]]:
        """Lane and operations that may run next, the preferred one first."""
        forward, other = self.at
        found: list[tuple[int, list[Item]]] = []
        turn = forward < len(self.forwards) and (other == len(self.others) or forward < self.before[other])
        if turn or (forward < len(self.forwards) and forward - self.before[other] < self.ahead):
            found.append((0, self.forwards[forward]))
        if other < len(self.others) and not (turn and self.others[other][0].kind == Kind.R):
            # an R before its turn would take memory before its turn
            found.insert(1 if turn else 0, (1, self.others[other]))
        return found


@dataclass(slots=True)
class Barrier:
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


class Weaver:
    """Runs the schedule with a clock; each rank takes S and T when they can run, and its own operations between.

    ``eager`` ranks take S, and T of algorithm 1, before their own operations, others only where they would idle.
    A rank runs something whenever it can, so that all stand still only where shifted lanes wait for each other.
    """

    def __init__(self, plan: Plan, *, shift: int, ahead: int, eager: bool) -> None:
        ranks, microbatches = plan.schedule.num_ranks, plan.schedule.num_microbatches
        self.plan = plan
        self.eager = eager
        self.ranks = range(ranks)
        self.lanes = [Lanes(plan, rank, shift=shift, ahead=ahead) for rank in self.ranks]
        self.orders: list[list[Item]] = [[] for _ in self.ranks]
        self.now = self.makespan = 0.0
        self.busy = [False] * ranks
        self.ended = [math.inf] * plan.schedule.num_ops
        self.queues: dict[int, list[int]] = {Kind.S: [], Kind.T: []}
        """Micro-batches whose last forward, and whose S are over: the order of S and of T on all ranks."""
        self.next = {kind: [0] * ranks for kind in self.queues}
        self.barriers = {kind: [Barrier(ranks) for _ in range(microbatches)] for kind in self.queues}
        self.events: list[tuple[float, int, int, list[Item]]] = []
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
        return sum(len(self.order(rank)) for rank in self.ranks) == len(self.plan.items) + passes

    def order(self, rank: int) -> list[Item]:
        """What a rank has run, and its optimizer step."""
        offsets = self.plan.schedule.offsets
        own = self.plan.items[offsets[rank] : offsets[rank + 1]]
        return self.orders[rank] + [item for item in own if item.kind == Kind.OPT]

    def _event(self, time: float, rank: int, group: list[Item]) -> None:
        """At that time ``group`` ends on a rank, or the rank may find something to run."""
        heapq.heappush(self.events, (time, self.count, rank, group))
        self.count += 1

    def _start(self, rank: int, group: list[Item]) -> None:
        """Run operations on an idle rank."""
        self.busy[rank] = True
        self.orders[rank] += group
        if group[0].row < 0:
            self.next[group[0].kind][rank] += 1
        end = self.now + sum(self.plan.durations[item.kind][item.stage] for item in group)
        self.makespan = max(self.makespan, end)
        self._event(end, rank, group)

    def _finish(self, rank: int, item: Item) -> set[int]:
        """Note that an operation is over; ranks that may go on now.  Those that hear of it later are woken then."""
        self.busy[rank] = False
        concerned: frozenset[int] | set[int] = frozenset()
        if item.row >= 0:
            self.ended[item.row] = self.now
            concerned = self.plan.readers[item.row]
            if item.kind == Kind.F and item.row == self.plan.last[item.microbatch]:
                self.queues[Kind.S].append(item.microbatch)
        elif self.barriers[item.kind][item.microbatch].arrive(rank, self.now):
            concerned = set(self.ranks)
            if item.kind == Kind.S and self.plan.first[item.microbatch] >= 0:
                self.queues[Kind.T].append(item.microbatch)
        if self.plan.latency == 0:
            return set(concerned)
        for other in concerned:
            self._event(self.now + self.plan.latency, other, [])
        if item.row < 0:  # the slowest rank waits for the one before it alone
            known = self.barriers[item.kind][item.microbatch].known(rank, self.plan.latency)
            if self.now < known < math.inf:
                self._event(known, rank, [])
        return {rank}

    def _choose(self, rank: int) -> list[Item]:
        """What an idle rank runs now; nothing where nothing can run."""
        score, gradient = self._pass(rank, Kind.S), self._pass(rank, Kind.T)
        late = len(self.queues[Kind.T]) - self.next[Kind.T][rank] > self.plan.waiting
        urgent = [gradient, score] if self.plan.algorithm == 1 else [score, gradient if late else []]
        if (self.eager or late) and any(urgent):
            return urgent[0] or urgent[1]
        lanes = self.lanes[rank]
        for lane, group in lanes.heads():
            if self._ready(rank, group):
                lanes.at[lane] += 1
                return group
        return urgent[0] or urgent[1] or gradient

    def _pass(self, rank: int, kind: Kind) -> list[Item]:
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
        return [Item(kind, rank, microbatch)] if known <= self.now else []

    def _ready(self, rank: int, group: list[Item]) -> bool:
        """Whether all that a group of joined operations needs is there."""
        plan, together = self.plan, {item.row for item in group}
        for item in group:
            for need in plan.needs[item.row]:
                latency = plan.latency if plan.rank[need] != rank else 0.0
                if need not in together and self.ended[need] + latency > self.now:
                    return False
            if item.kind in BACKWARD and item.row == plan.first[item.microbatch]:
                barrier = self.barriers[Kind.T if plan.algorithm == 1 else Kind.S][item.microbatch]
                if barrier.known(rank, plan.latency) > self.now:
                    return False
        return True
