"""Layered gradient accumulation in a modular pipeline (Lamy-Poirier 2021).

2 ranks, 4 micro-batches, 2 chunks:

    rank 0 │0F0-0F1-0F2-0F3-2F0-2F1-2F2-2F3-            2B0-----2B1-----2B2-----2B3-----0B0-----0B1-----0B2-----0B3-----
    rank 1 │    1F0-1F1-1F2-1F3-3F0-3F1-3F2-3F3-3B0-----3B1-----3B2-----3B3-----1B0-----1B1-----1B2-----1B3-----
    time   │0                                                                                                       13.5

*Layered gradient accumulation*: all micro-batches go through a layer before the next layer begins, forward and
backward, so that a layer's parameters are gathered once a pass, its gradients reduced once a step, and both go on
while its neighbours compute.  *Modular pipeline*: layers are dealt to the ranks in turn, so that a micro-batch comes
by every R layers, and filling the pipeline costs R - 1 layers instead of R - 1 shares of the model.

    0UNSHARD0 2UNSHARD0 0F0 ... 0F3 0RESHARD0 2F0 ... 2F3   0UNSHARD0 2B0 ... 2B3 2RESHARD0 2REDUCE_GRAD0 0B0 ...

With one rank it is layered gradient accumulation alone.  ``chunks`` is the number of layers a rank holds, or of
groups of layers.  It is the origin of breadth-first, has the same order, and shards unless told otherwise.
"""

from __future__ import annotations

from stretto.schedule.families.breadth_first import chunk_by_chunk
from stretto.schedule.families.option import flag
from stretto.schedule.schedule import Schedule


def modular(*, ranks: int, microbatches: int, chunks: int, sharded: bool | str = True) -> Schedule:
    """Stage s on rank s mod R, one stage after the other; any number of micro-batches."""
    return chunk_by_chunk(
        "modular", ranks=ranks, microbatches=microbatches, chunks=chunks, sharded=flag("sharded", sharded)
    )
