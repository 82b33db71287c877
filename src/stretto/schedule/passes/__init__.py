"""Passes: functions from Schedule to Schedule, each with its invariant in the first line of its docstring.

``PASSES`` names those that a user may ask for (``--pass vocabulary:algorithm=2``); each is written and tested for any
family.  Where several are asked for, vocabulary and recompute come before offload, and sharding comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stretto.schedule.passes.offload import offload
from stretto.schedule.passes.recompute import recompute
from stretto.schedule.passes.sharding import sharding
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.passes.vocabulary import vocabulary
from stretto.schedule.schedule import Schedule


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


PASSES: Mapping[str, Pass] = {
    "split-backward": Pass(apply=split_backward, summary="B becomes I and W"),
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
        summary="activations spend their wait in the host's memory: O and L; all that fit, a fraction, or what a limit asks",
        options=("stages", "fraction", "limit"),
        costed=True,
    ),
    "sharding": Pass(
        apply=sharding,
        summary="sharded parameters: UNSHARD, RESHARD, REDUCE_GRAD and OPT",
        options=("blocks", "reshard", "prefetch", "reduce", "optimizer"),
    ),
}
