"""Layers of each stage so that no rank has much more to do than another.

Every layer costs the same; the last stage also has the head, worth some layers:

    80 layers, pp = 4, head worth 3 layers        20 20 20 20+3     longest turn 23
                                                  20 21 21 18+3     longest turn 21

Layers are dealt one by one to the rank that is then least laden, which leaves the largest load as small as it can be:
a rank is given a layer only when all others would be laden at least as much by it.  A rank whose memory can't hold
more gets no more.  Ties go to the later ranks, which keep fewer micro-batches alive.  On unequal devices a layer costs
each rank its own (``costs``), and goes to the rank that then is done first; what a slower rank has then moves to a
faster one as long as nobody has more to do than the longest before.
"""

from __future__ import annotations

from collections.abc import Sequence


def balanced_by_cost(
    num_layers: int,
    *,
    ranks: int,
    chunks: int = 1,
    last: float = 0.0,
    most: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
) -> tuple[int, ...] | None:
    """Layers of each of ``ranks`` x ``chunks`` stages, stage s on rank s mod ``ranks``, at least one each.

    ``last``: what the last rank does besides, in layers.  ``most``: layers that each rank can hold.  None where that
    isn't enough.  ``costs``: of a layer on each rank, in any unit; None: all equal.

    >>> balanced_by_cost(80, ranks=4, last=3.0)
    (20, 21, 21, 18)
    >>> balanced_by_cost(30, ranks=2, costs=(1.0, 2.0))
    (20, 10)
    """
    if num_layers < ranks * chunks:
        return None
    held = [chunks] * ranks
    extra = [0.0] * ranks
    extra[-1] += last
    each = list(costs) if costs is not None else [1.0] * ranks
    room = list(most) if most is not None else [num_layers] * ranks
    if any(layers > limit for layers, limit in zip(held, room, strict=True)):
        return None
    for _ in range(num_layers - ranks * chunks):
        free = [rank for rank in range(ranks) if held[rank] < room[rank]]
        if not free:
            return None
        held[min(free, key=lambda rank: ((held[rank] + 1 + extra[rank]) * each[rank], -rank))] += 1
    if costs is not None:
        _hasten(held, [share * cost for share, cost in zip(extra, each, strict=True)], each, room, chunks)
    return _dealt(held, chunks)


def _hasten(held: list[int], extra: Sequence[float], each: Sequence[float], room: Sequence[int], least: int) -> None:
    """Move layers to faster ranks where the longest turn doesn't grow: a micro-batch is through sooner."""
    loads = [count * cost + more for count, cost, more in zip(held, each, extra, strict=True)]
    longest = max(loads)
    for slow in sorted(range(len(held)), key=lambda rank: -each[rank]):
        for fast in sorted(range(len(held)), key=lambda rank: each[rank]):
            while each[fast] < each[slow] and held[slow] > least and held[fast] < room[fast]:
                if (held[fast] + 1) * each[fast] + extra[fast] > longest * (1 + 1e-9):
                    break
                held[slow] -= 1
                held[fast] += 1


def _dealt(held: Sequence[int], chunks: int) -> tuple[int, ...]:
    """The layers of each rank over its chunks, as evenly as can be; what is left over goes to the early ones."""
    parts = [[layers // chunks + (chunk < layers % chunks) for chunk in range(chunks)] for layers in held]
    return tuple(parts[rank][chunk] for chunk in range(chunks) for rank in range(len(held)))
