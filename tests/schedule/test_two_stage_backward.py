"""2BP: W later, within a limit, over any schedule."""

import pytest

from stretto.schedule import Kind, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.sharding import sharding
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.passes.two_stage_backward import two_stage_backward
from stretto.schedule.simulate import Costs, peak_activation, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

SHAPES = {
    "1f1b": {"ranks": 4, "microbatches": 8},
    "gpipe": {"ranks": 3, "microbatches": 5},
    "interleaved": {"ranks": 2, "microbatches": 5, "chunks": 3},
    "chimera": {"ranks": 4, "microbatches": 8},
    "dualpipe": {"ranks": 4, "microbatches": 8},
    "hanayo": {"ranks": 3, "microbatches": 4},
}


def without_w(schedule: Schedule) -> list[list[object]]:
    return [[op for op in schedule.ops(rank) if op.kind is not Kind.W] for rank in range(schedule.num_ranks)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", [{"when": "end"}, {"when": "idle"}, {"when": "late", "behind": 2}])
def test_only_w_moves_and_no_family_gets_slower(name: str, options: dict) -> None:
    schedule = split_backward(build(name, **SHAPES[name]))
    changed = two_stage_backward(schedule, **options)
    validate(changed)
    validate(lower(changed))
    assert without_w(changed) == without_w(schedule)
    if options["when"] == "idle":
        assert simulate(changed).makespan <= simulate(schedule).makespan + 1e-9


def test_at_the_end_all_w_follow_the_last_i_and_the_backward_is_as_fast_as_it_can() -> None:
    changed = two_stage_backward(build("1f1b", ranks=4, microbatches=4), when="end")
    for rank in range(4):
        kinds = [op.kind for op in changed.ops(rank)]
        assert kinds[-4:] == [Kind.W] * 4
        assert Kind.W not in kinds[:-4]
    assert simulate(build("1f1b", ranks=4, microbatches=4)).makespan == 21
    assert simulate(changed).makespan == 18
    assert simulate(two_stage_backward(build("1f1b", ranks=4, microbatches=4))).makespan <= 18


def test_late_is_counted_in_i_of_the_rank() -> None:
    changed = two_stage_backward(build("1f1b", ranks=2, microbatches=4), when="late", behind="1")
    assert " ".join(map(str, changed.ops(1))) == "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3"


@pytest.mark.parametrize("act_w", [1.0, 0.5])
def test_a_limit_makes_w_come_before_an_f(act_w: float) -> None:
    costs = Costs(act_w=act_w)
    schedule = build("1f1b", ranks=4, microbatches=12)
    assert max(peak_activation(two_stage_backward(schedule, when="end", costs=costs), costs)) > 5
    changed = two_stage_backward(schedule, when="end", limit=5, costs=costs)
    validate(changed)
    assert 4.5 <= max(peak_activation(changed, costs)) <= 5
    assert simulate(changed, costs).makespan <= simulate(schedule, costs).makespan


def test_gradients_are_reduced_and_the_optimizer_runs_after_the_last_w() -> None:
    schedule = sharding(split_backward(build("interleaved", ranks=2, microbatches=4, chunks=2)))
    changed = two_stage_backward(schedule, when="end")
    validate(changed)
    assert without_w(changed) == without_w(schedule)


def test_messages_stay_messages() -> None:
    schedule = build("1f1b", ranks=3, microbatches=4)
    changed = two_stage_backward(lower(schedule), when="end")
    assert changed.lowered
    assert without_messages(changed) == two_stage_backward(schedule, when="end")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"when": "never"}, "W can't come 'never'; when is one of idle, end, late"),
        ({"when": "late", "behind": "-1"}, "behind is a whole number, 0 or more"),
        ({"limit": 0}, "can't keep a limit of 0"),
        ({"limit": "x"}, "can't keep a limit of 'x'"),
        ({"limit": 3}, "keeps 4 micro-batches of activations on rank 0 even with W at once; the memory limit is 3"),
    ],
)
def test_options_that_cannot_be_are_errors(options: dict, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        two_stage_backward(build("1f1b", ranks=4, microbatches=8), **options)
