"""Sums over the ranks of a pipeline without a barrier: on the way down they grow, the last rank tells all.

    rank 0 │ own ──►                                     ◄── whole, some time later
    rank 1 │        + own ──►                            ◄──
    rank 2 │                 + own = whole ─────────────────┘

Each rank has at once what the ranks before it found and itself (the partial sum), which is enough to see that a
limit is exceeded, and later what all found.  (Qi et al. 2023, section 4: there the whole travels back from rank to
rank; here the last one tells every other, which needs no rank to pass it on while it computes.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.parallel.collectives import Pending
from stretto.parallel.process_groups import new_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from stretto.parallel.mesh import Mesh


class Relay:
    """Partial and whole sums along this rank's pipeline; making it is collective over the world."""

    def __init__(self, mesh: Mesh) -> None:
        self._place, self._last = mesh.index("pp"), mesh.size("pp") - 1
        self._group: ProcessGroup | None = None
        for column in mesh.columns:
            group = new_group(column, limit=mesh.limit)
            if mesh.rank in column:
                self._group, self._column = group, column

    @property
    def previous(self) -> int | None:
        """Position of the rank that the partial sum comes from; None for the first."""
        return self._place - 1 if self._place else None

    @property
    def teller(self) -> int | None:
        """Position of the rank that the whole sum comes from; None for itself."""
        return None if self._place == self._last else self._last

    def add(self, own: Tensor) -> tuple[Tensor, Tensor, Pending]:
        """Add ``own`` (a vector) to what the ranks before found, and pass it on.

        Returns the partial sum, and the whole one, which may be read once the third value has been waited for.
        """
        assert self._group is not None
        partial = own.clone()
        if self._place:
            before = torch.empty_like(own)
            self._group.recv([before], self._place - 1, 0).wait()
            partial += before
        whole = partial.clone()
        if self._place < self._last:
            sent = partial.clone()
            passed = Pending(self._group.send([sent], self._place + 1, 0), sent)
            told = Pending(self._broadcast(whole), whole)
            return partial, whole, _Both(passed, told)
        return partial, whole, Pending(self._broadcast(whole), whole)

    def _broadcast(self, whole: Tensor) -> dist.Work:
        work = dist.broadcast(whole, self._column[self._last], group=self._group, async_op=True)
        assert work is not None
        return work


class _Both(Pending):
    """Two things under way."""

    __slots__ = ("_first", "_second")

    def __init__(self, first: Pending, second: Pending) -> None:
        super().__init__(None)
        self._first, self._second = first, second

    def wait(self) -> None:
        """Return when both are done."""
        self._first.wait()
        self._second.wait()
