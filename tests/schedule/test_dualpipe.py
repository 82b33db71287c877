"""DualPipe and DualPipe-V: no bubble but the unavoidable one, pairs that overlap, any number of micro-batches."""

import importlib
from itertools import pairwise

import pytest

from stretto.schedule import Kind
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


# Scored with another event simulator from the order of DeepSeek's code; makespan and largest peak.
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "costs", "makespan", "peak"),
    [
        ("dualpipe", 4, 8, "", 25, 5),
        ("dualpipe", 8, 32, "", 99, 9),
        ("dualpipe", 8, 16, "F=18.5,I=18.1,W=9.3,comm=0.6", 826.5, 9),
        ("dualpipe-v", 4, 8, "", 25.5, 4.5),
        ("dualpipe-v", 8, 16, "comm=0.1", 55.2, 8.5),
        ("dualpipe-v", 8, 32, "F=18.5,I=18.1,W=9.3,comm=0.6", 1581.15, 8.5),
    ],
)
def test_time_and_memory_are_the_published_ones(
    name: str, ranks: int, microbatches: int, costs: str, makespan: float, peak: float
) -> None:
    figures = simulate(build(name, ranks=ranks, microbatches=microbatches), Costs.parse(costs))
    assert figures.makespan == pytest.approx(makespan)
    assert max(figures.peak_activation) == pytest.approx(peak)


@pytest.mark.parametrize(("name", "ranks"), [("dualpipe", 2), ("dualpipe", 6), ("dualpipe-v", 1), ("dualpipe-v", 3)])
def test_any_number_of_microbatches(name: str, ranks: int) -> None:
    before = 0.0
    for microbatches in range(1, 2 * ranks + 4):
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        validate(schedule)
        validate(lower(schedule))
        makespan = simulate(schedule).makespan
        assert before <= makespan
        before = makespan


@pytest.mark.parametrize("name", ["dualpipe", "dualpipe-v"])
@pytest.mark.parametrize("microbatches", [7, 8, 13])
def test_a_pair_is_a_forward_and_the_backward_that_follows_in_the_other_direction(name: str, microbatches: int) -> None:
    schedule = build(name, ranks=4, microbatches=microbatches)
    pairs = 0
    for rank in range(4):
        ops = schedule.ops(rank)
        for op, behind in pairwise(ops):
            if op.joined:
                pairs += 1
                assert (op.kind, behind.kind) == (Kind.F, Kind.B)
                assert op.microbatch != behind.microbatch or op.stage != behind.stage
        assert not ops[-1].joined
    fewest = {7: 8, 8: 12, 13: 32}
    assert pairs >= fewest[microbatches]


def test_the_directions_of_dualpipe_mirror_each_other() -> None:
    schedule = build("dualpipe", ranks=4, microbatches=8)
    assert schedule.placement == ((0, 1, 2, 3), (3, 2, 1, 0)) and schedule.voice == (0,) * 4 + (1,) * 4
    for rank in range(4):
        mirrored = [(op.kind, op.stage, (op.microbatch + 4) % 8, op.joined) for op in schedule.ops(3 - rank)]
        assert [(op.kind, op.stage, op.microbatch, op.joined) for op in schedule.ops(rank)] == mirrored


def test_odd_ranks_are_refused_with_the_way_out() -> None:
    with pytest.raises(ScheduleError, match=r"can't have 3 ranks.*even; take 4 ranks, or dualpipe-v"):
        build("dualpipe", ranks=3, microbatches=8)


@pytest.mark.parametrize(
    ("module", "name", "ranks", "microbatches"),
    [
        ("dualpipe", "dualpipe", 4, 8),
        ("dualpipe_v", "dualpipe-v", 2, 4),
    ],
)
def test_the_figure_in_the_docstring_is_what_is_built(module: str, name: str, ranks: int, microbatches: int) -> None:
    picture = draw(run(build(name, ranks=ranks, microbatches=microbatches), Costs()), width=116)
    docstring = importlib.import_module(f"stretto.schedule.families.{module}").__doc__
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in docstring
