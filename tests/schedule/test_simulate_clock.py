"""The clock against a referee that knows nothing of it, and against times worked out by hand."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.schedule import Op, Schedule, compiled
from stretto.schedule.document import to_json
from stretto.schedule.families import build
from stretto.schedule.passes.communication import lower
from stretto.schedule.simulate import Costs, Network, Timeline, attribution, critical_path, lower_bound, run, simulate
from stretto.schedule.simulate.attribution import ops_of
from stretto.spec.errors import ScheduleError


def referee(exported: str, takes: dict[str, list[float]], comm: list[float]) -> dict[str, float]:
    """End of each operation of a schedule file, by raising all of them until nothing moves."""
    file = json.loads(exported)
    ends = {token: 0.0 for order in file["actions"] for token in order}
    rank_of = {token: rank for rank, order in enumerate(file["actions"]) for token in order}
    comm = [
        0.0 if one == other else latency
        for latency, (one, other) in zip(comm, itertools.pairwise(file["placement"][0]), strict=True)
    ]

    def least(token: str, ahead: str | None) -> float:
        kind = next(letter for letter in token if letter.isalpha())
        stage, m = map(int, token.split(kind))
        others = {"F": [stage - 1], "W": []}.get(kind, range(stage + 1, file["stages"]))
        needs = [(other, f"{other}{letter}{m}") for other in others for letter in ("F" if kind == "F" else "BI")]
        needs = [(other, need) for other, need in needs if need in ends][:1]
        needs += [] if kind == "F" else [(stage, f"{stage}{'I' if kind == 'W' else 'F'}{m}")]
        starts = [ends[ahead] if ahead else 0.0]
        for other, need in needs:
            crosses = rank_of[need] != rank_of[token]
            starts.append(ends[need] + (max(comm[min(stage, other) : max(stage, other)]) if crosses else 0.0))
        return max(starts) + takes[kind][stage]

    while True:
        before = dict(ends)
        for order in file["actions"]:
            for ahead, token in zip([None, *order], order, strict=False):
                ends[token] = least(token, ahead)
        if ends == before:
            return ends


def shuffled(draw: random.Random) -> Schedule:
    """Any placement, any order that respects the arrows, each backward whole or split, some stages without one."""
    ranks, stages, microbatches = draw.randint(1, 4), draw.randint(1, 6), draw.randint(1, 5)
    placement = [draw.randrange(ranks) for _ in range(stages)]
    frozen = [stage for stage in range(stages) if draw.random() < 0.1]
    chains = []
    for m in range(microbatches):
        backward = [f"{s}{draw.choice('BI')}{m}" for s in reversed(range(stages)) if s not in frozen]
        chains.append([f"{s}F{m}" for s in range(stages)] + backward)
    orders: list[list[Op]] = [[] for _ in range(ranks)]
    loose: list[Op] = []
    while chains or loose:
        if loose and (not chains or draw.random() < 0.3):
            op = loose.pop(draw.randrange(len(loose)))
        else:
            chain = draw.choice(chains)
            op = Op.parse(chain.pop(0))
            if not chain:
                chains.remove(chain)
            if op.kind.name == "I":
                loose.append(Op.parse(f"{op.stage}W{op.microbatch}"))
        orders[placement[op.stage]].append(op)
    return Schedule.from_orders(
        orders, name="shuffled", num_stages=stages, num_microbatches=microbatches, placement=[placement], frozen=frozen
    )


@given(seed=st.integers(0, 10**9))
@settings(max_examples=60, deadline=None)
def test_the_referee_agrees(seed: int) -> None:
    draw = random.Random(seed)
    schedule = shuffled(draw)
    stages = schedule.num_stages
    takes = {kind: [draw.uniform(0.5, 3) for _ in range(stages)] for kind in "FIW"}
    comm = [draw.choice([0.0, draw.uniform(0, 2)]) for _ in range(stages - 1)]
    costs = Costs(F=takes["F"], I=takes["I"], W=takes["W"], comm=comm)
    takes["B"] = [inputs + weights for inputs, weights in zip(takes["I"], takes["W"], strict=True)]
    ends = referee(to_json(schedule), takes, comm)
    timeline = run(schedule, costs)
    ops = map(str, ops_of(timeline, range(schedule.num_ops)))
    assert dict(zip(ops, timeline.end.tolist(), strict=True)) == pytest.approx(ends)
    assert simulate(schedule, costs).makespan == pytest.approx(max(ends.values()))
    assert lower_bound(schedule, costs) <= timeline.makespan + 1e-9
    check_attribution_and_path(timeline, costs)


def check_attribution_and_path(timeline: Timeline, costs: Costs) -> None:
    parts = attribution(timeline)
    for rank in zip(parts.busy, parts.communication, parts.bubble, strict=True):
        assert sum(rank) == pytest.approx(timeline.makespan)
        assert min(rank) >= -1e-9
    if not any(costs.comm):
        assert sum(parts.communication) == 0
    path = list(critical_path(timeline))
    assert timeline.start[path[0]] == 0
    assert timeline.end[path[-1]] == timeline.makespan
    latencies = {0.0, *timeline.graph.costs.comm.tolist()}
    for earlier, later in itertools.pairwise(path):
        gap = timeline.start[later] - timeline.end[earlier]
        assert min(abs(gap - latency) for latency in latencies) < 1e-9


@pytest.mark.parametrize("name", ["1f1b", "interleaved"])
def test_compiled_and_plain_clocks_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = build(name, ranks=4, microbatches=8)
    plain = run(schedule, Costs(F=2, comm=0.25))
    monkeypatch.setattr(compiled, "WORTH_IT", 0)
    fast = run(schedule, Costs(F=2, comm=0.25))
    assert np.array_equal(plain.start, fast.start)
    assert np.array_equal(plain.end, fast.end)


def test_a_lowered_schedule_is_timed_without_its_messages() -> None:
    schedule = build("1f1b", ranks=3, microbatches=4)
    assert simulate(lower(schedule), Costs(comm=0.5)) == simulate(schedule, Costs(comm=0.5))


def timed(orders: list[str], costs: Costs, network: Network | None = None, **flow: object) -> dict[str, tuple]:
    """Start and end of each operation of a schedule written by hand, stage s on the rank that runs it."""
    parsed = [[Op.parse(token) for token in order.split()] for order in orders]
    placed = {op.stage: rank for rank, order in enumerate(parsed) for op in order if op.kind.name == "F"}
    schedule = Schedule.from_orders(
        parsed,
        name="by hand",
        num_stages=len(placed),
        num_microbatches=1 + max(op.microbatch for order in parsed for op in order if op.kind.name == "F"),
        placement=[[placed[stage] for stage in sorted(placed)]],
        **{"forward_only": "B" not in str(orders) and "I" not in str(orders)} | flow,
    )
    timeline = run(schedule, costs, network)
    ops = map(str, ops_of(timeline, range(timeline.schedule.num_ops)))
    times = zip(timeline.start.tolist(), timeline.end.tolist(), strict=True)
    found = {op: (round(start, 9), round(end, 9)) for op, (start, end) in zip(ops, times, strict=True)}
    parts = attribution(timeline)
    return found | {"busy": parts.busy, "communication": parts.communication, "bubble": parts.bubble}


def test_a_message_keeps_its_link_busy() -> None:
    times = timed(["0F0 0F1", "1F0 1F1"], Costs(F=1, comm=0.5), Network(message_bytes=2, bandwidth=1))
    assert times["1F0"] == (3.5, 4.5), "made at 1, two on the link, half on the way"
    assert times["1F1"] == (5.5, 6.5), "its message leaves when that of 0F0 is through"
    assert (times["busy"], times["communication"], times["bubble"]) == ((2, 2), (0, 3.5), (4.5, 1))


def test_messages_of_each_boundary_have_their_size() -> None:
    wide = Network(message_bytes=[1, 3], bandwidth=2)
    times = timed(["0F0", "1F0", "2F0"], Costs(F=1), wide)
    assert (times["1F0"], times["2F0"]) == ((1.5, 2.5), (4, 5))
    skips = timed(["0F0 0F1", "1F1", "2F0 2F1"], Costs(F=1, comm=(0.25, 1)), wide, paths=[[0, 2], [0, 1, 2]])
    assert skips["2F0"] == (3.5, 4.5), "over two boundaries: the largest message and the largest latency"


def test_few_messages_in_flight() -> None:
    costs, orders = Costs(F=(1, 3), comm=(0.5,)), ["0F0 0F1 0F2", "1F0 1F1 1F2"]
    free = timed(orders, costs)
    one = timed(orders, costs, Network(in_flight=1))
    two = timed(orders, costs, Network(in_flight=2))
    assert [free[f"1F{m}"][0] for m in range(3)] == [1.5, 4.5, 7.5]
    assert [one[f"1F{m}"][0] for m in range(3)] == [1.5, 5.0, 8.5]
    assert [two[f"1F{m}"][0] for m in range(3)] == [1.5, 4.5, 7.5]
    assert one["communication"] == (0, 1.5)


def test_too_few_messages_in_flight_are_said() -> None:
    # rank 1 reads the second message of the channel first
    orders = ["0F0 2F1", "3F1 1F0"]
    with pytest.raises(ScheduleError, match="waits for ever in 3F1; with at most 1 messages in flight"):
        timed(orders, Costs(), Network(in_flight=1), paths=[[0, 1], [2, 3]])


def test_a_blocking_send_occupies_its_rank() -> None:
    times = timed(
        ["0F0 0F1", "1F0 1F1"], Costs(F=1, comm=0.5), Network(manner="blocking", message_bytes=1, bandwidth=1)
    )
    assert (times["0SEND_F0"], times["0F1"], times["0SEND_F1"]) == ((1, 2), (2, 3), (3, 4))
    assert (times["1F0"], times["1F1"]) == ((2.5, 3.5), (4.5, 5.5))
    assert (times["busy"], times["communication"], times["bubble"]) == ((2, 2), (2, 1), (1.5, 2.5))


def test_blocking_sends_wait_for_room() -> None:
    orders = ["0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1F0 1RECV_F1 1F1"]
    times = timed(orders, Costs(F=(1, 3)), Network(manner="blocking", in_flight=1))
    assert times["0SEND_F1"] == (2, 2), "the first message was received at 1"
    late = timed(["0F0 0SEND_F0 0F1 0SEND_F1", "1F2 1RECV_F0 1F0 1RECV_F1 1F1"], Costs(F=(1, 3)),
                 Network(manner="blocking", in_flight=1), paths=[[0, 1], [0, 1], [1]])  # fmt: skip
    assert late["0SEND_F1"] == (3, 3)


def test_rendezvous_holds_both_ranks() -> None:
    orders = ["0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1F0 1RECV_F1 1F1"]
    network = Network(manner="rendezvous", message_bytes=1, bandwidth=1)
    times = timed(orders, Costs(F=(1, 3), comm=(0.5,)), network)
    assert times["0SEND_F0"] == times["1RECV_F0"] == (1, 2.5)
    assert times["0SEND_F1"] == times["1RECV_F1"] == (5.5, 7)
    assert (times["busy"], times["communication"], times["bubble"]) == ((2, 6), (3, 3), (5, 1))
    assert simulate(build("1f1b", ranks=4, microbatches=6), network=network).makespan > 30


def test_rendezvous_that_stands_still_is_said() -> None:
    with pytest.raises(ScheduleError, match="deadlock"):
        run(lower(build("1f1b", ranks=2, microbatches=4)), network=Network(manner="rendezvous"))


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"manner": "telegraph"}, "Messages can't be 'telegraph'; they are overlapped, blocking, rendezvous"),
        ({"message_bytes": -1}, "A message has -1 bytes"),
        ({"message_bytes": [1, float("inf")]}, "A message has inf bytes"),
        ({"bandwidth": 0}, "The bandwidth is 0"),
        ({"in_flight": 0}, "A channel can't hold 0 messages"),
    ],
)
def test_impossible_networks(network: dict, said: str) -> None:
    with pytest.raises(ScheduleError) as error:
        Network(**network)
    assert said in str(error.value)


def test_networks_read_from_the_command_line() -> None:
    read = Network.parse("manner=blocking, message_bytes=1e6,bandwidth=2e9,in_flight=2")
    assert read == Network(manner="blocking", message_bytes=1e6, bandwidth=2e9, in_flight=2)
    assert Network.parse("") == Network()
    for text, said in (
        ("band=1", "'band=1' says nothing of a network; did you mean 'bandwidth'?"),
        ("manner", "'manner' says nothing of a network"),
        ("in_flight=1.5", "in_flight of a network is '1.5', which is not a number"),
        ("bandwidth=nan", "The bandwidth is nan"),
    ):
        with pytest.raises(ScheduleError) as error:
            Network.parse(text)
        assert said in str(error.value)


def test_message_sizes_for_another_shape() -> None:
    with pytest.raises(ScheduleError, match="2 message sizes, but the schedule has 1 bound"):
        run(build("1f1b", ranks=2, microbatches=2), network=Network(message_bytes=[1, 2], bandwidth=1))


def test_gathering_parameters_runs_beside_arithmetic() -> None:
    costs = Costs(F=(1, 1), UNSHARD=(2, 2))
    times = timed(["0UNSHARD0 0F0 1UNSHARD0 0F1 0RESHARD0 1F0 1F1"], costs)
    assert (times["0UNSHARD0"], times["0F0"]) == ((0, 2), (2, 3))
    assert (times["1UNSHARD0"], times["0F1"]) == ((3, 5), (3, 4)), "both follow 0F0"
    assert (times["0RESHARD0"], times["1F0"], times["1F1"]) == ((4, 4), (5, 6), (6, 7))
    assert (times["busy"], times["communication"], times["bubble"]) == ((4,), (3,), (0,))


def test_the_optimizer_waits_for_all_gradients() -> None:
    costs = Costs(F=(1,), I=(1,), W=(1,), REDUCE_GRAD=(3,), UNSHARD=(1,), OPT=(0.5,))
    times = timed(["0F0 0I0 0W0 0REDUCE_GRAD0 OPT"], costs)
    assert (times["0REDUCE_GRAD0"], times["OPT"]) == ((3, 6), (6, 6.5))
    assert timed(["0F0 0I0 0W0 0REDUCE_GRAD0"], costs) == times, "where none is written, costs of it put it at the end"


def test_every_rank_ends_with_its_optimizer_step() -> None:
    figures = simulate(build("1f1b", ranks=2, microbatches=2), Costs(OPT=(5, 0.25)))
    assert figures.makespan == 9 + 5
    assert figures.busy == (11, 6.25)
    assert figures.lower_bound <= 14


def test_vocabulary_passes_meet() -> None:
    costs = Costs(F=1, I=1, W=1, S=0.5, T=0.25, comm=0.1)
    times = timed(["0F0 0S0 0T0 0B0", "1F0 1S0 1T0 1B0"], costs)
    assert (times["1F0"], times["0S0"], times["1S0"]) == ((1.1, 2.1), (2.2, 2.7), (2.1, 2.6))
    assert (times["0T0"], times["1T0"]) == ((2.7, 2.95), (2.8, 3.05))
    assert times["1B0"] == (3.05, 5.05)
    deferred = timed(["0F0 0S0 0B0 0T0", "1F0 1S0 1B0 1T0"], costs)
    assert deferred["1B0"] == (2.8, 4.8), "waits for S alone, and the latency of the other rank's"


def test_offload_runs_beside_arithmetic() -> None:
    costs = Costs(F=(1,), I=(1,), W=(1,), O=(2,), L=(1,))
    times = timed(["0F0 0O0 0F1 0L0 0B1 0B0"], costs)
    assert (times["0O0"], times["0F1"], times["0L0"]) == ((1, 3), (1, 2), (3, 4))
    assert (times["0B1"], times["0B0"]) == ((2, 4), (4, 6))
