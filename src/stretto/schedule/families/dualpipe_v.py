"""DualPipe-V: DualPipe cut in half along its middle, one replica in a V (DeepSeek and Sea AI Lab 2025, figure in the
README of DualPipe).

2 ranks, 4 micro-batches:

    rank 0 │0F0-0F1-0F2-3F0-3I0-3W0-3F1-0F3-3B1-----3F2-0B0-----3B2-----3F3-    0B1-----3B3-----0I2-0W2-0I3-0W3-
    rank 1 │    1F0-2F0-1F1-2F1-1F2-2B0-----2F2-1B0-----1F3-2B1-----2F3-1B1-----2B2-----1B2-----2I3-1I3-2W3-1W3-
    time   │0                                                                                               12.5

In DualPipe rank r and rank R - 1 - r do the same work in mirrored directions, so that one of them is enough:
rank r of R holds stages r and 2R - 1 - r, runs the order of rank r of DualPipe with 2R ranks, and what was
the far direction are the micro-batches on their way back up.  One copy of the weights; any number of ranks.

The order presumes at least 2R micro-batches; fewer follow that of 2R with the missing ones left out.
"""

from __future__ import annotations

from stretto.schedule import placement
from stretto.schedule.families.dualpipe import assemble, eight_steps, read
from stretto.schedule.schedule import Schedule


def dualpipe_v(*, ranks: int, microbatches: int) -> Schedule:
    """Stages r and 2R - 1 - r on rank r; any number of ranks and micro-batches."""
    import numpy as np

    orders = []
    for rank in range(ranks):
        steps = read(eight_steps(rank, depth=ranks, turns=max(microbatches, 2 * ranks)))
        steps = steps.only(steps.turn < microbatches)
        orders.append((steps, np.where(steps.far, 2 * ranks - 1 - rank, rank), steps.turn))
    return assemble(
        orders,
        voice=[0] * microbatches,
        shape={
            "name": "dualpipe-v",
            "num_stages": 2 * ranks,
            "num_microbatches": microbatches,
            "placement": [placement.zigzag(ranks, 2 * ranks)],
        },
    )
