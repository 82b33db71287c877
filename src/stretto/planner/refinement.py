"""What runs taught a calibration: factors on its figures, each at the size where it was measured.

    seconds of a plan  =  figure of the machine  x  factor(kind, size)

    factor │        ·run B          between two runs' sizes the factor lies on the line between them in the logarithm
           │    ╱       ╲           of the size; beyond them it fades with the distance from the nearest: ``REACH``
         1 │·run A        ·run C    times as large or as small, nothing is known that wasn't before.
           └────────────────── size

``planner.refine`` finds them from a run's trace; ``planner.measured_step`` uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from math import hypot, isfinite, log
from typing import Any

KINDS: Mapping[str, str] = {
    "forward": "operations of a layer's products, one way",
    "inputs": "operations of a layer's products, one way",
    "weights": "operations of a layer's products, one way",
    "head": "operations of the logits, one way",
    "exchange": "bytes that a layer exchanges over tp and cp",
    "message": "bytes of a message between stages",
    "collectives": "bytes of a layer's gradients",
    "optimizer": "parameters",
    "step": "ranks",
    "gaps": "ranks",
    "waiting": "ranks of a pipeline",
}
"""What a factor is on, and what its size counts: a stage's forward, the gradients of its inputs and of its weights,
logits and loss, communication, the update, what a step takes besides, what lies between two operations of a rank (times
what the runtime adds to an operation; 0 where no run told it), and the whole schedule, whose operations take now more,
now less time, so that ranks wait for whoever is late."""
REACH = 4.0
"""Ratio of sizes at which a factor tells nothing of the error any more."""
SAME = 0.01
"""Relative difference up to which two sizes are one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """One figure that a run corrected; ValueError for what can't be one."""

    kind: str
    """One of ``KINDS``."""
    size: float
    """Where it was measured."""
    factor: float
    """Measured over the machine's own figure."""
    error: float
    """Expected error of figures with it, relative, one standard deviation."""
    source: str
    """Which run said so."""

    def __post_init__(self) -> None:
        """Refuse what no run can have measured."""
        numbers = (self.size, self.factor, self.error)
        if self.kind not in KINDS or not all(isfinite(number) for number in numbers) or min(numbers) < 0:
            raise ValueError(f"{self.kind!r} of size {self.size!r} can't have a factor of {self.factor!r}")
        if not self.size or not (self.factor or self.kind == "gaps"):
            raise ValueError(f"{self.kind!r} needs a size and a factor above 0")

    def as_data(self) -> dict[str, Any]:
        """Plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Refinement:
        """From plain values; KeyError, TypeError or ValueError where they aren't one."""
        numbers = {name: float(data[name]) for name in ("size", "factor", "error")}
        return cls(kind=str(data["kind"]), source=str(data["source"]), **numbers)


def factor(refinements: Iterable[Refinement], kind: str, size: float) -> float:
    """What the machine's figure of ``kind`` at ``size`` is multiplied by; 1 where no run said anything (gaps: 0).

    >>> known = [Refinement(kind="step", size=s, factor=f, error=0.1, source="") for s, f in ((2, 1.0), (8, 3.0))]
    >>> factor(known, "step", 4), factor(known, "step", 16), factor(known, "step", 32), factor(known, "optimizer", 4)
    (2.0, 2.0, 1.0, 1.0)
    """
    points = sorted((one.size, one.factor) for one in refinements if one.kind == kind)
    unrefined = 0.0 if kind == "gaps" else 1.0
    if not points:
        return unrefined
    for (low, before), (high, after) in pairwise(points):
        if low <= size <= high:
            return before + (after - before) * log(size / low) / log(high / low)
    nearest, there = points[0] if size < points[0][0] else points[-1]
    return there + (unrefined - there) * _away(size, nearest)


def error(refinements: Iterable[Refinement], kind: str, size: float, *, unrefined: float) -> float:
    """Expected error of the figure of ``kind`` at ``size``; ``unrefined``: what it is where no run is near."""
    near = [one for one in refinements if one.kind == kind]
    if not near or size <= 0:
        return unrefined
    best = min(near, key=lambda one: _away(size, one.size))
    away = _away(size, best.size)
    return min(unrefined, hypot(best.error, away * unrefined)) if away else best.error


def _away(size: float, known: float) -> float:
    """How far a size is from a known one: from 0, the same, to 1, where nothing of it tells."""
    return min(1.0, abs(log(size / known)) / log(REACH)) if size > 0 else 1.0


def merged(older: Iterable[Refinement], newer: Iterable[Refinement]) -> tuple[Refinement, ...]:
    """Both; of the same kind and size the newer."""
    newer = tuple(newer)

    def replaced(one: Refinement) -> bool:
        return any(one.kind == new.kind and abs(one.size / new.size - 1) <= SAME for new in newer)

    return (*(one for one in older if not replaced(one)), *newer)
