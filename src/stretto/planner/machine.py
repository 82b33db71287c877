"""What ``stretto diagnose --calibrate`` measured of a machine: seconds by size, read off between the sizes tried.

A figure between two measured ones lies on the line between them in logarithms, where rates are straight; below the
smallest it is the smallest (what a call costs by itself), above the largest it grows in proportion.

    seconds │              ·      Products [m, k] x [k, n] are a table of three such lines.  Measured with one thread
            │          ·          a process, as ranks on a CPU run; how much slower each becomes where there are more
            │  ·   ·              processes than cores is ``contention``.
            └───────────────── size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import exp, inf, log
from typing import Any

from stretto.planner import refinement
from stretto.planner.refinement import Refinement

LONGEST = 1e6
"""Seconds that anything that was measured takes at most."""
WIDEST = 2**20
"""Side of a product that was measured, at most."""
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "exchange")
"""What groups of ranks do; ``exchange`` is an all-to-all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Seconds over a size."""

    points: tuple[tuple[float, float], ...]
    """(size, seconds), sizes growing."""

    def at(self, size: float) -> float:
        """Seconds of ``size``.

        >>> round(Curve(points=((10, 1.0), (1000, 100.0))).at(100), 6), Curve(points=((10, 1.0), (20, 2.0))).at(40)
        (10.0, 4.0)
        """
        first, last = self.points[0], self.points[-1]
        if size <= first[0]:
            return first[1]
        if size >= last[0]:
            return last[1] * size / last[0]
        for (low, before), (high, after) in pairwise(self.points):
            if size <= high:
                share = log(size / low) / log(high / low)
                return exp(log(before) + share * log(after / before))
        raise AssertionError("sizes grow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine as measured; all figures of one process with one thread unless said otherwise."""

    processor: str
    """Its name, for people."""
    cores: int
    """Processors that processes may use."""
    dtype: str = "float32"
    """Arithmetic that was measured."""
    sides: tuple[int, ...]
    """Sizes of m, n and k that products were measured at."""
    products: tuple[float, ...]
    """Seconds of products, k changing fastest, then n, then m."""
    attention_forward: Curve
    """Over heads x T x T x K, under a mask (packed documents)."""
    attention_backward: Curve
    rest_forward: Curve
    """A block's norms, rotary, activation, residuals and calls, over ``rest_elements``."""
    rest_backward: Curve
    loss_forward: Curve
    """Cross-entropy over tokens x vocabulary."""
    loss_backward: Curve
    optimizer: Curve
    """Norm, clipping and AdamW over parameters."""
    copy: Curve
    """Reading and writing so many bytes."""
    operation_seconds: float
    """What the runtime adds to each operation of a schedule."""
    step_seconds: float
    """What a step takes besides its operations and the optimizer."""
    sleep_seconds: float
    """How much later than asked a sleep ends."""
    messages: Curve
    """One message between two ranks, over bytes."""
    collectives: tuple[tuple[str, int, Curve], ...]
    """(name, ranks, seconds over the bytes of the whole tensor), all of the machine's groups at work at once."""
    contention: tuple[tuple[int, float], ...]
    """(processes at work, how many times longer each takes)."""
    spread: float = 0.05
    """Relative spread of repeated measurements, one standard deviation."""
    refinements: tuple[Refinement, ...] = ()
    """What traces of runs corrected; the figures above stay as they were measured."""

    def factor(self, kind: str, size: float) -> float:
        """What traces of runs say that a figure is multiplied by (``refinement``)."""
        return refinement.factor(self.refinements, kind, size)

    def product(self, m: int, n: int, k: int) -> float:
        """Seconds of [m, k] x [k, n], by the eight measured ones around it; further out by their operations."""
        seconds = 0.0
        for corner, weight in self._corners((m, n, k)):
            seconds += weight * log(self.products[corner])
        inside = [min(max(size, self.sides[0]), self.sides[-1]) for size in (m, n, k)]
        beyond = m * n * k / (inside[0] * inside[1] * inside[2])
        return exp(seconds) * max(1.0, beyond)

    def _corners(self, sizes: tuple[int, int, int]) -> list[tuple[int, float]]:
        found, count = [(0, 1.0)], len(self.sides)
        for size in sizes:
            size = min(max(size, self.sides[0]), self.sides[-1])
            low = max(at for at in range(count - 1) if self.sides[at] <= size)
            share = log(size / self.sides[low]) / log(self.sides[low + 1] / self.sides[low])
            found = [
                (index * count + low + step, weight * part)
                for index, weight in found
                for step, part in ((0, 1 - share), (1, share))
                if part
            ]
        return found

    def collective(self, name: str, ranks: int, num_bytes: float) -> float:
        """Seconds of a collective; between measured groups the nearest one's, by the data that each rank receives."""
        curves = {size: curve for known, size, curve in self.collectives if known == name}
        if ranks in curves:
            return curves[ranks].at(num_bytes)
        near = min(curves, key=lambda size: abs(log(size / ranks)))
        return curves[near].at(num_bytes) * (ranks - 1) / ranks / ((near - 1) / near) * max(1.0, ranks / near)

    def slowdown(self, processes: float) -> float:
        """How many times longer work takes with so many processes at work; linear between and beyond the measured.

        Never less than the cores allow.
        """
        known = ((1, 1.0), *(pair for pair in self.contention if pair[0] > 1))
        if processes <= 1 or len(known) == 1:
            return max(1.0, processes / self.cores)
        for (low, before), (high, after) in pairwise(known):
            if processes <= high:
                return before + (after - before) * (processes - low) / (high - low)
        return known[-1][1] * processes / known[-1][0]

    def rates(self) -> dict[str, float]:
        """Plain rates, by their names in ``[cluster]``: of the largest product, copy and all-reduce."""
        side, (size, seconds) = self.sides[-1], self.copy.points[-1]
        sums = [(ranks, curve.points[-1]) for name, ranks, curve in self.collectives if name == "all_reduce"]
        link = max((2 * (n - 1) / n * num_bytes / spent for n, (num_bytes, spent) in sums), default=1e9)
        return {
            "peak_flops_bfloat16": 2.0 * side**3 / self.product(side, side, side),
            "memory_bytes_per_second": size / seconds,
            "link_bytes_per_second": link,
            "network_bytes_per_second": link,
        }

    def as_data(self) -> dict[str, Any]:
        """Plain values, for a file; what runs corrected is a table of its own there."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "refinements"]
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Machine:
        """Back from ``as_data``; KeyError, TypeError or ValueError where it isn't one."""
        given: dict[str, Any] = dict(data)
        for field in dataclasses.fields(cls):
            if field.type == "Curve":
                given[field.name] = _curve(given[field.name])
        given["sides"] = tuple(int(side) for side in given["sides"])
        given["products"] = tuple(float(second) for second in given["products"])
        given["collectives"] = tuple((str(n), int(ranks), _curve(points)) for n, ranks, points in given["collectives"])
        given["contention"] = tuple((int(count), float(times)) for count, times in given["contention"])
        machine = cls(**given)
        _check(machine)
        return machine


def rest_elements(tokens: float, hidden: float, split: float) -> float:
    """Elements that what is neither a product nor attention works on in a block, in units of what a rank holds.

    ``hidden``: width of norms and residuals on this rank; ``split``: width of heads and feed-forward on it.
    """
    return tokens * (6 * hidden + 3 * split)


def _curve(points: Any) -> Curve:
    curve = Curve(points=tuple((float(size), float(seconds)) for size, seconds in points))
    sizes = [size for size, _ in curve.points]
    if not sizes or sizes != sorted(set(sizes)) or not 0 < sizes[0] <= sizes[-1] < inf:
        raise ValueError("a curve needs growing sizes above 0")
    if not all(0 < seconds <= LONGEST for _, seconds in curve.points):
        raise ValueError(f"a curve needs seconds above 0, up to {LONGEST:g}")
    return curve


def _check(machine: Machine) -> None:
    """ValueError for figures that no machine has."""
    if len(machine.products) != len(machine.sides) ** 3 or len(machine.sides) < 2:
        raise ValueError("products must be one figure for each m, n and k of sides")
    if list(machine.sides) != sorted(set(machine.sides)) or not 0 < machine.sides[0] <= machine.sides[-1] <= WIDEST:
        raise ValueError(f"sides must grow, from 1 to {WIDEST} at most")
    if not all(0 < seconds <= LONGEST for seconds in machine.products):
        raise ValueError(f"products must be seconds above 0, up to {LONGEST:g}")
    if type(machine.cores) is not int or machine.cores < 1:
        raise ValueError(f"cores must be a whole number of at least 1, not {machine.cores!r}")
    for name in ("operation_seconds", "step_seconds", "sleep_seconds", "spread"):
        value = getattr(machine, name)
        if type(value) not in (int, float) or not 0 <= value <= LONGEST:
            raise ValueError(f"{name} must be a number from 0 to {LONGEST:g}, not {value!r}")
    if {name for name, *_ in machine.collectives} != set(COLLECTIVES):
        raise ValueError(f"collectives must be {', '.join(COLLECTIVES)}")
    if not all(ranks > 1 for _, ranks, _ in machine.collectives):
        raise ValueError("collectives are of 2 ranks or more")
    counts = [count for count, _ in machine.contention]
    if counts != sorted(set(counts)) or not all(n > 0 and 0 < times <= LONGEST for n, times in machine.contention):
        raise ValueError("contention must be of growing numbers of processes, each some times longer")


def _plain(value: Any) -> Any:
    if isinstance(value, Curve):
        return [list(point) for point in value.points]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
