"""Which operation needs which, over rows: the arrows that any order must respect.

For a micro-batch that visits stages 0 and 1, with the backward of stage 1 split:

    0F ──► 1F                in a lowered schedule an arrow between ranks goes through its two
    │       │                messages: 0F ► SEND_F ► RECV_F ► 1F
    ▼       ▼
    0B ◄── 1I ──► 1W

Besides: R and O need their F, L its O; B and I (and R) need L, and B and I need R, where there are such.
S needs the F of the last stage, T every rank's S; the first backward needs every rank's T where its own rank
runs T before it, else every rank's S (vocabulary parallelism).  Operations that may occur several times
(UNSHARD, RESHARD, REDUCE_GRAD, OPT) stay on their rank, and its order holds for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from stretto.schedule.flow import NONE, Flows, flows
from stretto.schedule.op import PER_BLOCK, Kind
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Rows = npt.NDArray[np.int32]

Key = tuple[int, int, int]
"""Kind, stage, micro-batch: what names an operation that occurs once."""

REPEATABLE = PER_BLOCK | {Kind.OPT}
"""Kinds that may occur several times and so have no key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrows:
    """Row i needs the rows ``need[start[i]:start[i + 1]]``; -1 stands for an operation that no rank runs."""

    start: Rows
    """N + 1 entries."""
    need: Rows
    """Rows."""
    missing: dict[int, Key]
    """What no rank runs, by the row that needs it."""


class Places:
    """Where operations stand: ``find`` gives rows.  Of an operation that occurs twice, the first."""

    def __init__(self, schedule: Schedule) -> None:
        """Index the schedule."""
        import numpy as np

        self.schedule = schedule
        self.flows: Flows = flows(schedule)
        self._tables: dict[int, Rows] = {}
        kinds = np.bincount(schedule.kind, minlength=len(Kind))
        for kind in np.flatnonzero(kinds).tolist():
            if kind not in REPEATABLE:
                height = schedule.num_ranks if kind in (Kind.S, Kind.T) else schedule.num_stages
                rows = np.flatnonzero((schedule.kind == kind) & (schedule.stage < height))[::-1].astype(np.int32)
                table = np.full((height, schedule.num_microbatches), NONE, dtype=np.int32)
                table[schedule.stage[rows], schedule.microbatch[rows]] = rows  # of several, the first remains
                self._tables[kind] = table

    def has(self, kind: int) -> bool:
        """Whether any rank runs the kind."""
        return kind in self._tables

    def find(self, kind: int, stage: npt.ArrayLike, microbatch: npt.ArrayLike) -> Rows:
        """Rows of operations, -1 where no rank runs one; ``stage`` and ``microbatch`` are broadcast."""
        import numpy as np

        stage, microbatch = np.broadcast_arrays(stage, microbatch)
        table = self._tables.get(kind)
        if table is None:
            return np.full(stage.shape, NONE, dtype=np.int32)
        inside = stage < len(table)
        found = table[np.where(inside, stage, 0), microbatch]
        return found if inside.all() else np.where(inside, found, np.int32(NONE))

    def backward(self, stage: npt.ArrayLike, microbatch: npt.ArrayLike) -> Rows:
        """Rows of what gives the gradient of a stage's input: I where the backward is split, else B."""
        import numpy as np

        split = self.find(Kind.I, stage, microbatch)
        return np.where(split >= 0, split, self.find(Kind.B, stage, microbatch))

    def messages(self) -> tuple[Rows, Rows]:
        """Rows of all sends, and of the receives that meet them, -1 where no rank runs one."""
        import numpy as np

        schedule, parts = self.schedule, []
        for send, receive, reader_of in (
            (Kind.SEND_F, Kind.RECV_F, self.flows.after),
            (Kind.SEND_B, Kind.RECV_B, self.flows.target),
        ):
            rows = np.flatnonzero(schedule.kind == send).astype(np.int32)
            microbatch = schedule.microbatch[rows]
            reader = reader_of[self.flows.of[microbatch], schedule.stage[rows]]
            parts.append((rows, np.where(reader >= 0, self.find(receive, reader, microbatch), NONE)))
        sends, receives = map(np.concatenate, zip(*parts, strict=True))
        return sends, receives.astype(np.int32)

    @cached_property
    def rank(self) -> Rows:
        """Rank of each row."""
        import numpy as np

        offsets = self.schedule.offsets
        return np.repeat(np.arange(self.schedule.num_ranks, dtype=np.int32), np.diff(offsets))


def arrows(places: Places) -> Arrows:
    """All arrows of a schedule."""
    return _Drawing(places).finished()


class _Drawing:
    """Arrows in the making: blocks of pairs, each with at most one arrow per row."""

    def __init__(self, places: Places) -> None:
        import numpy as np

        self.places = places
        self.schedule = places.schedule
        self.flows = places.flows
        self.lowered = self.schedule.lowered
        self.blocks: list[tuple[Rows, Rows]] = []
        self.missing: dict[int, Key] = {}
        kinds = self.schedule.kind
        of_kind = {kind: np.flatnonzero(kinds == kind).astype(np.int32) for kind in Kind if places.has(kind)}
        nothing = np.empty(0, dtype=np.int32)
        self.rows = {kind: of_kind.get(kind, nothing) for kind in Kind}
        backwards = [self.rows[Kind.B], self.rows[Kind.I]]
        self.backwards = np.sort(np.concatenate(backwards)) if len(backwards[1]) else backwards[0]

    def finished(self) -> Arrows:
        """Draw everything; rows in order."""
        import numpy as np

        self._own()
        self._operands()
        if self.lowered:
            self._messages()
        if self.places.has(Kind.S):
            self._vocabulary()
        count = np.zeros(self.schedule.num_ops + 1, dtype=np.int32)
        for rows, _ in self.blocks:
            count[rows + 1] += 1
        start = np.cumsum(count, dtype=np.int32)
        cursor = start[:-1].copy()
        need = np.empty(int(start[-1]), dtype=np.int32)
        for rows, needed in self.blocks:
            need[cursor[rows]] = needed
            cursor[rows] += 1
        return Arrows(start=start, need=need, missing=self.missing)

    def _draw(self, rows: Rows, kind: Kind, stage: Rows, *, optional: bool = False) -> None:
        """Each row needs the operation of ``kind`` on ``stage`` (-1: nothing) for its own micro-batch."""
        import numpy as np

        rows, stage = rows[stage >= 0], stage[stage >= 0]
        microbatch = self.schedule.microbatch[rows]
        found = self.places.backward(stage, microbatch) if kind is Kind.B else self.places.find(kind, stage, microbatch)
        there = found >= 0
        if not there.all():
            if optional:
                rows, found = rows[there], found[there]
            else:
                for at in np.flatnonzero(~there).tolist():
                    self.missing.setdefault(int(rows[at]), (int(kind), int(stage[at]), int(microbatch[at])))
        if len(rows):
            self.blocks.append((rows, found))

    def _stage(self, rows: Rows) -> Rows:
        return self.schedule.stage[rows]

    def _flow(self, rows: Rows) -> Rows:
        return self.flows.of[self.schedule.microbatch[rows]]

    def _own(self) -> None:
        """What an operation needs of its own stage and micro-batch."""
        for kinds, need, optional in (
            ((Kind.B, Kind.I, Kind.R, Kind.O), Kind.F, False),
            ((Kind.W,), Kind.I, False),
            ((Kind.L,), Kind.O, False),
            ((Kind.B, Kind.I), Kind.R, True),
            ((Kind.B, Kind.I, Kind.R), Kind.L, True),
        ):
            if not optional or self.places.has(need):
                for kind in kinds:
                    self._draw(self.rows[kind], need, self._stage(self.rows[kind]), optional=optional)

    def _operands(self) -> None:
        """Activations for F and gradients for B and I, of other stages."""
        for rows, giver_of, kind, message in (
            (self.rows[Kind.F], self.flows.before, Kind.F, Kind.RECV_F),
            (self.backwards, self.flows.source, Kind.B, Kind.RECV_B),
        ):
            stage, flow = self._stage(rows), self._flow(rows)
            giver = giver_of[flow, stage]
            if self.lowered:
                holder = self.flows.holder
                crosses = (giver >= 0) & (holder[flow, giver] != holder[flow, stage])
                self._draw(rows[crosses], message, stage[crosses])
                rows, giver = rows[~crosses], giver[~crosses]
            self._draw(rows, kind, giver)

    def _messages(self) -> None:
        """Sends need what they carry, receives their sends."""
        rows = self.rows
        self._draw(rows[Kind.SEND_F], Kind.F, self._stage(rows[Kind.SEND_F]))
        self._draw(rows[Kind.SEND_B], Kind.B, self._stage(rows[Kind.SEND_B]))
        for receive, send, giver_of in (
            (rows[Kind.RECV_F], Kind.SEND_F, self.flows.before),
            (rows[Kind.RECV_B], Kind.SEND_B, self.flows.source),
        ):
            self._draw(receive, send, giver_of[self._flow(receive), self._stage(receive)])

    def _vocabulary(self) -> None:
        """S after the last forward, T after all S, the first backward after all T or all S."""
        import numpy as np

        ranks = self.schedule.num_ranks
        sums, gradients = self.rows[Kind.S], self.rows[Kind.T]
        self._draw(sums, Kind.F, self.flows.last[self._flow(sums)])
        for shard in range(ranks):
            self._draw(gradients, Kind.S, np.full(len(gradients), shard, dtype=np.int32))
        first = self.backwards[self._stage(self.backwards) == self.flows.turn[self._flow(self.backwards)]]
        own = self.places.find(Kind.T, self.places.rank[first], self.schedule.microbatch[first])
        waits = (own >= 0) & (own < first)  # rows of one rank: its order says which algorithm this is
        for rows, kind in ((first[waits], Kind.T), (first[~waits], Kind.S)):
            for shard in range(ranks):
                self._draw(rows, kind, np.full(len(rows), shard, dtype=np.int32))
