"""Drawings with characters: never wider than asked, and to scale."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.render.text import draw, grid
from stretto.schedule.simulate import Costs, run


@given(
    ranks=st.integers(1, 12),
    microbatches=st.integers(1, 40),
    chunks=st.integers(1, 3),
    comm=st.sampled_from([0.0, 0.3]),
    width=st.integers(40, 120),
)
@settings(max_examples=60, deadline=None)
def test_drawings_keep_to_their_width(ranks: int, microbatches: int, chunks: int, comm: float, width: int) -> None:
    schedule = build("interleaved", ranks=ranks, microbatches=microbatches, chunks=chunks)
    lines = draw(run(schedule, Costs(comm=comm)), width=width).splitlines()
    assert len(lines) == ranks + 1 and max(map(len, lines)) <= width
    lowered = lower(schedule)
    for position in (0, len(lowered.ops(ranks - 1)) - 1, len(lowered.ops(ranks - 1))):
        picture = grid(lowered, rank=ranks - 1, position=position, width=width)
        assert max(map(len, picture.splitlines())) <= width and "^" in picture


def test_time_is_to_scale() -> None:
    lines = draw(run(build("1f1b", ranks=2, microbatches=2), Costs(F=1, I=1, W=2, comm=1))).splitlines()
    assert lines == [
        "rank 0 │F0-F1-               B0-------   B1-------",
        "rank 1 │      F0-B0-------F1-B1-------",
        "time   │0                                       14",
    ]


def test_the_stage_is_shown_where_ranks_have_several_and_there_is_room() -> None:
    few = draw(run(build("interleaved", ranks=2, microbatches=2, chunks=2), Costs()))
    many = draw(run(build("interleaved", ranks=2, microbatches=20, chunks=2), Costs()))
    assert "2F1" in few and "3B0" in few
    assert "2F1" not in many


@pytest.mark.parametrize("rank", [0, 20, 39])
def test_a_grid_of_many_ranks_shows_those_around_the_cell(rank: int) -> None:
    lines = grid(build("1f1b", ranks=40, microbatches=4), rank=rank, position=0).splitlines()
    assert len(lines) == 17
    pointer = next(at for at, line in enumerate(lines) if "^" in line)
    assert lines[pointer - 1].startswith(f"rank {rank} ")
