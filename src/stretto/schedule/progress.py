"""Can a schedule finish?  Run it without a clock, each rank in its order, as far as it goes.

    rank 0   0F0 │ 0B0  waits for 1B0 ─────┐
                       ▲                  ▼        neither will ever move: a deadlock, and this
    rank 1       └── 0F1   waits in  1F1 │ 1B0      circle of waits is the cause that is reported

*Buffered*: a send is over at once.  *Rendezvous*: a send is over when its receiver has come to the
receive that meets it, so two ranks that first send to each other stand still for ever.  An overlapped pair
(``2F7+5B3``) starts when both of its operations can, and neither is over before both are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stretto.schedule.arrows import Places, arrows
from stretto.schedule.compiled import for_size
from stretto.schedule.op import text
from stretto.schedule.render.text import grid
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.int32]

Semantics = Literal["buffered", "rendezvous"]


def check_progress(schedule: Schedule, *, semantics: Semantics = "buffered") -> None:
    """Raise ScheduleError where an operation precedes one that it needs, or ranks wait in a circle."""
    run = _Run(schedule, semantics)
    if not run.round.all():
        raise ScheduleError(run.why())


def rounds(schedule: Schedule) -> Rows:
    """The round, from 1, in which each operation runs where every rank runs at most one in each round.

    Sends are over at once.  Raises ScheduleError where not all operations can run.
    """
    run = _Run(schedule, "buffered")
    if not run.round.all():
        raise ScheduleError(run.why())
    return run.round


class _Run:
    """How far each rank comes."""

    def __init__(self, schedule: Schedule, semantics: Semantics) -> None:
        """Go as far as it goes."""
        import numpy as np

        self.schedule = schedule
        self.places = Places(schedule)
        self.arrows = arrows(self.places)
        self.receive: dict[int, int] = {}
        """The receive that each send must meet, where sends block."""
        start, need = self.arrows.start, self.arrows.need
        if semantics == "rendezvous" or schedule.joined is not None:
            waiting = np.repeat(np.arange(schedule.num_ops, dtype=np.int32), np.diff(start))
            if semantics == "rendezvous":
                waiting, need = self._with_arrivals(waiting, need)
            if schedule.joined is not None:
                waiting, need = _as_pairs(schedule.joined, waiting, need)
            order = np.argsort(waiting, kind="stable")
            start = np.searchsorted(waiting[order], np.arange(schedule.num_ops + 1)).astype(np.int32)
            need = need[order]
        self.round = _take_turns(schedule.offsets, start, need)

    def _with_arrivals(self, waiting: Rows, need: Rows) -> tuple[Rows, Rows]:
        """Arrows and, for each send, one from the operation before the receive that it must meet."""
        import numpy as np

        sends, receives = self.places.messages()
        sends, receives = sends[receives >= 0], receives[receives >= 0]
        self.receive = dict(zip(sends.tolist(), receives.tolist(), strict=True))
        inside = ~np.isin(receives, self.schedule.offsets)  # a rank that starts with the receive has come to it
        return np.concatenate([waiting, sends[inside]]), np.concatenate([need, receives[inside] - 1])

    def why(self) -> str:
        """Say in one sentence what keeps the first rank that stands still from moving, and show where."""
        row = int((self.round == 0).argmax())
        stood: dict[int, tuple[int, str]] = {}
        while (rank := self._rank(row)) not in stood:
            row, need = self._waits(row)
            if need < 0:
                key = text(*self.arrows.missing[row])
                return self._show(row, f"rank {rank} runs {self._name(row)}, which needs {key}; no rank runs that.")
            holder = self._rank(need)
            if holder == rank:
                return self._show(row, f"rank {rank} runs {self._name(row)} before {self._name(need)}, which it needs.")
            stood[rank] = row, f"rank {rank} waits in {self._name(row)} for {self._name(need)} of rank {holder}"
            first = int(self.schedule.offsets[holder])
            row = first + int((self.round[first:] == 0).argmax())
        circle = list(stood)[list(stood).index(rank) :]
        return self._show(stood[rank][0], "deadlock: " + ", ".join(stood[member][1] for member in circle) + ".")

    def _waits(self, row: int) -> tuple[int, int]:
        """The operation at ``row`` that stands still (of a pair, either), and the row that it waits for, -1: none."""
        joined = self.schedule.joined
        pair = [row, row + 1] if joined is not None and joined[row] else [row]
        for waiting in pair:
            start, end = self.arrows.start[waiting : waiting + 2]
            for need in self.arrows.need[start:end].tolist():
                over = need + 1 if joined is not None and joined[need] else need
                if need < 0 or (self.round[over] == 0 and need not in pair):
                    return waiting, need
        return row, self.receive[row]

    def _rank(self, row: int) -> int:
        return int(self.places.rank[row])

    def _name(self, row: int) -> str:
        schedule = self.schedule
        return text(int(schedule.kind[row]), int(schedule.stage[row]), int(schedule.microbatch[row]))

    def _show(self, row: int, sentence: str) -> str:
        """The sentence, and the grid with the cell that it speaks of."""
        rank = self._rank(row)
        position = row - int(self.schedule.offsets[rank])
        return f"{self.schedule.name}: {sentence}\n{grid(self.schedule, rank=rank, position=position)}"


def _as_pairs(joined: npt.NDArray[np.int8], waiting: Rows, needed: Rows) -> tuple[Rows, Rows]:
    """Arrows between rows as arrows between pairs: into the first of a pair, out of its second."""
    import numpy as np

    row = np.arange(len(joined), dtype=np.int32)
    first = row - np.append(0, joined[:-1])
    waiting, owner = first[waiting], np.where(needed < 0, needed, first[needed])
    apart = waiting != owner
    over = np.where(needed < 0, needed, (row + joined)[needed])
    return waiting[apart], over[apart].astype(np.int32)


def _take_turns(offsets: Rows, start: Rows, need: Rows) -> Rows:
    """Round of each row, 0 where it never runs."""
    import numpy as np

    rows, ranks = int(offsets[-1]), len(offsets) - 1
    turn = for_size(_turns, rows)
    if turn is _turns:  # lists are faster than arrays where nothing is compiled
        plain = [0] * rows
        turn(offsets.tolist(), start.tolist(), need.tolist(), plain, ([-1] * rows, [-1] * ranks))
        return np.array(plain, dtype=np.int32)
    rounds = np.zeros(rows, dtype=np.int32)
    lists = np.full(rows, -1, dtype=np.int32), np.full(ranks, -1, dtype=np.int32)
    turn(offsets, start, need, rounds, lists)
    return rounds


def _turns(offsets, start, need, rounds, lists) -> None:  # type: ignore[no-untyped-def]
    """Move every rank as far as it goes, until none moves; fills ``rounds``.

    ``lists``: the first rank that waits for each row, and the next rank that waits for the same; -1: none.
    """
    waits, link = lists
    ranks = len(offsets) - 1
    at = list(offsets)
    ready = list(range(ranks))
    while len(ready) > 0:
        rank = ready.pop()
        row = at[rank]
        last = rounds[row - 1] if row > offsets[rank] else 0
        while row < offsets[rank + 1]:
            latest = last
            blocked = False
            for entry in range(start[row], start[row + 1]):
                needed = need[entry]
                if needed < 0:
                    blocked = True
                    break
                if rounds[needed] == 0:
                    link[rank] = waits[needed]
                    waits[needed] = rank
                    blocked = True
                    break
                latest = max(latest, rounds[needed])
            if blocked:
                break
            last = latest + 1
            rounds[row] = last
            waiter = waits[row]
            while waiter >= 0:
                ready.append(waiter)
                waiter = link[waiter]
            row += 1
        at[rank] = row
