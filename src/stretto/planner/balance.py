"""Layers of each stage so that no rank has much more to do than another.

Every layer costs the same; the last stage also has the head, worth some layers, and the first the embedding:

    80 layers, pp = 4, head worth 3 layers        20 20 20 20+3     longest turn 23
                                                  20 21 21 18+3     longest turn 21

Layers are dealt one by one to the rank that is then least laden, which leaves the largest load as small as it can be:
a rank is given a layer only when all others would be laden at least as much by it.  A rank whose memory can't hold
more gets no more.  Ties go to the later ranks, which keep fewer micro-batches alive.
"""

from __future__ import annotations

from collections.abc import Sequence


def balanced_by_cost(
    num_layers: int,
    *,
    ranks: int,
    chunks: int = 1,
    first: float = 0.0,
    last: float = 0.0,
    most: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Layers of each of ``ranks`` x ``chunks`` stages, stage s on rank s mod ``ranks``, at least one each.

    ``first`` and ``last``: what the first and the last rank do besides, in layers.  ``most``: layers that each rank can
    hold.  None where that isn't enough.

    >>> balanced_by_cost(80, ranks=4, last=3.0)
    (20, 21, 21, 18)
    """
    if num_layers < ranks * chunks:
        return None
    held = [chunks] * ranks
    extra = [0.0] * ranks
    extra[0] += first
    extra[-1] += last
    room = list(most) if most is not None else [num_layers] * ranks
    if any(layers > limit for layers, limit in zip(held, room, strict=True)):
        return None
    for _ in range(num_layers - ranks * chunks):
        free = [rank for rank in range(ranks) if held[rank] < room[rank]]
        if not free:
            return None
        held[min(free, key=lambda rank: (held[rank] + extra[rank], -rank))] += 1
    return _dealt(held, chunks)


def _dealt(held: Sequence[int], chunks: int) -> tuple[int, ...]:
    """The layers of each rank over its chunks, as evenly as can be; what is left over goes to the early ones."""
    parts = [[layers // chunks + (chunk < layers % chunks) for chunk in range(chunks)] for layers in held]
    return tuple(parts[rank][chunk] for chunk in range(chunks) for rank in range(len(held)))
