"""Which rank holds which stage.

With 4 ranks and 8 stages (2 chunks per rank):

    loop   rank 0: 0 4      V   rank 0: 0     7
           rank 1: 1 5          rank 1:  1   6
           rank 2: 2 6          rank 2:   2 5
           rank 3: 3 7          rank 3:    3 4

In a loop every boundary between stages crosses ranks, from the last rank back to the first
(Narayanan et al. 2021, interleaved stages).  In a V the turn stays on a rank, and the first and the
last stage lie on the same one (Qi et al. 2024, controllable memory).
"""

from __future__ import annotations


def loop(num_ranks: int, num_stages: int) -> tuple[int, ...]:
    """Stage s on rank s mod R.

    >>> loop(4, 8)
    (0, 1, 2, 3, 0, 1, 2, 3)
    """
    return tuple(stage % num_ranks for stage in range(num_stages))


def zigzag(num_ranks: int, num_stages: int) -> tuple[int, ...]:
    """Down the ranks and up again; a V with two chunks, a W with four.

    >>> zigzag(4, 8)
    (0, 1, 2, 3, 3, 2, 1, 0)
    """
    period = 2 * num_ranks
    return tuple(min(stage % period, period - 1 - stage % period) for stage in range(num_stages))
