"""Forward only: for evaluation and inference.

3 ranks, 4 micro-batches:

    rank 0 │F0-F1-F2-F3-
    rank 1 │   F0-F1-F2-F3-
    rank 2 │      F0-F1-F2-F3-
    time   │0                6

With several chunks the forwards go in the order of interleaved 1F1B.
"""

from __future__ import annotations

from stretto.schedule import placement
from stretto.schedule.families.interleaved import forward_turns
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule


def forward_only(*, ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Stage s on rank s mod R, forwards alone."""
    import numpy as np

    turns = np.array(forward_turns(ranks=ranks, microbatches=microbatches, chunks=chunks), dtype=np.int32)
    chunk, microbatch = turns.T
    return Schedule.from_columns(
        kind=np.full(ranks * len(turns), Kind.F),
        stage=(chunk * ranks + np.arange(ranks, dtype=np.int32)[:, None]).ravel(),
        microbatch=np.tile(microbatch, ranks),
        offsets=np.arange(ranks + 1) * len(turns),
        name="forward-only",
        num_stages=ranks * chunks,
        num_microbatches=microbatches,
        placement=[placement.loop(ranks, ranks * chunks)],
        forward_only=True,
    )
