"""Costs per stage: what a costs file may say, what it means for a schedule, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from stretto.schedule.families import build
from stretto.schedule.simulate import Costs, peak_activation, simulate
from stretto.spec.errors import ScheduleError

FILE = {
    "F": [1, 2, 3, 4], "I": [2, 2, 2, 2], "W": [1, 1, 1, 1], "R": [5, 5, 5, 5], "S": [0.5] * 4, "T": [0.25] * 4,
    "O": [0] * 4, "L": [0] * 4, "comm": [0.1, 0.2, 0.3], "activation_bytes": [100, 300, 300, 100],
    "act_w": [1, 0.5, 0.5, 1], "OPT": [7, 8],
}  # fmt: skip


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(document))
    return path


def test_a_costs_file_is_absolute_per_stage(tmp_path: Path) -> None:
    schedule = build("interleaved", ranks=2, microbatches=4, chunks=2)
    costs = Costs.load(written(tmp_path, FILE)).of(schedule)
    assert costs.F.tolist() == [1, 2, 3, 4]
    assert costs.B.tolist() == [3, 3, 3, 3]
    assert costs.R.tolist() == [5, 5, 5, 5]
    assert costs.comm.tolist() == [0.1, 0.2, 0.3]
    assert costs.act_w.tolist() == [1, 0.5, 0.5, 1]
    assert costs.OPT.tolist() == [7, 8]


def test_what_a_costs_file_leaves_out(tmp_path: Path) -> None:
    schedule = build("interleaved", ranks=2, microbatches=4, chunks=2)
    costs = Costs.load(written(tmp_path, {name: FILE[name] for name in "FIW"})).of(schedule)
    assert costs.R.tolist() == costs.F.tolist(), "recompute is the forward again"
    assert costs.activation.tolist() == [0.5] * 4
    assert costs.unit_bytes is None
    assert not (costs.comm.any() or costs.OPT.any() or costs.S.any())


def test_a_scalar_is_for_a_ranks_whole_share() -> None:
    schedule = build("interleaved", ranks=2, microbatches=4, chunks=4)
    costs = Costs(F=2, I=3, W=1, O=4, S=0.5, OPT=6, comm=0.25, act_w=0.75).of(schedule)
    assert (costs.F[0], costs.B[7], costs.R[3], costs.O[1]) == (0.5, 1.0, 0.5, 1.0)
    assert (costs.S[0], costs.OPT[1], costs.act_w[0]) == (0.5, 6, 0.75), "a rank has one shard and one optimizer step"
    assert costs.comm.tolist() == [0.25] * 7
    table = costs.durations()
    assert table.shape == (17, 8)
    assert table[1].tolist() == costs.B.tolist()


def test_inside_a_rank_there_is_no_latency() -> None:
    class V:
        num_ranks, num_stages, num_chunks, placement = 2, 4, 2, ((0, 1, 1, 0),)

    assert Costs(comm=0.5).of(V()).comm.tolist() == [0.5, 0.0, 0.5]
    assert Costs(comm=(0.1, 0.2, 0.3)).of(V()).comm.tolist() == [0.1, 0.0, 0.3]


def test_bytes_become_units_of_the_average_rank() -> None:
    schedule = build("interleaved", ranks=2, microbatches=4, chunks=2)
    costs = Costs(activation_bytes=(100, 300, 300, 100)).of(schedule)
    assert costs.activation.tolist() == [0.25, 0.75, 0.75, 0.25]
    assert costs.activation.sum() == schedule.num_ranks
    assert costs.unit_bytes == 400
    even = simulate(schedule, Costs(activation_bytes=[5e9] * 4))
    assert even.peak_activation == simulate(schedule).peak_activation


def test_uneven_stages_in_time_and_memory() -> None:
    # rank 0 │0F0-│0F1-│    │0B0 │0B1 │      F 1, I 1, W 1 on stage 0; F 2, I 1, W 2 on stage 1; latency 0.5
    # rank 1 │   1F0-│1B0│1F1│1B1│
    schedule = build("1f1b", ranks=2, microbatches=2)
    figures = simulate(schedule, Costs(F=(1, 2), I=(1, 1), W=(1, 2), comm=(0.5,), activation_bytes=(10, 30)))
    assert figures.makespan == 1 + 0.5 + 2 * (2 + 1 + 2) + 0.5 + 2
    assert figures.busy == (6.0, 10.0)
    assert figures.peak_activation == (1.0, 1.5)
    assert figures.lower_bound == 11.5, "rank 1 starts at 1.5 and works for 10; its last W may come last of all"
    assert peak_activation(schedule, Costs(activation_bytes=(10, 30))) == (1.0, 1.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"W": [1, 1, 1]}, "Cost F has 4 entries, but W has 3; each has one per stage"),
        ({"activation_bytes": [1] * 5}, "Cost F has 4 entries, but activation_bytes has 5"),
        ({"comm": [0.1] * 4}, "Cost comm has 4 entries, but 4 stages have 3 boundaries"),
        ({"F": [1, 0, 1, 1]}, "Cost F[1] is 0, but an operation takes a time above 0"),
        ({"R": [1, 1, -1, 1]}, "Cost R[2] is -1, but an operation takes a time above 0"),
        ({"T": [0, 0, 0, -2]}, "Cost T[3] is -2, but it is 0 or more"),
        ({"comm": [0, -1, 0]}, "Cost comm[1] is -1, but a latency is 0 or more"),
        ({"act_w": [0, 0, 2, 0]}, "Cost act_w[2] is 2, but a fraction"),
        ({"OPT": [float("nan"), 0]}, "Cost OPT[0] is nan"),
        ({"activation_bytes": [0] * 4}, "Cost activation_bytes is 0 on every stage"),
        ({"F": 1}, "has F=1; it is a list of numbers"),
        ({"F": [1, "2", 3, 4]}, "it is a list of numbers"),
        ({"com": [1] * 4}, "unknown key 'com'; did you mean 'comm'?"),
        ({"F": [True] * 4}, "it is a list of numbers"),
        ({"F": [10**400] * 4}, "int too large"),
    ],
)
def test_impossible_costs_files(tmp_path: Path, change: dict, said: str) -> None:
    with pytest.raises(ScheduleError) as error:
        Costs.load(written(tmp_path, FILE | change))
    assert said in str(error.value)
    assert "costs.json" in str(error.value)


def test_unreadable_costs_files(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="can't be read"):
        Costs.load(tmp_path / "none.json")
    with pytest.raises(ScheduleError, match="holds no JSON object"):
        Costs.load(written(tmp_path, [1]))
    with pytest.raises(ScheduleError, match="has no 'I'; it needs F, I, W"):
        Costs.load(written(tmp_path, {"F": [1]}))


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        (Costs(F=(1, 2, 3)), "Cost F has 3 entries, but the schedule has 4 stages"),
        (Costs(OPT=(1, 2, 3)), "Cost OPT has 3 entries, but the schedule has 2 ranks"),
        (Costs(comm=(1, 2)), "Cost comm has 2 entries, but the schedule has 3 boundaries between stages"),
        (Costs(activation_bytes=(1,)), "Cost activation_bytes has 1 entries, but the schedule has 4 stages"),
    ],
)
def test_costs_of_another_shape(costs: Costs, said: str) -> None:
    with pytest.raises(ScheduleError) as error:
        simulate(build("interleaved", ranks=2, microbatches=2, chunks=2), costs)
    assert said in str(error.value)


def test_costs_are_values() -> None:
    costs = Costs(F=[1, 2], comm=np.array([0.5]))
    assert costs == Costs(F=(1.0, 2.0), comm=(0.5,))
    assert hash(costs) == hash(Costs(F=(1.0, 2.0), comm=(0.5,)))
