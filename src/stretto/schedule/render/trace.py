"""A schedule as a trace in Chrome's format, for Perfetto (ui.perfetto.dev) or chrome://tracing.

    process   the schedule
    threads   one per rank for its arithmetic, one more for each stream that runs beside it
    slices    operations; arguments say stage, micro-batch and rank
    flows     arrows from an operation to the one on another rank that reads its result
    counters  activation memory of each rank

The format counts in microseconds.  A time of the costs is taken for seconds, so a step of unit costs lasts seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stretto.schedule.op import PER_BLOCK, Kind, text
from stretto.schedule.render.scene import NONE, Scene, scene
from stretto.schedule.simulate.graph import STREAMS
from stretto.schedule.simulate.streams import STREAM_OF

if TYPE_CHECKING:
    from stretto.schedule.simulate import Timeline

MICROSECONDS = 1e6
"""Per unit of the costs' time."""
Event = dict[str, Any]


def events(timeline: Timeline, *, process: int = 1) -> dict[str, Any]:
    """The trace as what JSON is made of; ``process`` tells several schedules in one trace apart.

    Processes and threads count from 1: viewers take number 0 for what runs while a machine idles.
    """
    shown = scene(timeline)
    tracks = (timeline.graph.queue[: shown.schedule.num_ops] + 1).tolist()
    rows = [*_names(shown, tracks, process), *_slices(shown, tracks, process)]
    rows += [*_flows(shown, tracks, process), *_counters(shown, process)]
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _names(shown: Scene, tracks: list[int], process: int) -> list[Event]:
    """What the process and its tracks are called, and that they stand in the order of ranks."""
    beside = {0: "", **dict.fromkeys(STREAM_OF.values(), "")}
    for kind, stream in STREAM_OF.items():
        beside[stream] += f" {kind.name}"
    named: list[Event] = [_meta("process_name", process, 1, name=shown.schedule.name)]
    for track in sorted(set(tracks)):
        named.append(_meta("thread_name", process, track, name=_track(track - 1, beside)))
        named.append(_meta("thread_sort_index", process, track, sort_index=track))
    return named


def _track(queue: int, beside: dict[int, str]) -> str:
    """``rank 3``, or ``rank 3 UNSHARD REDUCE_GRAD`` for a stream."""
    return f"rank {queue // STREAMS}{beside[queue % STREAMS]}"


def _meta(what: str, process: int, track: int, **arguments: Any) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": arguments}


def _slices(shown: Scene, tracks: list[int], process: int) -> list[Event]:
    """One for each operation that takes time."""
    schedule = shown.schedule
    columns = (schedule.kind, schedule.stage, schedule.microbatch, shown.rank, shown.start, shown.end)
    found = []
    rows = zip(*(column.tolist() for column in columns), tracks, strict=True)
    for kind, stage, microbatch, rank, start, end, track in rows:
        if end <= start:
            continue
        arguments: Event = {"rank": rank}
        if kind != Kind.OPT:
            arguments |= {"stage": stage, "block" if kind in PER_BLOCK else "microbatch": microbatch}
        found.append(
            {
                "ph": "X",
                "name": text(kind, stage, microbatch),
                "cat": Kind(kind).name,
                "pid": process,
                "tid": track,
                "ts": start * MICROSECONDS,
                "dur": (end - start) * MICROSECONDS,
                "args": arguments,
            }
        )
    return found


def _flows(shown: Scene, tracks: list[int], process: int) -> list[Event]:
    """Two events for each message: it leaves where its sender ends, and binds to the slice that reads it."""
    found: list[Event] = []
    start, end, kind = shown.start.tolist(), shown.end.tolist(), shown.schedule.kind.tolist()
    for reader, sender in enumerate(shown.source.tolist()):
        if sender == NONE:
            continue
        name = "activation" if kind[reader] in (Kind.F, Kind.RECV_F) else "gradient"
        both: Event = {"name": name, "cat": "message", "id": process << 32 | reader, "pid": process}
        # A flow binds to the slice around its time: inside the sender, not at the end, where the next one begins.
        leaves = (start[sender] + end[sender]) / 2 * MICROSECONDS
        found.append({"ph": "s", **both, "tid": tracks[sender], "ts": leaves})
        found.append({"ph": "f", "bp": "e", **both, "tid": tracks[reader], "ts": start[reader] * MICROSECONDS})
    return found


def _counters(shown: Scene, process: int) -> list[Event]:
    """Activation memory of each rank whenever it changes."""
    found: list[Event] = []
    at, memory, offsets = shown.memory_at.tolist(), shown.memory.tolist(), shown.memory_offsets.tolist()
    for rank in range(shown.schedule.num_ranks):
        for index in range(offsets[rank], offsets[rank + 1]):
            found.append(
                {
                    "ph": "C",
                    "name": f"memory of rank {rank}",
                    "pid": process,
                    "ts": at[index] * MICROSECONDS,
                    "args": {"micro-batches": memory[index]},
                }
            )
    return found
