"""An axis of a plot: where a value lies on it, and which values are written under it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from stretto.schedule.render.svg import round_step

FINE = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
MARKS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), FINE)
"""Marks of a decade; the finest set that isn't too many is taken."""
MOST = 8
"""Marks of an axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Values from ``low`` to ``high``, evenly or by their logarithm."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Place of a value, 0 at the low end and 1 at the high one."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        """Round values on the axis, at most ``MOST``.

        >>> Axis(low=0, high=100).marks()
        [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
        >>> Axis(low=0.9, high=1200, logarithmic=True).marks()
        [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
        """
        if not self.logarithmic:
            step = round_step((self.high - self.low) / (MOST - 1))
            first = math.ceil(self.low / step - 1e-9)
            return [count * step for count in range(first, math.floor(self.high / step + 1e-9) + 1)]
        sets = [list(self._of(marks)) for marks in MARKS]
        fitting = [found for found in sets if len(found) <= MOST]
        best = max(fitting, key=len, default=[self.low])
        return best if len(best) > 3 else Axis(low=self.low, high=self.high).marks()

    def _of(self, marks: tuple[float, ...]) -> Iterator[float]:
        for power in range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1):
            for mark in marks:
                value = float(f"{mark * 10.0**power:.9g}")
                if self.low <= value <= self.high:
                    yield value
