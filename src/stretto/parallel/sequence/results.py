"""Selective checkpoint++ (LoongTrain): where a block is recomputed, its attention is not.

    forward     block without graph ── attention ──► (out, lse) kept        a block keeps its input and this
    backward    block again ────────── attention ◄── (out, lse)             no keys travel for it a second time

Attention grows with the square of the sequence and its messages cross nodes, while its output is one activation:
keeping it costs little and saves most of what a full recompute costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


class Results:
    """Hands results of attention from a block's forward to its recomputation, in order."""

    def __init__(self) -> None:
        self._store: list[Tensor] | None = None
        self._again = False

    @contextmanager
    def keep(self, store: list[Tensor]) -> Iterator[None]:
        """Put what attention gives into ``store``."""
        self._store, self._again = store, False
        yield
        self._store = None

    @contextmanager
    def reuse(self, store: list[Tensor]) -> Iterator[None]:
        """Let attention give what is in ``store``, which is empty afterwards; an empty one changes nothing."""
        self._store, self._again = store, bool(store)
        yield
        self._store = None

    def put(self, out: Tensor, lse: Tensor) -> None:
        """A result, kept if somebody asked for it."""
        if self._store is not None and not self._again:
            self._store += [out, lse]

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The next result, None where it has to be computed."""
        if self._store is None or not self._again:
            return None
        return self._store.pop(0), self._store.pop(0)
