"""``--schedule auto``: the best schedule that can be found in a space of placements, and how good it can be.

    every layout   bounds, the families' schedules, a short search      a layout whose bound is no better
    the better     a longer search, and moves along critical paths      than what is found already drops out
    the best       as long as the effort lasts

Effort is counted in nominal seconds (see ``search``), which a usual machine needs fewer real ones for; the
clock cuts in only on a machine that is slower, and then the result may differ from another's.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule.simulate.costs import Costs
from stretto.schedule.synthesize import seeds
from stretto.schedule.synthesize.bounds import least_memory, lower_bound
from stretto.schedule.synthesize.problem import TOLERANCE
from stretto.schedule.synthesize.relax import everything
from stretto.schedule.synthesize.space import layouts, problem_of
from stretto.schedule.synthesize.symbols import from_orders, to_schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stretto.schedule.schedule import Schedule
    from stretto.schedule.synthesize.problem import Problem
    from stretto.schedule.synthesize.search import Search
    from stretto.schedule.synthesize.space import Layout, Pricing

ROUNDS = ((99, 0.2), (4, 0.25), (2, 0.25), (1, 0.2))
"""How many layouts go on, and the share of the effort that they divide."""
EXPLORED = 0.55
"""Share of a layout's effort that goes to rules; the rest to moves."""
EFFORT = 0.7
"""Nominal seconds of search in a second of budget; the rest is for bounds, families that search, slow machines."""
SOLVED_OPERATIONS = 600
"""Problems up to here may be solved by looking at everything, where memory is scarce."""
EQUAL = 1e-9
"""Relative difference below which a schedule counts as reaching its bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The best schedule found, and how far from the best possible it can be."""

    schedule: Schedule
    """Complete and verified by construction; named ``auto``."""
    layout: str
    """Name of its placement."""
    makespan: float
    """In the costs' unit."""
    lower_bound: float
    """No schedule of the whole space is shorter."""
    reason: str
    """What makes the bound so."""

    @property
    def gap(self) -> float:
        """How much longer than the bound it is, relative."""
        return max(0.0, self.makespan / self.lower_bound - 1)

    @property
    def proven(self) -> bool:
        """Whether it is proven that nothing in the space is shorter."""
        return self.gap <= EQUAL


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One layout while the search goes on."""

    layout: Layout
    problem: Problem
    costs: Costs
    bound: float
    reason: str
    search: Search

    @property
    def makespan(self) -> float:
        """Of the best schedule found, infinite where there is none."""
        return self.search.best.makespan if self.search.best else math.inf

    @property
    def closed(self) -> bool:
        """Whether its best schedule reaches its bound."""
        return self.makespan <= self.bound * (1 + EQUAL)


def synthesize(
    *,
    microbatches: int,
    space: Sequence[Layout],
    costs: Costs | Pricing,
    memory_limit: float | Sequence[float] | None = None,
    seed: int = 0,
    time_budget: float = 10.0,
    effort: float | None = None,
) -> Result:
    """The best schedule that can be found for ``space`` in ``time_budget`` seconds (compilation not counted).

    ``effort``: nominal seconds of search; left out, as many as ``time_budget`` has room for on a usual machine.

    ``costs`` may be a function from a layout to its costs, where they differ from layout to layout.
    ``memory_limit``: one for all ranks or one per rank, in micro-batches over a rank's whole share.

    Raises ScheduleError where no schedule of the space fits the memory, saying the least that would.
    """
    _warm_up()
    effort = EFFORT * time_budget if effort is None else effort
    started = time.monotonic()
    candidates = _candidates(space, microbatches=microbatches, costs=costs, memory_limit=memory_limit, seed=seed)
    for candidate in candidates:
        candidate.search.deadline = started + time_budget
        _sow(candidate, seeds.QUICK)
    for number, (survivors, share) in enumerate(ROUNDS):
        if number == 1:
            for candidate in _worth_it(candidates):
                _sow(candidate, seeds.COSTED)
        going = _worth_it(candidates)[:survivors]
        for candidate in going:
            own = effort * share / len(going)
            candidate.search.explore(own * EXPLORED)
            candidate.search.anneal(own * (1 - EXPLORED))
    small = any(candidate.search.operations <= SOLVED_OPERATIONS for candidate in candidates)
    proving = (0.4 if small else 0.1) * effort
    _prove(candidates, time_budget=max(0.0, min(proving, started + time_budget - time.monotonic())))
    return _result(candidates)


def _result(candidates: list[Candidate]) -> Result:
    """The shortest schedule against the least bound."""
    best = min(candidates, key=lambda candidate: candidate.makespan)
    least = min(candidates, key=lambda candidate: candidate.bound)
    assert best.search.best is not None, "memory that admits one micro-batch at a time admits a schedule"
    assert best.makespan >= least.bound * (1 - EQUAL), "a bound that a schedule goes below is wrong"
    return Result(
        schedule=to_schedule(best.search.best.order, best.problem, name="auto"),
        layout=best.layout.name,
        makespan=best.makespan,
        lower_bound=least.bound,
        reason=least.reason,
    )


def _candidates(
    space: Sequence[Layout],
    *,
    microbatches: int,
    costs: Costs | Pricing,
    memory_limit: float | Sequence[float] | None,
    seed: int,
) -> list[Candidate]:
    """The layouts that the memory admits, the promising ones first."""
    from stretto.schedule.synthesize.search import Search

    found, least = [], math.inf
    for number, layout in enumerate(space):
        own = costs if isinstance(costs, Costs) else costs(layout)
        limits = _limits(memory_limit, layout.num_ranks)
        problem = problem_of(layout, microbatches=microbatches, costs=own.of(layout), limit=limits)
        needed = least_memory(problem)
        least = min(least, float(needed.max()))
        if (needed > problem.limit + TOLERANCE).any():
            continue
        bound = lower_bound(problem, time_budget=0.0)
        search = Search(problem, seed=seed * 1000 + number, target=bound.value)
        found.append(
            Candidate(layout=layout, problem=problem, costs=own, bound=bound.value, reason=bound.reason, search=search)
        )
    if not found:
        raise ScheduleError(
            f"No schedule fits a memory limit of {_say(memory_limit)}: one micro-batch alone keeps {least:.9g} alive "
            f"on the fullest rank, so the limit must be {least:.9g} or more."
        )
    return sorted(found, key=lambda candidate: candidate.bound)


def _limits(memory_limit: float | Sequence[float] | None, ranks: int) -> list[float]:
    """One limit per rank."""
    if memory_limit is None:
        return [math.inf] * ranks
    if isinstance(memory_limit, int | float):
        return [float(memory_limit)] * ranks
    if len(memory_limit) != ranks:
        raise ScheduleError(f"memory_limit has {len(memory_limit)} entries, but there are {ranks} ranks.")
    return [float(limit) for limit in memory_limit]


def _say(memory_limit: float | Sequence[float] | None) -> str:
    return f"{memory_limit:.9g}" if isinstance(memory_limit, int | float) else str(memory_limit)


def _sow(candidate: Candidate, names: Iterable[str]) -> None:
    """Offer the families' schedules."""
    for name in names:
        if candidate.search.over:
            return
        for order in seeds.starts(candidate.problem, name, costs=candidate.costs):
            candidate.search.add(order)


def _worth_it(candidates: list[Candidate]) -> list[Candidate]:
    """The layouts that might still be improved and win, the best so far first."""
    best = min(candidate.makespan for candidate in candidates)
    going = [candidate for candidate in candidates if not candidate.closed and candidate.bound < best * (1 - EQUAL)]
    return sorted(going, key=lambda candidate: candidate.makespan)


def _prove(candidates: list[Candidate], *, time_budget: float) -> None:
    """Raise the bounds of the layouts that hold the space's bound down; small ones are solved where that is quick."""
    deadline = time.monotonic() + time_budget
    for candidate in sorted(candidates, key=lambda candidate: candidate.bound):
        best = min(candidate.makespan for candidate in candidates)
        left = deadline - time.monotonic()
        if candidate.bound >= best * (1 - EQUAL) or left <= 0.05:
            return
        if candidate.search.operations <= SOLVED_OPERATIONS:
            proof = everything(candidate.problem, time_budget=left / 2, upper=best)
            if proof.orders is not None:
                candidate.search.add(from_orders(proof.orders, candidate.problem))
                best = min(best, candidate.makespan)
        bound = lower_bound(candidate.problem, time_budget=max(0.0, deadline - time.monotonic()), upper=best)
        if bound.value > candidate.bound:
            candidate.bound, candidate.reason = min(bound.value, candidate.makespan), bound.reason


def _warm_up() -> None:
    """Load or compile the loops on a problem that takes no time."""
    import numpy as np

    from stretto.schedule.synthesize.search import Search

    layout = layouts(2, chunks=(1,))[0]
    problem = problem_of(layout, microbatches=2, costs=Costs(comm=0.25).of(layout), limit=np.full(2, 1.0).tolist())
    search = Search(problem, seed=0)
    search.explore(0.0)
    search.anneal(1e-4)
    lower_bound(problem, time_budget=0.01)
