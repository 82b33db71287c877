"""Repeat blocks: their order for all micro-batches, run under several policies; the best run as a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stretto.schedule.families.blocks import work as arrays
from stretto.schedule.families.blocks.polishing import polish, retime
from stretto.schedule.families.blocks.running import run_order
from stretto.schedule.families.blocks.work import INFINITE, Numbers, Values
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    from stretto.schedule.synthesize.problem import Problem

Policy = tuple[float, float, float]
"""See ``running.run_order``."""

KINDS = np.array([Kind.F, Kind.I, Kind.W])
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """A schedule in the numbering of ``blocks.work``, and what it takes."""

    figure: float
    """Makespan, or with a weight of the span both."""
    done: Numbers
    """Operations, rank after rank."""
    start: Values
    """Start of each (3, S, M)."""


class Repeating:
    """Repeats blocks for one number of micro-batches."""

    def __init__(self, problem: Problem, microbatches: int, *, span_weight: float = 0.0) -> None:
        self.problem = problem
        self.microbatches = microbatches
        self.span_weight = span_weight
        self.work = arrays.of(problem)
        counts = np.bincount(self.work.rank_of, minlength=problem.ranks) * microbatches
        self.offsets = np.concatenate([[0], np.cumsum(counts)]) * 3
        """Where each rank's operations start among all."""

    def order(self, period: float, starts: Values) -> Numbers:
        """F and I of each rank, rank after rank, by when the repeated block starts them."""
        stages, microbatches = self.problem.stages, self.microbatches
        times = starts[:2, :, None] + period * np.arange(microbatches)
        ranks = np.broadcast_to(self.work.rank_of[None, :, None], times.shape)
        return np.lexsort((np.arange(2 * stages * microbatches), np.round(times.ravel() / period, 9), ranks.ravel()))

    def runs(self, order: Numbers, policies: Sequence[Policy], *, passes: int = 1) -> Iterator[Run]:
        """Run an order under each policy; each further pass expects what the pass before has seen."""
        shape = (self.problem.stages, self.microbatches)
        for policy in policies:
            guess = np.full((2, *shape), INFINITE)
            for _ in range(passes):
                done, start = np.empty(3 * shape[0] * shape[1], dtype=np.int64), np.empty((3, *shape))
                makespan = run_order(self.work, order, self.offsets * 2 // 3, guess, np.array(policy), done, start)
                if makespan >= INFINITE:
                    break
                yield Run(figure=self.figure(makespan, start), done=done, start=start)
                if passes > 1:
                    guess = self._arrivals(start)

    def figure(self, makespan: float, start: Values) -> float:
        """Makespan and span in their shares."""
        if self.span_weight == 0:
            return makespan
        end = start[2, :, -1] + self.work.duration[2]
        spans = [
            max(end[stage] for stage in stages) - min(start[0, stage, 0] for stage in stages)
            for stages in self.problem.chunks
        ]
        return (1 - self.span_weight) * makespan + self.span_weight * max(spans)

    def _arrivals(self, start: Values) -> Values:
        """When F and I have what they need, in a run that is over (2, S, M)."""
        work, over = self.work, start[:2] + self.work.duration[:2, :, None]
        arrive = np.zeros_like(over)
        arrive[0, 1:] = over[0, :-1] + work.comm[:, None]
        arrive[1, :-1] = over[1, 1:] + work.comm[:, None]
        arrive[1, -1] = over[0, -1]
        return arrive

    def polished(self, run: Run, *, rounds: int) -> Run:
        """The run after so many moves; never worse."""
        done, start = run.done.copy(), run.start.copy()
        figure = polish(self.work, done, self.offsets, self.span_weight, rounds, SEED, start)
        return Run(figure=figure, done=done, start=start)

    def retimed(self, run: Run) -> Run:
        """A run of other durations in its exact order."""
        start = np.empty_like(run.start)
        figure = retime(self.work, run.done, self.offsets, self.span_weight, start)
        return Run(figure=figure, done=run.done, start=start)

    def schedule(self, run: Run, *, name: str) -> Schedule:
        """The run as a schedule."""
        stages, microbatches = self.problem.stages, self.microbatches
        return Schedule.from_columns(
            kind=KINDS[run.done // (stages * microbatches)],
            stage=run.done // microbatches % stages,
            microbatch=run.done % microbatches,
            offsets=self.offsets,
            name=name,
            num_stages=stages,
            num_microbatches=microbatches,
            placement=[self.problem.placement],
        )
