"""How many micro-batches of activations a pipeline rank keeps alive at its peak.

Unit: one micro-batch over a rank's whole share of the layers, as in ``schedule.simulate.memory``.

    gpipe, breadth-first,  every micro-batch
    modular
    1f1b                   R - r: the forwards that rank r runs before its first backward, and the one in hand
    zb-h1                  R on every rank: W gives back last, and runs late where forwards are few (Qi et al. 2024)
    interleaved            (V - 1) G + 2(R - r - 1) + 1 chunks, each 1/V, for groups of G micro-batches, G = R where R
                           divides M (Narayanan et al. 2021)

Other families, and shapes with fewer micro-batches than ranks, are simulated once and remembered.  After a few rounds
of the ranks more micro-batches don't raise the peak of a family that alternates, so at most ``ROUNDS`` rounds, and what
is left over of the last, are simulated.
"""

from __future__ import annotations

from functools import lru_cache

CLOSED_FORMS = ("gpipe", "breadth-first", "modular", "1f1b", "zb-h1", "interleaved")
"""Families whose peak is known without building their schedule, at least in the shapes below."""
ROUNDS = 4
"""Rounds of R micro-batches after which the peak of an alternating family has settled."""


@lru_cache(maxsize=4096)
def in_flight(family: str, *, ranks: int, microbatches: int, chunks: int = 1) -> tuple[float, ...]:
    """Peak of each rank in micro-batches; ScheduleError for a shape that the family can't have.

    >>> in_flight("1f1b", ranks=4, microbatches=8)
    (4.0, 3.0, 2.0, 1.0)
    """
    if family in ("gpipe", "breadth-first", "modular"):
        return (float(microbatches),) * ranks
    if family == "1f1b":
        return tuple(float(min(microbatches, ranks - rank)) for rank in range(ranks))
    if family == "zb-h1" and microbatches >= ranks > 1:
        return (float(ranks),) * ranks
    if family == "interleaved" and microbatches >= ranks > 1 and chunks > 1:
        from stretto.schedule.families.interleaved import groups

        group = groups(ranks, microbatches)[0]
        ahead = (min(chunks * microbatches, (chunks - 1) * group + 2 * (ranks - rank - 1) + 1) for rank in range(ranks))
        return tuple(number / chunks for number in ahead)
    settled = min(microbatches, ROUNDS * ranks + microbatches % ranks)
    return simulated(family, ranks=ranks, microbatches=settled, chunks=chunks)


def simulated(family: str, *, ranks: int, microbatches: int, chunks: int = 1) -> tuple[float, ...]:
    """The same from the simulator, for every family."""
    from stretto.schedule.families import build
    from stretto.schedule.simulate import peak_activation

    return peak_activation(build(family, ranks=ranks, microbatches=microbatches, chunks=chunks))
