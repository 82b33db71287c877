"""A stage: a consecutive run of segments that one rank plays for each micro-batch.

F  forward ──► activations kept ──► B  backward
               │           ▲   └──► I  backward_inputs ──► stash kept ──► W  backward_weights
               └─ input ─ R
                   kept  rerun
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from stretto.parallel.pipeline.segment import Kept, Segment, Value, tensors_of
from stretto.parallel.unit import Unit

Around = Callable[[Segment], AbstractContextManager[object]]
"""What a segment runs in."""
_PLAIN = nullcontext()


class Stage:
    """Runs forward and backward of its segments and keeps what the backward needs in between.

    Args:
        index: stage number, 0 is the first of the model.
        segments: its parts in order; in the last stage the last one returns the summed loss.
    """

    def __init__(self, index: int, segments: Sequence[Segment]) -> None:
        self.index = index
        self.segments = list(segments)
        self._inputs: dict[int, Value] = {}
        self._kept: dict[int, list[Kept]] = {}
        self._stashed: dict[int, list[Kept]] = {}

    @property
    def units(self) -> list[Unit]:
        """Its units, in order, once per use."""
        return [unit for segment in self.segments for unit in segment.units]

    @property
    def num_in_flight(self) -> int:
        """Micro-batches of which something is held: an input, activations, or the stash between ``I`` and ``W``."""
        return len(self._inputs) + len(self._kept) + len(self._stashed)

    def kept_tensors(self) -> Iterator[Tensor]:
        """Inputs of the stage and its segments that it holds, and what those between ``I`` and ``W`` stash."""
        for x in self._inputs.values():
            yield from tensors_of(x)
        for kept in self._kept.values():
            for record in kept:
                yield from tensors_of(record.x)
                yield from record.results
        yield from self.stashed_tensors()

    def stashed_tensors(self) -> Iterator[Tensor]:
        """What the micro-batches between ``I`` and ``W`` stash."""
        for kept in self._stashed.values():
            for record in kept:
                if record.stash is not None:
                    yield from record.stash.tensors()

    def inputs_of(self, microbatch: int) -> list[Value]:
        """The inputs of its segments that it keeps for a micro-batch, leaves of their graphs."""
        return [record.x for record in self._kept[microbatch]]

    def forward(
        self, microbatch: int, x: Value, context: Any, batch: Any, *, split: bool = False, around: Around | None = None
    ) -> Value:
        """Output of the stage; ``split``: its backward will be ``backward_inputs`` and ``backward_weights``.

        ``around`` gives what each segment runs in, when its parameters have memory.
        """
        kept = []
        for segment in self._forwards():
            with _PLAIN if around is None else around(segment):
                record, x = segment.forward(x, context, batch, split=split)
            segment.reshard()
            kept.append(record)
        self._kept[microbatch] = kept
        return x

    def forward_lightly(self, microbatch: int, x: Value, context: Any, batch: Any) -> Value:
        """Output of the stage, of which the input alone is kept; ``rerun`` comes before the backward."""
        self._inputs[microbatch] = x
        return self.evaluate(x, context, batch)

    def rerun(self, microbatch: int, context: Any, batch: Any, *, split: bool = False) -> None:
        """Run the forward again, this time keeping what its backward needs."""
        self.forward(microbatch, self._inputs.pop(microbatch), context, batch, split=split)

    def evaluate(self, x: Value, context: Any, batch: Any) -> Value:
        """Output of the stage, without a graph and nothing kept."""
        with torch.no_grad():
            for segment in self._forwards():
                x = segment.evaluate(x, context, batch)
                segment.reshard()
        return x

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

    def _forwards(self) -> Iterator[Segment]:
        """Its segments, each with its parameters and the next one's on their way."""
        self.segments[0].unshard()
        for position, segment in enumerate(self.segments):
            if position + 1 < len(self.segments):
                self.segments[position + 1].unshard()
            yield segment

    def _backwards(self) -> Iterator[int]:
        """Positions from the last to the first, each with its parameters and the previous one's on their way."""
        self.segments[-1].unshard()
        for position in reversed(range(len(self.segments))):
            if position:
                self.segments[position - 1].unshard()
            yield position

    def update(self) -> None:
        """OPT: nothing, because the update needs the norm of all ranks; VersionedStage (versions.py) needs none."""

    def forget(self) -> None:
        """Let all activations go (a step was given up)."""
        self._inputs.clear()
        self._kept.clear()
        self._stashed.clear()


def scalar(value: Value) -> Tensor:
    """The summed loss that the last stage returned."""
    assert isinstance(value, Tensor) and value.ndim == 0, "the last stage returns a scalar"
    return value
