"""A problem as the arrays that the compiled loops read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from stretto.schedule.synthesize.problem import Problem

    Values = npt.NDArray[np.float64]
    Symbols = npt.NDArray[np.int64]


class Tables(NamedTuple):
    """S stages on R ranks, at most V a rank; a tuple, because compiled code can read those."""

    rank_of: Symbols
    """(S,)"""
    stages_on: Symbols
    """(R, V) ascending, filled up with -1."""
    length: Symbols
    """Operations of each rank (R,)."""
    duration: Values
    """(3, S) of F, I, W."""
    comm: Values
    """Latency from stage s to s + 1 and back (S - 1,)."""
    activation: Values
    """(S,)"""
    act_w: Values
    """(S,)"""
    limit: Values
    """(R,), a large number where there is no limit."""
    microbatches: int
    """M"""


def tables_of(problem: Problem) -> Tables:
    """Read a problem."""
    chunks = problem.chunks
    depth = max(len(held) for held in chunks)
    stages_on = np.full((problem.ranks, depth), -1, dtype=np.int64)
    for rank, held in enumerate(chunks):
        stages_on[rank, : len(held)] = held
    unlimited = problem.microbatches * float(problem.activation.sum()) + 1
    return Tables(
        rank_of=np.array(problem.placement, dtype=np.int64),
        stages_on=stages_on,
        length=np.array([3 * len(held) * problem.microbatches for held in chunks], dtype=np.int64),
        duration=np.stack((problem.F, problem.I, problem.W)).astype(np.float64),
        comm=np.asarray(problem.comm, dtype=np.float64),
        activation=np.asarray(problem.activation, dtype=np.float64),
        act_w=np.asarray(problem.act_w, dtype=np.float64),
        limit=np.minimum(problem.limit, unlimited).astype(np.float64),
        microbatches=problem.microbatches,
    )
