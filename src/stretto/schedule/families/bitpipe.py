"""BitPipe: two replicas in opposite directions, each a V with two chunks (Wu et al. 2024).

2 ranks, 4 micro-batches:

    rank 0 │0F0-1F1-2F1-3F0-3B0-----0F2-2B1-----1F3-1B1-----2F3-0B0-----3F2-3B2-----2B3-----1B3-----0B2-----
    rank 1 │0F1-1F0-2F0-3F1-3B1-----0F3-2B0-----1F2-1B0-----2F2-0B1-----3F3-3B3-----2B2-----1B2-----0B3-----
    time   │0                                                                                             12

Chimera and a V in one: the replica that runs down holds stages r and 2R - 1 - r on rank r, the other one lies on
the ranks in reverse, so that a rank has two chunks of each.  A chunk costs half of what a rank's share does, which
halves Chimera's bubble, and half of the turns stay on a rank.  Even micro-batches belong to the first replica.

Groups of R micro-batches, half of them in each replica, follow each other without a gap (see ``wave``).  Elsewhere
groups are as even as can be, the larger ones first.  Gradients are reduced as in Chimera.

The price: a rank holds two copies of its share of the weights.
"""

from __future__ import annotations

from stretto.schedule import placement
from stretto.schedule.families.chimera import check_even
from stretto.schedule.families.interleaved import groups
from stretto.schedule.families.option import flag
from stretto.schedule.families.wave import in_waves
from stretto.schedule.schedule import Schedule


def bitpipe(*, ranks: int, microbatches: int, eager_sync: bool | str = True) -> Schedule:
    """Two replicas of 2R stages; an even number of ranks, any number of micro-batches."""
    check_even("bitpipe", ranks)
    down = placement.zigzag(ranks, 2 * ranks)
    return in_waves(
        groups(ranks // 2, (microbatches + 1) // 2),
        name="bitpipe",
        placement=[down, [ranks - 1 - rank for rank in down]],
        microbatches=microbatches,
        eager_sync=flag("eager_sync", eager_sync),
    )
