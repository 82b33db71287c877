"""How a parameter lies on the mesh, as data.

A parameter has one global name and one global shape, whatever the plan.  A rank holds a *slice*
of it: first the tensor-parallel cut along one dim, then (with dp_shard) a flat range of what is
left.  Both are described here without torch, so that models, the runtime and checkpoints speak of
the same thing:

    global [8, 6]          tp=2 cuts dim 0        dp_shard=2 cuts the flat elements
    ┌──────────┐           ┌──────────┐           ┌──────────┐
    │          │           │  tp 0    │ rows 0-3  │██████████│ elements 0-11  -> rank 0
    │          │    ->     ├──────────┤     ->    ├──────────┤
    │          │           │  tp 1    │ rows 4-7  │██████████│ elements 12-23 -> rank 1
    └──────────┘           └──────────┘           └──────────┘
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class TensorRule(StrEnum):
    """What tensor parallelism does to a module of a model (Megatron-LM)."""

    REGION = "region"
    """The module's first input is gathered over the sequence before it runs."""
    COLUMN = "column"
    """Linear layer whose output features (weight dim 0 and bias) are split."""
    ROW = "row"
    """Linear layer whose input features (weight dim 1) are split; its output is summed and
    scattered over the sequence, its bias is added afterwards."""
    VOCAB_EMBEDDING = "vocab_embedding"
    """Embedding whose rows (the vocabulary) are split, the last rank holding fewer if need be."""
    VOCAB_HEAD = "vocab_head"
    """Linear layer onto the vocabulary, its output features split likewise; its input is gathered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A half-open rectangle ``[offset, offset + length)`` of a tensor, one entry per dim."""

    offset: tuple[int, ...]
    """First index held, per dim."""
    length: tuple[int, ...]
    """Number of indices held, per dim."""

    @property
    def numel(self) -> int:
        """Number of elements in the slice."""
        return math.prod(self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """Where a rank's local tensor sits in the global parameter."""

    name: str
    """Global name, for example ``blocks.3.attention.q.weight``; equal under every plan."""
    shape: tuple[int, ...]
    """Global shape."""
    slice: Slice
    """The part that this tensor-parallel rank holds."""
    tp_dim: int | None = None
    """The dim that tp cuts, or None where every tp rank holds the whole parameter."""
    tied_to: str | None = None
    """Global name of the parameter that this one is a copy of (tied embeddings)."""

    @classmethod
    def whole(cls, name: str, shape: Sequence[int], *, tied_to: str | None = None) -> Sharding:
        """The sharding of a parameter that is held whole."""
        shape = tuple(shape)
        return cls(name=name, shape=shape, slice=Slice(offset=(0,) * len(shape), length=shape), tied_to=tied_to)


def split_evenly(total: int, parts: int, index: int) -> tuple[int, int]:
    """Return ``(start, length)`` of part ``index`` when ``total`` is cut in chunks of ceil(total / parts).

    The last parts are shorter, and may be empty, where ``parts`` doesn't divide ``total``.

    >>> [split_evenly(10, 4, i) for i in range(4)]
    [(0, 3), (3, 3), (6, 3), (9, 1)]
    """
    size = -(-total // parts)
    start = min(index * size, total)
    return start, min(size, total - start)


def cut(
    name: str, shape: Sequence[int], *, dim: int | None, parts: int, index: int, tied_to: str | None = None
) -> Sharding:
    """The sharding of tp rank ``index`` of ``parts`` when ``dim`` is cut (None: held whole)."""
    if dim is None or parts == 1:
        return Sharding.whole(name, shape, tied_to=tied_to)
    start, length = split_evenly(shape[dim], parts, index)
    offsets = tuple(start if d == dim else 0 for d in range(len(shape)))
    lengths = tuple(length if d == dim else n for d, n in enumerate(shape))
    return Sharding(
        name=name, shape=tuple(shape), slice=Slice(offset=offsets, length=lengths), tp_dim=dim, tied_to=tied_to
    )


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Slice]]:
    """Cut the flat element range ``[start, stop)`` of a row-major tensor into rectangles.

    Yields ``(flat offset from start, rectangle)`` in flat order; at most ``2 * dims - 1`` of them.
    This is how a flat dp_shard range is written to a checkpoint that only knows rectangles.

    >>> [(at, r.offset, r.length) for at, r in rectangles((4, 3), 2, 10)]
    [(0, (0, 2), (1, 1)), (1, (1, 0), (2, 3)), (7, (3, 0), (1, 1))]
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield 0, Slice(offset=(start,) * len(shape), length=(stop - start,) * len(shape))
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    at = start
    while at < stop:
        index = at // row
        if at % row == 0 and index < last + (stop % row == 0):
            rows = stop // row - index
            yield at - start, Slice(offset=(index,) + (0,) * (len(shape) - 1), length=(rows, *shape[1:]))
            at += rows * row
        else:
            end = min(stop, (index + 1) * row)
            for inner, part in rectangles(shape[1:], at - index * row, end - index * row):
                yield at - start + inner, Slice(offset=(index, *part.offset), length=(1, *part.length))
            at = end
    assert first <= last
