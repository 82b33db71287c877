"""Bounds from some of a problem's ranks: their schedules are all looked at, those of the others never wait.

A beginning of a schedule is known by what of it matters later: how often each operation has run, when the ranks
are free, and when each micro-batch under way can go on.  All beginnings of n operations give all of n + 1.  Of two
that have run the same operations, one that is as early in everything makes the other needless.

    rank 3 alone, after F3 F4 F3 F4:   free at 5.5, micro-batch 0 back at 5.5, micro-batch 1 at 6.5
                  after F3 F3 F4 F4:   free at 5.5, micro-batch 0 back at 6.0, micro-batch 1 at 6.5   needless

Since memory lets few micro-batches be under way, few beginnings remain: tens for one rank, hundreds or thousands
for two, however long the schedule is.  Where they are too many the search gives up, and the bound is what the
beginnings that it has promise.  Times are whole and rounded down (``ticks``), so the bound stays true.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind
from stretto.schedule.synthesize.bounds import Bound, Rank
from stretto.schedule.synthesize.chain import Chain
from stretto.schedule.synthesize.replay import Durations, Operation, in_turn
from stretto.schedule.synthesize.ticks import Ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.synthesize.problem import Problem

MOST_ROWS = 1 << 16
"""Beginnings of equal length that are kept at most, about a tenth of a gigabyte; four times that for a schedule."""
PER_SECOND = 6e6
"""Operations that compiled loops look at in a second."""
GUARD = 2.0
"""The clock may run this many times the budget."""
ROUNDING = 1e-6
"""Ticks; what floating point may have added to a whole number of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a relaxation showed."""

    value: float
    """No schedule of the problem is faster, unless it is as slow as the upper limit that the search was given."""
    complete: bool
    """Whether the search came to its end."""
    orders: tuple[tuple[Operation, ...], ...] | None = None
    """The best schedule, one order per rank, where it was asked for and there is one."""


@dataclass(slots=True)
class Effort:
    """How much may still be done, counted in operations looked at, so that the same work gives the same bound."""

    left: float
    deadline: float
    """The clock only guards against a machine far slower than ours."""

    @classmethod
    def of(cls, seconds: float) -> Effort:
        """As much as about that many seconds allow."""
        return cls(seconds * PER_SECOND, time.monotonic() + seconds * GUARD)

    def spend(self, amount: float) -> bool:
        """Take some of it; False where it is used up."""
        self.left -= amount
        return self.left > 0 and time.monotonic() < self.deadline


def tighten(
    problem: Problem, order: Sequence[Rank], bound: Bound, *, time_budget: float, upper: float = math.inf
) -> Bound:
    """The best bound of one rank, and of that rank with more and more of its neighbours.

    ``order``: the ranks, the most promising first.  ``bound``: what is proven already.
    """
    effort = Effort.of(time_budget)
    alone = Effort(left=effort.left / 2, deadline=effort.deadline)
    effort.left -= alone.left
    group, most = [order[0]], 0.0
    for rank in order:
        if alone.left <= 0 or bound.value >= upper:
            break
        proof = relax(problem, [rank], alone, upper=upper)
        if proof.value > most:
            group, most = [rank], proof.value
        bound = max(bound, Bound(value=proof.value, reason=f"all schedules of rank {rank.number} alone"))
    effort.left += max(0.0, alone.left)
    while len(group) < len(order) and effort.left > 0 and bound.value < upper:
        grown = []
        for rank in _neighbours(problem, group, order):
            proof = relax(problem, [*group, rank], effort, upper=upper)
            names = ", ".join(str(number) for number in sorted(r.number for r in [*group, rank]))
            bound = max(bound, Bound(value=proof.value, reason=f"all schedules of ranks {names} alone"))
            if proof.complete:
                grown.append((proof.value, rank.number, rank))
        if not grown:
            break
        group.append(max(grown)[2])
    return bound


def _neighbours(problem: Problem, group: Sequence[Rank], order: Sequence[Rank]) -> list[Rank]:
    """Ranks outside a group that hold a stage next to one of the group's, or the first or last stage.

    Neighbours take turns at a micro-batch; the first and last stage decide how long it takes to fill and to empty.
    """
    inside = {rank.number for rank in group}
    pairs = list(itertools.pairwise(problem.placement))
    near = {one for one, other in pairs if other in inside} | {other for one, other in pairs if one in inside}
    near |= {problem.placement[0], problem.placement[-1]}
    return [rank for rank in order if rank.number in near - inside]


def everything(problem: Problem, *, time_budget: float, upper: float = math.inf) -> Proof:
    """The best of all schedules below ``upper``, where memory leaves few enough of them to look at.

    The proof is complete, and its schedule optimal, or ``upper`` is (the proof then has no schedule); or the
    search gave up.  Where rows had to be merged the schedule may be slower than the bound: its makespan tells.
    """
    chain = Chain.along(Durations.of(problem))
    ranks = [rank for number in range(problem.ranks) if (rank := Rank.of(problem, chain, number)).stages]
    return relax(problem, ranks, Effort.of(time_budget), upper=upper, keep=True)


def relax(
    problem: Problem, ranks: Sequence[Rank], effort: Effort, *, upper: float = math.inf, keep: bool = False
) -> Proof:
    """Least makespan of the problem with these ranks alone as machines with memory.

    Only schedules below ``upper`` are looked at; where there are none it is the bound.  ``keep``: also say which
    is the best, which must be all ranks' then.
    """
    import numpy as np

    from stretto.schedule.synthesize.relax_kernels import CAPACITY, MEMORY, NEVER, PARENT, RANK, TIMES, expand

    ticks = Ticks.of(problem)
    ops, table_of_ranks = _operations(problem, ranks, ticks), _ranks(problem, ranks, ticks)
    takes = int(ops[0, MEMORY])
    room = int(table_of_ranks[ops[0, RANK], CAPACITY]) // takes if takes else problem.microbatches
    columns = len(ops) + 1 + len(ranks) + min(problem.microbatches, room) + 1
    rows = 4 * MOST_ROWS if keep else MOST_ROWS
    old, new = (np.zeros((rows, columns), dtype=np.int64) for _ in range(2))
    links, table = np.zeros((rows, 5), dtype=np.int64), np.zeros(4 * rows, dtype=np.int64)
    most = NEVER if math.isinf(upper) else math.ceil(upper * ticks.rate - ROUNDING) - 1
    number, value = 1, 0
    trail: list[npt.NDArray[np.int32]] = []
    for _ in range(int(ops[:, TIMES].sum())):
        number, least = expand(ops, table_of_ranks, old, number, new, links, table, most)
        if number == 0:
            return Proof(value=upper, complete=True)
        if number < 0 or not effort.spend(number * len(ops)):
            return Proof(value=value / ticks.rate, complete=False)
        value = max(value, int(least))
        if keep:
            trail.append(links[:number, PARENT:].astype(np.int32))
        old, new = new, old
    ends = old[:number, len(ops) : len(ops) + 1 + len(ranks)].max(axis=1)
    orders = _orders(problem, trail, int(ends.argmin())) if keep else None
    return Proof(value=int(ends.min()) / ticks.rate, complete=True, orders=orders)


def _orders(problem: Problem, trail: list[npt.NDArray[np.int32]], row: int) -> tuple[tuple[Operation, ...], ...]:
    """Follow a row back to the empty beginning and hand its operations to their ranks."""
    stages = range(problem.stages)
    names = [(int(Kind.F), stage) for stage in stages]
    names += [(int(Kind.I), stage) for stage in reversed(stages)] + [(int(Kind.W), stage) for stage in stages]
    ran = []
    for layer in reversed(trail):
        row, op = layer[row].tolist()
        ran.append(names[op])
    orders: list[list[Operation]] = [[] for _ in range(problem.ranks)]
    for kind, stage in reversed(ran):
        orders[problem.placement[stage]].append((kind, stage, 0))
    return tuple(tuple(order) for order in in_turn(orders))


def _operations(problem: Problem, ranks: Sequence[Rank], ticks: Ticks) -> npt.NDArray[np.int64]:
    """Rows of the kernels' columns, one per operation of these ranks along a micro-batch's way."""
    import numpy as np

    numbers = [rank.number for rank in ranks]
    stages = [stage for stage, holder in enumerate(problem.placement) if holder in numbers]
    chain, durations = Chain.along(ticks.durations), ticks.durations
    back = stages[::-1]
    held = {number: iter(rank.stages) for number, rank in zip(numbers, ranks, strict=True)}
    seen = [next(held[problem.placement[s]]) for s in stages]
    memory = [stage.whole for stage in seen]
    memory += [stage.rest - stage.whole for stage in reversed(seen)] + [-stage.rest for stage in seen]
    length = [durations.F[s] for s in stages] + [durations.I[s] for s in back] + [durations.W[s] for s in stages]
    begin = [chain.before_F[s] for s in stages] + [chain.before_I[s] for s in back]
    lag = [then - now - took for now, then, took in zip(begin, begin[1:], length, strict=False)]
    beside = [0] * len(stages)
    return np.array(
        [
            [numbers.index(problem.placement[s]) for s in stages + back + stages],
            length,
            [*lag, 0, *beside],
            [chain.after_F[s] for s in stages] + [chain.after_I[s] for s in back] + beside,
            memory,
            [problem.microbatches] * (3 * len(stages)),
            begin + beside,
        ],
        dtype=np.int64,
    ).T.copy()


def _ranks(problem: Problem, ranks: Sequence[Rank], ticks: Ticks) -> npt.NDArray[np.int64]:
    """Rows of the kernels' columns, one per rank; the last three are theirs to fill."""
    import numpy as np

    rows = []
    for rank in ranks:
        everything = problem.microbatches * sum(stage.whole for stage in rank.stages) + 1
        capacity = everything if rank.capacity is None else rank.capacity
        last = math.floor(rank.last * ticks.rate + ROUNDING)
        rows.append([capacity, last, max(0, math.floor(rank.last_idle * ticks.rate - ROUNDING)), 0, 0, 0])
    return np.array(rows, dtype=np.int64)
