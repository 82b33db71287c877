"""1F1B: one forward, one backward in turn (PipeDream-Flush, Narayanan et al. 2021, figure 3).

4 ranks, 6 micro-batches, backward twice as long as forward; warm-up, steady state, cool-down:

    rank 0 │F0-F1-F2-F3-                  B0----F4-B1----F5-B2----   B3----   B4----   B5----
    rank 1 │   F0-F1-F2-            B0----F3-B1----F4-B2----F5-B3----   B4----   B5----
    rank 2 │      F0-F1-      B0----F2-B1----F3-B2----F4-B3----F5-B4----   B5----
    rank 3 │         F0-B0----F1-B1----F2-B2----F3-B3----F4-B4----F5-B5----
    time   │0                                                                              27

As fast as GPipe, but rank r never keeps more than R - r micro-batches alive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule import placement
from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def one_f_one_b(*, ranks: int, microbatches: int) -> Schedule:
    """One stage per rank; rank r runs R - r - 1 forwards ahead of its first backward."""
    import numpy as np

    forward, turn = zip(*(alternate(microbatches, ahead=ranks - rank - 1) for rank in range(ranks)), strict=True)
    return Schedule.from_columns(
        kind=np.where(np.concatenate(forward), Kind.F, Kind.B),
        stage=np.repeat(np.arange(ranks), 2 * microbatches),
        microbatch=np.concatenate(turn),
        offsets=np.arange(ranks + 1) * 2 * microbatches,
        name="1f1b",
        num_stages=ranks,
        num_microbatches=microbatches,
        placement=[placement.loop(ranks, ranks)],
    )


def alternate(turns: int, *, ahead: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """``ahead`` forwards, then forward and backward in turn, then the backwards that are left.

    For each of the 2 * ``turns`` operations: whether it is a forward, and its number in its direction.

    >>> forward, turn = alternate(3, ahead=1)
    >>> " ".join("BF"[f] + str(t) for f, t in zip(forward.tolist(), turn.tolist()))
    'F0 F1 B0 F2 B1 B2'
    """
    import numpy as np

    ahead = min(ahead, turns)
    forward = np.zeros(2 * turns, dtype=bool)
    forward[:ahead] = True
    forward[ahead : 2 * turns - ahead : 2] = True
    turn = np.empty(2 * turns, dtype=np.int64)
    turn[forward] = turn[~forward] = np.arange(turns)
    return forward, turn
