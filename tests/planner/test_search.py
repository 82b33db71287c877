"""The search: nothing better is missed, more room never hurts, and the same question has the same answer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stretto.planner.balance import balanced_by_cost
from stretto.planner.candidates import cores, divisors, shardings, worlds
from stretto.planner.estimate import estimate, least_peak_bytes, least_seconds, least_state_bytes, turns
from stretto.planner.plan import answer, fill_in
from stretto.planner.request import Request, resized
from stretto.planner.search import search
from stretto.spec import capabilities
from stretto.spec.check import check
from stretto.spec.errors import ConfigError, StrettoError
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec


def request_of(
    model: str = "llama-3-8b", cluster: str = "a100:16", *, batch: int = 64, length: int = 4096, **fields: Any
) -> Request:
    """A question about a preset; ``fields`` are the Request's, but for what begins with model_ or cluster_."""
    own = {name: fields.pop(name) for name in list(fields) if name.startswith(("model_", "cluster_"))}
    parts: dict[str, dict[str, Any]] = {"model": {}, "cluster": {}}
    for name, value in own.items():
        section, _, key = name.partition("_")
        parts[section][key] = value
    training = TrainingSpec(sequence_length=length, global_batch_size=batch, dtype="bfloat16")
    run = RunSpec(
        model=model_preset(model, **parts["model"]),
        cluster=cluster_preset(cluster, **parts["cluster"]),
        training=training,
    )
    return Request(run=run, **fields)


SMALL = {"model_num_layers": 6, "length": 1024, "batch": 8}
"""Six layers of Llama 3 8B: few enough ways to divide them that all can be tried."""


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write ``total`` as ``parts`` numbers of at least 1."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, total)))


def every_plan(request: Request) -> Iterator[PlanSpec]:
    """All plans with schedules of closed form, by plain loops and the launch's own checks."""
    devices, batch = request.devices, request.run.training.global_batch_size
    degrees = [n for n in range(1, devices + 1) if devices % n == 0]
    for pp, tp, cp, replicate in itertools.product(degrees, repeat=4):
        if devices % (pp * tp * cp * replicate) or pp > request.model.num_layers:
            continue
        shard = devices // (pp * tp * cp * replicate)
        for zero, micro, recompute in itertools.product((1, 2, 3), range(1, batch + 1), ("none", "selective", "full")):
            base = PlanSpec(
                pp=pp, tp=tp, cp=cp, dp_replicate=replicate, dp_shard=shard, zero=zero, micro_batch_size=micro,
                recompute=recompute,
            )  # fmt: skip
            try:
                check(replace(request.run, plan=base), data=False)
            except StrettoError:
                continue
            for schedule in ("1f1b", "gpipe"):
                for stages in compositions(request.model.num_layers, pp):
                    yield replace(base, schedule=schedule, stages=stages)


@pytest.mark.parametrize("memory_bytes", [80e9, 26e9])
def test_no_plan_is_better(memory_bytes: float) -> None:
    """An exhaustive enumeration finds nothing faster that fits, with room to spare and without."""
    request = request_of(cluster="a100:4", cluster_memory_bytes=memory_bytes, **SMALL)
    everything = [found for plan in every_plan(request) if (found := estimate(request, plan)).fits]
    fastest = min(found.seconds for found in everything)
    best = search(request).plans[0]
    assert len(everything) > 50
    assert best.fits and best.seconds <= fastest * (1 + 1e-9)


def test_least_memory_is_the_least() -> None:
    request = request_of(cluster="a100:4", objective="memory", **SMALL)
    least = min(estimate(request, plan).peak_bytes for plan in every_plan(request) if plan.schedule == "1f1b")
    assert search(request).plans[0].peak_bytes <= least * (1 + 1e-9)
    assert all("less memory; " in why for why in answer(request).reasons)


def test_bounds_are_below() -> None:
    """No plan of a core is faster, and none of a sharding smaller, than what closes them unseen."""
    request = request_of(cluster="a100:4", **SMALL)
    for plan in list(every_plan(request))[::37]:
        found = estimate(request, plan)
        assert least_seconds(found.work, turns(found.work, None)) <= found.seconds * (1 + 1e-9)
        assert max(least_state_bytes(found.work), least_peak_bytes(found.work)) <= found.peak_bytes * (1 + 1e-9)


def test_more_memory_is_never_slower() -> None:
    seconds = []
    for memory_bytes in (30e9, 60e9, 141e9):
        found = search(request_of(cluster_memory_bytes=memory_bytes, pins={"cp": 1}), top=1).plans
        seconds.append(found[0].seconds if found else float("inf"))
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] < float("inf")


def test_faster_links_are_never_slower() -> None:
    slow, fast = (search(request_of(cluster_network_bytes_per_second=rate), top=1).plans[0] for rate in (5e9, 50e9))
    assert fast.seconds <= slow.seconds


def test_list_is_ranked_and_differs_in_layout() -> None:
    plans = search(request_of()).plans
    assert len(plans) == 5 and all(plan.fits for plan in plans)
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    assert len({(plan.plan.pp, plan.plan.tp) for plan in plans}) == 5


def test_same_question_same_answer() -> None:
    one, two = (search(request_of()) for _ in range(2))
    assert [plan.plan for plan in one.plans] == [plan.plan for plan in two.plans]
    assert one.counts == two.counts


def test_pins_are_kept_and_everything_runs() -> None:
    request = request_of(pins={"pp": 2, "schedule": "zb-h1", "recompute": "full"})
    found = answer(request)
    for number, plan in enumerate(found.plans):
        assert (plan.plan.pp, plan.plan.schedule, plan.plan.recompute) == (2, "zb-h1", "full")
        check(found.run(number), data=False, world_size=16)


def test_only_what_this_version_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "AXES", ("pp", "dp_replicate", "dp_shard"))
    monkeypatch.setattr(capabilities, "OFFLOAD", False)
    request = request_of()
    some = [plan for core in cores(request, 16) for plan in shardings(request, core)]
    assert some and all(plan.cp == 1 and not plan.offload for plan in some)


def test_pipeline_bubble_asks_for_another_schedule() -> None:
    """With few micro-batches a schedule with a shorter bubble is worth its simulation."""
    found = search(request_of(batch=16, cluster="a100:8", pins={"pp": 4, "tp": 1, "cp": 1}), top=1).plans[0]
    plain = search(request_of(batch=16, cluster="a100:8", pins={"pp": 4, "tp": 1, "cp": 1, "schedule": "1f1b"}), top=1)
    assert found.plan.schedule != "1f1b" and found.seconds < plain.plans[0].seconds


def test_schedules_that_keep_less_are_tried_where_1f1b_does_not_fit() -> None:
    pins = {"pp": 4, "tp": 1, "cp": 1, "micro_batch_size": 1, "recompute": "none", "offload": False, "zero": 1}
    run = RunSpec(
        model=model_preset("demo"),
        cluster=replace(cluster_preset("local-cpu:4"), memory_bytes=8e6),
        training=TrainingSpec(global_batch_size=8, sequence_length=128),
    )
    (best,) = search(Request(run=run, pins=pins), top=1).plans
    assert best.fits and not estimate(Request(run=run), replace(best.plan, passes=(), schedule="1f1b")).fits


def test_cost_takes_fewer_devices() -> None:
    """Devices that communicate less are cheaper per step; the run file has only those."""
    found = answer(request_of(objective="cost", price=2.0), top=1)
    fastest = answer(request_of(), top=1)
    assert found.best.plan.num_ranks in worlds(request_of(objective="cost"))
    assert found.best.device_hours <= fastest.best.device_hours
    cluster = found.run().cluster
    assert cluster.num_nodes * cluster.devices_per_node == found.best.plan.num_ranks
    assert found.best.cost == pytest.approx(2.0 * found.best.device_hours)


def test_auto_takes_the_best_plan() -> None:
    run = request_of().run
    assert fill_in(run, {"pp": 2}) == answer(request_of(pins={"pp": 2}), top=1).best.plan


def test_large_clusters_are_quick() -> None:
    start = time.process_time()
    assert search(request_of("llama-3-70b", "h100:512", batch=1024, length=8192)).plans
    assert time.process_time() - start < 10  # 4 s when this was written


@pytest.mark.parametrize("layers", [7, 12])
@pytest.mark.parametrize(("ranks", "last"), [(2, 1.5), (3, 0.2), (4, 2.7), (4, 9.0)])
def test_no_division_is_better_balanced(layers: int, ranks: int, last: float) -> None:
    def largest(stages: tuple[int, ...]) -> float:
        return max(*stages[:-1], stages[-1] + last)

    found = balanced_by_cost(layers, ranks=ranks, last=last)
    assert found is not None and sum(found) == layers
    assert largest(found) == min(map(largest, compositions(layers, ranks)))


def test_balance_within_memory() -> None:
    assert balanced_by_cost(12, ranks=3, most=[2, 4, 12]) == (2, 4, 6)
    assert balanced_by_cost(12, ranks=3, most=[2, 4, 5]) is None
    assert balanced_by_cost(8, ranks=2, chunks=2, last=2.0) == (3, 2, 2, 1)


def test_the_clusters_own_calibration_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "measured.toml"
    path.write_text('format = "stretto.calibration/1"\n[shares]\nmatmul = 0.2\n')
    pins = {"cp": 1, "tp": 1, "pp": 1}
    slow, usual = (
        search(request_of(cluster_calibration=file, pins=pins), top=1).plans[0] for file in (str(path), None)
    )
    assert slow.seconds > 2 * usual.seconds


def test_divisors_and_parts_of_a_cluster() -> None:
    assert divisors(36) == [n for n in range(1, 37) if 36 % n == 0]
    assert resized(cluster_preset("h100:64"), 4).devices_per_node == 4
    assert worlds(request_of(objective="cost")) == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pins": {"pp": 3}}, "plan.pp = 3 can't divide 16 devices; pp may be 1, 2, 4, 8, 16."),
        ({"pins": {"pp": 8, "dp_shard": 4}}, "pp 8 x dp_shard 4 = 32 ranks"),
        ({"pins": {"tp": 16}}, "8 key/value heads can't be split over tp=16; tp may be 1, 2, 4 or 8."),
        ({"pins": {"pp": 2, "stages": (3, 3)}}, "plan.stages = [3, 3] holds 6 layers"),
        ({"batch": 7, "pins": {"pp": 1, "tp": 1, "cp": 1}}, "No plan divides a global batch of 7 sequences over 16"),
        (
            {"model": "llama-3.1-405b", "batch": 16, "pins": {"tp": 8, "cp": 1}},
            "'llama-3.1-405b' fits on no plan for 16 devices of 80.0 GB. The least that any plan needs is ",
        ),
        ({"objective": "cost"}, "needs the price of a device for an hour"),
        ({"objective": "speed"}, "--objective = 'speed' is none of"),
        ({"cluster_num_nodes": 0}, "cluster.num_nodes = 0 must be positive"),
    ],
)
def test_what_cannot_be_is_one_clear_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        answer(request_of(**fields))
    assert message in str(error.value)


def test_a_large_vocabulary_is_cut_over_the_pipeline() -> None:
    """Where a quarter of the parameters are vocabulary, the fullest rank holds least with a share of it."""
    model = replace(model_preset("llama-3-8b"), num_layers=8, vocab_size=256_000)
    run = RunSpec(
        model=model,
        cluster=cluster_preset("a100:4"),
        training=TrainingSpec(global_batch_size=16, sequence_length=2048, dtype="bfloat16"),
    )
    pins = {"pp": 4, "schedule": "1f1b", "recompute": "none", "offload": False}
    best = search(Request(run=run, pins=pins, objective="memory"), top=1).plans[0]
    whole = search(Request(run=run, pins={**pins, "passes": ()}, objective="memory"), top=1).plans[0]
    assert best.plan.passes == ("vocabulary",)
    assert best.peak_bytes < whole.peak_bytes
