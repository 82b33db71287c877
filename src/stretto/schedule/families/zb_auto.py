"""ZB-auto: F, I and W ordered by their costs, within a memory limit (Qi et al. 2023, section 3).

One stage per rank.  The paper runs as many F ahead as the memory allows, then I as it comes, and W where a rank would
pause otherwise or has no memory for the next F; which F may run ahead is tried both ways.  Here the F and I follow
repeated building blocks (see ``building_block``), which decide this for each rank, and W is put the same way:

                 memory limit    published as    4 ranks, 8 micro-batches, F = I = W
    zb-auto      R (default)     ZB-1p           27
                 2 R             ZB-2p           27, each rank from its first operation to its last without a pause
                 R / 2           -               41

What is made small is the makespan and the span (from a rank's first operation to its last, the ranks' largest) in
equal parts: the paper's bubble rate is about the span, since with its optimizer step nobody waits for the
others.  4 ranks, 6 micro-batches, at most 6 alive:

    rank 0 │F0-F1-F2-F3-F4-F5-   I0-W0-I1-W1-I2-W2-I3-W3-I4-W4-I5-W5-
    rank 1 │   F0-F1-F2-F3-F4-I0-W0-I1-W1-I2-F5-I3-W2-I4-W3-I5-W4-W5-
    rank 2 │      F0-F1-F2-I0-W0-I1-F3-I2-F4-I3-F5-I4-W1-I5-W2-W3-W4-W5-
    rank 3 │         F0-I0-F1-I1-F2-I2-F3-I3-F4-I4-F5-I5-W0-W1-W2-W3-W4-W5-
    time   │0                                                            21
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule import placement
from stretto.schedule.families.building_block import search_and_repeat
from stretto.schedule.schedule import Schedule
from stretto.schedule.synthesize.space import Layout, problem_of

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs

SPAN_WEIGHT = 0.5
"""Share of the span in what is made small."""


def zb_auto(*, ranks: int, microbatches: int, costs: Costs, memory_limit: float | None) -> Schedule:
    """One stage per rank; the memory limit left out is that of 1F1B, R micro-batches."""
    layout = Layout(name="loop 1", num_ranks=ranks, placement=(placement.loop(ranks, ranks),))
    limit = float(ranks) if memory_limit is None else memory_limit
    problem = problem_of(layout, microbatches=microbatches, costs=costs.of(layout), limit=(limit,) * ranks)
    return search_and_repeat(problem, name="zb-auto", span_weight=SPAN_WEIGHT)
