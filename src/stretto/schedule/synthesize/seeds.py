"""Schedules of the families as starting points, so that no family is better than what the search returns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from stretto.schedule.synthesize.symbols import to_symbols
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs
    from stretto.schedule.synthesize.problem import Problem
    from stretto.schedule.synthesize.tables import Symbols

FIXED = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "breadth-first", "group-interleaved", "hanayo", "dualpipe-v")
"""Families that know no costs."""
COSTED = ("zb-auto", "v-min", "v-half", "zb-v")
"""Families that fit themselves to costs and memory."""
GROUPS = (1.0, 0.5)
"""Group sizes of group-interleaved, over the number of ranks."""


def starts(problem: Problem, *, costs: Costs | None) -> Iterator[Symbols]:
    """Orders of the families that have the problem's placement; ``costs`` (None: skip) for those that ask."""
    from stretto.schedule.families import FAMILIES, build

    chunks = problem.stages // problem.ranks
    limit = float(problem.limit.min())
    for name in (*FIXED, *(COSTED if costs is not None else ())):
        family = FAMILIES.get(name)
        if family is None:
            continue
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
    if name == "hanayo":
        return [{"waves": chunks // 2}] if chunks % 2 == 0 else []
    if name == "group-interleaved" and chunks > 1:
        return [{"group": max(1, int(ranks * part))} for part in GROUPS]
    return [{}]
