"""A stage: a consecutive run of segments that one rank plays for each micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from stretto.parallel.pipeline.segment import Kept, Segment, Value, tensors_of
from stretto.parallel.unit import Unit


class Stage:
    """Runs forward and backward of its segments and keeps what the backward needs in between.

    Args:
        index: stage number, 0 is the first of the model.
        segments: its parts in order; in the last stage the last one returns the summed loss.
    """

    def __init__(self, index: int, segments: Sequence[Segment]) -> None:
        self.index = index
        self.segments = list(segments)
        self._kept: dict[int, list[Kept]] = {}

    @property
    def units(self) -> list[Unit]:
        """Its units, in order, once per use."""
        return [unit for segment in self.segments for unit in segment.units]

    @property
    def num_in_flight(self) -> int:
        """Micro-batches whose activations are held."""
        return len(self._kept)

    def kept_inputs(self) -> Iterator[Tensor]:
        """Segment inputs of the micro-batches in flight."""
        for kept in self._kept.values():
            for record in kept:
                yield from tensors_of(record.x)

    def forward(self, microbatch: int, x: Value, context: Any, batch: Any) -> Value:
        """Output of the stage for a micro-batch; without gradients if ``grad`` mode is off."""
        kept = []
        for position, segment in enumerate(self.segments):
            segment.unshard()
            if position + 1 < len(self.segments):
                self.segments[position + 1].unshard()
            record, x = segment.forward(x, context, batch)
            segment.reshard()
            kept.append(record)
        self._kept[microbatch] = kept
        return x

    def evaluate(self, x: Value, context: Any, batch: Any) -> Value:
        """Output of the stage, nothing kept; called without grad mode."""
        for position, segment in enumerate(self.segments):
            segment.unshard()
            if position + 1 < len(self.segments):
                self.segments[position + 1].unshard()
            x = segment.evaluate(x, context, batch)
            segment.reshard()
        return x

    def backward(self, microbatch: int, dy: Value, context: Any, batch: Any) -> Value:
        """Gradient of the stage's input; the activations of the micro-batch are let go as it proceeds."""
        kept = self._kept.pop(microbatch)
        for position in reversed(range(len(self.segments))):
            segment = self.segments[position]
            segment.unshard()
            if position:
                self.segments[position - 1].unshard()
            dy = segment.backward(kept.pop(), dy, context, batch)
            segment.reshard()
        return dy

    def forget(self) -> None:
        """Let all activations go (a step was given up)."""
        self._kept.clear()


def scalar(value: Value) -> Tensor:
    """The summed loss that the last stage returned."""
    assert isinstance(value, Tensor) and value.ndim == 0, "the last stage returns a scalar"
    return value
