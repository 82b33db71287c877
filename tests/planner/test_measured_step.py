"""Steps on a measured machine: read off between sizes, played on shared cores, kept in files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stretto.planner.calibration import Calibration
from stretto.planner.calibration_file import read_calibration, write_calibration
from stretto.planner.contention import contended
from stretto.planner.machine import COLLECTIVES, Curve, Machine
from stretto.planner.measured_step import measured_step
from stretto.planner.plan import answer
from stretto.planner.prediction import predict
from stretto.planner.remedy import refuse_unfit, remedies
from stretto.planner.request import Request
from stretto.planner.step import step_time
from stretto.planner.tracked import tracked
from stretto.schedule.families import build
from stretto.schedule.op import Kind
from stretto.schedule.simulate import Costs, simulate
from stretto.spec.cluster import ClusterSpec
from stretto.spec.data import DataSpec
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import CLUSTERS, cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec

LINE = Curve(points=((1.0, 1e-9), (1e9, 1.0)))
FREE = Curve(points=((1.0, 1e-15), (2.0, 1e-15), (1e12, 1e-15)))
MACHINE = Machine(
    processor="test",
    cores=2,
    sides=(16, 64),
    products=tuple(2e-10 * m * n * k for m in (16, 64) for n in (16, 64) for k in (16, 64)),
    attention_forward=LINE,
    attention_backward=LINE,
    rest_forward=LINE,
    rest_backward=LINE,
    loss_forward=LINE,
    loss_backward=LINE,
    optimizer=LINE,
    copy=LINE,
    operation_seconds=1e-4,
    step_seconds=1e-3,
    sleep_seconds=1e-5,
    messages=LINE,
    collectives=tuple((name, ranks, LINE) for name in COLLECTIVES for ranks in (2, 4)),
    contention=((1, 1.0), (2, 1.0), (4, 2.0)),
)
RUN = RunSpec(
    run=RunSettings(device="cpu"),
    model=model_preset("demo"),
    cluster=ClusterSpec(name="local-cpu:4", devices_per_node=4),
    plan=PlanSpec(pp=4),
    training=TrainingSpec(global_batch_size=8, sequence_length=256),
    data=DataSpec(path="stdlib"),
)


def test_layers_compiled_as_a_whole_have_no_w() -> None:
    assert seconds(pp=4, schedule="zb-h1") < 0.98 * seconds(pp=4, schedule="zb-h1", compile="blocks")
    assert seconds(pp=4, schedule="zb-h1", compile="regions") == seconds(pp=4, schedule="zb-h1")


def seconds(**plan: object) -> float:
    spec = PlanSpec(**plan)  # type: ignore[arg-type]
    return measured_step(Request(run=RUN).work(spec), MACHINE).total


def alone(_: float) -> float:
    return 1.0


@pytest.mark.parametrize("family", ["gpipe", "1f1b", "interleaved", "zb-h1", "dualpipe"])
def test_with_a_core_for_each_rank_it_is_the_simulator(family: str) -> None:
    schedule = build(family, ranks=4, microbatches=8)
    chunks = schedule.num_stages / schedule.num_ranks
    one = [1.0 / chunks] * schedule.num_stages
    work = {Kind.F: one, Kind.I: one, Kind.W: one, Kind.B: [2 * second for second in one]}
    for message in (0.0, 0.2):
        found, busy, span = contended(schedule, work, message=message, slowdown=alone)
        figures = simulate(schedule, Costs(comm=message))
        assert found == pytest.approx(figures.makespan) and busy == pytest.approx(max(figures.busy))
        assert span == pytest.approx(figures.span)


def test_shared_cores_lie_between_all_work_and_one_rank_after_the_other() -> None:
    schedule = build("1f1b", ranks=4, microbatches=8)
    one = [1.0] * 4
    work = {Kind.F: one, Kind.B: [2.0] * 4}
    free, *_ = contended(schedule, work, slowdown=alone)
    shared, *_ = contended(schedule, work, slowdown=lambda count: max(1.0, count / 2))
    single, *_ = contended(schedule, work, slowdown=lambda count: count)
    assert single == pytest.approx(4 * 8 * 3)  # one core is never idle
    assert max(free, 4 * 8 * 3 / 2) <= shared < single
    four, *_ = contended(schedule, work, slowdown=lambda count: max(1.0, 2 * count / 2))
    assert four == pytest.approx(single)  # twice the processes on two cores
    waiting, *_ = contended(
        schedule, work, waits={Kind.F: one, Kind.B: one}, slowdown=lambda count: max(1.0, count / 2)
    )
    assert shared < waiting < shared + 2 * 11  # waits leave the cores to others


def test_what_is_not_followed_is_said() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    orders = [schedule.ops(rank) for rank in range(2)]
    first = orders[0][0]
    orders[0].insert(1, replace(first, kind=Kind.O))
    orders[0].insert(2, replace(first, kind=Kind.L))
    with pytest.raises(UnsupportedError, match="has L, O"):
        contended(schedule.with_orders(orders), {Kind.F: [1.0] * 2, Kind.B: [1.0] * 2}, slowdown=alone)


def test_products_are_exact_where_they_are_straight() -> None:
    for shape in ((16, 64, 16), (32, 20, 48), (128, 64, 64), (256, 512, 64)):
        m, n, k = shape
        assert MACHINE.product(m, n, k) == pytest.approx(2e-10 * m * n * k)
    assert MACHINE.product(4, 4, 4) == MACHINE.product(16, 16, 16)  # a call costs what it costs
    assert MACHINE.collective("all_reduce", 8, 1e6) > MACHINE.collective("all_reduce", 4, 1e6)
    assert [MACHINE.slowdown(count) for count in (1, 3, 4, 8)] == [1.0, 1.5, 2.0, 4.0]


def test_a_step_is_the_sum_of_what_was_measured() -> None:
    work = Request(run=RUN).work(PlanSpec())
    time = measured_step(work, MACHINE)
    model, tokens = RUN.model, 256
    weights = 128 * (2 * 128 + 2 * 64) + 3 * 128 * 352
    elements = tokens * (6 * 128 + 3 * (4 * 32 + 2 * 64 + 3 * 352))
    layer = 3 * 2e-10 * tokens * weights + 2e-9 * (4 * 256 * 256 * 32 + elements)
    head = 3 * 2e-10 * tokens * 260 * 128 + 2e-9 * tokens * 260
    assert time.work == pytest.approx(8 * (model.num_layers * layer + head + 2e-4))
    assert time.optimizer == pytest.approx(1e-3 + 1e-9 * work.largest_share)
    assert time.data_communication == 0.0 and time.bubble == 0.0
    assert step_time(work, Calibration(machine=MACHINE)) == time


def test_plans_on_two_cores_are_ordered_as_their_causes_say() -> None:
    assert seconds() > seconds(dp_replicate=2) > 0.9 * seconds(dp_replicate=4)  # two cores, not four
    assert seconds(pp=4, recompute="full") > seconds(pp=4, recompute="selective") > seconds(pp=4)
    assert seconds(dp_shard=4, zero=3) > seconds(dp_shard=4, zero=2) > seconds(dp_replicate=4)
    assert seconds(tp=2, dp_replicate=2) > seconds(dp_replicate=4)
    with pytest.raises(UnsupportedError, match="offload"):
        seconds(pp=4, offload=True)


def test_files_come_back_and_bad_ones_are_refused(tmp_path: Path) -> None:
    for name in ("a.toml", "a.json"):
        write_calibration(MACHINE, tmp_path / name)
        assert read_calibration(tmp_path / name).machine == MACHINE
    data = json.loads((tmp_path / "a.json").read_text())
    bad = {
        "doesn't exist": None,
        "can't be read": "{",
        "format must be": json.dumps({**data, "format": "x"}),
        "measure again": json.dumps({**data, "machine": {**data["machine"], "products": [1.0]}}),
        "unknown key shares.matmull; did you mean": json.dumps({**data, "shares": {"matmull": 0.5}}),
        "must be a finite number above 0": json.dumps({**data, "shares": {"matmul": 0}}),
    }
    for message, text in bad.items():
        path = tmp_path / "bad.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_calibration(path)
    (tmp_path / "shares.json").write_text(json.dumps({"format": data["format"], "shares": {"matmul": 0.5}}))
    assert read_calibration(tmp_path / "shares.json") == Calibration(matmul=0.5)


def test_the_planner_reads_what_the_cluster_names(tmp_path: Path) -> None:
    write_calibration(MACHINE, tmp_path / "here.toml")
    run = replace(RUN, cluster=replace(RUN.cluster, calibration=str(tmp_path / "here.toml")))
    request = Request(run=run)
    assert request.assumed == () and Request(run=RUN).assumed and request.cluster.peak_flops_bfloat16 > 0
    found = answer(request.pinned(pp=2, tp=1, cp=1, dp_shard=1, schedule="1f1b", recompute="none"), top=1)
    assert found.best.seconds == pytest.approx(step_time(found.best.work, request.calibration).total)
    assert found.run().cluster.peak_flops_bfloat16 == 0.0  # what wasn't written stays unwritten
    known = predict(run)
    assert known is not None and known.time.total > 0 and predict(RUN) is None
    devices = replace(RUN, cluster=cluster_preset("h100:4"))
    assert predict(devices) is None and predict(devices, cuda=True) is not None and predict(run, cuda=True) is None


def test_tracked_tensors_grow_with_what_is_alive() -> None:
    request = Request(run=RUN)

    def most(**plan: object) -> float:
        return max(rank.total for rank in tracked(request.work(PlanSpec(**plan))))  # type: ignore[arg-type]

    assert most(pp=4, schedule="gpipe") > most(pp=4) > most(pp=4, recompute="full")
    assert most() > most(dp_shard=4) > most(dp_shard=4, zero=2) > most(dp_shard=4, zero=3)
    work = request.work(PlanSpec(cp=4))
    others = 3 * work.tokens * 2 * work.model.kv_heads * work.model.head_size * work.stack.parameter_bytes
    kept = most(cp=4, context_keep=True) - most(cp=4)
    assert kept == pytest.approx(work.model.num_layers * others)


def test_what_cannot_fit_is_refused_with_what_makes_it_fit() -> None:
    tight = replace(
        RUN, cluster=replace(RUN.cluster, memory_bytes=12e6), plan=PlanSpec(pp=2, dp_replicate=2, micro_batch_size=2)
    )
    request = Request(run=tight)
    found = remedies(request, tight.plan)
    assert len(found) == 3 and all(remedy.estimate.fits for remedy in found)
    with pytest.raises(ConfigError, match=r"can't fit: pipeline rank \d needs .*run.refuse_unfit = false") as error:
        refuse_unfit(tight)
    assert all(str(remedy) in str(error.value) for remedy in found)
    refuse_unfit(replace(tight, run=replace(tight.run, refuse_unfit=False)))
    refuse_unfit(RUN)
    with pytest.raises(ConfigError, match="No change of one or two keys"):
        refuse_unfit(replace(tight, cluster=replace(RUN.cluster, memory_bytes=1e5)))


def test_presets_have_every_level() -> None:
    for name in set(CLUSTERS) - {"local-cpu"}:
        cluster = cluster_preset(name)
        assert cluster.link_bytes_per_second > cluster.network_bytes_per_second > 0
        assert cluster.peak_flops_bfloat16 > cluster.peak_flops_float32 > 0
        if cluster.module_devices:
            assert cluster.devices_per_node % cluster.module_devices == 0
            assert cluster.module_bytes_per_second > cluster.link_bytes_per_second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cores": 0}, "cores must be a whole number of at least 1"),
        ({"cores": "2"}, "cores must be a whole number"),
        ({"sides": [0, 64]}, "sides must grow"),
        ({"products": [float("nan")] * 8}, "products must be seconds above 0"),
        ({"operation_seconds": float("inf")}, "operation_seconds must be a number from 0"),
        ({"step_seconds": -1.0}, "step_seconds must be a number from 0"),
        ({"spread": []}, "spread must be a number"),
        ({"copy": [[0.0, 1e-9], [1e9, 1.0]]}, "growing sizes above 0"),
        ({"copy": [[1.0, float("nan")], [1e9, 1.0]]}, "seconds above 0"),
        ({"collectives": []}, "collectives must be all_reduce"),
        ({"contention": [[2, 1.0], [1, 1.0]]}, "contention must be of growing numbers"),
    ],
)
def test_figures_that_no_machine_has(changes: dict[str, object], message: str) -> None:
    data = MACHINE.as_data()
    assert Machine.of_data(data) == MACHINE
    with pytest.raises(ValueError, match=message):
        Machine.of_data(data | changes)
