"""Schedule families by name: each a pure function of its shape that returns a Schedule.

``build("1f1b", ranks=4, microbatches=8)`` checks the shape and builds; ``FAMILIES`` lists what there
is.  One file per family, with the paper's figure in its docstring; a new family adds a file and a
line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stretto.schedule.families.forward_only import forward_only
from stretto.schedule.families.gpipe import gpipe
from stretto.schedule.families.interleaved import interleaved
from stretto.schedule.families.one_f_one_b import one_f_one_b
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to build a family's schedules, and what to say of it in a list."""

    builder: Callable[..., Schedule]
    """Takes ``ranks`` and ``microbatches``, ``chunks`` where it can have several, and its options."""
    summary: str
    """One line."""
    chunked: bool = False
    """Whether a rank may hold several stages."""
    options: tuple[str, ...] = ()
    """Names of the options that the builder takes besides."""


FAMILIES: Mapping[str, Family] = {
    "gpipe": Family(builder=gpipe, summary="all forwards, then all backwards"),
    "1f1b": Family(builder=one_f_one_b, summary="one forward, one backward in turn; at most R micro-batches alive"),
    "interleaved": Family(
        builder=interleaved, summary="1f1b over several chunks per rank; a shorter bubble", chunked=True
    ),
    "forward-only": Family(builder=forward_only, summary="no backward; evaluation and inference", chunked=True),
}


def build(
    name: str, *, ranks: int, microbatches: int, chunks: int = 1, options: Mapping[str, Any] | None = None
) -> Schedule:
    """Build a family's schedule.

    Raises ScheduleError for an unknown name or option and for a shape that the family can't have.
    """
    if name not in FAMILIES:
        raise ScheduleError(
            f"There is no schedule {name!r}{nearest(name, FAMILIES) or '.'} Known: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[name]
    for value, what in ((ranks, "ranks"), (microbatches, "micro-batches"), (chunks, "chunks")):
        if value < 1:
            raise ScheduleError(f"Schedule {name} can't have {value} {what}; it needs at least 1.")
    if chunks > 1 and not family.chunked:
        several = ", ".join(other for other in FAMILIES if FAMILIES[other].chunked)
        raise ScheduleError(
            f"Schedule {name} holds one stage per rank, so chunks={chunks} can't be; take chunks=1 or one of {several}."
        )
    options = dict(options or {})
    for option in options:
        if option not in family.options:
            known = ", ".join(family.options) or "none"
            close = nearest(option, family.options) or "."
            raise ScheduleError(f"Schedule {name} has no option {option!r}{close} Its options: {known}.")
    if family.chunked:
        options["chunks"] = chunks
    return family.builder(ranks=ranks, microbatches=microbatches, **options)
