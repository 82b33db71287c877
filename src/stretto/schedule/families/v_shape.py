"""V-Min, V-Half and ZB-V: two chunks per rank in a V, memory as wanted (Qi et al. 2024, figures 4 and 5).

Rank r holds stages r and 2R - 1 - r.  A rank that holds an early stage, whose activations live long, holds a late one,
whose activations live shortly, so all ranks need the same memory, and the time that a micro-batch spends between
its first F and its last I can be chosen: the building blocks fall behind by different amounts on the way (see
``building_block``).  4 ranks, 4 micro-batches, v-min keeps at most (R + 4) / 3 micro-batches alive, a third of 1F1B's:

    rank 0 │F0-F1-F2-            F0-I0-W0-      F1-I1-W1-F3-I0-W0-      F2-I2-I1-W2-W1-F3-I3-W3-   I2-W2-      I3-W3-
    rank 1 │   F0-F1-F2-      F0-      I0-W0-F1-      I1-I0-W1-F3-W0-F2-I1-W1-I2-W2-F3-      I3-I2-W3-W2-   I3-W3-
    rank 2 │      F0-F1-   F0-   F1-      I0-W0-F2-I0-W0-I1-W1-F2-F3-I1-W1-      F3-I2-W2-   I2-I3-W2-W3-I3-W3-
    rank 3 │         F0-F0-F1-F1-            I0-I0-W0-F2-W0-F2-I1-I1-W1-F3-W1-F3-      I2-I2-W2-W2-I3-I3-W3-W3-
    time   │0                                                                                                    17.5

v-half keeps R / 2 + 1, half of 1F1B's:

    rank 0 │F0-F1-F2-F3-         F0-I0-F1-I1-W0-W1-   F2-I2-W2-I0-W0-F3-I3-I1-W3-W1-   I2-W2-I3-W3-
    rank 1 │   F0-F1-F2-F3-   F0-   F1-I0-W0-I1-W1-F2-   I0-I2-W0-F3-W2-I1-I3-W1-W3-I2-W2-I3-W3-
    rank 2 │      F0-F1-F2-F0-F3-F1-      I0-W0-F2-I1-I0-W1-W0-F3-I2-I1-W2-W1-I3-I2-W3-I3-W2-W3-
    rank 3 │         F0-F0-F1-F1-F2-F2-      I0-I0-W0-F3-W0-F3-I1-I1-I2-I2-W1-W1-I3-I3-W2-W2-W3-W3-
    time   │0                                                                                  14.5

zb-v keeps R, as many as 1F1B, and no rank pauses once it has begun:

    rank 0 │0F0-0F1-0F2-0F3-            7F0-7I0-7F1-7I1-7W0-7W1-7F2-7I2-0I0-7W2-7F3-7I3-0I1-0W0-7W3-0W1-0I2-0W2-0I3-0W3-
    rank 1 │    1F0-1F1-1F2-1F3-    6F0-    6F1-6I0-6W0-6I1-6F2-6W1-1I0-6I2-6F3-1W0-1I1-6I3-6W2-1W1-1I2-6W3-1I3-1W2-1W3-
    rank 2 │        2F0-2F1-2F2-5F0-2F3-5F1-    5F2-5I0-5W0-5I1-2I0-5F3-5W1-5I2-2I1-2W0-5W2-5I3-2I2-2W1-2I3-5W3-2W2-2W3-
    rank 3 │            3F0-4F0-3F1-4F1-3F2-4F2-3F3-4F3-4I0-3I0-4I1-3I1-4W0-3W0-4I2-3I2-4W1-3W1-4I3-3I3-4W2-3W2-4W3-3W3-
    time   │0                                                                                                       13.5

Costs other than F = I = W make other blocks better; all that keep the family's memory are tried, and none is slower
than the figures' ones.  A lower memory limit is kept too, down to a single micro-batch; zb-v uses a higher one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule import placement
from stretto.schedule.families.building_block import search_and_repeat
from stretto.schedule.schedule import Schedule
from stretto.schedule.synthesize.space import Layout, problem_of

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs


def v_min(*, ranks: int, microbatches: int, costs: Costs, memory_limit: float | None) -> Schedule:
    """At most (R + 4) / 3 micro-batches alive, rounded down."""
    return _v_shape("v-min", ranks, microbatches, costs, _lower(max(1, (ranks + 4) // 3), memory_limit))


def v_half(*, ranks: int, microbatches: int, costs: Costs, memory_limit: float | None) -> Schedule:
    """At most R / 2 + 1 micro-batches alive, rounded down."""
    return _v_shape("v-half", ranks, microbatches, costs, _lower(ranks // 2 + 1, memory_limit))


def zb_v(*, ranks: int, microbatches: int, costs: Costs, memory_limit: float | None) -> Schedule:
    """At most R micro-batches alive, or as many as the limit allows, which may be more."""
    return _v_shape("zb-v", ranks, microbatches, costs, ranks if memory_limit is None else memory_limit)


def _lower(own: int, memory_limit: float | None) -> float:
    """The family's memory, or the limit where that is lower."""
    return own if memory_limit is None else min(own, memory_limit)


def _v_shape(name: str, ranks: int, microbatches: int, costs: Costs, limit: float) -> Schedule:
    """The best repetition of a block on the V within ``limit`` micro-batches on each rank."""
    stages = placement.zigzag(ranks, 2 * ranks)
    layout = Layout(name="zigzag 2", num_ranks=ranks, placement=(stages,))
    problem = problem_of(layout, microbatches=microbatches, costs=costs.of(layout), limit=(limit,) * ranks)
    return search_and_repeat(problem, name=name, span_weight=SPAN_WEIGHT)


SPAN_WEIGHT = 0.01
"""Where makespans are equal, the shorter span wins."""
