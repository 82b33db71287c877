"""One window of a schedule in its best order: how a long schedule is improved by an exact solver.

    rank 0  FFFFIWIF│WIWFFI│WIFWIW       before: fixed    in the window: any order
    rank 1   FFFIFIW│IFWFIW│IWIWW        after: the same order, as early as it goes

Only the window is modelled: of what comes before, its ends count; of what comes after, the longest way from each of
its operations to the end of the schedule.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.synthesize import exact
from stretto.schedule.synthesize.exact import F, I, W
from stretto.schedule.synthesize.replay import Durations, Operation, in_turn, starts
from stretto.schedule.synthesize.ticks import Ticks

if TYPE_CHECKING:
    from stretto.schedule.synthesize.problem import Problem

LARGEST = 2**24
"""Largest whole time: two makespans are multiplied in the objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The part of a schedule that may change: what starts in a stretch of time, on some ranks."""

    begin: float
    """Operations that start before this stay where they are."""
    end: float
    """Operations that start at this time or after keep their order."""
    ranks: frozenset[int] | None = None
    """Ranks whose order may change, None: all."""


def improve(
    problem: Problem, orders: exact.Orders, window: Window, *, time_budget: float, seed: int = 0
) -> exact.Solution | None:
    """The same schedule with the operations of a window in the best order found, None where it doesn't fit.

    What starts before the window stays; what starts after it keeps its order on each rank and moves up.  Of equal
    makespans the one whose ranks are done earlier is taken, so that windows searched in turn add up.
    """
    known = in_turn(orders)
    clock = Ticks.of(problem, largest=LARGEST)
    model = WindowModel(problem, clock, known, window)
    answer = model.search(time_budget=time_budget, seed=seed)
    if not answer.starts:
        return None
    changed = [before + sorted(inside, key=answer.starts.__getitem__) + after for before, inside, after in model.parts]
    return exact.best_of([changed], problem, bound=answer.bound / clock.rate)


class WindowModel:
    """A schedule of which one window may change.

    What starts before is constant.  What starts after keeps its order, so all that counts of it is the longest
    way to the end from each operation that the window leads to: the model holds the window alone.
    """

    def __init__(self, problem: Problem, clock: Ticks, orders: list[list[Operation]], window: Window) -> None:
        """Cut the schedule in three and model the middle."""
        self.problem, self.durations = problem, clock.durations
        self.model = exact.new_model()
        exactly, times = starts(orders, Durations.of(problem)), starts(orders, clock.durations)
        assert exactly is not None and times is not None, "the schedule to improve must end"
        self.parts = [_cut(order, exactly, window) for order in orders]
        self.times = times
        now = max(at + clock.durations[kind][stage] for (kind, stage, _), at in self.times.items())
        self.start = {
            operation: self.model.new_int_var(0, now, "") for _, inside, _ in self.parts for operation in inside
        }
        self.makespan = self.model.new_int_var(0, now, "")
        self.model.add_hint(self.makespan, now)
        for operation, variable in self.start.items():
            self.model.add_hint(variable, self.times[operation])
        self.rest = self._rest(sorted((key for _, _, after in self.parts for key in after), key=exactly.__getitem__))
        self._arrows()
        ends = [self._rank(rank, now, window) for rank in range(problem.ranks)]
        self.model.minimize(self.makespan * (len(ends) * now + 1) + sum(ends))
        self.worth = len(ends) * now + 1

    def _followers(self, operation: Operation) -> list[tuple[Operation, int]]:
        """What waits for an operation on its micro-batch's way, and the latency to it."""
        kind, stage, turn = operation
        last, comm = self.problem.stages - 1, self.durations.comm
        if kind == W:
            return []
        if kind == F:
            return [((F, stage + 1, turn), comm[stage])] if stage < last else [((I, stage, turn), 0)]
        own: list[tuple[Operation, int]] = [((W, stage, turn), 0)]
        return own + ([((I, stage - 1, turn), comm[stage - 1])] if stage else [])

    def _rest(self, after: list[Operation]) -> dict[Operation, int]:
        """Longest way from the start of each operation behind the window to the end."""
        following = {key: behind for _, _, row in self.parts for key, behind in itertools.pairwise(row)}
        rest: dict[Operation, int] = {}
        for operation in reversed(after):
            ways = [latency + rest[behind] for behind, latency in self._followers(operation)]
            if operation in following:
                ways.append(rest[following[operation]])
            rest[operation] = self.durations[operation[0]][operation[1]] + max(ways, default=0)
        return rest

    def _arrows(self) -> None:
        """From what is fixed into the window, within it, and out of it to the end."""
        for before, inside, _ in self.parts:
            for operation in before + inside:
                at = self.start.get(operation, self.times[operation])
                over = at + self.durations[operation[0]][operation[1]]
                self.model.add(self.makespan >= over)
                for behind, latency in self._followers(operation):
                    if behind in self.start:
                        self.model.add(self.start[behind] >= over + latency)
                    elif behind in self.rest:
                        self.model.add(self.makespan >= over + latency + self.rest[behind])

    def _rank(self, rank: int, now: int, window: Window) -> exact.Variable:
        """One rank's window as a machine with memory; returns the time at which it is through."""
        before, inside, after = self.parts[rank]
        free = max((self.times[key] + self.durations[key[0]][key[1]] for key in before), default=0)
        through = self.model.new_int_var(free, now, "")
        for operation in inside:
            self.model.add(self.start[operation] >= free)
            self.model.add(through >= self.start[operation] + self.durations[operation[0]][operation[1]])
        if after:
            self.model.add(self.makespan >= through + self.rest[after[0]])
        if window.ranks is None or rank in window.ranks:
            self._free(inside, held=_held(before, self.problem))
        else:
            for operation, behind in itertools.pairwise(inside):
                length = self.durations[operation[0]][operation[1]]
                self.model.add(self.start[behind] >= self.start[operation] + length)
        return through

    def _free(self, inside: list[Operation], *, held: float) -> None:
        """Any order within the memory limit, micro-batches in turn."""
        for operation in inside:
            before = (operation[0], operation[1], operation[2] - 1)
            if before in self.start:
                length = self.durations[operation[0]][operation[1]]
                self.model.add(self.start[operation] >= self.start[before] + length)
        exact.machine(self.model, inside, self.start, self.durations)
        exact.memory(self.model, inside, self.start, problem=self.problem, durations=self.durations, held=held)

    def search(self, *, time_budget: float, seed: int) -> exact.Answer:
        """Least makespan, then least time at which the ranks are through."""
        answer = exact.run(self.model, self.start, time_budget=time_budget, seed=seed, workers=1)
        return exact.Answer(bound=answer.bound // self.worth, starts=answer.starts)


def _cut(
    order: list[Operation], times: dict[Operation, float], window: Window
) -> tuple[list[Operation], list[Operation], list[Operation]]:
    """What a rank starts before, in and after a window."""
    begin = sum(times[operation] < window.begin for operation in order)
    end = max(begin, sum(times[operation] < window.end for operation in order))
    return order[:begin], order[begin:end], order[end:]


def _held(order: list[Operation], problem: Problem) -> float:
    """Memory that a rank holds after these operations."""
    held = 0.0
    for kind, stage, _ in order:
        whole = float(problem.activation[stage])
        rest = whole * float(problem.act_w[stage])
        held += whole if kind == F else rest - whole if kind == I else -rest
    return held
