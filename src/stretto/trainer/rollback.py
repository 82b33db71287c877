"""An update that can be taken back exactly: copies of what it changes.

The alternative is to run the update's arithmetic backwards (Qi et al. 2023, appendix): it needs no memory, but is
exact only in exact arithmetic.  Undoing ``w = w (1 - lr decay) - lr m / (sqrt(v) + eps)`` divides by what was
multiplied and adds what was subtracted, so that each of the three tensors comes back with another rounding, and the
second moment loses ``1 - beta2`` of its digits' worth.  A clipped step would then differ from that of a run with a
barrier, and resumed runs from uninterrupted ones.  The copies live from the update to the next step's first
backward, when few activations do: the peak of a step hardly grows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class Rollback:
    """Remembers all that an optimizer's step changes.

    Args:
        optimizer: the one whose next step may have to be taken back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._kept = [(tensor, tensor.detach().clone()) for tensor in changed_by(optimizer)]

    @torch.no_grad()
    def undo(self) -> None:
        """Put everything back, bit by bit."""
        for tensor, kept in self._kept:
            tensor.copy_(kept)


def changed_by(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The tensors that a step may change: those it updates, and its state of them."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            yield tensor
            yield from (value for value in optimizer.state.get(tensor, {}).values() if isinstance(value, Tensor))
