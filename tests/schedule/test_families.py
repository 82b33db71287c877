"""Families: what ``build`` refuses, and the textbook figures of gpipe, 1f1b, interleaved and forward-only.

That any shape of any family is right is in test_properties.
"""

import importlib
import subprocess
import sys

import pytest

from stretto.schedule import Kind, Schedule
from stretto.schedule.families import FAMILIES, Family, build
from stretto.schedule.render.text import draw
from stretto.schedule.simulate import Costs, run
from stretto.schedule.validate import peak_memory
from stretto.spec.errors import ScheduleError


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
        ({"name": "dualpipe-v", "ranks": 2, "microbatches": 4, "chunks": 3}, "holds 2 stages per rank, so chunks=3"),
        ({"name": "hanayo", "ranks": 2, "microbatches": 4, "chunks": 4}, "takes no chunks; its options (waves) decide"),
        ({"name": "1f1b", "ranks": 2, "microbatches": 2, "memory_limit": 0.0}, "The memory limit is 0,"),
        ({"name": "1f1b", "ranks": 2, "microbatches": 2, "memory_limit": float("nan")}, "The memory limit is nan,"),
        (
            {"name": "1f1b", "ranks": 4, "microbatches": 8, "memory_limit": 3.5},
            "1f1b keeps 4 micro-batches of activations on rank 0, above the memory limit of 3.5; families that fit",
        ),
    ],
)
def test_an_impossible_shape_is_one_clear_error(shape: dict, said: str) -> None:
    with pytest.raises(ScheduleError) as error:
        build(**shape)
    assert said in str(error.value)


def test_a_limit_that_holds_is_no_error() -> None:
    assert build("1f1b", ranks=4, microbatches=8, memory_limit=4.0) == build("1f1b", ranks=4, microbatches=8)


def test_a_family_has_its_own_count_of_chunks() -> None:
    own = build("dualpipe-v", ranks=2, microbatches=4)
    assert own.num_chunks == 2
    assert own == build("dualpipe-v", ranks=2, microbatches=4, chunks=2)
    assert build("interleaved", ranks=2, microbatches=4) == build("interleaved", ranks=2, microbatches=4, chunks=1)


def test_a_costed_family_is_handed_costs_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    handed = []

    def builder(*, ranks: int, microbatches: int, costs: Costs, memory_limit: float | None) -> Schedule:
        handed.append((costs, memory_limit))
        return build("gpipe", ranks=ranks, microbatches=microbatches)

    monkeypatch.setitem(FAMILIES, "mine", Family(builder=builder, summary="", costed=True))
    build("mine", ranks=2, microbatches=8)
    build("mine", ranks=2, microbatches=8, costs=Costs(F=2), memory_limit=1.5)  # it answers for the limit itself
    assert handed == [(Costs(), None), (Costs(F=2), 1.5)]


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
