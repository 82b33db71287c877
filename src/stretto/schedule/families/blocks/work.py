"""What the loops over blocks are given: a problem as plain arrays.

S stages on R ranks, V stages on the fullest of them, M micro-batches.  Kinds are 0 for F, 1 for I, 2 for W here.  An
operation is one number, ``(kind * S + stage) * M + micro-batch``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from stretto.schedule.synthesize.problem import Problem

Numbers = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]

INFINITE = 1e300
"""A time that never comes."""


class Work(NamedTuple):
    """A problem without its number of micro-batches; a named tuple, because compiled loops know these."""

    rank_of: Numbers
    """Rank of each stage (S,)."""
    index_of: Numbers
    """How many stages of its rank come before each stage (S,)."""
    stages_on: Numbers
    """Stages of each rank, ascending, filled up with -1 (R, V)."""
    duration: Values
    """Time of F, I and W on each stage (3, S)."""
    comm: Values
    """Latency from each stage to the next (S - 1,)."""
    activation: Values
    """Memory that a micro-batch keeps alive on each stage (S,)."""
    kept: Values
    """Fraction of it kept between I and W (S,)."""
    limit: Values
    """Memory of each rank (R,)."""
    instant: float
    """Times closer than this count as equal."""

    @property
    def busiest(self) -> float:
        """Time that the busiest rank computes for one micro-batch: no period is shorter."""
        return float(np.bincount(self.rank_of, weights=self.duration.sum(axis=0)).max())


def of(problem: Problem) -> Work:
    """The arrays of a problem."""
    chunks = problem.chunks
    rank_of = np.array(problem.placement, dtype=np.int64)
    index_of = np.zeros(len(rank_of), dtype=np.int64)
    stages_on = np.full((problem.ranks, max(map(len, chunks))), -1, dtype=np.int64)
    for rank, stages in enumerate(chunks):
        index_of[list(stages)] = np.arange(len(stages))
        stages_on[rank, : len(stages)] = stages
    duration = np.array([problem.F, problem.I, problem.W], dtype=np.float64)
    return Work(
        rank_of=rank_of,
        index_of=index_of,
        stages_on=stages_on,
        duration=duration,
        comm=np.asarray(problem.comm, dtype=np.float64),
        activation=np.asarray(problem.activation, dtype=np.float64),
        kept=np.asarray(problem.act_w, dtype=np.float64),
        limit=np.asarray(problem.limit, dtype=np.float64),
        instant=1e-9 * float(duration.max()),
    )


def flattened(work: Work) -> Work:
    """The same work in equal steps: F, I and W take a third of their stage's time each, messages none.

    Its blocks have no holes too small for anything, and their orders often do better than the exact ones.
    """
    third = work.duration.mean(axis=0)
    return work._replace(duration=np.array([third, third, third]), comm=np.zeros_like(work.comm))
