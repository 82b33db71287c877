"""Group-interleaved: the makespans and the memory of the public generator, any shape and group."""

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule.families import build
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

PROFILED = Costs(F=18.5, I=18.1, W=9.3, comm=0.6)

# Ranks, micro-batches, chunks, group; makespan with F = I = W = 1 and with profiled costs, peak memory.
PUBLIC = [
    (4, 8, 2, 4, 27.0, 428.1, 4.0),
    (4, 8, 2, 2, 28.0, 457.8, 3.0),
    (4, 8, 2, 1, 28.5, 473.85, 3.5),
    (4, 8, 4, 2, 27.0, 453.6, 2.5),
    (8, 16, 2, 8, 55.0, 875.7, 8.0),
    (8, 16, 4, 4, 54.5, 917.55, 5.0),
]


@pytest.mark.parametrize(("ranks", "microbatches", "chunks", "group", "unit", "profiled", "peak"), PUBLIC)
def test_time_and_memory_of_the_public_generator(
    ranks: int, microbatches: int, chunks: int, group: int, unit: float, profiled: float, peak: float
) -> None:
    schedule = build(
        "group-interleaved", ranks=ranks, microbatches=microbatches, chunks=chunks, options={"group": group}
    )
    assert simulate(schedule).makespan == pytest.approx(unit)
    assert simulate(schedule, PROFILED).makespan == pytest.approx(profiled)
    assert max(simulate(schedule).peak_activation) <= peak


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_groups_of_r_have_two_thirds_of_interleaveds_bubble(chunks: int) -> None:
    figures = simulate(build("group-interleaved", ranks=5, microbatches=10, chunks=chunks))
    assert figures.makespan == pytest.approx(30 + 4 * 2 / chunks)


@given(
    ranks=st.integers(1, 7),
    microbatches=st.integers(1, 18),
    chunks=st.integers(1, 5),
    group=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_group_is_complete(ranks: int, microbatches: int, chunks: int, group: int) -> None:
    validate(
        build("group-interleaved", ranks=ranks, microbatches=microbatches, chunks=chunks, options={"group": str(group)})
    )


def test_a_group_of_none_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="Option group is '0', but it is a whole number of at least 1"):
        build("group-interleaved", ranks=4, microbatches=8, chunks=2, options={"group": "0"})


def test_the_figure_in_the_docstring_is_what_is_built() -> None:
    schedule = build("group-interleaved", ranks=4, microbatches=4, chunks=2, options={"group": 2})
    picture = draw(run(schedule, Costs()), width=116)
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in str(
        importlib.import_module("stretto.schedule.families.group_interleaved").__doc__
    )
