"""A schedule on fewer cores than there are processes: whoever has work shares the cores equally.

    rank 0  ──F0──F1─────F2───        2 cores: while two ranks are at work each runs at full speed,
    rank 1       ──F0──F1─────        while four are each runs at half, and so on.  Between two events
    rank 2            ──F0────        (an operation ends, a message arrives) speeds stay the same, so
                                      the step is followed from event to event.

An operation is work, which is slowed, and then a wait (for collectives, whose measured time has the contention in it
already), which isn't.  A pipeline rank may stand for several processes that do the same, those of tp, cp and the data
ranks: ``slowdown`` knows how many.  Processor sharing is what an operating system's fair scheduler comes to over a time
slice or two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from stretto.schedule.op import Kind
from stretto.spec.errors import UnsupportedError

if TYPE_CHECKING:
    from stretto.schedule.op import Op
    from stretto.schedule.schedule import Schedule

PLAYED = (Kind.F, Kind.B, Kind.I, Kind.W, Kind.R)
"""What is followed."""
Seconds = Mapping[Kind, Sequence[float]]
"""Of each kind, per stage."""
EMPTY: Seconds = {}


@dataclass(slots=True, kw_only=True)
class _Rank:
    """Where a rank is."""

    ops: list[Op]
    next: int = 0
    work: float = 0.0
    """Left of the operation at hand, in seconds at full speed."""
    until: float = 0.0
    """When its wait ends."""
    since: float = 0.0
    """When the operation at hand began."""
    state: str = "ready"
    """``ready`` (for its next operation), ``working``, ``waiting`` or ``over``."""
    busy: float = 0.0
    began: float = float("inf")
    ended: float = 0.0
    """First and last moment of its operations."""


class Contended(NamedTuple):
    """A schedule on shared cores, in seconds."""

    makespan: float
    """From the first operation anywhere to the last."""
    busiest: float
    """The most that a rank is at work."""
    span: float
    """The longest time between a rank's own first and last operation."""


@dataclass(slots=True, kw_only=True)
class _Play:
    """A schedule under way."""

    schedule: Schedule
    work: Seconds
    waits: Seconds
    message: float
    ranks: list[_Rank]
    ready: dict[tuple[bool, int, int], tuple[float, int]] = field(default_factory=dict)
    """When an output (True) or a gradient of an input (False) was there, and on which rank."""
    now: float = 0.0
    taken: dict[tuple[Kind, int], list[float]] | None = None
    """Where durations of operations are noted, by kind and stage."""

    def start(self) -> float:
        """Start whatever can be started; when the next message arrives that somebody waits for."""
        arrives = float("inf")
        for number, rank in enumerate(self.ranks):
            if rank.state != "ready":
                continue
            if rank.next == len(rank.ops):
                rank.state = "over"
                continue
            op = rank.ops[rank.next]
            at = self._arrival(op, number)
            if at <= self.now + 1e-15:
                rank.state, rank.work, rank.since = "working", self.work[op.kind][op.stage], self.now
                rank.began = min(rank.began, self.now)
            else:
                arrives = min(arrives, at)
        return arrives

    def _arrival(self, op: Op, rank: int) -> float:
        """When what an operation needs is there; infinite while it isn't known."""
        if op.kind in (Kind.W, Kind.R):
            return 0.0
        forward = op.kind is Kind.F
        look = self.schedule.previous_stage if forward else self.schedule.gradient_source
        source = look(op.stage, op.microbatch)
        if source is None:
            return 0.0
        found = self.ready.get((forward, source, op.microbatch))
        if found is None:
            return float("inf")
        return found[0] + (0.0 if found[1] == rank else self.message)

    def end_work(self, rank: _Rank) -> None:
        """The work of an operation is done; its wait begins."""
        op = rank.ops[rank.next]
        rank.state, rank.work = "waiting", 0.0
        rank.until = self.now + (self.waits[op.kind][op.stage] if op.kind in self.waits else 0.0)

    def end(self, rank: _Rank, number: int) -> None:
        """An operation is over."""
        op = rank.ops[rank.next]
        if self.taken is not None:
            self.taken.setdefault((op.kind, op.stage), []).append(self.now - rank.since)
        if op.kind in (Kind.F, Kind.B, Kind.I):
            self.ready[op.kind is Kind.F, op.stage, op.microbatch] = (self.now, number)
        rank.state, rank.next, rank.ended = "ready", rank.next + 1, self.now


def contended(
    schedule: Schedule,
    work: Seconds,
    *,
    waits: Seconds = EMPTY,
    message: float = 0.0,
    slowdown: Callable[[float], float],
    taken: dict[tuple[Kind, int], list[float]] | None = None,
) -> Contended:
    """Follow a schedule from event to event.

    Args:
        schedule: without messages, or with them: they are left out, and ``message`` is what each takes.
        work: seconds at full speed of F, I, W, B and R, per stage.
        waits: seconds after each that aren't slowed.
        slowdown: how many times longer work takes with so many of the schedule's ranks at work.
        taken: filled with seconds from begin to end of each operation, by kind and stage.

    Raises UnsupportedError for operations that aren't followed.
    """
    alien = {Kind(kind) for kind in schedule.kind.tolist()} & {Kind.S, Kind.T, Kind.O, Kind.L}
    if alien:
        raise UnsupportedError(
            f"The time of {schedule.name} on shared cores can't be told yet, because it has "
            f"{', '.join(sorted(kind.name for kind in alien))}."
        )
    orders = [[op for op in schedule.ops(rank) if op.kind in PLAYED] for rank in range(schedule.num_ranks)]
    play = _Play(
        schedule=schedule, work=work, waits=waits, message=message, ranks=[_Rank(ops=order) for order in orders],
        taken=taken,
    )  # fmt: skip
    while True:
        arrives = play.start()
        working = [rank for rank in play.ranks if rank.state == "working"]
        slower = slowdown(len(working)) if working else 1.0
        ends = [play.now + rank.work * slower for rank in working]
        ends += [rank.until for rank in play.ranks if rank.state == "waiting"]
        if not ends and arrives == float("inf"):
            assert all(rank.state == "over" for rank in play.ranks), "a schedule was validated before it is timed"
            busiest = max(rank.busy for rank in play.ranks)
            span = max(rank.ended - rank.began for rank in play.ranks if rank.ops)
            return Contended(makespan=play.now, busiest=busiest, span=span)
        _advance(play, min([arrives, *ends]), slower)


def _advance(play: _Play, moment: float, slower: float) -> None:
    """Go to the next event."""
    passed, play.now = moment - play.now, moment
    for number, rank in enumerate(play.ranks):
        if rank.state in ("working", "waiting"):
            rank.busy += passed
        if rank.state == "working":
            rank.work -= passed / slower
            if rank.work <= 1e-12:
                play.end_work(rank)
        if rank.state == "waiting" and rank.until <= moment + 1e-15:
            play.end(rank, number)
