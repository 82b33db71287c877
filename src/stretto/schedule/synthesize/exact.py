"""The best schedule of a small problem, by CP-SAT; ``window`` uses its parts on long schedules.

Variables are the starts of F, I and W of each stage and micro-batch, in whole steps of time.  A rank is a
machine that runs one interval at a time; its memory is a level that F raises and W (and I) lowers.
Micro-batches are alike, so each stage takes them in turn: that alone removes M! equal schedules.

Times are whole numbers, rounded down where they must be (``ticks``): the bound stays true, and orders found are timed
with the true values.

With one worker the solver repeats itself exactly: its limit is work done (deterministic time), not the clock, which
only guards against a machine far slower than ours.  The one file that imports ortools (extra ``synthesize``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from stretto.schedule.op import Kind
from stretto.schedule.synthesize.bounds import common_measure, lower_bound
from stretto.schedule.synthesize.chain import Chain
from stretto.schedule.synthesize.problem import TOLERANCE
from stretto.schedule.synthesize.replay import (
    Durations,
    Operation,
    columns,
    fits,
    in_turn,
    makespan,
    one_by_one,
    starts,
)
from stretto.schedule.synthesize.ticks import Ticks

if TYPE_CHECKING:
    from stretto.schedule.synthesize.problem import Problem
    from stretto.schedule.synthesize.replay import Order


Orders = Iterable[Iterable[Sequence[int]]]
F, I, W = int(Kind.F), int(Kind.I), int(Kind.W)  # noqa: E741
Variable = cp_model.IntVar
new_model = cp_model.CpModel

MEMORY_STEPS = 10**9
"""Steps of one memory unit where activations have no common measure; rounding 500 of them stays below TOLERANCE."""
GUARD = 6.0
"""The clock may run this many times the budget before a search that should be over is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a search found and what it proved."""

    orders: list[Order]
    """One array (n, 3) of kind, stage, micro-batch per rank."""
    makespan: float
    """Of these orders, in the problem's unit of time."""
    bound: float
    """None that was searched is faster."""

    @property
    def optimal(self) -> bool:
        """Whether none is faster."""
        return self.makespan <= self.bound * (1 + 1e-9)


def solve(
    problem: Problem, *, time_budget: float, seed: int = 0, hint: Orders | None = None, workers: int = 1
) -> Solution | None:
    """The best schedule found in about ``time_budget`` seconds, None where the memory limit admits none.

    ``hint`` is a schedule within the memory limit to start from and to improve on (without it, one micro-batch
    after another); it is returned where nothing better was found.
    """
    known = in_turn(hint) if hint is not None else one_by_one(problem)
    if not fits(known, problem):
        return None
    clock = Ticks.of(problem)
    model = Model(problem, clock)
    floor = lower_bound(problem, time_budget=0).value
    model.above(floor)
    model.start_from(known)
    answer = model.search(time_budget=time_budget, seed=seed, workers=workers)
    found = [known]
    if answer.starts:
        found.append([sorted(row, key=answer.starts.__getitem__) for row in model.rows()])
    return best_of(found, problem, bound=max(floor, answer.bound / clock.rate))


def best_of(found: list[list[list[Operation]]], problem: Problem, *, bound: float) -> Solution | None:
    """The fastest of some orders that keep to the memory limit."""
    solutions = [
        Solution(orders=columns(orders), makespan=time, bound=bound)
        for orders in found
        if fits(orders, problem) and (time := makespan(orders, problem)) is not None
    ]
    return min(solutions, key=lambda solution: solution.makespan, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the solver says, in ticks."""

    bound: int
    starts: dict[Operation, int] | None


def run(
    model: cp_model.CpModel, start: dict[Operation, Variable], *, time_budget: float, seed: int, workers: int
) -> Answer:
    """Search until done or out of budget."""
    solver = cp_model.CpSolver()
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = workers
    solver.parameters.max_deterministic_time = time_budget
    solver.parameters.max_time_in_seconds = time_budget * GUARD if workers == 1 else time_budget
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(bound=math.ceil(max(0.0, solver.best_objective_bound) - 1e-6), starts=None)
    found = {operation: solver.value(variable) for operation, variable in start.items()}
    return Answer(bound=math.ceil(solver.best_objective_bound - 1e-6), starts=found)


class Model:
    """A problem as CP-SAT sees it."""

    def __init__(self, problem: Problem, clock: Ticks) -> None:
        """Variables and constraints of all operations."""
        self.problem, self.clock = problem, clock
        self.model = cp_model.CpModel()
        durations = clock.durations
        self.chain = Chain.along(durations)
        self.makespan = self.model.new_int_var(0, clock.horizon, "")
        self.start: dict[Operation, Variable] = {}
        for stage in range(problem.stages):
            self._add_stage(stage)
        for microbatch in range(problem.microbatches):
            self._add_arrows(microbatch)
        for rank in range(problem.ranks):
            operations = [key for key in self.start if problem.placement[key[1]] == rank]
            machine(self.model, operations, self.start, durations)
            memory(self.model, operations, self.start, problem=problem, durations=durations)
        self.model.minimize(self.makespan)

    def _add_stage(self, stage: int) -> None:
        """F, I and W of one stage, micro-batches in turn, between what comes before and after at the least."""
        chain, durations, M = self.chain, self.clock.durations, self.problem.microbatches
        done = chain.before_I[stage] + durations.I[stage]
        around = {
            F: (chain.before_F[stage], chain.after_F[stage]),
            I: (chain.before_I[stage], chain.after_I[stage]),
            W: (done, 0),
        }
        for kind, (before, after) in around.items():
            length = durations[kind][stage]
            for turn in range(M):
                least = before + turn * length
                most = self.clock.horizon - after - (M - turn) * length
                variable = self.model.new_int_var(least, most, "")
                self.start[kind, stage, turn] = variable
                if turn:
                    self.model.add(variable >= self.start[kind, stage, turn - 1] + length)
            self.model.add(self.makespan >= self.start[kind, stage, M - 1] + length + after)

    def _add_arrows(self, microbatch: int) -> None:
        """A micro-batch's way from stage to stage, there and back."""
        chain, start, add = self.chain, self.start, self.model.add
        stages = range(self.problem.stages)
        for here, there in itertools.pairwise(stages):
            lag = chain.before_F[there] - chain.before_F[here]
            add(start[F, there, microbatch] >= start[F, here, microbatch] + lag)
            lag = chain.before_I[here] - chain.before_I[there]
            add(start[I, here, microbatch] >= start[I, there, microbatch] + lag)
        last = stages[-1]
        lag = chain.before_I[last] - chain.before_F[last]
        add(start[I, last, microbatch] >= start[F, last, microbatch] + lag)
        for stage in stages:
            add(start[W, stage, microbatch] >= start[I, stage, microbatch] + self.clock.durations.I[stage])

    def rows(self) -> list[list[Operation]]:
        """The operations of each rank, in no order."""
        return [
            [key for key in self.start if self.problem.placement[key[1]] == rank] for rank in range(self.problem.ranks)
        ]

    def start_from(self, orders: list[list[Operation]]) -> None:
        """Take a schedule as the first solution; nothing slower is looked at."""
        times = starts(orders, self.clock.durations)
        if times is None:
            return
        for operation, variable in self.start.items():
            self.model.add_hint(variable, times[operation])
        ends = [at + self.clock.durations[kind][stage] for (kind, stage, _), at in times.items()]
        self.model.add_hint(self.makespan, max(ends))
        self.model.add(self.makespan <= max(ends))

    def above(self, bound: float) -> None:
        """Tell the solver of a bound that is proven already."""
        if math.isfinite(bound):
            self.model.add(self.makespan >= math.ceil(bound * self.clock.rate - 1e-6))

    def search(self, *, time_budget: float, seed: int, workers: int) -> Answer:
        """Least makespan."""
        return run(self.model, self.start, time_budget=time_budget, seed=seed, workers=workers)


def machine(
    model: cp_model.CpModel, operations: list[Operation], start: dict[Operation, Variable], durations: Durations[int]
) -> None:
    """One operation at a time."""
    model.add_no_overlap(
        [model.new_fixed_size_interval_var(start[key], durations[key[0]][key[1]], "") for key in operations]
    )


def memory(
    model: cp_model.CpModel,
    operations: list[Operation],
    start: dict[Operation, Variable],
    *,
    problem: Problem,
    durations: Durations[int],
    held: float = 0.0,
) -> None:
    """The level of one rank's memory never goes above its limit; ``held`` is what it is before all of this."""
    rank = problem.placement[operations[0][1]] if operations else 0
    if not math.isfinite(problem.limit[rank]):
        return
    stages = sorted({stage for _, stage, _ in operations})
    whole = {stage: float(problem.activation[stage]) for stage in stages}
    rest = {stage: float(problem.activation[stage] * problem.act_w[stage]) for stage in stages}
    step = common_measure([*whole.values(), *rest.values(), held]) or 1 / MEMORY_STEPS
    most = math.floor((float(problem.limit[rank]) + TOLERANCE) / step)
    if len(stages) == 1 and rest == whole:
        in_flight = most // max(1, math.floor(whole[stages[0]] / step + 1e-6))
        for kind, stage, turn in operations:
            if kind == F and turn >= in_flight:
                leaver = (W, stage, turn - in_flight)
                if leaver in start:
                    model.add(start[kind, stage, turn] >= start[leaver] + durations.W[stage])
        return
    times: list[cp_model.LinearExprT] = [0]
    changes = [math.floor(held / step + 1e-6)]
    for kind, stage, turn in operations:
        given_back = rest[stage] if kind == W else whole[stage] - rest[stage]
        change = math.floor(whole[stage] / step + 1e-6) if kind == F else -math.ceil(given_back / step - 1e-6)
        at = start[kind, stage, turn]
        times.append(at if kind == F else at + durations[kind][stage])
        changes.append(change)
    model.add_reservoir_constraint(times, changes, -sum(abs(change) for change in changes), most)
