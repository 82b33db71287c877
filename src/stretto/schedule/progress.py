"""Can a schedule finish?  Run it without a clock, each rank in its order, as far as it goes.

    rank 0   0F0 │ 0B0  waits for 1B0 ─────┐
                       ▲                  ▼        neither will ever move: a deadlock, and this
    rank 1       └── 0F1   waits in  1F1 │ 1B0      circle of waits is the cause that is reported

*Buffered*: a send is over at once.  *Rendezvous*: a send is over when its receiver has come to the
receive that meets it, so two ranks that first send to each other stand still for ever.
"""

from __future__ import annotations

from typing import Literal

from stretto.schedule.dependencies import REPEATABLE, Dependencies, Key
from stretto.schedule.op import Kind, text
from stretto.schedule.render.text import grid
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

Semantics = Literal["buffered", "rendezvous"]


def check_progress(schedule: Schedule, *, semantics: Semantics = "buffered") -> None:
    """Raise ScheduleError where an operation precedes one that it needs, or ranks wait in a circle."""
    run = _Run(schedule, semantics)
    run.go()
    stuck = [rank for rank, order in enumerate(run.orders) if run.at[rank] < len(order)]
    if stuck:
        raise ScheduleError(run.why(stuck[0]))


class _Run:
    """How far each rank has come."""

    def __init__(self, schedule: Schedule, semantics: Semantics) -> None:
        self.schedule = schedule
        self.rendezvous = semantics == "rendezvous"
        self.dependencies = Dependencies(schedule)
        self.orders = [[row[:3] for row in schedule.rows(rank)] for rank in range(schedule.num_ranks)]
        self.at = [0] * schedule.num_ranks
        self.done: set[Key] = set()

    def go(self) -> None:
        """Move every rank as far as it goes, until none moves."""
        waiting: dict[Key, list[int]] = {}
        ready = list(range(len(self.orders)))
        while ready:
            rank = ready.pop()
            order = self.orders[rank]
            if self.rendezvous and self.at[rank] < len(order):
                ready += waiting.pop(_arrival(order[self.at[rank]]), [])
            while self.at[rank] < len(order):
                op = order[self.at[rank]]
                missing = self._missing(op)
                if missing is not None:
                    waiting.setdefault(missing, []).append(rank)
                    break
                self.at[rank] += 1
                if op[0] not in REPEATABLE:
                    self.done.add(op)
                    ready += waiting.pop(op, [])
                if self.rendezvous and self.at[rank] < len(order):
                    ready += waiting.pop(_arrival(order[self.at[rank]]), [])

    def _missing(self, op: Key) -> Key | None:
        """What ``op`` waits for: an operation, or the arrival of its receiver; None where it may run."""
        for need in self.dependencies.needs(*op):
            if need not in self.done:
                return need
        if self.rendezvous and op[0] in (Kind.SEND_F, Kind.SEND_B):
            receive = self.dependencies.counterpart(*op)
            if receive in self.dependencies.where:
                rank, position = self.dependencies.where[receive]
                if self.at[rank] < position:
                    return _arrival(receive)
        return None

    def why(self, rank: int) -> str:
        """Say in one sentence what keeps a rank from moving, and show where."""
        seen: dict[int, str] = {}
        while rank not in seen:
            op = self.orders[rank][self.at[rank]]
            missing = self._missing(op)
            assert missing is not None, "a rank that waits for nothing would have moved"
            need = _departure(missing)
            if need not in self.dependencies.where:
                return self._show(rank, f"rank {rank} runs {text(*op)}, which needs {text(*need)}; no rank runs that.")
            holder = self.dependencies.where[need][0]
            if holder == rank:
                return self._show(rank, f"rank {rank} runs {text(*op)} before {text(*need)}, which it needs.")
            seen[rank] = f"rank {rank} waits in {text(*op)} for {text(*need)} of rank {holder}"
            rank = holder
        circle = list(seen)[list(seen).index(rank) :]
        return self._show(rank, "deadlock: " + ", ".join(seen[member] for member in circle) + ".")

    def _show(self, rank: int, sentence: str) -> str:
        """The sentence, and the grid with the cell that it speaks of."""
        return f"{self.schedule.name}: {sentence}\n{grid(self.schedule, rank=rank, position=self.at[rank])}"


def _arrival(receive: Key) -> Key:
    """The event that a rank has come to ``receive``: its key with a kind below all kinds."""
    return (-1 - receive[0], receive[1], receive[2])


def _departure(event: Key) -> Key:
    """The operation that an event is about."""
    return event if event[0] >= 0 else (-1 - event[0], event[1], event[2])
