"""What pictures show: causes that explain every start, and messages between ranks only."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from stretto.schedule.families import FAMILIES, build
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.render.scene import NONE, Scene, scene
from stretto.schedule.simulate import Costs, Network, run


def named(shown: Scene, row: int) -> str:
    """Text of a row's operation."""
    schedule = shown.schedule
    rank = int(shown.rank[row])
    return str(schedule.ops(rank)[row - int(schedule.offsets[rank])])


def test_causes_by_hand() -> None:
    """1F1B on two ranks, comm = 1: 1F0 waits for 0F0, 0B0 for 1B0, and 1B0 follows 1F0."""
    shown = scene(run(build("1f1b", ranks=2, microbatches=2), Costs(comm=1)))
    causes = {
        named(shown, row): named(shown, cause) if cause != NONE else None
        for row, cause in enumerate(shown.cause.tolist())
    }
    assert causes == {
        "0F0": None, "0F1": "0F0", "0B0": "1B0", "0B1": "1B1",
        "1F0": "0F0", "1B0": "1F0", "1F1": "1B0", "1B1": "1F1",
    }  # fmt: skip
    assert [named(shown, row) for row in shown.critical] == ["0F0", "1F0", "1B0", "1F1", "1B1", "0B1"]
    sources = {named(shown, row): named(shown, source) for row, source in enumerate(shown.source) if source != NONE}
    assert sources == {"1F0": "0F0", "1F1": "0F1", "0B0": "1B0", "0B1": "1B1"}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"auto"}))
@pytest.mark.parametrize("comm", [0.0, 0.3])
def test_a_cause_ends_when_its_effect_can_start(family: str, comm: float) -> None:
    """At the start of the effect, or earlier by the latency where ranks differ."""
    shown = scene(run(build(family, ranks=4, microbatches=8), Costs(comm=comm)))
    for row, cause in enumerate(shown.cause.tolist()):
        if cause == NONE:
            assert shown.start[row] == 0
        else:
            lag = comm if shown.rank[row] != shown.rank[cause] else 0.0
            assert shown.end[cause] + lag == pytest.approx(shown.start[row])
    assert shown.start[shown.critical[0]] == 0
    assert shown.end[shown.critical[-1]] == shown.makespan


def test_messages_on_links_and_in_ranks_are_seen_through() -> None:
    schedule = split_backward(build("1f1b", ranks=3, microbatches=4))
    pure = scene(run(schedule, Costs()))
    links = scene(run(schedule, Costs(), Network(message_bytes=1.0, bandwidth=4.0)))
    assert np.array_equal(pure.source, links.source)
    assert links.cause.max() < schedule.num_ops
    blocking = scene(run(schedule, Costs(comm=0.5), Network(manner="rendezvous")))
    readers = {named(blocking, row).strip("0123456789") for row in np.flatnonzero(blocking.source != NONE)}
    assert readers == {"RECV_F", "RECV_B"}


def test_memory_is_the_simulators() -> None:
    schedule = build("zb-h1", ranks=4, microbatches=8)
    shown = scene(run(schedule, Costs(act_w=0.5)))
    bounds = shown.memory_offsets.tolist()
    peaks = [shown.memory[start:end].max() for start, end in pairwise(bounds)]
    assert peaks[0] == 4 and np.all(np.diff(shown.memory_at[: bounds[1]]) >= 0)
    assert all(shown.memory[end - 1] == 0 for end in bounds[1:])
