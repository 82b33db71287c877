"""What a rank keeps between forwards and backwards, and what of it spends the time in the host's memory.

    arithmetic   │0F0│0F1│0F2│0F3│   │0B0│         0O0 ends before 0L0 starts, 0L0 ends before 0B0 starts;
    out              │ 0O0 │                       in between 0F0's activation is not on the device
    in                     ·····│ 0L0 │

Two streams, each a queue: out in the order of the forwards, in in the order of the backwards.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from stretto.schedule.op import Kind, Op

ROUNDS = 32
"""Times that the choice under a limit is revised, since loads that must make room for each other come earlier."""
TOLERANCE = 1e-6
"""How far above its limit memory may come out, and how far times may be apart and count as one, for rounding."""


@dataclass(slots=True, kw_only=True)
class Unit:
    """Operations that run at once: one, or a pair that overlaps, and behind them what runs beside the arithmetic."""

    start: float
    end: float
    ops: list[Op]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An activation between its forward and its backward."""

    stage: int
    microbatch: int
    amount: float
    """In micro-batches over a rank's whole share of the layers."""
    forward: int
    """Unit that makes it."""
    backward: int
    """Unit that needs it."""
    made: float
    """End of its forward."""
    due: float
    """Start of its backward."""
    offload: float
    """Time to move it to the host."""
    load: float
    """Time to bring it back."""

    @property
    def life(self) -> float:
        """Time for which it only lies there."""
        return self.due - self.made


@dataclass(slots=True, kw_only=True)
class Window:
    """The time that an activation is away."""

    gone: float
    """End of its O."""
    back: float
    """Start of its L."""
    before: int
    """Unit that L stands before."""
    fits: bool
    """Whether it is gone before it must come back."""


class Host:
    """One rank: its units, what it keeps, and what of that moves."""

    def __init__(self, units: list[Unit], kept: list[Kept], held: list[tuple[float, float]]) -> None:
        """``held``: times and amounts by which memory changes while nothing moves; ``kept``: what may move."""
        self.units = units
        self.ends = [unit.end for unit in units]
        self.kept = kept
        self.held = held
        self.moved: set[int] = set()
        self.stays = {at for at, each in enumerate(kept) if each.life + TOLERANCE < each.offload + each.load}
        """What doesn't fit."""
        lives: dict[int, list[float]] = {}
        for each in kept:
            lives.setdefault(each.stage, []).append(each.life)
        self.typical = {stage: round(median(of_stage), 6) for stage, of_stage in lives.items()}
        """How long each stage's activations live: half of them shorter, half longer."""

    def longest(self, fraction: float) -> list[int]:
        """So much of what is kept: stages that keep it longest first, the last one's evenly spread over time."""
        room = math.floor(fraction * len(self.kept) + TOLERANCE)
        chosen: list[int] = []
        for stage in sorted(self.typical, key=lambda stage: (-self.typical[stage], stage)):
            of_stage = sorted((at for at, each in enumerate(self.kept) if each.stage == stage), key=self._made)
            count, share = len(of_stage), min(room - len(chosen), len(of_stage))
            chosen += [at for turn, at in enumerate(of_stage) if turn * share // count < (turn + 1) * share // count]
        return chosen

    def _made(self, at: int) -> float:
        """When an activation is made."""
        return self.kept[at].made

    def move(self, chosen: Iterable[int]) -> None:
        """Move so many of these as fit into their lives and the streams."""
        self.moved |= set(chosen) - self.stays
        while late := self._late(self.windows()):
            self.moved -= late
            self.stays |= late

    def keep_below(self, limit: float) -> float:
        """Move as few as keep memory below a limit; the peak that is reached."""
        for _ in range(ROUNDS):
            more = self._victims(limit)
            if not more:
                break
            self.move(more)
        peak = self.peak()
        if peak <= limit + TOLERANCE:
            return peak
        few, self.moved, self.stays = self.moved, set(), set()
        self.move(range(len(self.kept)))
        if self.peak() >= peak:
            self.moved = few
        return min(peak, self.peak())

    def windows(self) -> dict[int, Window]:
        """When each activation that moves is away."""
        kept, windows = self.kept, {}
        free = -math.inf
        for at in sorted(self.moved, key=self._made):
            free = max(free, kept[at].made) + kept[at].offload
            windows[at] = Window(gone=free, back=math.inf, before=0, fits=True)
        queue = sorted(self.moved, key=lambda at: (kept[at].due, kept[at].backward))
        latest = math.inf
        for at in reversed(queue):
            latest = min(latest, kept[at].due) - kept[at].load
            window = windows[at]
            window.before = min(bisect_right(self.ends, latest + TOLERANCE), kept[at].backward)
            window.fits = window.gone <= latest + TOLERANCE and window.before > kept[at].forward
        free = -math.inf
        for at in queue:
            window = windows[at]
            window.back = max(free, window.gone, self.ends[window.before - 1])
            free = window.back + kept[at].load
        return windows

    def _late(self, windows: dict[int, Window]) -> set[int]:
        """What should stay so that the rest fits: the first one of each crowd on the way out, of the stage that keeps
        its activations for the shortest time."""
        late: set[int] = set()
        crowd: list[int] = []
        free = -math.inf
        settled = False
        for at in sorted(windows, key=self._made):
            if self.kept[at].made > free:
                crowd, settled = [], False
            crowd.append(at)
            free = windows[at].gone
            if not windows[at].fits and not settled:
                late.add(min(crowd, key=lambda each: (self.typical[self.kept[each].stage], self.kept[each].made)))
                settled = True
        return late

    def peak(self) -> float:
        """Largest memory of the rank."""
        changes = [(time, amount) for time, amount in self.held]
        for at, window in self.windows().items():
            changes += [(window.gone, -self.kept[at].amount), (window.back, self.kept[at].amount)]
        level = peak = 0.0
        for _, amount in sorted(changes):  # at the same time, first what is given back
            level += amount
            peak = max(peak, level)
        return round(peak, 9)

    def _victims(self, limit: float) -> set[int]:
        """What else should move, going through time: where memory is above the limit, what is due last."""
        victims: set[int] = set()
        level = 0.0
        around: list[tuple[float, int]] = []
        """What could be gone by now and isn't, the one due last on top."""
        changes = [(time, amount, -1) for time, amount in self.held]
        for at, window in self.windows().items():
            changes += [(window.gone, -self.kept[at].amount, -1), (window.back, self.kept[at].amount, -1)]
        changes += [
            (kept.made + kept.offload, -math.inf, at)
            for at, kept in enumerate(self.kept)
            if at not in self.moved and at not in self.stays
        ]
        heapq.heapify(changes)
        while changes:
            now, amount, at = heapq.heappop(changes)
            if at >= 0:
                heapq.heappush(around, (-self.kept[at].due, at))
                continue
            level += amount
            while amount > 0 and level > limit + TOLERANCE and around:
                due, at = heapq.heappop(around)
                if -due - self.kept[at].load <= now:
                    break
                victims.add(at)
                level -= self.kept[at].amount
                heapq.heappush(changes, (-due - self.kept[at].load, self.kept[at].amount, -1))
        return victims

    def order(self) -> list[Op]:
        """The rank's operations with O and L."""
        outgoing: dict[int, list[Op]] = {}
        incoming: dict[int, list[Op]] = {}
        windows = self.windows()
        for at in sorted(windows, key=lambda at: (self.kept[at].due, self.kept[at].backward)):
            kept = self.kept[at]
            outgoing.setdefault(kept.forward, []).append(Op(Kind.O, stage=kept.stage, microbatch=kept.microbatch))
            load = Op(Kind.L, stage=kept.stage, microbatch=kept.microbatch)
            incoming.setdefault(windows[at].before, []).append(load)
        order: list[Op] = []
        for index, unit in enumerate(self.units):
            order += [*incoming.get(index, ()), *unit.ops, *outgoing.get(index, ())]
        return order
