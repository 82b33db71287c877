"""auto: searched, not drawn.  The best schedule that ``synthesize`` finds for the costs and the memory at hand.

The space is loops and zigzags of 1 to 4 chunks per rank, unless the number of chunks is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs
    from stretto.schedule.synthesize.auto import Result

CHUNKS = (1, 2, 3, 4)
"""Chunks per rank that are tried where none are asked for."""
OPTIONS = ("time_budget", "seed", "placements")
"""Seconds (10), seed (0), and shapes to place stages in: ``["loop", "zigzag"]``, or ``loop+zigzag`` as text."""


def auto(
    *, ranks: int, microbatches: int, chunks: int | None, costs: Costs, memory_limit: float | None, **options: Any
) -> Schedule:
    """The schedule that ``find`` finds."""
    return find(
        ranks=ranks, microbatches=microbatches, chunks=chunks, costs=costs, memory_limit=memory_limit, **options
    ).schedule


def find(
    *, ranks: int, microbatches: int, chunks: int | None, costs: Costs, memory_limit: float | None, **options: Any
) -> Result:
    """Search; raises ScheduleError where nothing fits the memory, or costs per stage fit no placement."""
    from stretto.schedule.synthesize.auto import synthesize
    from stretto.schedule.synthesize.space import layouts

    counts: tuple[int, ...] = CHUNKS if chunks is None else (chunks,)
    stages = _stages(costs)
    if stages is not None:
        if stages % ranks or (chunks is not None and stages != chunks * ranks):
            wanted = f"{chunks} chunks on {ranks} ranks" if chunks is not None else f"a multiple of {ranks} ranks"
            raise ScheduleError(f"The costs are for {stages} stages, which is not {wanted}.")
        counts = (stages // ranks,)
    shapes = _shapes(options.get("placements", ("loop", "zigzag")))
    return synthesize(
        microbatches=microbatches,
        space=layouts(ranks, chunks=counts, shapes=shapes),
        costs=costs,
        memory_limit=memory_limit,
        seed=_number("seed", options.get("seed", 0), int),
        time_budget=_number("time_budget", options.get("time_budget", 10.0), (int, float)),
    )


def _stages(costs: Costs) -> int | None:
    """How many stages costs per stage are for; None where all are for a rank's whole share."""
    from stretto.schedule.simulate.costs import PER_STAGE

    return next((len(value) for name in PER_STAGE if isinstance(value := getattr(costs, name), tuple)), None)


def _shapes(value: Any) -> list[str]:
    """The shapes to place stages in, each once and at least one."""
    shapes = value.split("+") if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not shapes or any(not isinstance(shape, str) for shape in shapes):
        raise ScheduleError(f"Option placements of schedule auto is {value!r}; write loop, zigzag or loop+zigzag.")
    return list(dict.fromkeys(shapes))


def _number(name: str, value: Any, kinds: Any) -> Any:
    """An option that is a number, 0 or more."""
    if not isinstance(value, kinds) or isinstance(value, bool) or not value >= 0:
        raise ScheduleError(f"Option {name} of schedule auto is {value!r}, but must be a number of 0 or more.")
    return value
