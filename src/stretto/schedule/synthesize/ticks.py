"""A problem's times as whole numbers, for methods that compare and count them exactly.

Times are multiplied by their common denominator.  Where that is too fine they are rounded *down*: every schedule only
gets shorter, so what is proven of the whole times is true of the problem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from stretto.schedule.synthesize.replay import Durations

if TYPE_CHECKING:
    from stretto.schedule.synthesize.problem import Problem

LARGEST = 2**40
"""Largest whole time that anyone need compute with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticks:
    """Whole times."""

    durations: Durations[int]
    """Of each stage, in ticks."""
    rate: float
    """Ticks in one unit of the problem's time."""
    horizon: int
    """Ticks that one micro-batch after another takes, which always fits."""

    @classmethod
    def of(cls, problem: Problem, *, largest: int = LARGEST) -> Ticks:
        """By the common denominator of all times, or rounded down to what ``largest`` allows."""
        parts = (problem.F, problem.I, problem.W, problem.comm)
        times = [float(time) for part in parts for time in part]
        total = problem.microbatches * sum(times) * 2
        fractions = [Fraction(time).limit_denominator(10_000) for time in times]
        rate: float = math.lcm(*(fraction.denominator for fraction in fractions))
        exact = all(abs(float(given) - time) <= 1e-12 * time for given, time in zip(fractions, times, strict=True))
        if exact and total * rate <= largest:
            ticks = [round(time * rate) for time in times]
        else:
            rate = min(largest / total, 10_000 / max(times))
            ticks = [math.floor(time * rate) for time in times]
        S = problem.stages
        F, I, W, comm = (ticks[S * part : S * (part + 1)] for part in range(4))  # noqa: E741
        way = sum(ticks) + sum(comm)
        return cls(durations=Durations(F=F, I=I, W=W, comm=comm), rate=rate, horizon=problem.microbatches * way)
