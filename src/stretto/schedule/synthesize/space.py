"""The declared space: which placements a search may choose from, and the problem that each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.schedule import placement
from stretto.schedule.synthesize.problem import Problem
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stretto.schedule.simulate.costs import Costs
    from stretto.schedule.simulate.stage_costs import StageCosts

    Pricing = Callable[["Layout"], Costs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One placement of one replica; what costs are asked for."""

    name: str
    """``loop`` or ``zigzag`` with its number of chunks, or whatever its author calls it."""
    num_ranks: int
    """R."""
    placement: tuple[tuple[int, ...]]
    """Rank of each stage, in a tuple of one replica."""

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.placement[0])


def layouts(
    ranks: int, *, chunks: Sequence[int] = (1, 2, 3, 4), shapes: Sequence[str] = ("loop", "zigzag")
) -> list[Layout]:
    """Loops and zigzags with these numbers of chunks; one chunk has one shape only."""
    makers = {"loop": placement.loop, "zigzag": placement.zigzag}
    found = []
    for count in chunks:
        for shape in shapes if count > 1 and ranks > 1 else shapes[:1]:
            if shape not in makers:
                raise ScheduleError(f"There is no placement {shape!r}; placements are {', '.join(makers)}.")
            stages = (makers[shape](ranks, ranks * count),)
            found.append(Layout(name=f"{shape} {count}", num_ranks=ranks, placement=stages))
    return found


def problem_of(layout: Layout, *, microbatches: int, costs: StageCosts, limit: Sequence[float]) -> Problem:
    """The problem of one layout."""
    import numpy as np

    return Problem(
        placement=layout.placement[0],
        ranks=layout.num_ranks,
        microbatches=microbatches,
        F=costs.F,
        I=costs.I,
        W=costs.W,
        comm=costs.comm,
        activation=costs.activation,
        act_w=costs.act_w,
        limit=np.asarray(limit, dtype=np.float64),
    )
