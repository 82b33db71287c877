"""Brings the last stage's output of each micro-batch to all pipeline ranks.

rank 3   3F0 ── give ──┐                 Broadcasts are started in the order of S, which all ranks share; a
rank 0   ... post ◄────┤ ... take ─ 0S0  rank that will receive starts its side ahead, the rank that sends as
rank 1   ... post ◄────┘ ... take ─ 1S0  soon as its output and those before it are there
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stretto.parallel.collectives import Pending, broadcast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AHEAD = 2
"""Outputs that a rank may be receiving before it needs them."""


class Spread:
    """The broadcasts of one schedule.

    Args:
        group: the pipeline; None where it is one rank.
        order: micro-batches in the order of S.
        sources: index in the group of the rank that makes each one's output.
        here: this rank's index.
    """

    def __init__(
        self, group: ProcessGroup | None, order: Sequence[int], sources: Mapping[int, int], *, here: int
    ) -> None:
        self._group, self._order, self._sources, self._here = group, order, sources, here
        self._at = self._taken = 0
        self._empty: Callable[[int], Tensor] | None = None
        self._ready: dict[int, Tensor] = {}
        self._arriving: dict[int, tuple[Tensor, Pending]] = {}
        self._leaving: list[Pending] = []

    def begin_step(self, empty: Callable[[int], Tensor]) -> None:
        """``empty`` makes a tensor to receive a micro-batch's output into."""
        self._at = self._taken = 0
        self._empty = empty
        self._post()

    def give(self, microbatch: int, y: Tensor) -> None:
        """This rank made an output; it must not be changed."""
        self._ready[microbatch] = y
        self._post()

    def take(self, microbatch: int) -> Tensor:
        """Wait for the next output in order."""
        assert self._order[self._taken] == microbatch
        self._taken += 1
        self._post()
        y, pending = self._arriving.pop(microbatch)
        if self._sources[microbatch] == self._here:
            self._leaving.append(pending)
        else:
            pending.wait()
        return y

    def end_step(self) -> None:
        """Wait until everything has left."""
        for pending in self._leaving:
            pending.wait()
        self._leaving.clear()

    def _post(self) -> None:
        """Start what can be started: all that comes before an output of this rank, and some more."""
        assert self._empty is not None
        self._leaving = [pending for pending in self._leaving if not pending.is_over()]
        own = max((i for i, m in enumerate(self._order) if m in self._ready), default=-1)
        while self._at < len(self._order) and self._at <= max(own, self._taken + AHEAD - 1):
            microbatch = self._order[self._at]
            source = self._sources[microbatch]
            if source == self._here and microbatch not in self._ready:
                return
            self._at += 1
            y = self._ready.pop(microbatch) if source == self._here else self._empty(microbatch)
            self._arriving[microbatch] = y, broadcast(y, source, self._group)

    def tensors(self) -> list[Tensor]:
        """What it keeps until S takes it."""
        return [*self._ready.values(), *(y for y, _ in self._arriving.values())]


def like_outputs(tokens: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """A tensor for an output of the last stage, [B, T, D], given the tokens [B, T]."""
    return torch.empty(*tokens.shape, width, dtype=dtype, device=tokens.device)
