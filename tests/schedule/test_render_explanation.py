"""Where the time goes: parts that add up, and a path without gaps."""

from __future__ import annotations

import pytest

from stretto.schedule.families import build
from stretto.schedule.render.explanation import as_data, as_text
from stretto.schedule.simulate import Costs, Network, attribution, run


def test_the_parts_of_a_rank_add_up_to_the_makespan() -> None:
    timeline = run(build("zb-h1", ranks=4, microbatches=8), Costs(comm=0.3))
    data = as_data(timeline)
    for parts in zip(attribution(timeline).busy, data["communication"], data["bubble"], strict=True):
        assert sum(parts) == pytest.approx(timeline.makespan)
    assert [curve[-1][1] for curve in data["memory_curve"]] == [0, 0, 0, 0]
    assert max(value for _, value in data["memory_curve"][0]) == 4


def test_1f1b_by_hand() -> None:
    """Two ranks, two micro-batches, comm = 1: down, all of rank 1, and up again."""
    timeline = run(build("1f1b", ranks=2, microbatches=2), Costs(comm=1))
    assert as_data(timeline)["critical_path"] == ["0F0", "1F0", "1B0", "1F1", "1B1", "0B1"]
    lines = as_text(timeline, (2.0, 1.0)).splitlines()
    assert lines[0].split() == ["rank", "busy", "communication", "bubble", "peak", "activation"]
    assert lines[1].split()[:2] == ["0", "6"] and lines[2].split()[-1] == "1"
    assert lines[3] == "critical path: 6 operations, F 3 + B 6 + latency 2"
    assert lines[4] == "  0F0 1F0 1B0 1F1 1B1 0B1"


def test_lines_are_short_and_name_messages_that_occupy_ranks() -> None:
    timeline = run(build("1f1b", ranks=4, microbatches=40), Costs(comm=0.2), Network(manner="blocking"))
    text = as_text(timeline, (1.0,) * 4)
    assert max(map(len, text.splitlines())) <= 120 and "RECV_B" in text
