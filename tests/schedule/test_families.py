"""Families: any shape gives a schedule that plays to its end, and the figures in the docstrings are true.

The player here is written apart from the verifier on purpose: it knows only that a forward needs the
forward before it and a backward the backward after it.
"""

import importlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind, Schedule
from stretto.schedule.families import FAMILIES, build
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.rendezvous import lower_rendezvous
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run
from stretto.schedule.validate import peak_memory, validate
from stretto.spec.errors import ScheduleError

shapes = st.fixed_dictionaries(
    {
        "name": st.sampled_from(sorted(FAMILIES)),
        "ranks": st.integers(1, 8),
        "microbatches": st.integers(1, 24),
        "chunks": st.integers(1, 4),
    }
).filter(lambda shape: shape["chunks"] == 1 or FAMILIES[shape["name"]].chunked)


def play(schedule: Schedule) -> set[tuple[str, int, int]]:
    """Run each rank's operations in order as long as any rank can move; what has run in the end."""
    last, done = schedule.num_stages - 1, set()
    queues = [list(schedule.ops(rank)) for rank in range(schedule.num_ranks)]
    moved = True
    while moved:
        moved = False
        for queue in queues:
            while queue:
                op = queue[0]
                stage, m = op.stage, op.microbatch
                needs = {"F": [("F", stage - 1, m)], "B": [("F", stage, m), ("B", stage + 1, m)]}[op.kind.name]
                if any(need not in done for need in needs if 0 <= need[1] <= last):
                    break
                assert (op.kind.name, stage, m) not in done
                done.add((op.kind.name, stage, m))
                queue.pop(0)
                moved = True
    return done


@given(shape=shapes)
@settings(max_examples=150, deadline=None)
def test_any_shape_plays_to_its_end_with_each_operation_once(shape: dict) -> None:
    schedule = build(**shape)
    kinds = "F" if shape["name"] == "forward-only" else "FB"
    stages, microbatches = range(shape["ranks"] * shape["chunks"]), range(shape["microbatches"])
    assert play(schedule) == {(kind, stage, m) for kind in kinds for stage in stages for m in microbatches}
    assert schedule.num_ops == len(kinds) * len(stages) * len(microbatches)
    assert all(schedule.rank_of(op.stage) == rank for rank in range(shape["ranks"]) for op in schedule.ops(rank))


@given(shape=shapes)
@settings(max_examples=100, deadline=None)
def test_any_shape_passes_the_verifier_in_every_form(shape: dict) -> None:
    schedule = build(**shape)
    validate(schedule)
    validate(lower(schedule))
    validate(split_backward(schedule))
    validate(lower(split_backward(schedule)))
    validate(lower_rendezvous(schedule))
    validate(lower_rendezvous(schedule), semantics="rendezvous")


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("microbatches", [1, 3, 8, 16])
def test_gpipe_and_1f1b_take_the_textbook_time(ranks: int, microbatches: int) -> None:
    for name in ("gpipe", "1f1b"):
        timeline = run(build(name, ranks=ranks, microbatches=microbatches), Costs(F=2, I=3, W=1))
        assert timeline.makespan == pytest.approx((microbatches + ranks - 1) * (2 + 4))


@pytest.mark.parametrize("ranks", [2, 4, 5])
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaving_divides_the_bubble_by_the_chunks_for_any_number_of_microbatches(ranks: int, chunks: int) -> None:
    for microbatches in range(ranks, 3 * ranks + 2):
        timeline = run(build("interleaved", ranks=ranks, microbatches=microbatches, chunks=chunks), Costs())
        assert timeline.makespan == pytest.approx(3 * microbatches + 3 * (ranks - 1) / chunks)


@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_fewer_microbatches_than_ranks_follow_each_other_by_one_share(microbatches: int) -> None:
    timeline = run(build("interleaved", ranks=4, microbatches=microbatches, chunks=2), Costs())
    assert timeline.makespan == pytest.approx(4 * 3 + (microbatches - 1) * 3 / 2)


def test_interleaved_is_megatrons_order_where_ranks_divide_microbatches() -> None:
    # Warm-up of (R - r - 1) * 2 + (V - 1) * R chunks; figure 4 of the paper, counted from 0.
    first, last = (build("interleaved", ranks=4, microbatches=8, chunks=2).ops(rank) for rank in (0, 3))
    assert " ".join(map(str, first[:14])) == "0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 0F6 4B0 0F7 4B1"
    assert " ".join(map(str, last[:8])) == "3F0 3F1 3F2 3F3 7F0 7B0 7F1 7B1"


def test_one_chunk_interleaved_is_1f1b() -> None:
    plain, chunked = (build(name, ranks=4, microbatches=6) for name in ("1f1b", "interleaved"))
    assert [plain.ops(rank) for rank in range(4)] == [chunked.ops(rank) for rank in range(4)]


def test_1f1b_keeps_at_most_the_ranks_behind_it_alive() -> None:
    assert peak_memory(build("1f1b", ranks=4, microbatches=16)) == (4.0, 3.0, 2.0, 1.0)
    assert peak_memory(build("1f1b", ranks=4, microbatches=2)) == (2.0, 2.0, 2.0, 1.0)
    assert peak_memory(build("gpipe", ranks=4, microbatches=16)) == (16.0,) * 4


def test_forward_only_has_no_backward_and_keeps_nothing() -> None:
    schedule = build("forward-only", ranks=2, microbatches=3, chunks=2)
    assert schedule.forward_only and set(schedule.kind.tolist()) == {int(Kind.F)}
    assert peak_memory(schedule) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"name": "gpip", "ranks": 2, "microbatches": 2}, "There is no schedule 'gpip'; did you mean 'gpipe'?"),
        ({"name": "1f1b", "ranks": 0, "microbatches": 2}, "can't have 0 ranks"),
        ({"name": "1f1b", "ranks": 2, "microbatches": 0}, "can't have 0 micro-batches"),
        ({"name": "interleaved", "ranks": 2, "microbatches": 2, "chunks": 0}, "can't have 0 chunks"),
        ({"name": "1f1b", "ranks": 2, "microbatches": 2, "chunks": 2}, "take chunks=1 or one of interleaved"),
        ({"name": "1f1b", "ranks": 2, "microbatches": 2, "options": {"waves": "2"}}, "has no option 'waves'"),
    ],
)
def test_an_impossible_shape_is_one_clear_error(shape: dict, said: str) -> None:
    with pytest.raises(ScheduleError) as error:
        build(**shape)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        ("gpipe", {"name": "gpipe", "ranks": 4, "microbatches": 4}),
        ("one_f_one_b", {"name": "1f1b", "ranks": 4, "microbatches": 6}),
        ("interleaved", {"name": "interleaved", "ranks": 2, "microbatches": 4, "chunks": 2}),
        ("forward_only", {"name": "forward-only", "ranks": 3, "microbatches": 4}),
    ],
)
def test_the_figure_in_the_docstring_is_what_is_built(module: str, shape: dict) -> None:
    picture = draw(run(build(**shape), Costs()), width=116)
    docstring = importlib.import_module(f"stretto.schedule.families.{module}").__doc__
    assert "\n".join(f"    {line}" for line in picture.splitlines()) in docstring


def test_naming_and_importing_schedules_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, stretto.schedule.families, stretto.schedule.validate, stretto.schedule.simulate, "
        "stretto.schedule.document; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
