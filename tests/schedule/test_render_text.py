"""Drawings with characters: never wider than asked, and to scale."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.render.text import MOST_LINES, draw, grid, orders
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


def test_many_micro_batches_become_what_most_time_goes_to() -> None:
    """Warm-up, a steady state in which kinds take turns, and what is left at the end."""
    lines = draw(run(build("zb-h1", ranks=4, microbatches=400), Costs())).splitlines()
    assert max(map(len, lines)) <= 120
    assert set(lines[0].partition("│")[2][1:]) == {"▒"}
    gpipe = draw(run(build("gpipe", ranks=2, microbatches=400), Costs())).splitlines()[1].partition("│")[2]
    assert "F" * 30 in gpipe and gpipe.endswith("B" * 60)


def test_many_ranks_leave_out_those_in_the_middle() -> None:
    lines = draw(run(build("gpipe", ranks=100, microbatches=4), Costs())).splitlines()
    assert len(lines) == 66 and lines[32].startswith("... 36 more")
    assert lines[33].startswith("rank 68 ")


def test_colour_changes_no_character() -> None:
    for microbatches in (6, 300):
        timeline = run(build("zb-h1", ranks=3, microbatches=microbatches), Costs())
        coloured = draw(timeline, colour=True)
        assert "\x1b[" in coloured
        assert [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", coloured).splitlines()] == draw(
            timeline
        ).splitlines()


def test_orders_wrap_and_stop() -> None:
    short = orders(lower(build("1f1b", ranks=2, microbatches=12)), width=60).splitlines()
    assert short[0].startswith("rank 0 │ 0F0 0SEND_F0") and max(map(len, short)) <= 60
    assert sum(line.count("F11") + line.count("B11") for line in short) == 8
    long = orders(build("1f1b", ranks=2, microbatches=900)).splitlines()
    assert long[MOST_LINES].endswith("more") and len(long) == 2 * (MOST_LINES + 1)
    pairs = orders(lower(build("dualpipe", ranks=4, microbatches=8)))
    assert "0F3+3B5" in pairs
