"""Times of given orders, with micro-batches in turn: what the exact solver starts from and is judged by.

An order is rows of kind, stage, micro-batch, one array (n, 3) per rank.  Kinds are those of ``op.Kind``; a B counts
as I with its W right behind.  Micro-batches are alike, so the n-th F of a stage may be called micro-batch n's,
and so may its n-th I and W: times and memory stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from stretto.schedule.op import Kind
from stretto.schedule.synthesize.problem import TOLERANCE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.synthesize.problem import Problem

    Order = npt.NDArray[np.int64]

Number = TypeVar("Number", int, float)
Operation = tuple[int, int, int]
"""Kind, stage, micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations(Generic[Number]):
    """Times of a problem in whatever number type its user counts in, one entry per stage."""

    F: Sequence[Number]
    I: Sequence[Number]  # noqa: E741
    W: Sequence[Number]
    comm: Sequence[Number]

    @staticmethod
    def of(problem: Problem) -> Durations[float]:
        """As the problem gives them."""
        return Durations(F=problem.F.tolist(), I=problem.I.tolist(), W=problem.W.tolist(), comm=problem.comm.tolist())

    def __getitem__(self, kind: int) -> Sequence[Number]:
        """Time of a kind on each stage."""
        return self.F if kind == Kind.F else self.I if kind == Kind.I else self.W


def in_turn(orders: Iterable[Iterable[Sequence[int]]]) -> list[list[Operation]]:
    """The same orders with every B split and micro-batches named in turn on each stage."""
    renamed: list[list[Operation]] = []
    for order in orders:
        seen: dict[tuple[int, int], int] = {}
        row: list[Operation] = []
        for given, stage, _ in order:
            for kind in (Kind.I, Kind.W) if given == Kind.B else (Kind(int(given)),):
                turn = seen.get((kind, stage), 0)
                seen[kind, stage] = turn + 1
                row.append((int(kind), int(stage), turn))
        renamed.append(row)
    return renamed


def one_by_one(problem: Problem) -> list[list[Operation]]:
    """One micro-batch after another: the schedule that needs the least memory."""
    return [
        [
            operation
            for microbatch in range(problem.microbatches)
            for operation in [(int(Kind.F), stage, microbatch) for stage in stages]
            + [(int(kind), stage, microbatch) for stage in reversed(stages) for kind in (Kind.I, Kind.W)]
        ]
        for stages in problem.chunks
    ]


def columns(orders: Sequence[Sequence[Operation]]) -> list[Order]:
    """Orders as one array (n, 3) per rank."""
    import numpy as np

    return [np.array(order, dtype=np.int64).reshape(-1, 3) for order in orders]


def starts(orders: Sequence[Sequence[Operation]], durations: Durations[Number]) -> dict[Operation, Number] | None:
    """Earliest start of each operation, None where the orders wait for each other in a circle."""
    last = len(durations.F) - 1
    position, free = [0] * len(orders), [0 * durations.F[0]] * len(orders)
    start: dict[Operation, Number] = {}
    waiting: dict[Operation, int] = {}
    ready = list(range(len(orders)))
    while ready:
        rank = ready.pop()
        while position[rank] < len(orders[rank]):
            operation = orders[rank][position[rank]]
            at, missing = free[rank], None
            for need, latency in needs(operation, last, durations.comm):
                if need not in start:
                    missing = need
                    break
                at = max(at, start[need] + durations[need[0]][need[1]] + latency)
            if missing is not None:
                waiting[missing] = rank
                break
            start[operation] = at
            free[rank] = at + durations[operation[0]][operation[1]]
            position[rank] += 1
            if operation in waiting:
                ready.append(waiting.pop(operation))
    done = all(at == len(order) for at, order in zip(position, orders, strict=True))
    return start if done else None


def needs(operation: Operation, last: int, comm: Sequence[Number]) -> list[tuple[Operation, Number]]:
    """What must be over before an operation, and the latency from there."""
    kind, stage, microbatch = operation
    if kind == Kind.F:
        return [((kind, stage - 1, microbatch), comm[stage - 1])] if stage else []
    if kind == Kind.W:
        return [((int(Kind.I), stage, microbatch), 0)]
    if stage == last:
        return [((int(Kind.F), stage, microbatch), 0)]
    return [((kind, stage + 1, microbatch), comm[stage])]


def makespan(orders: Iterable[Iterable[Sequence[int]]], problem: Problem) -> float | None:
    """Time that orders take, from 0 to the last end; None where they never end."""
    durations = Durations.of(problem)
    start = starts(in_turn(orders), durations)
    if start is None:
        return None
    return max(at + durations[kind][stage] for (kind, stage, _), at in start.items())


def fits(orders: Iterable[Iterable[Sequence[int]]], problem: Problem) -> bool:
    """Whether every rank stays within its memory limit."""
    whole = problem.activation.tolist()
    rest = (problem.activation * problem.act_w).tolist()
    for rank, order in enumerate(in_turn(orders)):
        held = 0.0
        for kind, stage, _ in order:
            if kind == Kind.F:
                held += whole[stage]
                if held > problem.limit[rank] + TOLERANCE:
                    return False
            else:
                held -= whole[stage] - rest[stage] if kind == Kind.I else rest[stage]
    return True
