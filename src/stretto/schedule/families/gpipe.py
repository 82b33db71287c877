"""GPipe: all forwards, then all backwards (Huang et al. 2019, figure 2c).

4 ranks, 4 micro-batches, backward twice as long as forward:

    rank 0 │F0-F1-F2-F3-                           B0----B1----B2----B3----
    rank 1 │   F0-F1-F2-F3-                  B0----B1----B2----B3----
    rank 2 │      F0-F1-F2-F3-         B0----B1----B2----B3----
    rank 3 │         F0-F1-F2-F3-B0----B1----B2----B3----
    time   │0                                                            21

Every rank keeps the activations of all micro-batches.  Backwards run in the order of the forwards,
so that a gradient message never overtakes another.
"""

from __future__ import annotations

from stretto.schedule import placement
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule


def gpipe(*, ranks: int, microbatches: int) -> Schedule:
    """One stage per rank, all forwards before the first backward."""
    import numpy as np

    return Schedule.from_columns(
        kind=np.tile(np.repeat([Kind.F, Kind.B], microbatches), ranks),
        stage=np.repeat(np.arange(ranks), 2 * microbatches),
        microbatch=np.tile(np.arange(microbatches), 2 * ranks),
        offsets=np.arange(ranks + 1) * 2 * microbatches,
        name="gpipe",
        num_stages=ranks,
        num_microbatches=microbatches,
        placement=[placement.loop(ranks, ranks)],
    )
