"""Attention of a rank that has all tokens of a row: nothing circulates, and what the kernel gives is the result.

These are whole rows where a backend was named without any cp, and documents that a rank has to itself.  No sum in a
wider type is kept beside the result, which at 128k tokens would be twice the size of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stretto.parallel.sequence.blockwise import Block, Rows
from stretto.parallel.sequence.pieces import Task


class Alone:
    """The scheme of one seat."""

    __slots__ = ()

    def attend(self, task: Task, q: Tensor, kv: Tensor, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Attention of all queries to all keys: out [B, H, T, K] and lse [B, H, T]."""
        return task.kernel.forward(q, kv, _whole(task))

    def differentiate(self, task: Task, rows: Rows, kv: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of q, and of keys and values."""
        return task.kernel.backward(rows, kv, _whole(task))


def _whole(task: Task) -> Block:
    ((row,),) = task.seats
    return Block(queries=row, keys=row, sight=task.sight, drop=task.drop, first_head=task.first_head)
