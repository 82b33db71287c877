"""Interleaved 1F1B: several chunks per rank (Narayanan et al. 2021, figure 4).

2 ranks, 2 chunks (stages 0 and 2 on rank 0, 1 and 3 on rank 1), 4 micro-batches; a chunk costs half of
what a rank's whole share does, so filling and draining the pipeline cost half as well:

    rank 0 │0F0-0F1-2F0-2F1-0F2-    2B0-----0F3-2B1-----2F2-0B0-----2F3-0B1-----    2B2-----    2B3-----0B2-----0B3-----
    rank 1 │    1F0-1F1-3F0-3B0-----3F1-3B1-----1F2-1B0-----1F3-1B1-----3F2-3B2-----3F3-3B3-----1B2-----1B3-----
    time   │0                                                                                                       13.5

Micro-batches go in groups of at least R: a group passes chunk 0, then chunk 1, and so on, and goes back
in reverse.  Where R divides M the groups have R micro-batches and the order is Megatron-LM's.
Elsewhere the groups are as even as can be, the larger ones first: a group smaller than R would come
back to rank 0 before its last micro-batch left, and idle, and a group larger than the first would
need more forwards ahead than the warm-up makes.  With fewer than R micro-batches the order is that of R
of them with the missing ones left out, which can only make it shorter.
"""

from __future__ import annotations

from stretto.schedule import placement
from stretto.schedule.families.one_f_one_b import alternate
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule


def interleaved(*, ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Stage s on rank s mod R, ``chunks`` stages per rank, any number of micro-batches."""
    import numpy as np

    counted = max(microbatches, ranks)
    chunk, of_turn = np.array(forward_turns(ranks=ranks, microbatches=counted, chunks=chunks)).T
    there = of_turn < microbatches
    columns = []
    for rank in range(ranks):
        forward, turn = alternate(len(chunk), ahead=_ahead(rank, ranks=ranks, microbatches=counted, chunks=chunks))
        forward, turn = forward[there[turn]], turn[there[turn]]
        held = np.where(forward, chunk[turn], chunks - 1 - chunk[turn])
        columns.append((np.where(forward, Kind.F, Kind.B), held * ranks + rank, of_turn[turn]))
    kind, stage, microbatch = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    return Schedule.from_columns(
        kind=kind,
        stage=stage,
        microbatch=microbatch,
        offsets=np.arange(ranks + 1) * 2 * chunks * microbatches,
        name="interleaved",
        num_stages=ranks * chunks,
        num_microbatches=microbatches,
        placement=[placement.loop(ranks, ranks * chunks)],
    )


def _ahead(rank: int, *, ranks: int, microbatches: int, chunks: int) -> int:
    """Forwards of a rank before its first backward comes in turn."""
    if chunks == 1:
        return ranks - rank - 1
    # The first backward of the last rank needs its last chunk, which the first group reaches after
    # all the others; each rank before it is one forward and one backward further away from there.
    return (chunks - 1) * groups(ranks, microbatches)[0] + 2 * (ranks - rank - 1)


def forward_turns(*, ranks: int, microbatches: int, chunks: int) -> list[tuple[int, int]]:
    """Chunk and micro-batch of each forward of a rank, in order; the same on every rank.

    >>> forward_turns(ranks=2, microbatches=2, chunks=2)
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    turns, first = [], 0
    for size in groups(ranks, microbatches):
        turns += [(chunk, m) for chunk in range(chunks) for m in range(first, first + size)]
        first += size
    return turns


def groups(ranks: int, microbatches: int) -> list[int]:
    """Sizes of the groups, each at least R where there are that many, the larger ones first.

    >>> groups(4, 8), groups(4, 9), groups(4, 3)
    ([4, 4], [5, 4], [3])
    """
    count = max(1, microbatches // ranks)
    small, larger = divmod(microbatches, count)
    return [small + 1] * larger + [small] * (count - larger)
