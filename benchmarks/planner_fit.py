"""One calibration from measured steps: three shares of the machine's rates, one latency, one margin of memory.

Step times: the least sum of |log(predicted / measured)| over the three quarters of the rows that it is least for (least
trimmed absolute deviations), since a quarter contradicts the rest: with FlashAttention 2 at 2,048 tokens the same
layouts are 6 to 16% faster than with FlashAttention 1 where pp=1, and up to 63% slower where pp=2, which no kernel
explains.  Memory: the fragmentation on a grid that judges most rows right, then misses fewest that ran out.  Both see
the fitted rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.planner_rows import Row
from stretto.planner.calibration import FITTED, Calibration
from stretto.planner.memory import Margin, fits
from stretto.planner.step import step_time

KEPT = 0.75
"""Share of the rows that the fit of times is judged by."""
START = Calibration(matmul=0.8, memory=0.9, link=0.45, kernel_latency=2e-5)
"""Where the descent begins."""
GRID = tuple(percent / 100 for percent in range(0, 51, 5))
"""Shares of activations that fragmentation may cost."""


def log_error(row: Row, calibration: Calibration) -> float:
    """log(predicted / measured step time); the row must have been measured."""
    assert row.seconds is not None
    if row.flow_splits is not None:
        calibration = replace(calibration, flow_splits=row.flow_splits)
    return math.log(step_time(row.work, calibration).total / row.seconds)


def fit_time(rows: Sequence[Row]) -> Calibration:
    """Coordinate descent with shrinking steps; shares of a rate stay below 1."""
    best, step = START, 0.1
    least = _loss(rows, best)
    while step > 0.002:
        moved = False
        for name in FITTED:
            for factor in (1 + step, 1 / (1 + step)):
                value = min(getattr(best, name) * factor, 1.0)
                other = replace(best, **{name: value})
                loss = _loss(rows, other)
                if loss < least:
                    best, least, moved = other, loss, True
        if not moved:
            step /= 2
    return best


def fit_margin(rows: Sequence[Row]) -> Margin:
    """The grid's best; of equal ones the middle."""
    scored = []
    for share in GRID:
        margin = Margin(fragmentation=share)
        judged = [(fits(row.work, margin), row.seconds is not None) for row in rows]
        right = sum(said == true for said, true in judged)
        missed = sum(said and not true for said, true in judged)
        scored.append((right, -missed, share))
    top = max(scored)[:2]
    best = [share for *score, share in scored if tuple(score) == top]
    return Margin(fragmentation=best[len(best) // 2])


def _loss(rows: Sequence[Row], calibration: Calibration) -> float:
    """Sum over the rows that are kept."""
    errors = sorted(abs(log_error(row, calibration)) for row in rows)
    return sum(errors[: round(KEPT * len(errors))])


def cross_validated(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Every measured row with its relative error under a fit that has not seen its group."""
    measured = [row for row in rows if row.seconds]
    found = []
    for group in dict.fromkeys(row.group for row in measured):
        calibration = fit_time([row for row in measured if row.group != group])
        found += [(row, math.expm1(log_error(row, calibration))) for row in measured if row.group == group]
    return found
