"""A stage whose weights change between the forward and the backward of a micro-batch.

    F3 │ weights as the forward shall see them ─► Stage.forward ─► weights as they are now
    B3 │ weights as the backward shall see them ─► Stage.backward ─► weights as they are now
    OPT│ update at once

Weights are exchanged in place through ``.data``, which autograd doesn't count as a change: a backward reads the values
that the parameters hold when it runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from stretto.parallel.pipeline.segment import Value
from stretto.parallel.pipeline.stage import Stage


class Weights(Protocol):
    """Which weights a pass sees, and what an update does."""

    def for_forward(self, microbatch: int) -> AbstractContextManager[None]:
        """Inside, the stage's parameters are those of the micro-batch's forward."""

    def for_backward(self, microbatch: int) -> AbstractContextManager[None]:
        """Inside, they are those of its backward."""

    def update(self, microbatch: int) -> None:
        """The gradient of the micro-batch is there."""


class VersionedStage(Stage):
    """A stage that asks ``weights`` before every pass."""

    def __init__(self, stage: Stage, weights: Weights) -> None:
        super().__init__(stage.index, stage.segments)
        self._weights = weights
        self._last = -1

    def forward(self, microbatch: int, x: Value, context: Any, batch: Any, **how: Any) -> Value:
        """As ``Stage.forward``, with the weights of the micro-batch's forward."""
        with self._weights.for_forward(microbatch):
            return super().forward(microbatch, x, context, batch, **how)

    def backward(self, microbatch: int, dy: Value, context: Any, batch: Any) -> Value:
        """As ``Stage.backward``, with the weights of its backward."""
        self._last = microbatch
        with self._weights.for_backward(microbatch):
            return super().backward(microbatch, dy, context, batch)

    def update(self) -> None:
        """Update with the gradient of the backward before."""
        self._weights.update(self._last)
