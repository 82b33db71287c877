"""Runs whose trace is made up: every operation takes what its cost says, but for what a test changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stretto.schedule.document import save
from stretto.schedule.measured.format import FOLDER, SCHEDULE, Event, Source, header, path_of, record
from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule

MILLISECOND = 1_000_000
SECONDS: dict[Kind, float] = {Kind.F: 0.010, Kind.B: 0.020, Kind.I: 0.010, Kind.W: 0.010}
COMM = 0.001
APART = 123_456_789_000
"""By how much the clock of another host than the first stands later, in nanoseconds."""
LATENCY = int(COMM * 1e9)


def play(schedule: Schedule, *, times: Mapping[int, float], more: Mapping[str, float]) -> list[list[Event]]:
    """The events of every rank of a lowered schedule, from 0.

    ``times``: factor of the operations of a stage.  ``more``: seconds that an operation takes longer; for a receive,
    that its message is later; ``before 1F2``: that its rank does nothing before.
    """
    orders = [schedule.ops(rank) for rank in range(schedule.num_ranks)]
    events: list[list[Event]] = [[] for _ in orders]
    arrivals: dict[tuple[bool, int | None, int], int] = {}
    while any(len(done) < len(order) for done, order in zip(events, orders, strict=True)):
        for done, order in zip(events, orders, strict=True):
            while len(done) < len(order):
                op = order[len(done)]
                free = (done[-1][3] if done else 0) + int(more.get(f"before {op}", 0.0) * 1e9)
                late = int(more.get(str(op), 0.0) * 1e9)
                if op.kind in (Kind.RECV_F, Kind.RECV_B):
                    if (key := (op.kind is Kind.RECV_F, op.stage, op.microbatch)) not in arrivals:
                        break
                    end, peer, carried = max(free, arrivals[key] + late), op.peer, 100
                elif op.kind in (Kind.SEND_F, Kind.SEND_B):
                    arrivals[_key(schedule, op)] = free + LATENCY
                    end, peer, carried = free, op.peer, 100
                else:
                    seconds = SECONDS.get(op.kind, 0.0) * times.get(op.stage, 1.0)
                    end, peer, carried = free + round(seconds * 1e9) + late, None, 0
                done.append((str(op), peer, free, end, carried, 0))
    return events


def _key(schedule: Schedule, op: Op) -> tuple[bool, int | None, int]:
    forward = op.kind is Kind.SEND_F
    reader = (schedule.next_stage if forward else schedule.gradient_target)(op.stage, op.microbatch)
    return forward, reader, op.microbatch


def write_run(
    run: Path,
    schedule: Schedule,
    *,
    times: Sequence[Mapping[int, float]] = ({},),
    more: Mapping[str, float] | None = None,
    steps: Sequence[int] = (2, 3, 4),
    late_steps: Sequence[int] = (2, 3, 4),
    hosts: Sequence[str] = ("a",),
    device: str = "cpu",
    compiled: str = "none",
) -> Path:
    """A run's directory with a trace; one pipeline for each of ``times``; ``more`` holds in ``late_steps``."""
    folder = run / FOLDER
    folder.mkdir(parents=True)
    (run / "run.toml").write_text("")
    save(schedule, folder / SCHEDULE)
    pipelines = len(times)
    for rank in range(schedule.num_ranks * pipelines):
        place, pipeline = rank // pipelines, rank % pipelines
        source = Source(
            rank=rank,
            world_size=schedule.num_ranks * pipelines,
            position=place,
            pipeline=pipeline,
            host=hosts[place % len(hosts)],
            epoch=5 if place % len(hosts) == 0 else 5 - APART,
            device=device,
            compiled=compiled,
        )
        parts = [header(source)]
        for step in steps:
            clock = APART if place % len(hosts) else 0
            events = play(schedule, times=times[pipeline], more=(more or {}) if step in late_steps else {})
            begin, over = 1000 * step * MILLISECOND + clock, max(event[3] for rank in events for event in rank)
            shifted = [(name, peer, start + begin, end + begin, n, 0) for name, peer, start, end, n, _ in events[place]]
            settled = begin + over + MILLISECOND
            shifted.append(("REDUCE_GRAD", None, shifted[-1][3], settled, 0, 0))
            shifted.append(("OPT", None, settled, settled + 2 * MILLISECOND, 0, 0))
            parts.append(record(step, begin - MILLISECOND, settled + 2 * MILLISECOND, shifted))
        path_of(folder, rank).write_bytes(b"".join(parts))
    return run
