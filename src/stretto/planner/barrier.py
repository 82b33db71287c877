"""What a step saves where pipeline ranks don't wait for each other at the update (``plan.optimizer_barrier = false``).

    rank 0 │F F F F B B B B│update            with a barrier a step takes the makespan of its schedule; without,
    rank 1   │F F F B B B F│update            each rank begins the next step as it ends this one, and a step takes
           └─── makespan ──┘                  the longest span of a rank (Qi et al. 2023, section 4)

1F1B, GPipe and their like gain nothing: their first rank begins first and ends last.  What others gain is what starts
and ends of ranks lie apart, which a few rounds of micro-batches show as well as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from stretto.planner.profile import ROUNDS, Key, schedule_key, scheduled

if TYPE_CHECKING:
    from stretto.planner.workload import Workload

DIGITS = 3
"""Of costs, those that tell simulations apart: the saving is a small part of a step."""


def barrier(work: Workload) -> bool:
    """Whether ranks wait for each other at the update."""
    return work.plan.pp == 1 or work.plan.optimizer_barrier


def saved_seconds(
    work: Workload, forward: Sequence[float], inputs: Sequence[float], weights: Sequence[float], message: float
) -> float:
    """Makespan minus the longest span of a rank, where nobody waits at the update; costs in seconds, per stage."""
    if barrier(work):
        return 0.0
    scale = max(*forward, *inputs, *weights, message)
    costs = [
        tuple(round(max(cost / scale, 1e-6), DIGITS) or 1e-6 for cost in some) for some in (forward, inputs, weights)
    ]
    number = work.num_microbatches
    few = min(number, ROUNDS * work.plan.pp + number % work.plan.pp)
    return scale * _saved(schedule_key(work.plan), few, (*costs, (round(message / scale, DIGITS),)))


@lru_cache(maxsize=4096)
def _saved(key: Key, microbatches: int, costs: tuple[tuple[float, ...], ...]) -> float:
    from stretto.schedule.simulate import Costs, simulate

    forward, inputs, weights, (message,) = costs
    figures = simulate(scheduled(key, microbatches), Costs(F=forward, I=inputs, W=weights, comm=message))
    return figures.makespan - figures.span
