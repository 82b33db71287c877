"""A stage: a consecutive run of segments that one rank plays for each micro-batch.

F  forward ──► activations kept ──► B  backward
                               └──► I  backward_inputs ──► stash kept ──► W  backward_weights
"""

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
        self._stashed: dict[int, list[Kept]] = {}

    @property
    def units(self) -> list[Unit]:
        """Its units, in order, once per use."""
        return [unit for segment in self.segments for unit in segment.units]

    @property
    def num_in_flight(self) -> int:
        """Micro-batches of which something is held, activations or the stash between ``I`` and ``W``."""
        return len(self._kept) + len(self._stashed)

    def kept_tensors(self) -> Iterator[Tensor]:
        """Segment inputs of the micro-batches in flight, and what those between ``I`` and ``W`` stash."""
        for kept in self._kept.values():
            for record in kept:
                yield from tensors_of(record.x)
        yield from self.stashed_tensors()

    def stashed_tensors(self) -> Iterator[Tensor]:
        """What the micro-batches between ``I`` and ``W`` stash."""
        for kept in self._stashed.values():
            for record in kept:
                if record.stash is not None:
                    yield from record.stash.tensors()

    def forward(
        self, microbatch: int, x: Value, context: Any, batch: Any, *, split: bool = False, recompute: bool = False
    ) -> Value:
        """Output of the stage for a micro-batch.

        Args:
            split: its backward will be ``backward_inputs`` and ``backward_weights``.
            recompute: keep the segments' inputs alone; ``rerun`` makes the rest before the backward.
        """
        kept = []
        for position, segment in enumerate(self.segments):
            segment.unshard()
            if position + 1 < len(self.segments):
                self.segments[position + 1].unshard()
            record, x = segment.forward(x, context, batch, split=split, recompute=recompute)
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

    def rerun(self, microbatch: int, context: Any, batch: Any) -> None:
        """Recompute what the forward didn't keep."""
        for segment, record in zip(self.segments, self._kept[microbatch], strict=True):
            segment.rerun(record, context, batch)
            segment.reshard()

    def backward(self, microbatch: int, dy: Value, context: Any, batch: Any) -> Value:
        """Gradient of the stage's input; the activations of the micro-batch are let go as it proceeds."""
        kept = self._kept.pop(microbatch)
        for position in self._backwards():
            segment = self.segments[position]
            dy = segment.backward(kept.pop(), dy, context, batch)
            segment.reshard()
        return dy

    def backward_inputs(self, microbatch: int, dy: Value, context: Any, batch: Any) -> Value:
        """Gradient of the stage's input; what ``backward_weights`` needs is stashed."""
        kept = self._stashed[microbatch] = self._kept.pop(microbatch)
        for position in self._backwards():
            segment = self.segments[position]
            dy = segment.backward_inputs(kept[position], dy, context, batch)
            segment.reshard()
        return dy

    def backward_weights(self, microbatch: int) -> None:
        """Gradients of the stage's parameters go to the units."""
        kept = self._stashed.pop(microbatch)
        for segment in reversed(self.segments):
            segment.backward_weights(kept.pop())

    def _backwards(self) -> Iterator[int]:
        """Positions from the last to the first, each with its parameters and the next ones' on their way."""
        for position in reversed(range(len(self.segments))):
            self.segments[position].unshard()
            if position:
                self.segments[position - 1].unshard()
            yield position

    def forget(self) -> None:
        """Let all activations go (a step was given up)."""
        self._kept.clear()
        self._stashed.clear()


def scalar(value: Value) -> Tensor:
    """The summed loss that the last stage returned."""
    assert isinstance(value, Tensor) and value.ndim == 0, "the last stage returns a scalar"
    return value
