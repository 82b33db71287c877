"""Selective offload: a long document's activations are on the host while nobody needs them, block by block (ByteScale).

Whether and how many blocks' is said by each micro-batch (``SequencePart.away``).  The first ones go, each as soon as it
has computed, and come back in reverse; the budget is what the others take, two blocks' at least:

    forward    │F0│F1│F2│F3│F4│F5│       away 4: F2 waits for 0 to be gone, F5 for 3; before that copies take their time
    backward   │B5│B4│B3│B2│B1│B0│       B4 begins with the way back of 3, into the memory that B5 gave back

What is held depends on the order alone, not on how fast copies are; a copy that is late is waited for.  A forward ends
when what goes has gone, so over pp a stage holds no more of each of its micro-batches than of the one at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from stretto.parallel.offload.activation import tensors_in
from stretto.parallel.offload.offloader import Offloader
from stretto.parallel.pipeline.segment import Kept, Segment, Value, tensors_of
from stretto.parallel.pipeline.stage import Around, Stage

TURNS = 2
"""Blocks whose activations are here at least: the one at work, and one on its way."""


class SelectiveStage(Stage):
    """A stage that keeps less of some micro-batches.

    Args:
        index, segments: see Stage.
        offloader: moves what goes, keyed by a segment's position and the micro-batch; a rank has one stage.
    """

    def __init__(self, index: int, segments: Sequence[Segment], offloader: Offloader) -> None:
        super().__init__(index, segments)
        self.offloader = offloader
        names = [segment.name for segment in self.segments]
        self._blocks = {
            at: number for number, at in enumerate(i for i, n in enumerate(names) if n.startswith("blocks"))
        }

    def forward(
        self, microbatch: int, x: Value, context: Any, batch: Any, *, split: bool = False, around: Around | None = None
    ) -> Value:
        """See Stage."""
        away = self._away(batch)
        if not away:
            return super().forward(microbatch, x, context, batch, split=split, around=around)
        assert around is None, "the schedule offloads whole stages"
        device, kept = next(tensors_in(batch)).device, list[Kept]()
        for position, segment in enumerate(self._forwards()):
            number, key = self._blocks.get(position), (position, microbatch)
            goes = number is not None and number < away
            if number is not None:  # of those before it, so many may still be here
                self.offloader.let_leave(min(number, away) - (number + 1 - self._budget(away)))
            activation = self.offloader.note(key, device, (context, batch)) if goes else None
            stay = [tensor for unit in segment.units for tensor in unit.buffers()]
            with nullcontext() if activation is None else activation.noting(stay):
                record, x = segment.forward(x, context, batch, split=split)
            segment.reshard()
            if goes:
                self.offloader.offload(key, [*tensors_of(record.x), *record.results])
            kept.append(record)
        self._kept[microbatch] = kept
        return x

    def backward(self, microbatch: int, dy: Value, context: Any, batch: Any) -> Value:
        """See Stage."""
        away = still = self._away(batch)
        if not away:
            return super().backward(microbatch, dy, context, batch)
        kept = self._kept.pop(microbatch)
        for position in self._backwards():
            number, segment = self._blocks.get(position), self.segments[position]
            while number is not None and still and number + 1 - still < self._budget(away):
                still -= 1
                self.offloader.load((self._position(still), microbatch))
            if number is not None and number < away:
                self.offloader.before_backward((position, microbatch))
            dy = segment.backward(kept.pop(), dy, context, batch)
            segment.reshard()
        return dy

    def _away(self, batch: Any) -> int:
        """Blocks whose activations of this micro-batch go."""
        return 0 if batch.part is None else max(0, min(batch.part.away, len(self._blocks) - TURNS))

    def _budget(self, away: int) -> int:
        """Blocks whose activations may be here at once."""
        return max(TURNS, len(self._blocks) - away)

    def _position(self, number: int) -> int:
        """Where block ``number`` is among the segments."""
        return next(position for position, found in self._blocks.items() if found == number)
