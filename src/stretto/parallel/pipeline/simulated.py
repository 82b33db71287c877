"""A clock of one rank that advances by costs, however long what it plays really takes.

It hears the runtime as its observer and its device; times of other ranks come to it with their messages:

    arithmetic   │1F0│       │1B0│          begins when the rank is free, its operand has arrived and what moves
    streams          │1O0│1L0│               beside the arithmetic is done

The rules are those of ``schedule/simulate`` (clock.py, streams.py), found again from what really happens: which
message carried an operand and which operation came before.  So what both say must be the same to the last bit.
"""

from __future__ import annotations

from stretto.schedule.op import COMPUTE, MESSAGES, Kind, Op
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.streams import READS_PARAMETERS, STREAM_OF

Operand = tuple[str, int, int]
"""``F`` or ``B``, the stage that reads it, micro-batch; ``S`` or ``T``, the rank, micro-batch."""


class SimulatedClock:
    """Time of one rank, in the costs' unit; hears all operations as the runtime's Observer.

    Args:
        schedule: lowered (with messages).
        rank: position along pp.
    """

    def __init__(self, schedule: Schedule, costs: Costs, rank: int) -> None:
        self._schedule, self._rank = schedule, rank
        self._costs = costs.of(schedule)
        self._durations = self._costs.durations().tolist()
        self._ops = {str(op): op for op in schedule.ops(rank)}
        self.step = 0
        self.last = "its first operation"
        """What began last."""
        self.begin_step()

    def begin_step(self) -> None:
        """Time is 0 again."""
        self.free = 0.0
        """When the arithmetic is."""
        self.first, self.latest = float("inf"), 0.0
        """When the first operation began and the last one ended."""
        self._streams = dict.fromkeys(STREAM_OF.values(), 0.0)
        self._ready: dict[tuple[Kind, int, int], float] = {}
        self._arrivals: dict[Operand, float] = {}
        self._sent_at = self._held = 0.0
        self._done: dict[Operand, float] = {}
        self._optimized = False

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        """An operation begins; one that runs beside the arithmetic takes its time on its stream."""
        self.last = operation
        op = self._ops.get(operation)
        if op is None or op.kind in COMPUTE:
            return
        if op.kind in MESSAGES:
            self._sent_at = self._done.get((op.kind.name[-1], op.stage, op.microbatch), self.free)
        elif op.kind is Kind.OPT:
            self.optimize()
        else:
            self._beside(op)

    def end(self) -> None:
        """The operation begun last is over: time has passed already."""

    def compute(self, op: Op) -> None:
        """An operation computes: from when its operands are there and the rank is free."""
        self.free = self._span(self._ready_for(op), self._durations[op.kind][op.stage])
        if op.kind is not Kind.W:
            kind = op.kind.name if op.kind in (Kind.F, Kind.S, Kind.T) else "B"
            self._done[kind, op.stage, op.microbatch] = self.free

    def sent(self, direction: str, boundary: int, microbatch: int) -> tuple[Operand, float]:
        """What the message is that is being sent, for whom, and when it will arrive."""
        schedule = self._schedule
        source = boundary if direction == "F" else schedule.gradient_source(boundary, microbatch)
        reader = schedule.next_stage(boundary, microbatch) if direction == "F" else boundary
        assert source is not None and reader is not None
        low, high = sorted((source, reader))
        return (direction, reader, microbatch), self._sent_at + float(self._costs.comm[low:high].max())

    def arrived(self, operand: Operand, time: float) -> None:
        """An operand that another rank sent arrives at ``time``."""
        self._arrivals[operand] = time

    def hold(self, time: float) -> None:
        """The next operation can't begin before ``time``."""
        self._held = max(self._held, time)

    def output_at(self, microbatch: int) -> float:
        """When the output of the last stage, made here, is known to other ranks."""
        return self._done["F", self._schedule.path(microbatch)[-1], microbatch] + self._farthest

    def vocabulary_at(self, kind: Kind, microbatch: int) -> float:
        """When what this rank's S or T found is."""
        return self._done[kind.name, self._rank, microbatch] + self._farthest

    @property
    def _farthest(self) -> float:
        """Latency of the largest boundary."""
        return float(self._costs.comm.max(initial=0.0))

    def optimize(self) -> None:
        """The optimizer step: on the arithmetic, behind what reduces gradients."""
        self._optimized = True
        reduced = [time for (kind, _, _), time in self._ready.items() if kind is Kind.REDUCE_GRAD]
        start = max([self.free, *reduced])
        self.free = self._span(start, float(self._costs.OPT[self._rank]))

    def end_step(self) -> None:
        """Where the optimizer takes time and stands nowhere, it comes last."""
        if not self._optimized and not self._schedule.forward_only and self._costs.OPT.any():
            self.optimize()

    def _ready_for(self, op: Op) -> float:
        """When what an operation needs is there and the rank is free."""
        needs = [self.free, self._held]
        self._held = 0.0
        if op.kind in READS_PARAMETERS:
            needs.append(self._ready.get((Kind.UNSHARD, op.stage, -1), 0.0))
        if op.kind is Kind.F:
            needs.append(self._arrivals.pop(("F", op.stage, op.microbatch), 0.0))
        elif op.kind in (Kind.B, Kind.I):
            needs.append(self._arrivals.pop(("B", op.stage, op.microbatch), 0.0))
            needs.append(self._ready.get((Kind.L, op.stage, op.microbatch), 0.0))
        return max(needs)

    def _beside(self, op: Op) -> None:
        """An operation on a stream: behind the arithmetic before it and what its stream did."""
        stream = STREAM_OF[op.kind]
        start = max(self.free, self._streams[stream])
        if op.kind is Kind.L:
            start = max(start, self._ready[Kind.O, op.stage, op.microbatch])
        end = self._streams[stream] = self._span(start, self._durations[op.kind][op.stage])
        self._ready[op.kind, op.stage, -1 if op.kind is Kind.UNSHARD else op.microbatch] = end

    def _span(self, start: float, duration: float) -> float:
        """Remember a span of time; its end."""
        end = start + duration
        self.first, self.latest = min(self.first, start), max(self.latest, end)
        return end


class SimulatedDevice:
    """A device on which operations last as long as a clock says."""

    def __init__(self, clock: SimulatedClock) -> None:
        self._clock = clock

    def begin(self, op: Op) -> None:
        """The clock goes on when it has computed."""

    def end(self, op: Op) -> None:
        """Let its time pass."""
        self._clock.compute(op)
