"""What lives for one step: values between operations, contexts of micro-batches, the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stretto.parallel.pipeline.segment import Value
from stretto.spec.contract import Batch

Slot = tuple[str, int, int]
"""Where a value lies between two operations: ``F`` or ``B``, the stage that reads it (the one that made it, where
another rank reads it), micro-batch."""
END_F, END_B = "END_F", "END_B"
"""Slots of what leaves the stages at the ends of the model, where the vocabulary is split over the ranks."""


class Play:
    """The state of one step.

    Args:
        batches: the micro-batches.
        context_of: makes what the blocks share of a micro-batch.
        scale: gives the gradient of the summed loss; None where nothing is differentiated.
        uses: how often each micro-batch's context will be asked for.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        context_of: Callable[[Batch], Any],
        scale: Callable[[], Tensor] | None,
        uses: Counter[int],
    ) -> None:
        self.batches = batches
        self.values: dict[Slot, Value] = {}
        """What one operation left for another: on this rank or for a message."""
        self.loss: Tensor | None = None
        """Sum of the losses so far."""
        self._scale = scale
        self._seed: Tensor | None = None
        self._loss_dtype: torch.dtype | None = None
        self._context_of, self._uses = context_of, dict(uses)
        self._contexts: dict[int, Any] = {}

    def context(self, microbatch: int) -> Any:
        """The context of a micro-batch: made when first asked for, let go when asked for the last time."""
        self._uses[microbatch] -= 1
        if microbatch not in self._contexts:
            self._contexts[microbatch] = self._context_of(self.batches[microbatch])
        if self._uses[microbatch]:
            return self._contexts[microbatch]
        return self._contexts.pop(microbatch)

    def seed(self, dtype: torch.dtype | None = None) -> Tensor:
        """Gradient of the summed loss, in the loss's own type, which a rank that has no loss must say."""
        if self._seed is None:
            dtype = dtype or self._loss_dtype
            assert self._scale is not None and dtype is not None
            self._seed = self._scale().to(dtype)
        return self._seed

    def add_loss(self, loss: Tensor) -> None:
        """Sum the losses, in at least float32."""
        loss = loss.detach()
        self._loss_dtype = loss.dtype
        wide = loss.to(torch.promote_types(loss.dtype, torch.float32))
        self.loss = wide if self.loss is None else self.loss + wide
