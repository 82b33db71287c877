"""Schedule families by name: each a pure function of its shape that returns a Schedule.

``build("1f1b", ranks=4, microbatches=8)`` checks the shape and builds; ``FAMILIES`` lists what there
is.  One file per family, with the paper's figure in its docstring; a new family adds a file and a
line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

from stretto.schedule.families.auto import OPTIONS as AUTO_OPTIONS
from stretto.schedule.families.auto import auto
from stretto.schedule.families.bitpipe import bitpipe
from stretto.schedule.families.breadth_first import breadth_first
from stretto.schedule.families.chimera import chimera
from stretto.schedule.families.dualpipe import dualpipe
from stretto.schedule.families.dualpipe_v import dualpipe_v
from stretto.schedule.families.forward_only import forward_only
from stretto.schedule.families.gpipe import gpipe
from stretto.schedule.families.group_interleaved import group_interleaved
from stretto.schedule.families.interleaved import interleaved
from stretto.schedule.families.modular import modular
from stretto.schedule.families.one_f_one_b import one_f_one_b
from stretto.schedule.families.skip_pipe import skip_pipe
from stretto.schedule.families.v_shape import v_half, v_min, zb_v
from stretto.schedule.families.wave import hanayo
from stretto.schedule.families.zb_auto import zb_auto
from stretto.schedule.families.zero_bubble import zb_h1, zb_h2
from stretto.schedule.families.zeropp import zeropp
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError, nearest

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs

TOLERANCE = 1e-6
"""How far above its limit memory may come out, for the sake of rounding."""


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
    chunk_counts: tuple[int, ...] | None = None
    """Stages per rank that it can have, its own count first; empty where its options decide; None: any where
    ``chunked``, else one.  Only the builder of a ``chunked`` family is handed ``chunks``."""
    chooses_chunks: bool = False
    """Whether chunks left out are the builder's to choose: it is handed None."""
    costed: bool = False
    """Whether the builder takes ``costs`` (simulate's Costs) and ``memory_limit`` (float or None) besides."""


FAMILIES: Mapping[str, Family] = {
    "gpipe": Family(builder=gpipe, summary="all forwards, then all backwards"),
    "1f1b": Family(builder=one_f_one_b, summary="one forward, one backward in turn; at most R micro-batches alive"),
    "interleaved": Family(
        builder=interleaved, summary="1f1b over several chunks per rank; a shorter bubble", chunked=True
    ),
    "zb-h1": Family(builder=zb_h1, summary="1f1b with W later than I: a third of its bubble at its memory"),
    "zb-h2": Family(builder=zb_h2, summary="no bubble once every rank has started; up to 2R - 1 micro-batches alive"),
    "zb-auto": Family(builder=zb_auto, summary="F, I and W ordered by their costs within a memory limit", costed=True),
    "v-min": Family(
        builder=v_min, summary="two chunks in a V, a third of 1f1b's memory", chunk_counts=(2,), costed=True
    ),
    "v-half": Family(
        builder=v_half, summary="two chunks in a V, half of 1f1b's memory", chunk_counts=(2,), costed=True
    ),
    "zb-v": Family(
        builder=zb_v, summary="two chunks in a V, almost no bubble at 1f1b's memory", chunk_counts=(2,), costed=True
    ),
    "group-interleaved": Family(
        builder=group_interleaved,
        summary="interleaved in groups of any size, backward split: a shorter bubble, or less memory",
        chunked=True,
        options=("group",),
    ),
    "breadth-first": Family(
        builder=breadth_first,
        summary="all micro-batches through a chunk before the next; each stage gathered once per pass",
        chunked=True,
        options=("sharded",),
    ),
    "modular": Family(
        builder=modular,
        summary="layered gradient accumulation: layers dealt to the ranks in turn, each gathered and reduced once",
        chunked=True,
        options=("sharded",),
    ),
    "hanayo": Family(
        builder=hanayo,
        summary="waves down the ranks and up again, two chunks each",
        options=("waves",),
        chunk_counts=(),
        costed=True,
    ),
    "chimera": Family(
        builder=chimera,
        summary="two replicas in opposite directions, two thirds of 1f1b's bubble",
        options=("eager_sync",),
    ),
    "bitpipe": Family(
        builder=bitpipe,
        summary="two replicas in opposite directions, each a V: half of chimera's bubble",
        options=("eager_sync",),
        chunk_counts=(2,),
    ),
    "dualpipe": Family(
        builder=dualpipe, summary="two replicas in opposite directions, forward of one under backward of the other"
    ),
    "dualpipe-v": Family(builder=dualpipe_v, summary="dualpipe with one replica, folded into a V", chunk_counts=(2,)),
    "zeropp": Family(
        builder=zeropp,
        summary="units of micro-batches with F, I and W staggered; sharded stages gathered once a unit",
        chunked=True,
        options=("unit", "sharded"),
        costed=True,
    ),
    "skip-pipe": Family(
        builder=skip_pipe,
        summary="each micro-batch skips a part of the stages, on paths that don't meet",
        chunked=True,
        options=("skip", "swap", "keep", "seed"),
        costed=True,
    ),
    "forward-only": Family(builder=forward_only, summary="no backward; evaluation and inference", chunked=True),
    "auto": Family(
        builder=auto,
        summary="searched: the best that is found for the costs and the memory, and how good it can be",
        chunked=True,
        options=AUTO_OPTIONS,
        costed=True,
        chooses_chunks=True,
    ),
}


def build(
    name: str,
    *,
    ranks: int,
    microbatches: int,
    chunks: int | None = None,
    options: Mapping[str, Any] | None = None,
    costs: Costs | None = None,
    memory_limit: float | None = None,
) -> Schedule:
    """Build a family's schedule.

    ``chunks`` left out is the family's own count.  ``costs`` (default: one unit per pass) and
    ``memory_limit`` (largest activation memory of a rank, in micro-batches over a rank's whole share of the
    layers) are used by the families that are ``costed``; another family's peak is held against the limit.

    Raises ScheduleError for an unknown name or option, for a shape that the family can't have and where the
    limit can't be kept.
    """
    from stretto.schedule.simulate.costs import Costs

    family = _family(name)
    for value, what in ((ranks, "ranks"), (microbatches, "micro-batches"), (chunks, "chunks")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, SupportsIndex)):
            raise ScheduleError(f"Schedule {name} can't have {value!r} {what}; their number is whole.")
        if value is not None and value < 1:
            raise ScheduleError(f"Schedule {name} can't have {value} {what}; it needs at least 1.")
    arguments = _options(name, family, options or {})
    if chunks is not None or not family.chooses_chunks:
        chunks = _chunks(name, family, chunks)
    if family.chunked:
        arguments["chunks"] = chunks
    if memory_limit is not None and not memory_limit > 0:
        raise ScheduleError(f"The memory limit is {memory_limit:g}, but a rank that computes needs memory above 0.")
    costs = costs or Costs()
    if family.costed:
        arguments |= {"costs": costs, "memory_limit": memory_limit}
    schedule = family.builder(ranks=ranks, microbatches=microbatches, **arguments)
    if memory_limit is not None and not family.costed:
        check_peak(schedule, costs, memory_limit)
    return schedule


def _family(name: str) -> Family:
    """The family of a name."""
    if name not in FAMILIES:
        raise ScheduleError(
            f"There is no schedule {name!r}{nearest(name, FAMILIES) or '.'} Known: {', '.join(FAMILIES)}."
        )
    return FAMILIES[name]


def _options(name: str, family: Family, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, all of which the family has."""
    for option in options:
        if option not in family.options:
            known = ", ".join(family.options) or "none"
            close = nearest(option, family.options) or "."
            raise ScheduleError(f"Schedule {name} has no option {option!r}{close} Its options: {known}.")
    return dict(options)


def _chunks(name: str, family: Family, chunks: int | None) -> int:
    """Chunks per rank: what was asked for where the family can have it, else its own count."""
    counts = family.chunk_counts if family.chunked or family.chunk_counts is not None else (1,)
    if chunks is None:
        return counts[0] if counts else 1
    if counts is None or chunks in counts:
        return chunks
    if not counts:
        raise ScheduleError(f"Schedule {name} takes no chunks; its options ({', '.join(family.options)}) decide.")
    several = ", ".join(other for other in FAMILIES if FAMILIES[other].chunked and not FAMILIES[other].chunk_counts)
    if counts == (1,):
        raise ScheduleError(
            f"Schedule {name} holds one stage per rank, so chunks={chunks} can't be; take chunks=1 or one of {several}."
        )
    can = " or ".join(map(str, counts))
    raise ScheduleError(
        f"Schedule {name} holds {can} stages per rank, so chunks={chunks} can't be; "
        f"take chunks={can}, leave them out, or take one of {several}."
    )


def check_peak(schedule: Schedule, costs: Costs, memory_limit: float) -> None:
    """Raise ScheduleError where a rank keeps more than the limit."""
    from stretto.schedule.simulate.memory import peak_activation

    peaks = peak_activation(schedule, costs)
    peak = max(peaks)
    if peak > memory_limit + TOLERANCE:
        fitting = ", ".join(name for name, family in FAMILIES.items() if family.costed) or "none yet"
        raise ScheduleError(
            f"Schedule {schedule.name} keeps {peak:.9g} micro-batches of activations on rank {peaks.index(peak)}, "
            f"above the memory limit of {memory_limit:.9g}; families that fit themselves to a limit: {fitting}."
        )
