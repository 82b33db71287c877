"""Priority rules: a few numbers that say when each operation should happen, were there no other.

Micro-batch after micro-batch enters the pipeline at an even pace and passes it at a given speed:

    time ──►    0F0 1F0 2F0 3F0     3I0 2I0 1I0 0I0        chunk by chunk, passes may be stretched
                    0F1 1F1 2F1 3F1     3I1 2I1 1I1 0I1    each micro-batch a pace later than the last
                └──────────────┘└──┘                       the turn may wait, W may lag behind its I

List scheduling by these times (``placing``) repairs what collides.  1F1B, its interleaved forms, zero
bubble and the V family are all near some such rule (Qi et al. 2024, controllable memory, calls one
micro-batch's part of it a building block); searching the few numbers finds them and what lies between.

Two restraints come with a rule: places of a rank's memory that earlier chunks leave free for later ones, and
patience, how long a free rank waits for a better operation that is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from stretto.schedule.synthesize.problem import Problem

    Values = npt.NDArray[np.float64]

LAGS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 100.0)
"""Scales of W's lag behind I, in mean operations of a rank; the last is "never before it must"."""
PATIENCE = (0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5)
"""Fractions of an operation that a rank may wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule; V chunks."""

    forward: Values
    """Logarithm of the stretch of the forward pass, per chunk (V,)."""
    backward: Values
    """Likewise of the backward pass."""
    turn: float
    """Wait between the last F and the first I, in mean operations."""
    lag: Values
    """Wait between I and W, per chunk, in mean operations."""
    pace: float
    """Logarithm of the time between two micro-batches over a rank's work for one."""
    reserve: Values | None
    """Places that the chunks up to each one leave free for later ones (V - 1,); None: no such restraint."""
    slope: float
    """By how many places the reserve grows from the first rank to the last."""
    patience: float
    """How long a rank waits for a better operation, over the duration of the one it could start."""
    held: int
    """Chunks whose F don't start before the rule's time, even on an idle rank; they would only take memory."""


def draw(random: np.random.Generator, problem: Problem) -> Rule:
    """Any rule."""
    chunks = _depth(problem)
    forward, backward = random.normal(0, 0.6), random.normal(0, 0.6)
    held = int(random.choice((0, 0, 1, chunks)))
    reserved = int(random.integers(-1, 3))
    places = float(np.nan_to_num(problem.limit, posinf=1.0).max() / problem.activation.mean())
    return Rule(
        forward=forward + random.normal(0, 0.2, chunks),
        backward=backward + random.normal(0, 0.2, chunks),
        turn=random.uniform(-2, 4),
        lag=np.full(chunks, random.choice(LAGS) * random.random()),
        pace=abs(random.normal(0, 0.3)) if held else random.normal(0, 0.3),
        reserve=None if reserved < 0 else np.full(chunks - 1, float(reserved)),
        slope=0.15 * places * random.normal() if random.random() < 0.5 else 0.0,
        patience=float(random.choice(PATIENCE)),
        held=held,
    )


def vary(random: np.random.Generator, rule: Rule, problem: Problem) -> Rule:
    """A rule near another."""
    chunks = len(rule.forward)
    for _ in range(int(random.integers(1, 4))):
        what = int(random.integers(9))
        one = np.eye(chunks)[random.integers(chunks)] if random.random() < 0.5 else np.ones(chunks)
        if what == 0:
            rule = replace(rule, forward=rule.forward + one * random.normal(0, 0.3))
        elif what == 1:
            rule = replace(rule, backward=rule.backward + one * random.normal(0, 0.3))
        elif what == 2:
            rule = replace(rule, lag=np.where(one > 0, random.choice(LAGS) * random.random(), rule.lag))
        elif what == 3:
            rule = replace(rule, lag=rule.lag * np.exp(one * random.normal(0, 0.7)))
        elif what == 4:
            rule = replace(rule, turn=rule.turn + random.normal())
        elif what == 5:
            rule = replace(rule, pace=rule.pace + random.normal(0, random.choice((0.15, 0.03))))
        elif what == 6:
            rule = _vary_reserve(random, rule, problem)
        elif what == 7:
            rule = replace(rule, patience=float(random.choice(PATIENCE)))
        else:
            rule = replace(rule, held=int(random.integers(chunks + 1)))
    return rule


def _vary_reserve(random: np.random.Generator, rule: Rule, problem: Problem) -> Rule:
    """One place more or less, or another slope."""
    if rule.reserve is None or not len(rule.reserve):
        return replace(rule, reserve=np.ones(len(rule.forward) - 1))
    if random.random() < 0.3:
        places = float(np.nan_to_num(problem.limit, posinf=1.0).max() / problem.activation.mean())
        return replace(rule, slope=rule.slope + 0.1 * places * random.normal())
    reserve = rule.reserve.copy()
    reserve[random.integers(len(reserve))] += random.choice((-1.0, 1.0))
    return replace(rule, reserve=reserve)


def priorities(rule: Rule, problem: Problem) -> Values:
    """The rule's time of each operation, (3, S, M) for F, I, W."""
    stages = problem.stages
    chunk = _chunk_of(problem)
    work = float(problem.work.max())
    mean = work / (3 * stages / problem.ranks)
    latency = np.append(problem.comm, 0.0)
    forward = np.exp(rule.forward)[chunk] * (problem.F + latency)
    backward = np.exp(rule.backward)[chunk] * (problem.I + np.append(0.0, problem.comm))
    at_forward = np.cumsum(forward) - forward
    returned = np.cumsum(backward[::-1])[::-1] - backward
    at_backward = at_forward[-1] + forward[-1] + rule.turn * mean + returned
    at_weights = at_backward + problem.I + rule.lag[chunk] * mean
    pace = np.arange(problem.microbatches) * work * np.exp(rule.pace)
    return np.stack((at_forward, at_backward, at_weights))[:, :, None] + pace


def releases(rule: Rule, problem: Problem, priority: Values) -> Values:
    """Time before which no F of a stage starts, (S, M)."""
    return np.where(_chunk_of(problem)[:, None] < rule.held, priority[0] - priority[0, 0, 0], 0.0)


def caps(rule: Rule, problem: Problem) -> Values:
    """Memory that the chunks of a rank up to each stage may take together, (S,)."""
    cap = np.full(problem.stages, np.inf)
    if rule.reserve is None:
        return cap
    for rank, held in enumerate(problem.chunks):
        along = rank / max(problem.ranks - 1, 1) - 0.5
        places = np.maximum(0, np.round(rule.reserve + rule.slope * along))
        needed = np.cumsum(problem.activation[list(held)])
        for index, stage in enumerate(held):
            later = sum(
                float(places[min(other, len(places) - 1)]) * problem.activation[held[other + 1]]
                for other in range(index, len(held) - 1)
            )
            cap[stage] = max(problem.limit[rank] - later, needed[index])
    return cap


def _depth(problem: Problem) -> int:
    """Most chunks that a rank holds."""
    return max(len(held) for held in problem.chunks)


def _chunk_of(problem: Problem) -> npt.NDArray[np.int64]:
    """Which of its rank's chunks each stage is (S,)."""
    chunk = np.zeros(problem.stages, dtype=np.int64)
    for held in problem.chunks:
        chunk[list(held)] = range(len(held))
    return chunk
