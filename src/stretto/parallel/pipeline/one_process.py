"""All ranks of a schedule in one process: the runtime of training, messages in memory, time from a simulated clock.

    thread 0   0F0 0F1 RECV_B ┐ waits          One thread runs at a time, and goes on until it waits for a message
    thread 1        ┌─────────┘ 1F0 1B0 1F1    that isn't there.  When all do, that is a deadlock, and said at once.
                    └ runs

What is computed is really computed, by the same operations in the same order as on as many processes; only the
time that it takes is told (``simulated.py``).  A stage that several ranks hold (replicas that flow in both directions),
or a unit that several stages hold (a tie), may be one object: its gradients then add up by themselves.  No process
group is needed, or used: collectives of other axes have no place here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from stretto.parallel.pipeline.channel import Message
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.segment import Value, tensors_of
from stretto.parallel.pipeline.simulated import Operand, SimulatedClock, SimulatedDevice
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.pipeline.vocabulary.in_memory import in_memory
from stretto.parallel.pipeline.vocabulary.passes import Shard
from stretto.schedule.render.text import grid
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.costs import Costs
from stretto.spec.contract import Batch
from stretto.spec.errors import ScheduleError

Letter = tuple[int, int, str, int, int]
"""Sender, receiver, direction, boundary, micro-batch; between vocabulary passes what it is, and no boundary."""


class Stopped(Exception):
    """Another rank raised; this one has nothing to say."""


class PostOffice:
    """Messages on their way between threads, of which one runs at a time: the one that holds the office."""

    def __init__(self, describe: Callable[[Mapping[int, int]], str]) -> None:
        """Args: describe: given for whom each rank waits, says so."""
        self._describe = describe
        self._office = threading.Condition()
        self._running: set[int] = set()
        self._wanted: dict[int, Letter] = {}
        self._letters: dict[Letter, Any] = {}
        self.failures: list[BaseException] = []
        """What ranks raised in this step, the first first."""

    def begin_step(self, num_ranks: int) -> None:
        """All ranks will run; nothing is on its way."""
        self._running = set(range(num_ranks))
        self._wanted, self._letters, self.failures = {}, {}, []

    @contextmanager
    def turn(self, rank: int) -> Iterator[None]:
        """Run a rank's step, when others wait; what it raises is noted."""
        with self._office:
            try:
                yield
            except Stopped:
                pass  # the rank that raised has noted why
            except BaseException as failure:
                self.failures.append(failure)
            self._running.discard(rank)
            self._look_for_deadlock()
            self._office.notify_all()

    def post(self, letter: Letter, value: Value, operand: Operand, time: float) -> None:
        """Send a copy, which arrives at ``time``."""
        copies = tuple(tensor.detach().clone() for tensor in tensors_of(value))
        self.leave(letter, (copies[0] if isinstance(value, Tensor) else copies, operand, time))

    def leave(self, letter: Letter, content: Any) -> None:
        """Send what its receiver may keep."""
        self._letters[letter] = content
        self._office.notify_all()

    def collect(self, letter: Letter) -> Any:
        """Wait for a letter, and give what it holds; meanwhile others run."""
        rank = letter[1]
        while letter not in self._letters:
            self._wanted[rank] = letter
            self._look_for_deadlock()
            if self.failures:
                raise Stopped
            self._office.wait()
        self._wanted.pop(rank, None)
        return self._letters.pop(letter)

    def _look_for_deadlock(self) -> None:
        """Note a failure where all that run wait for what isn't there."""
        waiting = {rank: letter[0] for rank, letter in self._wanted.items() if letter not in self._letters}
        if self._running and self._running <= waiting.keys() and not self.failures:
            found = {rank: waiting[rank] for rank in sorted(self._running)}
            self.failures.append(ScheduleError(self._describe(found)))
            self._office.notify_all()


class MemoryChannel:
    """One rank's end of all messages."""

    def __init__(self, office: PostOffice, rank: int, clock: SimulatedClock) -> None:
        self._office, self._rank, self._clock = office, rank, clock
        self._due: deque[Message] = deque()

    def begin_step(self, receives: Sequence[Message], shapes: Sequence[Hashable]) -> None:
        """Remember what will come; a step that failed may have left something."""
        self._due = deque(receives)

    def announce(self, receives: Sequence[Message]) -> None:
        """Remember what will come besides."""
        self._due.extend(receives)

    def send(self, message: Message, value: Value) -> None:
        """Post it."""
        operand, time = self._clock.sent(message.direction, message.boundary, message.microbatch)
        letter = (self._rank, message.peer, message.direction, message.boundary, message.microbatch)
        self._office.post(letter, value, operand, time)

    def receive(self, message: Message) -> Value:
        """Wait for it, letting other ranks run."""
        self._due.remove(message)
        letter = (message.peer, self._rank, message.direction, message.boundary, message.microbatch)
        value, operand, time = self._office.collect(letter)
        self._clock.arrived(operand, time)
        return value

    def tend(self) -> None:
        """Nothing can be done ahead."""

    def end_step(self) -> None:
        """Everything sent is there."""
        assert not self._due, "messages of this step were not received"

    def abandon(self) -> None:
        """Receive what was announced, and forget it."""
        while self._due:
            self.receive(self._due[0])


class OneProcess:
    """Plays a whole schedule.

    Args:
        schedule: lowered (with messages).
        stages: each rank's stages by number.
        costs: what the clock goes by; the default: every operation takes 1 of a rank's share.
        shards: each rank's rows of embedding and head, for a schedule with S and T.

    Raises:
        UnsupportedError: for a schedule with operations that can't be played.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Mapping[int, Stage]],
        *,
        costs: Costs | None = None,
        shards: Sequence[Shard] | None = None,
    ) -> None:
        self._schedule = schedule
        self._office, ranks = PostOffice(self._deadlock), schedule.num_ranks
        self.clocks = [SimulatedClock(schedule, costs or Costs(), rank) for rank in range(ranks)]
        self.runtimes = [
            Runtime(
                stages[rank],
                schedule,
                Seat(
                    rank=rank,
                    channel=MemoryChannel(self._office, rank, clock),
                    observer=clock,
                    device=SimulatedDevice(clock),
                    vocabulary=in_memory(shards[rank], self._office, (rank, ranks), clock) if shards else None,
                ),
            )
            for rank, clock in enumerate(self.clocks)
        ]

    @property
    def makespan(self) -> float:
        """Of the last step: from the first operation anywhere to the last, in the costs' unit."""
        return max(clock.latest for clock in self.clocks) - min(clock.first for clock in self.clocks)

    def step(
        self, batches: Sequence[Batch], context_of: Callable[[Batch], Any], scale: Callable[[], Tensor] | None
    ) -> Tensor | None:
        """Play a step, as ``Runtime.step``; the sum of all ranks' losses.

        Raises what a rank raised first, and ScheduleError, with the grid, where ranks wait for each other.
        """
        losses: dict[int, Tensor | None] = {}
        self._office.begin_step(self._schedule.num_ranks)

        def play(rank: int) -> None:
            with self._office.turn(rank):
                self.clocks[rank].begin_step()
                losses[rank] = self.runtimes[rank].step(batches, context_of, scale)
                self.clocks[rank].end_step()

        threads = [threading.Thread(target=play, args=(rank,), daemon=True) for rank in range(len(self.runtimes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._office.failures:
            raise self._office.failures[0]
        found = [loss for _, loss in sorted(losses.items()) if loss is not None]
        return sum(found[1:], found[0]) if found else None

    def _deadlock(self, waits: Mapping[int, int]) -> str:
        """Who waits for whom, and where that stands in the schedule."""
        schedule, last = self._schedule, [clock.last for clock in self.clocks]
        told = ", ".join(f"rank {rank} waits in {last[rank]} for rank {other}" for rank, other in waits.items())
        rank = next(iter(waits))
        position = [str(op) for op in schedule.ops(rank)].index(last[rank])
        return f"{schedule.name}: nothing moves: {told}.\n{grid(schedule, rank=rank, position=position)}"
