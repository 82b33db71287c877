"""The landing: where what the frozen front gave for the next step's micro-batches waits for that step.

    this step   ... 3F4 ─► 4F4 keep ──┐           (schedule/passes/hand_over.py; stage 4 is the landing)
    next step                         └─► 0F0     take: the first stage's input

It stands among a rank's stages, has no segments and keeps values between steps, not activations within one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from stretto.parallel.pipeline.play import Play, Slot
from stretto.parallel.pipeline.segment import Value, tensors_of
from stretto.parallel.pipeline.stage import Stage

Run = Callable[[int, Value, object, object], Value]
"""Runs a stage for a micro-batch: its input, context and batch."""


class Landing(Stage):
    """Keeps values from one step to the next.

    Args:
        index: stage number.
        num_microbatches: of a step; unit u of its frozen work is numbered ``num_microbatches + u``.
    """

    def __init__(self, index: int, num_microbatches: int) -> None:
        super().__init__(index, [])
        self._count = num_microbatches
        self._waiting: dict[int, Value] = {}
        self._landed: dict[int, Value] = {}

    def keep(self, unit: int, value: Value) -> None:
        """``value`` is what the first stage reads for micro-batch ``unit`` (modulo a step's) after the next turn."""
        self._landed[unit % self._count] = value

    def take(self, microbatch: int) -> Value:
        """The first stage's input for a micro-batch of this step; it is no longer kept."""
        return self._waiting.pop(microbatch)

    def turn(self) -> None:
        """The next step begins: what has landed is now what waits."""
        assert not self._waiting, f"what came for the micro-batches {sorted(self._waiting)} was not used"
        self._waiting, self._landed = self._landed, {}

    def kept_tensors(self) -> Iterator[Tensor]:
        """What it keeps."""
        for value in (*self._waiting.values(), *self._landed.values()):
            yield from tensors_of(value)

    def forget(self) -> None:
        """Let all go."""
        self._waiting, self._landed = {}, {}


@dataclass(frozen=True, slots=True)
class Land:
    """F of the landing: keep what arrived."""

    landing: Landing
    unit: int
    source: Slot
    """Where it lies."""

    def __call__(self, play: Play) -> None:
        """Play it."""
        self.landing.keep(self.unit, play.values.pop(self.source))


@dataclass(frozen=True, slots=True)
class Taking:
    """What a stage runs, on an input that it takes from the landing."""

    landing: Landing
    run: Run

    def __call__(self, microbatch: int, x: Value, context: object, batch: object) -> Value:
        """Run it; ``x`` is nothing."""
        return self.run(microbatch, self.landing.take(microbatch), context, batch)
