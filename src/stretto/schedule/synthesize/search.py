"""Search for one problem: many rules, then moves along the critical path of the best.

    rules      thousands of priority rules, drawn at first and then varied around the best   (placing)
    nudges     the times of a good schedule as priorities, stages shifted a little           (placing)
    moves      single operations of the critical path moved within their rank's order        (annealing)

Effort is counted in nominal seconds, a fixed price per operation handled, and not by the clock: the same
seed finds the same schedule on any machine that is given the time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stretto.schedule.synthesize import rules
from stretto.schedule.synthesize.annealing import Cooling, anneal
from stretto.schedule.synthesize.placing import INFINITE, Guidance, place
from stretto.schedule.synthesize.tables import tables_of
from stretto.schedule.synthesize.timing import desk_for, keeps, retime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stretto.schedule.synthesize.problem import Problem
    from stretto.schedule.synthesize.rules import Rule
    from stretto.schedule.synthesize.tables import Symbols, Values

POOL = 10
"""Good schedules that are kept to vary."""
RULE_SECONDS, PLACE_SECONDS = 90e-6, 0.12e-6
"""Nominal price of trying a rule: once, and per operation."""
MOVE_SECONDS, RETIME_SECONDS = 0.4e-6, 0.007e-6
"""Nominal price of a move: once, and per operation."""
THOROUGH = 500
"""Moves per operation that let a chain start hot."""
HOT, WARM = (0.3, 1.0, 0.1), (0.1, 0.03)
"""Temperatures that chains start from, over a rank's mean time for F, I or W."""
COOLED = 0.02
"""The last temperature of a chain over its first."""
WAITED = 1.02
"""What a schedule may be longer than the worst of the pool before its waits are taken out."""
SMALLEST = 1e-9
"""Makespans closer than this count as equal."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """A schedule that fits."""

    makespan: float
    order: Symbols
    """(R, n) symbols, see ``placing``."""
    rule: Rule | None
    """That made it, where one did."""


class Search:
    """The best orders found so far for one problem."""

    def __init__(self, problem: Problem, *, seed: int, target: float = 0.0, deadline: float = np.inf) -> None:
        """``target``: a makespan that can't be improved upon; ``deadline``: on ``time.monotonic``, when to stop."""
        self.problem = problem
        self.tables = tables_of(problem)
        self.operations = int(self.tables.length.sum())
        self.random = np.random.default_rng(seed)
        self.target = target
        self.deadline = deadline
        self.pool: list[Found] = []
        self.annealed: set[float] = set()
        self.chains = 0
        self._order = np.zeros((problem.ranks, int(self.tables.length.max())), dtype=np.int64)
        self._desk = desk_for(self.tables)
        self._end = np.zeros((3, problem.stages, problem.microbatches))

    @property
    def best(self) -> Found | None:
        """The shortest, None where nothing has fitted."""
        return self.pool[0] if self.pool else None

    @property
    def over(self) -> bool:
        """Whether there is nothing left to gain, or no time."""
        done = self.best is not None and self.best.makespan <= self.target * (1 + SMALLEST) + SMALLEST
        return done or time.monotonic() > self.deadline

    def add(self, order: Symbols) -> float:
        """Offer a schedule's orders; returns its makespan, infinite where it doesn't fit."""
        if not all(keeps(self.tables, order, rank) for rank in range(self.problem.ranks)):
            return np.inf
        makespan = retime(self.tables, order, self._desk)
        self._keep(makespan, order, None)
        return makespan if makespan < INFINITE else np.inf

    def explore(self, seconds: float) -> None:
        """Try rules: drawn ones at first, variations of the best more and more, nudged schedules towards the end."""
        price = RULE_SECONDS + PLACE_SECONDS * self.operations
        tries = max(3, round(seconds / price))
        for turn in range(tries):
            if self.over and self.pool:  # without a schedule there must be one, whatever the time
                return
            sources = [found for found in self.pool if found.rule is not None]
            chance = self.random.random()
            if len(sources) < 3 or chance < 0.5 * (1 - turn / tries):
                self._try(rules.draw(self.random, self.problem))
            elif chance < 0.85 or not self.pool:
                rule = self._pick(sources).rule
                assert rule is not None
                self._try(rules.vary(self.random, rule, self.problem))
            else:
                self._nudge(self._pick(self.pool))

    def anneal(self, seconds: float) -> None:
        """Move single operations of the best schedules."""
        operations = self.operations
        tries = round(seconds / (MOVE_SECONDS + RETIME_SECONDS * operations))
        chains = max(1, min(len(self.pool), tries // (THOROUGH * operations)))
        temperatures = HOT if tries // chains >= THOROUGH * operations / 2 else WARM
        mean = float(self.problem.work.max()) / 3
        for _ in range(chains):
            if self.over or not self.pool:
                return
            fresh = [found for found in self.pool if found.makespan not in self.annealed]
            start = fresh[0] if fresh else self._pick(self.pool)
            self.annealed.add(start.makespan)
            hot = mean * temperatures[self.chains % len(temperatures)]
            self.chains += 1
            self._anneal(start, hot=hot, tries=max(1, tries // chains))

    def _anneal(self, start: Found, *, hot: float, tries: int) -> None:
        """One run of moves, in parts so that the clock is looked at."""
        order = start.order.copy()
        part = max(200, round(0.2 / (MOVE_SECONDS + RETIME_SECONDS * self.operations)))
        for first in range(0, tries, part):
            if self.over:
                return
            last = min(first + part, tries)
            warm, cold = (hot * COOLED ** (at / tries) for at in (first, last))
            seed = int(self.random.integers(1 << 30))
            self._keep(anneal(self.tables, order, Cooling(last - first, warm, cold, seed)), order, None)

    def _try(self, rule: Rule) -> None:
        """List scheduling by a rule."""
        priority = rules.priorities(rule, self.problem)
        release = rules.releases(rule, self.problem, priority)
        self._place(priority, rules.caps(rule, self.problem), release, rule.patience, rule)

    def _nudge(self, found: Found) -> None:
        """List scheduling by the times of a schedule, some stages shifted."""
        problem, random = self.problem, self.random
        retime(self.tables, found.order, self._desk)
        start = self._desk.end.reshape(self._end.shape) - self.tables.duration[:, :, None]
        mean = float(problem.work.max()) / 3
        for _ in range(int(random.integers(1, 4))):
            kind, stage = random.integers(3), int(random.integers(problem.stages))
            stop = stage + 1 + int(random.exponential(problem.stages / 8))
            start[kind, stage:stop] += mean * random.normal() * random.choice((0.2, 1.0))
        cap = np.full(problem.stages, np.inf) if found.rule is None else rules.caps(found.rule, problem)
        self._place(start, cap, np.zeros(start.shape[1:]), float(random.choice(rules.PATIENCE)), found.rule)

    def _place(self, priority: Values, cap: Values, release: Values, patience: float, rule: Rule | None) -> None:
        guidance = Guidance(priority, release, np.minimum(cap, 1e30), patience)
        makespan = place(self.tables, guidance, self._order, self._end)
        if makespan < INFINITE and (len(self.pool) < POOL or makespan < self.pool[-1].makespan * WAITED):
            makespan = retime(self.tables, self._order, self._desk)  # without the waits, which only served to choose
            self._keep(makespan, self._order, rule)

    def _keep(self, makespan: float, order: Symbols, rule: Rule | None) -> None:
        """Into the pool, if it is good and unlike the others."""
        if makespan >= INFINITE or (len(self.pool) == POOL and makespan >= self.pool[-1].makespan):
            return
        if any(abs(found.makespan - makespan) < SMALLEST for found in self.pool):
            return
        self.pool.append(Found(makespan=float(makespan), order=order.copy(), rule=rule))
        self.pool.sort(key=lambda found: found.makespan)
        del self.pool[POOL:]

    def _pick(self, found: Sequence[Found]) -> Found:
        """One of them, the better ones more often."""
        return found[min(int(self.random.exponential(2.0)), len(found) - 1)]
