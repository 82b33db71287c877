"""Vocabulary passes: complete, in an order that ends, at the memory that the paper states, and as fast as it draws.

The player knows the paper's two algorithms and nothing of the verifier.
"""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Kind, Op, Schedule
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.passes.offload import offload
from stretto.schedule.passes.recompute import recompute
from stretto.schedule.passes.sharding import sharding
from stretto.schedule.passes.split_backward import split_backward
from stretto.schedule.passes.vocabulary import vocabulary
from stretto.schedule.passes.weave import Plan, Weaver
from stretto.schedule.simulate import Costs, peak_activation, simulate
from stretto.schedule.validate import validate
from stretto.spec.errors import ScheduleError

GROWTH = {1: 2, 2: 1}
FIGURE = Costs(F=1, I=1, W=1, S=0.5, T=0.5)
NAMES = ("gpipe", "1f1b", "interleaved", "breadth-first", "zb-h1", "zb-h2", "dualpipe-v")

shapes = st.fixed_dictionaries(
    {"name": st.sampled_from(NAMES), "ranks": st.integers(1, 5), "microbatches": st.integers(10, 16)}
)


def play(schedule: Schedule, algorithm: int) -> int:
    """Run every rank's order as far as it goes by the rules of an algorithm; operations that ran."""
    queues = [list(schedule.ops(rank)) for rank in range(schedule.num_ranks)]
    last, done = schedule.num_stages - 1, set()

    def needs(op: Op) -> list[tuple[str, int, int]]:
        m, backward = op.microbatch, "I" if (schedule.kind == Kind.I).any() and not mixed else "B"
        everyone = range(schedule.num_ranks)
        if op.kind is Kind.F:
            return [("F", op.stage - 1, m)] if op.stage else []
        if op.kind is Kind.S:
            return [("F", last, m)]
        if op.kind is Kind.T:
            return [("S", rank, m) for rank in everyone]
        if op.kind is Kind.W:
            return [("I", op.stage, m)]
        if op.stage == last:
            return [("F", last, m)] + [("T" if algorithm == 1 else "S", rank, m) for rank in everyone]
        return [("F", op.stage, m), (backward, op.stage + 1, m)]

    mixed = (schedule.kind == Kind.B).any()
    moved = True
    while moved:
        moved = False
        for queue in queues:
            while queue and all(need in done for need in needs(queue[0])):
                op = queue.pop(0)
                done.add((op.kind.name, op.stage, op.microbatch))
                moved = True
    return len(done)


@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "breadth-first", "zb-h1", "zb-h2"])
def test_every_rank_runs_its_shard_of_every_micro_batch_in_an_order_that_ends(name: str, algorithm: int) -> None:
    woven = vocabulary(build(name, ranks=4, microbatches=6), algorithm=algorithm)
    for rank in range(4):
        for kind in (Kind.S, Kind.T):
            passes = [op for op in woven.ops(rank) if op.kind is kind]
            assert {op.stage for op in passes} == {rank}
            assert sorted(op.microbatch for op in passes) == list(range(6))
    assert play(woven, algorithm) == woven.num_ops


@given(shape=shapes, algorithm=st.sampled_from([1, 2]), comm=st.sampled_from([0.0, 0.3]))
@settings(max_examples=40, deadline=None)
def test_any_shape_is_right_and_keeps_no_more_than_the_paper_says(shape: dict, algorithm: int, comm: float) -> None:
    schedule = build(**shape)
    woven = vocabulary(schedule, algorithm=algorithm, costs=Costs(S=0.4, T=0.3, comm=comm))
    validate(woven)
    validate(lower(woven))
    peaks = zip(peak_activation(woven), peak_activation(schedule), strict=True)
    assert all(after <= before + GROWTH[algorithm] + 1e-9 for after, before in peaks)
    for rank in range(schedule.num_ranks):
        for forward in (True, False):
            kept = [op for op in woven.ops(rank) if op.kind not in (Kind.S, Kind.T) and (op.kind is Kind.F) is forward]
            assert kept == [op for op in schedule.ops(rank) if (op.kind is Kind.F) is forward]


@pytest.mark.parametrize(("algorithm", "peak"), [(1, 6), (2, 5)])
def test_1f1b_has_the_memory_of_the_papers_figure_and_no_bubble_more(algorithm: int, peak: int) -> None:
    schedule = build("1f1b", ranks=4, microbatches=8)
    woven = vocabulary(schedule, algorithm=algorithm, costs=FIGURE)
    figures = simulate(woven, FIGURE)
    assert max(figures.peak_activation) == peak  # p + 2 and p + 1, figure 10
    assert figures.makespan <= simulate(schedule, FIGURE).makespan + 8 * (0.5 + 0.5)


def test_it_is_faster_than_the_whole_output_layer_on_the_last_stage() -> None:
    schedule = build("1f1b", ranks=4, microbatches=16)
    plain = (1.0, 1.0, 1.0, 1.0)
    heavy = Costs(F=(1, 1, 1, 2.25), I=(1, 1, 1, 2.25), W=(1, 1, 1, 2.25))  # 2.5 layers of two a stage
    shared = Costs(F=plain, I=plain, W=plain, S=(0.47,) * 4, T=(0.47,) * 4)
    assert sum(heavy.of(schedule).F + heavy.of(schedule).B) == pytest.approx(12 + 4 * 0.94, abs=0.02)
    for algorithm in (1, 2):
        woven = simulate(vocabulary(schedule, algorithm=algorithm, costs=shared), shared)
        assert woven.makespan < 0.65 * simulate(schedule, heavy).makespan


@pytest.mark.parametrize("algorithm", [1, 2])
def test_the_order_of_t_and_the_first_backward_tells_the_algorithm(algorithm: int) -> None:
    woven = vocabulary(build("1f1b", ranks=3, microbatches=5), algorithm=algorithm)
    order = woven.ops(2)
    for m in range(5):
        before = order.index(Op(Kind.T, stage=2, microbatch=m)) < order.index(Op(Kind.B, stage=2, microbatch=m))
        assert before == (algorithm == 1)


def test_collectives_meet_in_one_order() -> None:
    woven = vocabulary(build("dualpipe", ranks=4, microbatches=8), algorithm=2)
    for kind in (Kind.S, Kind.T):
        orders = {tuple(op.microbatch for op in woven.ops(rank) if op.kind is kind) for rank in range(4)}
        assert len(orders) == 1
        assert sorted(*orders) == list(range(8))


def test_overlapped_pairs_stay_together() -> None:
    schedule = build("dualpipe", ranks=4, microbatches=8)
    woven = vocabulary(schedule, algorithm=1)
    assert schedule.joined is not None
    assert woven.joined is not None
    assert woven.joined.sum() == schedule.joined.sum()
    for rank in range(4):
        order = woven.ops(rank)
        pairs = [(op.kind, after.kind) for op, after in pairwise(order) if op.joined]
        assert all(first is Kind.F and second in (Kind.B, Kind.I) for first, second in pairs)


def test_t_that_waits_is_bounded() -> None:
    schedule = build("1f1b", ranks=4, microbatches=12)

    def waiting(most: int) -> int:
        woven, worst = vocabulary(schedule, algorithm=2, waiting=most, costs=FIGURE), 0
        for rank in range(4):
            balance = 0
            for op in woven.ops(rank):
                balance += (op.kind is Kind.S) - (op.kind is Kind.T)
                worst = max(worst, balance)
        return worst

    assert waiting(0) <= 3
    assert waiting(0) <= waiting(2) <= 5


def test_messages_and_split_backward_and_recompute_go_with_it() -> None:
    schedule = build("1f1b", ranks=3, microbatches=4)
    assert without_messages(vocabulary(lower(schedule))) == vocabulary(schedule)
    validate(vocabulary(split_backward(schedule), algorithm=2))
    validate(vocabulary(recompute(schedule), algorithm=1))


def test_forward_only_scores_without_gradients() -> None:
    woven = vocabulary(build("forward-only", ranks=3, microbatches=4))
    kinds = woven.kind.tolist()
    assert (kinds.count(Kind.S), kinds.count(Kind.T)) == (12, 0)
    validate(woven)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"algorithm": 3}, "has no algorithm 3; it has 1 and 2"), ({"waiting": -1}, "can't let -1 T passes wait")],
)
def test_options_that_cannot_be(options: dict, says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        vocabulary(build("1f1b", ranks=2, microbatches=2), **options)


@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("name", ["modular", "zeropp", "chimera", "bitpipe", "sharded", "offloaded"])
def test_what_runs_beside_the_arithmetic_keeps_its_place(name: str, algorithm: int) -> None:
    changed = {"sharded": sharding, "offloaded": offload}.get(name)
    schedule = build("interleaved" if changed else name, ranks=4, microbatches=8)
    schedule = changed(schedule) if changed else schedule
    woven = vocabulary(schedule, algorithm=algorithm, costs=FIGURE)
    validate(woven)
    rigid = name not in ("chimera", "bitpipe")  # those only reduce gradients
    for rank in range(4):
        kept = [op for op in woven.ops(rank) if op.kind not in (Kind.S, Kind.T)]
        assert Kind.OPT not in {op.kind for op in woven.ops(rank)[:-1]}
        assert kept == schedule.ops(rank) or not rigid
        assert sorted(map(str, kept)) == sorted(map(str, schedule.ops(rank)))
    if not rigid:
        assert simulate(woven, FIGURE).makespan <= simulate(schedule, FIGURE).makespan + 8 * (0.5 + 0.5)


@pytest.mark.parametrize("algorithm", [1, 2])
def test_blocks_may_be_more_than_micro_batches(algorithm: int) -> None:
    validate(vocabulary(sharding(build("v-half", ranks=3, microbatches=1), blocks=3), algorithm=algorithm))


def test_it_comes_once() -> None:
    with pytest.raises(ScheduleError, match="has S and T already; the vocabulary passes come once"):
        vocabulary(vocabulary(build("1f1b", ranks=2, microbatches=2)))


@pytest.mark.parametrize("comm", [0.0, 0.3])
@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb-h1", "gpipe", "chimera"])
def test_the_clock_that_weaves_and_the_simulator_agree(name: str, algorithm: int, comm: float) -> None:
    schedule, costs = build(name, ranks=4, microbatches=8), Costs(S=0.4, T=0.7, comm=comm)
    plan = Plan.of(schedule, algorithm=algorithm, waiting=2, costs=costs)
    for shift, ahead, eager in ((0, 1, True), (1, 1, True), (0, 0, False)):
        weaver = Weaver(plan, shift=shift, ahead=ahead, eager=eager)
        assert weaver.run()
        woven = schedule.with_orders([[plan.op(item) for item in weaver.order(rank)] for rank in range(4)])
        assert simulate(woven, costs).makespan == pytest.approx(weaver.makespan)


@pytest.mark.parametrize("share", [0.02, 0.5])
@pytest.mark.parametrize("algorithm", [1, 2])
def test_no_time_is_lost_whatever_the_passes_take(algorithm: int, share: float) -> None:
    """A step is what one micro-batch takes there and back, and all others behind it: with and without known costs."""
    bare, real = build("1f1b", ranks=4, microbatches=16), Costs(S=share, T=share, comm=0.02)
    least = 16 * (3 + 2 * share) + 3 * 3
    for costs in (None, real):
        assert simulate(vocabulary(bare, algorithm=algorithm, costs=costs), real).makespan < 1.012 * least
