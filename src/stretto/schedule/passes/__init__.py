"""Passes: functions from Schedule to Schedule, each with its invariant in the first line of its docstring.

``PASSES`` names those that a user may ask for (``--pass vocabulary:algorithm=2``); each is written and tested for any
family.  Where several are asked for, vocabulary and recompute come before offload, and sharding comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stretto.schedule.passes.fill_bubbles import fill_bubbles, with_frozen
from stretto.schedule.passes.freeze import freeze
from stretto.schedule.passes.offload import offload
from stretto.schedule.passes.recompute import recompute
from stretto.schedule.passes.sharding import sharding
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.passes.two_stage_backward import two_stage_backward
from stretto.schedule.passes.vocabulary import vocabulary
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError, nearest

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """How to change a schedule, and what to say of it in a list."""

    apply: Callable[..., Schedule]
    """Takes a schedule and, by keyword, its options."""
    summary: str
    """One line."""
    options: tuple[str, ...] = ()
    """Names of the options."""
    costed: bool = False
    """Whether it takes ``costs`` (simulate's Costs) besides."""
    reprice: Callable[..., Costs] | None = None
    """Where the result has other stages: takes the costs, the schedule before and the options; gives costs that fit."""


PASSES: Mapping[str, Pass] = {
    "split-backward": Pass(apply=split_backward, summary="B becomes I and W"),
    "2bp": Pass(
        apply=two_stage_backward,
        summary="B becomes I and a later W: when=idle while a rank waits, when=end, or when=late by behind=1 I",
        options=("when", "behind", "limit"),
        costed=True,
    ),
    "vocabulary": Pass(
        apply=vocabulary,
        summary="the output layer on all ranks, as passes S and T; algorithm=1 keeps 2 more micro-batches, 2 keeps 1",
        options=("algorithm", "waiting"),
        costed=True,
    ),
    "recompute": Pass(
        apply=recompute, summary="keep only a stage's input, run its forward again as R", options=("stages",)
    ),
    "offload": Pass(
        apply=offload,
        summary="activations wait in the host's memory: O and L; all that fit, a fraction, or what a limit asks",
        options=("stages", "fraction", "limit"),
        costed=True,
    ),
    "freeze": Pass(
        apply=freeze, summary="the first stages don't train and have no backward; stages=0-1", options=("stages",)
    ),
    "fill-bubbles": Pass(
        apply=fill_bubbles,
        summary="frozen encoders run where ranks idle; frozen=0.5+0.5 are their layers' times",
        options=("frozen", "units", "where"),
        costed=True,
        reprice=with_frozen,
    ),
    "sharding": Pass(
        apply=sharding,
        summary="sharded parameters: UNSHARD, RESHARD, REDUCE_GRAD and OPT",
        options=("blocks", "reshard", "prefetch", "reduce", "optimizer"),
    ),
}


def change(
    schedule: Schedule, name: str, *, options: Mapping[str, Any] | None = None, costs: Costs | None = None
) -> tuple[Schedule, Costs]:
    """Apply a pass by name; the schedule, and the costs that fit it.

    Raises ScheduleError for an unknown name or option, and where the pass refuses the schedule.
    """
    from stretto.schedule.simulate.costs import Costs

    if name not in PASSES:
        raise ScheduleError(f"There is no pass {name!r}{nearest(name, PASSES) or '.'} Known: {', '.join(PASSES)}.")
    wanted, options, costs = PASSES[name], options or {}, costs or Costs()
    for option in options:
        if option not in wanted.options:
            known = ", ".join(wanted.options) or "none"
            raise ScheduleError(
                f"Pass {name} has no option {option!r}{nearest(option, wanted.options) or '.'} Its options: {known}."
            )
    changed = wanted.apply(schedule, **options, **({"costs": costs} if wanted.costed else {}))
    return changed, wanted.reprice(costs, schedule, **options) if wanted.reprice else costs
