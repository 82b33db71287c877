"""SkipPipe: equal visits, paths that don't meet, and time saved for work left out."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind
from stretto.schedule.families import build
from stretto.schedule.families.skip_pipe import _Track, skip_pipe
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.simulate import Costs, peak_activation, run, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError


@given(
    ranks=st.integers(1, 6),
    microbatches=st.integers(1, 14),
    chunks=st.integers(1, 2),
    skip=st.sampled_from([0, 0.2, 0.25, 0.5, 0.9]),
    swap=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_visits_stages_equally_often_on_paths_of_equal_length(
    ranks: int, microbatches: int, chunks: int, **options: object
) -> None:
    schedule = skip_pipe(ranks=ranks, microbatches=microbatches, chunks=chunks, **options)
    validate(schedule)
    validate(lower(schedule))
    assert schedule.paths is not None
    stages = ranks * chunks
    lengths = {len(path) for path in schedule.paths}
    assert lengths == {max(1, round((1 - options["skip"]) * stages))}
    visits = Counter(stage for path in schedule.paths for stage in path)
    counts = [visits[stage] for stage in range(stages)]
    assert max(counts) - min(counts) <= 1
    for path in schedule.paths:
        falls = [at for at in range(len(path) - 1) if path[at] > path[at + 1]]
        assert len(falls) <= (1 if options["swap"] else 0)
        if falls:
            at = falls[0]
            assert sorted(path) == [*path[:at], path[at + 1], path[at], *path[at + 2 :]]


def test_no_two_micro_batches_are_on_a_rank_in_one_slot() -> None:
    schedule = skip_pipe(ranks=6, microbatches=24, skip=0.34)
    timeline = run(schedule, Costs())
    slots: Counter[tuple[int, int]] = Counter()
    for rank in range(6):
        rows = timeline.rows(rank)
        for start, end in zip(timeline.start[rows].tolist(), timeline.end[rows].tolist(), strict=True):
            assert (start, end) == (round(start), round(end))
            slots.update((rank, slot) for slot in range(round(start), round(end)))
    assert set(slots.values()) == {1}


def test_backwards_take_the_reverse_path() -> None:
    schedule = skip_pipe(ranks=5, microbatches=8, skip=0.4, seed=1)
    timeline = run(schedule, Costs())
    begun: dict[int, list[tuple[float, Kind, int]]] = {}
    for rank in range(5):
        for op, start in zip(schedule.ops(rank), timeline.start[timeline.rows(rank)].tolist(), strict=True):
            begun.setdefault(op.microbatch, []).append((start, op.kind, op.stage))
    for m, ops in begun.items():
        way = [stage for _, _, stage in sorted(ops)]
        assert way == [*schedule.path(m), *reversed(schedule.path(m))]


@pytest.mark.parametrize(("skip", "most"), [(0.25, 0.82), (0.5, 0.55)])
def test_a_step_is_shorter_by_nearly_what_is_skipped(skip: float, most: float) -> None:
    full = simulate(build("1f1b", ranks=8, microbatches=64), Costs()).makespan
    assert simulate(skip_pipe(ranks=8, microbatches=64, skip=skip), Costs()).makespan <= most * full


def test_without_skipping_it_is_1f1b() -> None:
    plain, full = skip_pipe(ranks=4, microbatches=8, skip=0), build("1f1b", ranks=4, microbatches=8)
    assert simulate(plain, Costs()).makespan == simulate(full, Costs()).makespan
    assert max(peak_activation(plain)) == max(peak_activation(full))
    assert plain.paths == ((0, 1, 2, 3),) * 8


def test_swaps_shorten_the_step() -> None:
    swapped, ordered = (simulate(skip_pipe(ranks=8, microbatches=32, swap=swap), Costs()) for swap in (True, False))
    assert swapped.makespan < ordered.makespan


def test_kept_stages_are_on_every_path_in_their_place() -> None:
    schedule = build("skip-pipe", ranks=6, microbatches=12, options={"skip": 0.34, "keep": "0+5"})
    assert schedule.paths is not None
    assert all(path[0] == 0 and path[-1] == 5 for path in schedule.paths)
    visits = Counter(stage for path in schedule.paths for stage in path)
    assert (visits[0], visits[5]) == (12, 12)
    assert {visits[stage] for stage in range(1, 5)} == {6}
    validate(schedule)


def test_equal_seeds_give_equal_schedules() -> None:
    first, again, other = (skip_pipe(ranks=6, microbatches=12, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("limit", [2, 4, 6])
def test_a_memory_limit_is_kept(limit: int) -> None:
    schedule = build("skip-pipe", ranks=6, microbatches=24, memory_limit=limit)
    assert max(peak_activation(schedule)) <= limit


def test_split_backward_goes_with_it() -> None:
    validate(split_backward(skip_pipe(ranks=4, microbatches=6)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"skip": 1}, "can't skip 1 of the stages"),
        ({"skip": "half"}, "can't skip 'half' of the stages"),
        ({"keep": 7}, "can't keep 7; name stages of 0 to 3"),
        ({"keep": "a"}, "can't keep 'a'"),
        ({"keep": "0+1+2+3"}, "can't keep 4 stages on paths that visit 3 of 4"),
        ({"seed": "x"}, "can't draw with the seed 'x'"),
        ({"swap": "maybe"}, "true or false"),
    ],
)
def test_options_that_cannot_be(options: dict, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        build("skip-pipe", ranks=4, microbatches=8, options=options)


def test_a_limit_that_cannot_be_kept_says_the_least() -> None:
    with pytest.raises(
        ScheduleError, match=r"can't keep its activations below 0\.5 micro-batches; the least it reaches is"
    ):
        build("skip-pipe", ranks=4, microbatches=8, memory_limit=0.5)


@given(
    ranks=st.integers(1, 6),
    chunks=st.integers(1, 3),
    microbatches=st.integers(0, 20),
    start=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_swap_is_judged_as_if_its_way_were_walked(
    ranks: int, chunks: int, microbatches: int, start: int, seed: int
) -> None:
    draw, stages = random.Random(seed), ranks * chunks
    track = _Track(ranks, tuple(stage % ranks for stage in range(stages)))
    for _ in range(microbatches):
        taken = sorted(draw.sample(range(stages), draw.randint(1, stages)))
        track.take(track.trip(tuple(taken), draw.randint(0, 9)))
    path = tuple(range(stages))
    ordered = track.trip(path, start)
    for at in range(stages - 1):
        walked = track.trip((*path[:at], at + 1, at, *path[at + 2 :]), start)
        for within in (ordered.end, ordered.end - 1):
            assert track.swapped(ordered, at, within) == min(walked.end, within)


def test_many_stages_and_micro_batches_take_seconds() -> None:
    begun = time.process_time()
    skip_pipe(ranks=16, microbatches=64, chunks=4)
    assert time.process_time() - begun < 5
