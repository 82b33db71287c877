"""The trace: what Perfetto reads, and nothing left out."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from stretto.schedule.families import build
from stretto.schedule.render.trace import MICROSECONDS, events
from stretto.schedule.simulate import Costs, run


def of(events: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == phase]


def test_slices_flows_and_counters() -> None:
    schedule = build("1f1b", ranks=4, microbatches=8)
    timeline = run(schedule, Costs(comm=0.25))
    trace = json.loads(json.dumps(events(timeline)))["traceEvents"]
    slices = of(trace, "X")
    assert len(slices) == schedule.num_ops
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(timeline.makespan * MICROSECONDS)
    assert Counter(event["cat"] for event in slices) == {"F": 32, "B": 32}
    first = min(slices, key=lambda event: (event["ts"], event["tid"]))
    assert first["name"] == "0F0" and first["args"] == {"rank": 0, "stage": 0, "microbatch": 0}
    starts, ends = of(trace, "s"), of(trace, "f")
    assert len(starts) == len(ends) == 2 * 3 * 8  # both ways over three boundaries
    assert sorted(event["id"] for event in starts) == sorted(event["id"] for event in ends)
    counters = of(trace, "C")
    peaks = {
        rank: max(e["args"]["micro-batches"] for e in counters if e["name"].endswith(f" {rank}")) for rank in range(4)
    }
    assert peaks == {0: 4, 1: 3, 2: 2, 3: 1}


def test_flows_bind_to_the_operations_that_they_join() -> None:
    """A flow belongs to the slice that encloses its time on its track."""
    trace = events(run(build("zb-h1", ranks=3, microbatches=5), Costs()))["traceEvents"]
    slices = of(trace, "X")

    def around(event: dict[str, Any]) -> str:
        found = [s for s in slices if s["tid"] == event["tid"] and s["ts"] <= event["ts"] < s["ts"] + s["dur"]]
        assert len(found) == 1
        return str(found[0]["name"])

    ends = {event["id"]: event for event in of(trace, "f")}
    joined = {(around(event), around(ends[event["id"]])) for event in of(trace, "s")}
    assert ("0F0", "1F0") in joined and ("2I4", "1I4") in joined
    assert len(joined) == 2 * 2 * 5


def test_tracks_are_named_and_streams_stand_beside_their_rank() -> None:
    schedule = build("breadth-first", ranks=2, microbatches=4, chunks=2, options={"sharded": True})
    trace = events(run(schedule, Costs(UNSHARD=0.5, REDUCE_GRAD=0.5)), process=3)["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in of(trace, "M") if event["name"] == "thread_name"}
    assert names[1] == "rank 0"
    assert "rank 1 UNSHARD REDUCE_GRAD" in names.values()
    assert {event["tid"] for event in of(trace, "X")} <= set(names)
    assert {event["pid"] for event in trace} == {3}
