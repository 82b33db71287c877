"""One calibration from measured steps: four shares of the machine's rates, one latency, one margin of memory.

Step times: the sum over rows of |log(predicted / measured)|, of which what exceeds a quarter counts a fourth, since a
few published rows contradict their neighbours.  Memory: the fragmentation on a grid that judges most rows right, then
misses fewest that ran out.  Both see the fitted rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.planner_rows import Row
from stretto.planner.calibration import FITTED, Calibration
from stretto.planner.memory import Margin, fits
from stretto.planner.step import step_time

OUTLIER = 0.25
"""Log error beyond which a row counts less."""
GRID = tuple(percent / 100 for percent in range(0, 51, 2))
"""Shares of activations that fragmentation may cost."""


def log_error(row: Row, calibration: Calibration) -> float:
    """log(predicted / measured step time); the row must have been measured."""
    assert row.seconds is not None
    return math.log(step_time(row.work, calibration).total / row.seconds)


def fit_time(rows: Sequence[Row], start: Calibration | None = None) -> Calibration:
    """Coordinate descent with shrinking steps; shares of a rate stay below 1."""
    best, step = start or Calibration(), 0.3
    least = _loss(rows, best)
    while step > 0.004:
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
    total = 0.0
    for row in rows:
        error = abs(log_error(row, calibration))
        total += error if error < OUTLIER else OUTLIER + (error - OUTLIER) / 4
    return total
