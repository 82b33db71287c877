"""Activation memory: by order, over time, with recompute, offload and stages that differ."""

import pytest

from stretto.schedule import Op, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.simulate import Costs, memory_curve, peak_activation, run, simulate
from stretto.spec.errors import ScheduleError


def one_rank(tokens: str, stages: int = 1, **flow: object) -> Schedule:
    ops = [Op.parse(token) for token in tokens.split()]
    return Schedule.from_orders(
        [ops], name="one rank", num_stages=stages, num_microbatches=1 + max(op.microbatch for op in ops),
        placement=[[0] * stages], **flow,
    )  # fmt: skip


def curve(schedule: Schedule, costs: Costs, rank: int = 0) -> list[tuple[float, float]]:
    found = memory_curve(run(schedule, costs))[rank]
    return list(zip(found.times.tolist(), found.values.tolist(), strict=True))


def test_between_inputs_and_weights() -> None:
    schedule = one_rank("0F0 0F1 0I0 0W0 0B1")
    assert curve(schedule, Costs(act_w=0.25)) == [(0, 1), (1, 2), (3, 1.25), (4, 1), (6, 0)]
    assert peak_activation(one_rank("0F0 0F1 0I0 0F2 0I1 0W0 0I2 0W1 0W2"), act_w=0.25) == (2.25,)


def test_each_stage_keeps_its_own_part() -> None:
    schedule = one_rank("0F0 1F0 1I0 0I0 1W0 0W0", stages=2)
    costs = Costs(activation_bytes=(100, 300), act_w=(1, 0.5))
    assert curve(schedule, costs) == [(0, 0.25), (0.5, 1), (1.5, 0.625), (2.5, 0.25), (3, 0)]
    assert simulate(schedule, costs).peak_activation == (1,)


def test_recompute_keeps_nothing_in_between() -> None:
    schedule = one_rank("0F0 0F1 0F2 0R0 0B0 0R1 0B1 0B2")
    assert curve(schedule, Costs()) == [
        (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 2), (6, 1), (6, 2), (9, 1), (11, 0),
    ]  # fmt: skip
    assert peak_activation(schedule) == (2,)


def test_offload_gives_back_at_its_end_and_takes_again_when_loading_starts() -> None:
    schedule = one_rank("0F0 0O0 0F1 0L0 0B1 0B0")
    costs = Costs(F=(1,), I=(1,), W=(1,), O=(2,), L=(1,))
    assert curve(schedule, costs) == [(0, 1), (1, 2), (3, 1), (3, 2), (4, 1), (6, 0)]
    early = one_rank("0F0 0O0 0F1 0B1 0L0 0B0")
    assert peak_activation(early) == (1,), "by order, O is over before 0F1"
    assert simulate(early, Costs(O=0.5)).peak_activation == (2,), "0F1 starts while O runs"
    assert simulate(early, Costs()).peak_activation == (1,)


def test_what_is_recomputed_has_nothing_to_offload() -> None:
    schedule = one_rank("0F0 0O0 0F1 0L0 0R0 0B0 0B1")
    assert [value for _, value in curve(schedule, Costs(O=0.1, L=0.1))] == [1, 0, 1, 2, 1, 0]


def test_stages_without_backward_keep_nothing() -> None:
    assert peak_activation(one_rank("0F0 0F1 0F2", forward_only=True)) == (1,)
    frozen = one_rank("0F0 1F0 0F1 1F1 1B1 1B0", stages=2, frozen=[0])
    assert peak_activation(frozen) == (1,)
    assert curve(frozen, Costs())[-1][1] == 0


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved"])
def test_the_curves_peak_is_the_peak(name: str) -> None:
    schedule = split_backward(build(name, ranks=3, microbatches=6))
    costs = Costs(comm=0.3, act_w=0.4, activation_bytes=(1, 2, 5))
    timeline = run(schedule, costs)
    curves = memory_curve(timeline)
    peaks = peak_activation(schedule, costs)
    assert [round(max(curve.values), 9) for curve in curves] == list(peaks)
    assert peaks == simulate(schedule, costs).peak_activation
    assert all(curve.values[-1] == 0 and (curve.times[1:] >= curve.times[:-1]).all() for curve in curves)


def test_what_runs_again_is_held_while_it_runs_and_leaves_what_w_needs() -> None:
    """One rank, one stage of 10 bytes: F keeps 10, I holds 6 more while it runs and leaves 25, W ends it."""
    schedule = one_rank("0F0 0F1 0I0 0W0 0I1 0W1")
    costs = Costs(activation_bytes=[10.0], rerun_bytes=[6.0])
    assert peak_activation(schedule, costs) == (2.6,)
    assert peak_activation(schedule, Costs(activation_bytes=[10.0], rerun_bytes=[6.0], stash_bytes=[25.0])) == (3.5,)


def test_what_the_first_vocabulary_pass_keeps_lives_until_the_second() -> None:
    schedule = one_rank("0F0 0S0 0T0 0B0")
    assert peak_activation(schedule, Costs(activation_bytes=[10.0], vocabulary_bytes=[3.0])) == (1.3,)


def test_a_stage_that_recomputes_keeps_its_input() -> None:
    schedule = one_rank("0F0 0F1 0R0 0B0 0R1 0B1")
    assert peak_activation(schedule, Costs(activation_bytes=[10.0], input_bytes=[2.0])) == (1.2,)
    with pytest.raises(ScheduleError, match="input_bytes says nothing without activation_bytes"):
        Costs(input_bytes=[2.0])


def test_what_vocabulary_passes_keep() -> None:
    """Rank 0 makes embeddings, rank 1 outputs; an output is 1 unit here, a table a tenth, a shard's rows a half."""
    orders = [
        [Op.parse(token) for token in order.split()]
        for order in ("0F0 0F1 0S0 0T0 0B0 0S1 0T1 0B1", "1F0 1S0 1F1 1B0 1T0 1S1 1T1 1B1")
    ]
    schedule = Schedule.from_orders(
        orders, name="scored", num_stages=2, num_microbatches=2, placement=[(0, 1)], voice=[0, 0]
    )
    sizes = {"activation_bytes": [10.0, 10.0], "output_bytes": [10.0, 10.0], "vocabulary_bytes": [1.0, 1.0]}
    costs = Costs(F=(1, 1), I=(1, 1), W=(1, 1), S=(1, 1), T=(1, 1), **sizes)
    # Rank 0: two outputs are received at once, both activations are there when it scores the first (algorithm 2).
    # Rank 1: activation, output, table and products (2) at 1S0; then activation and output of 1F1.
    timeline = run(schedule, costs)
    first, second = memory_curve(timeline)
    assert peak_activation(schedule, costs) == (6.1, 6.1)
    assert first.values[0] == 3 and first.values[-1] == second.values[-1] == 0
    rows = Costs(F=(1, 1), I=(1, 1), W=(1, 1), S=(1, 1), T=(1, 1), row_bytes=[5.0, 5.0], **sizes)
    first, second = memory_curve(run(schedule, rows))
    assert first.values[0] == 4 and first.values[-1] == second.values[-1] == 0, "rows of both are looked up at once"
