"""A measured step as a trace for Perfetto, the simulated one below it.

Beside what a simulated schedule shows, each rank has a track for its messages: how long a receive waited, what
each message carried.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stretto.schedule.op import MESSAGES, Kind, text
from stretto.schedule.render.html import page
from stretto.schedule.render.trace import MICROSECONDS, Event, events
from stretto.schedule.simulate import Figures, Timeline, figures_of, lower_bound
from stretto.schedule.simulate.graph import STREAMS

if TYPE_CHECKING:
    from stretto.schedule.measured.diagnosis import Diagnosis
    from stretto.schedule.measured.trace import Played

BOTH = ("measured", "simulated")


def trace_of(diagnosis: Diagnosis) -> dict[str, Any]:
    """The trace as what JSON is made of: process 1 is the measured step, process 2 the simulated one."""
    measured, simulated = _timelines(diagnosis)
    found = events(measured, process=1)
    found["traceEvents"] += [*_messages(diagnosis.played), *events(simulated, process=2)["traceEvents"]]
    return found


def page_of(diagnosis: Diagnosis) -> str:
    """The HTML page of both."""
    timelines = _timelines(diagnosis)
    bound = lower_bound(diagnosis.trace.schedule, replace(diagnosis.costs, OPT=0.0))
    measured, simulated = (figures_of(timeline, bound) for timeline in timelines)
    return page(timelines, figures=[_as_measured(measured, diagnosis), simulated])


def _timelines(diagnosis: Diagnosis) -> tuple[Timeline, Timeline]:
    """Both, with names that tell them apart."""
    over = diagnosis.over
    measured, simulated = (
        replace(timeline, schedule=replace(timeline.schedule, name=f"{timeline.schedule.name}, {which}"))
        for timeline, which in zip((over.measured, over.simulated), BOTH, strict=True)
    )
    return measured, simulated


def _as_measured(figures: Figures, diagnosis: Diagnosis) -> Figures:
    """Figures whose busy time is what was measured instead of counted times its cost."""
    busy = diagnosis.over.spent.busy
    return replace(
        figures,
        busy=busy,
        bubble_rate=1 - sum(busy) / (figures.ranks * figures.makespan),
        bubble_rate_span=1 - max(busy) / figures.span,
    )


def _messages(played: Played) -> list[Event]:
    """A track of each rank's sends and receives."""
    schedule = played.schedule
    first = schedule.num_ranks * STREAMS + 1
    found: list[Event] = []
    for rank in range(schedule.num_ranks):
        named = {"ph": "M", "name": "thread_name", "pid": 1, "tid": first + rank}
        found.append({**named, "args": {"name": f"rank {rank} messages"}})
    columns = (schedule.kind, schedule.stage, schedule.microbatch, schedule.peer)
    columns += (played.ranks(), played.start, played.end, played.num_bytes)  # type: ignore[assignment]
    for kind, stage, microbatch, peer, rank, start, end, carried in zip(*(c.tolist() for c in columns), strict=True):
        if kind in MESSAGES:
            slice_ = {"ph": "X", "name": text(kind, stage, microbatch), "cat": Kind(kind).name, "pid": 1}
            times = {"tid": first + rank, "ts": start * MICROSECONDS, "dur": (end - start) * MICROSECONDS}
            found.append({**slice_, **times, "args": {"peer": peer, "bytes": carried}})
    return found
