"""Who sees whom, as one number per query: the first token of the row that it sees.

Causal, document and sliding-window masks all let query q see the tokens [first(q), q], counted over the whole row,
and ``first`` never falls along a row.  So a block of queries and keys is judged by its corners, whatever rank holds
it, and where it is empty nobody computes anything:

          keys ►                    full      first(last query) <= first key and last key <= first query
    q  ■ . . . .                    empty     last key < first(first query) or first key > last query
    ▼  ■ ■ . . .                    partial   the rest; only here is a mask made
       . ■ ■ . .  ◄ a window of 2
"""

from __future__ import annotations

from enum import Enum

import numpy as np
import torch
from torch import Tensor

from stretto.spec.reach import Reach, Seats
from stretto.spec.sequence import Range


class Relation(Enum):
    """What some queries see of some keys."""

    EMPTY = "empty"
    FULL = "full"
    PARTIAL = "partial"


class Sight:
    """Who sees whom in the rows of one micro-batch.

    Args:
        first: int64 [B or 1, S] on the CPU, the first token that each token of the row sees, never falling along
            a row; None: plain causal attention.
    """

    __slots__ = ("_first", "_least", "_most")

    def __init__(self, first: Tensor | None) -> None:
        self._first = first
        self._least: np.ndarray | None = None if first is None else first.amin(0).numpy()
        self._most: np.ndarray | None = None if first is None else first.amax(0).numpy()

    def relation(self, queries: Range, keys: Range) -> Relation:
        """What ``queries`` see of ``keys``, in all rows."""
        least = 0 if self._least is None else int(self._least[queries[0]])
        most = 0 if self._most is None else int(self._most[queries[1] - 1])
        if keys[0] > queries[1] - 1 or keys[1] - 1 < least:
            return Relation.EMPTY
        if keys[1] - 1 <= queries[0] and keys[0] >= most:
            return Relation.FULL
        return Relation.PARTIAL

    def reach(self, seats: Seats) -> Reach:
        """Which tokens of the seats see which of others, in any row."""
        least = self._least
        if least is None:
            return Reach.whole(seats)
        return Reach.of(seats, lambda token: int(least[token]), lambda token: int(least.searchsorted(token, "right")))

    def mask(self, queries: Range, keys: Range, device: torch.device) -> Tensor:
        """Bool [B or 1, 1, queries, keys], True where a query sees a key."""
        q = torch.arange(*queries, device=device).unsqueeze(1)
        k = torch.arange(*keys, device=device)
        seen = (k <= q).unsqueeze(0)
        if self._first is not None:
            first = self._first[:, queries[0] : queries[1]].to(device, non_blocking=True)
            seen = seen & (k >= first.unsqueeze(2))
        return seen.unsqueeze(1)

    @property
    def first(self) -> Tensor | None:
        """The first token that each token sees, as it was given."""
        return self._first

    def first_seen(self, queries: Range) -> np.ndarray | None:
        """The first token that each of ``queries`` sees, where rows are alike; None: all that precede it."""
        assert self.alike, "rows differ; take one"
        return None if self._least is None else self._least[queries[0] : queries[1]]

    @property
    def alike(self) -> bool:
        """Whether in all rows the same holds."""
        return self._first is None or self._first.shape[0] == 1

    def row(self, index: int) -> Sight:
        """Who sees whom in one of the rows."""
        return self if self._first is None or self.alike else Sight(self._first[index : index + 1])

    def pairs(self, queries: Range, keys: Range) -> int:
        """How many (query, key) pairs see each other in one row (the first, where rows differ): the work."""
        q = np.arange(*queries)
        first = np.zeros_like(q) if self._first is None else self._first[0, queries[0] : queries[1]].numpy()
        seen = np.minimum(q + 1, keys[1]) - np.maximum(first, keys[0])
        return int(seen.clip(0).sum())
