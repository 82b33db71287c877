"""Breadth-first: all micro-batches through a chunk before the next chunk (Lamy-Poirier 2023, figure 4d).

2 ranks, 3 micro-batches, 2 chunks:

    rank 0 │0F0-0F1-0F2-2F0-2F1-2F2-            2B0-----2B1-----2B2-----0B0-----0B1-----0B2-----
    rank 1 │    1F0-1F1-1F2-3F0-3F1-3F2-3B0-----3B1-----3B2-----1B0-----1B1-----1B2-----
    time   │0                                                                               10.5

Interleaved 1F1B goes depth first: a micro-batch goes back as soon as it can.  Here the chunk is the outer
loop, forward and backward, so that a rank works for a long time on one stage.  With parameters sharded over
data-parallel ranks (``sharded``) each stage is gathered once for the forward and once for the backward,
the next one while this one computes, and its gradients are reduced once, while the stages before it go on:

    0UNSHARD0 2UNSHARD0 0F0 ... 0F3 0RESHARD0 2F0 ... 2F3   0UNSHARD0 2B0 ... 2B3 2RESHARD0 2REDUCE_GRAD0 0B0 ...

The last chunk stays gathered between its forward and its backward.  The bubble is that of interleaved 1F1B,
the activations of all micro-batches are kept.
"""

from __future__ import annotations

from stretto.schedule import placement
from stretto.schedule.families.gathering import gathered
from stretto.schedule.families.option import flag
from stretto.schedule.families.runs import Run, columns
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule


def breadth_first(*, ranks: int, microbatches: int, chunks: int, sharded: bool | str = False) -> Schedule:
    """Stage s on rank s mod R, chunk after chunk; ``sharded`` gathers and reduces each stage where it is used."""
    return chunk_by_chunk(
        "breadth-first", ranks=ranks, microbatches=microbatches, chunks=chunks, sharded=flag("sharded", sharded)
    )


def chunk_by_chunk(name: str, *, ranks: int, microbatches: int, chunks: int, sharded: bool) -> Schedule:
    """All micro-batches through a rank's chunks one after the other, and back."""
    schedule = Schedule.from_columns(
        **columns([_order(range(rank, ranks * chunks, ranks), microbatches, sharded) for rank in range(ranks)]),
        name=name,
        num_stages=ranks * chunks,
        num_microbatches=microbatches,
        placement=[placement.loop(ranks, ranks * chunks)],
    )
    return gathered(schedule) if sharded else schedule


def _order(stages: range, microbatches: int, sharded: bool) -> list[Run]:
    """One rank's order; where stages are sharded, the gradients of each are reduced after its last backward."""
    order = [Run(Kind.F, stage, length=microbatches) for stage in stages]
    for stage in reversed(stages):
        order += [Run(Kind.B, stage, length=microbatches)]
        order += [Run(Kind.REDUCE_GRAD, stage)] * sharded
    return order
