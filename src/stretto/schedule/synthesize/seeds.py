"""Schedules of the families as starting points, so that no family is better than what the search returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stretto.schedule import placement
from stretto.schedule.synthesize.symbols import to_symbols
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs
    from stretto.schedule.synthesize.problem import Problem
    from stretto.schedule.synthesize.tables import Symbols

QUICK = (
    "gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "breadth-first", "group-interleaved", "hanayo", "zeropp",
    "dualpipe-v",
)  # fmt: skip
"""Families that are built at once."""
COSTED = {
    "zb-auto": (placement.loop, 1),
    "zb-v": (placement.zigzag, 2),
    "v-min": (placement.zigzag, 2),
    "v-half": (placement.zigzag, 2),
}
"""Families that fit themselves to costs and memory, with their placement; they search themselves, for seconds."""
SCARCE = 0.45
"""Share of 1F1B's memory above which v-min has nothing that zb-v has not."""
FEW_OPERATIONS = 7000
"""Above these, v-half takes seconds and finds what zb-v finds."""
GROUPS = (1.0, 0.5)
"""Group sizes of group-interleaved, over the number of ranks."""


def starts(problem: Problem, name: str, *, costs: Costs) -> Iterator[Symbols]:
    """Orders of a family where it has the problem's placement and keeps its memory; ``costs`` are the problem's."""
    from stretto.schedule.families import FAMILIES, build

    family = FAMILIES[name]
    chunks = problem.stages // problem.ranks
    if name in COSTED:
        place, count = COSTED[name]
        if problem.placement != place(problem.ranks, problem.ranks * count):
            return
    limit = float(problem.limit.min())
    if name == "v-min" and limit > SCARCE * problem.ranks:
        return
    if name == "v-half" and 3 * problem.stages * problem.microbatches > FEW_OPERATIONS:
        return
    for options in _options(name, problem.ranks, chunks):
        try:
            schedule = build(
                name,
                ranks=problem.ranks,
                microbatches=problem.microbatches,
                chunks=chunks if family.chunked else None,
                options=options,
                costs=costs,
                memory_limit=limit if family.costed and limit < float("inf") else None,
            )
        except ScheduleError:  # the family doesn't have this shape, or doesn't fit the memory
            continue
        if schedule.placement == (problem.placement,) and (order := to_symbols(schedule)) is not None:
            yield order


def _options(name: str, ranks: int, chunks: int) -> list[dict[str, object]]:
    """Options to build a family with."""
    if name == "zeropp":
        return [{"sharded": False}]
    if name == "hanayo":
        return [{"waves": chunks // 2}] if chunks % 2 == 0 else []
    if name == "group-interleaved" and chunks > 1:
        return [{"group": max(1, int(ranks * part))} for part in GROUPS]
    return [{}]
