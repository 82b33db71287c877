"""What the planner says of runs over clips: parameters and bytes exactly, memory as measured, plans that run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stretto.models.build import build_model
from stretto.models.video import PERIODS
from stretto.parallel.sequence.switch import CutSwitch, switch_bytes
from stretto.parallel.wire import Wire
from stretto.planner.calibration import published
from stretto.planner.explain import why_not
from stretto.planner.flops import TIME_WAVES, forward_flops_per_token, parameters
from stretto.planner.machine import COLLECTIVES, Curve, Machine
from stretto.planner.measured_step import Layer, layer
from stretto.planner.prediction import predict
from stretto.planner.remedy import refuse_unfit
from stretto.planner.request import Request
from stretto.planner.search import search
from stretto.planner.step import step_time
from stretto.planner.video import REST, switch_volume
from stretto.spec.check import check
from stretto.spec.cluster import ClusterSpec
from stretto.spec.data import DataSpec
from stretto.spec.errors import ConfigError
from stretto.spec.model import ModelSpec, VideoSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import MODELS
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.loop import train_rank
from stretto.trainer.world import World

CLIP = VideoSpec(frames=7, patches=9, channels=4)
MODEL = ModelSpec(family="video", hidden_size=32, intermediate_size=80, num_layers=3, num_heads=4, video=CLIP)
LARGE = MODELS["stdit-xl"]
RATES = {"peak_flops_bfloat16": 5e10, "memory_bytes_per_second": 1e10, "link_bytes_per_second": 2e9}


def run_of(model: ModelSpec, cluster: ClusterSpec, plan: PlanSpec | None = None, **training: Any) -> RunSpec:
    assert model.video is not None
    length, plan = model.video.tokens, plan or PlanSpec()
    return RunSpec(model=model, cluster=cluster, plan=plan, training=TrainingSpec(sequence_length=length, **training))


@pytest.mark.parametrize("model", [MODEL, MODELS["tiny-video"], LARGE], ids=lambda model: model.name)
def test_parameters_are_the_models_own(model: ModelSpec) -> None:
    assert TIME_WAVES == 2 * PERIODS
    with torch.device("meta"):
        stack: Any = build_model(model)
    assert parameters(model).total == sum(p.numel() for p in stack.parameters())
    counted = sum(p.numel() for n, p in stack.blocks.named_parameters() if p.ndim == 2 and "modulation" not in n)
    assert parameters(model).layer_matrices == counted


def test_flops_of_a_token() -> None:
    products = 2 * (3 * (8 * 32**2 + 2 * 32 * 80) + 4 * 33)
    assert forward_flops_per_token(MODEL, CLIP.tokens) == products + 3 * 4 * 32 * (7 + 9)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_bytes_are_those_of_the_switches(recompute: Any) -> None:
    plan = PlanSpec(cp=4, context="switch", micro_batch_size=2, recompute=recompute)
    work = Request(run=run_of(MODEL, ClusterSpec(**RATES), plan)).work(plan)
    switch, token = CutSwitch(wire=Wire(None), ranks=4), 2 * MODEL.hidden_size * 4
    frames, patches = switch.parts(CLIP.frames), switch.parts(CLIP.patches)
    sent = []
    for rank in range(4):
        there = switch_bytes((frames, patches), rank, token_bytes=token)
        back = switch_bytes((patches, frames), rank, token_bytes=token)
        found = switch_volume(work, rank, element_bytes=4)
        again = 3 * there + 2 * back if recompute == "full" else 0
        assert (found.forward, found.backward) == (3 * there + 2 * back, 3 * back + 2 * there + again)
        sent.append(found.forward + found.backward)
    assert sent[0] == max(sent), "whom the others wait for"


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_memory_is_what_a_run_measures(tmp_path: Path, recompute: Any) -> None:
    plan = PlanSpec(micro_batch_size=2, recompute=recompute)
    run = run_of(MODEL, ClusterSpec(**RATES, network_bytes_per_second=1e9), plan, steps=1, global_batch_size=4)
    run = replace(run, run=RunSettings(dir=str(tmp_path), device="cpu"), data=DataSpec(path="waves"))
    predicted = predict(run)
    assert predicted is not None and predicted.time.total > 0
    train_rank(run, World())
    measured = json.loads((tmp_path / "metrics.jsonl").read_text())["memory_bytes"]
    assert predicted.memory.total == pytest.approx(measured, rel=0.02)


def test_a_search_cuts_clips_where_there_are_fewer_than_devices() -> None:
    run = run_of(LARGE, cluster_preset("h100:16"), global_batch_size=4, dtype="bfloat16")
    request = Request(run=run, pins={"pp": 1})
    best = search(request, top=3).plans
    for found in best:
        assert found.plan.cp >= 4 and found.plan.context == "switch" and found.fits
        check(replace(request.run, plan=found.plan), data=False)
        assert found.time.context_communication > 0
    alone = search(replace(request, run=run_of(LARGE, cluster_preset("h100:16"), global_batch_size=16)), top=1).plans
    assert alone[0].plan.cp == 1, "enough clips for all devices"


def test_switches_cost_what_they_send() -> None:
    cluster = cluster_preset("h100:8")

    def waits(plan: PlanSpec) -> float:
        run = run_of(LARGE, cluster, plan, global_batch_size=1)
        return step_time(Request(run=run).work(plan)).context_communication

    plan = PlanSpec(cp=8, context="switch")
    reached, times = published("h100"), 2 * (2 * 28 - 1)
    each = 2 * 1152 * (16 * 1024 / 8) * 7 / 8 / (cluster.link_bytes_per_second * reached.link)
    assert waits(plan) == pytest.approx(times * (each + 7 * reached.link_latency))
    assert waits(replace(plan, recompute="full")) == pytest.approx(1.5 * waits(plan))


def test_what_can_not_be_is_said() -> None:
    run = run_of(LARGE, cluster_preset("h100:16"), global_batch_size=4)
    request = Request(run=run, pins={"pp": 1})
    assert "plan.tp = 2 can't go with" in why_not(request, {"tp": 2})
    assert "pp=2 can be, at best as pp 2" in why_not(Request(run=run, pins={"cp": 4, "schedule": "1f1b"}), {"pp": 2})
    assert "switch" in why_not(request, {"cp": 16})
    assert "switch" not in why_not(request, {"context": "ring"}).partition(". ")[0]
    small = replace(cluster_preset("h100:1"), memory_bytes=2e10)
    with pytest.raises(ConfigError, match=r"can't fit.*plan.recompute = \"full\""):
        refuse_unfit(run_of(LARGE, small, global_batch_size=1))


def test_on_a_measured_machine_a_step_is_its_parts() -> None:
    line = Curve(points=((1.0, 1e-9), (1e9, 1.0)))
    names = ("attention_forward", "attention_backward", "rest_forward", "rest_backward", "loss_forward")
    machine = Machine(
        processor="test",
        cores=2,
        sides=(16, 64),
        products=tuple(2e-10 * m * n * k for m in (16, 64) for n in (16, 64) for k in (16, 64)),
        collectives=tuple((name, ranks, line) for name in COLLECTIVES for ranks in (2, 4)),
        contention=((1, 1.0), (2, 1.0)),
        **dict.fromkeys((*names, "loss_backward", "optimizer", "copy", "messages"), line),
        **dict.fromkeys(("operation_seconds", "step_seconds", "sleep_seconds"), 1e-6),
    )

    def one(plan: PlanSpec) -> Layer:
        return layer(Request(run=run_of(MODEL, ClusterSpec(**RATES), plan)).work(plan), machine)

    whole, half = one(PlanSpec()), one(PlanSpec(cp=2, context="switch"))
    tokens, products = CLIP.tokens, 8 * 32**2 + 2 * 32 * 80
    assert whole.waits == 0 and whole.weights == pytest.approx(2e-10 * tokens * products, rel=0.05)
    attention, rest = 1e-9 * 4 * tokens * 16 * 8, 1e-9 * tokens * (6 * REST * 32 + 3 * 80)
    assert whole.forward == pytest.approx(whole.weights + attention + rest)
    # Two switches a layer but in the first, of what all ranks hold together.
    assert half.waits == pytest.approx(1e-9 * (2 - 1 / 3) * tokens * 32 * 4)
    assert half.forward == pytest.approx(whole.forward / 2, rel=0.1)
    again = one(PlanSpec(cp=2, context="switch", recompute="full"))
    assert again.waits == pytest.approx(1.5 * half.waits) and again.inputs == pytest.approx(half.inputs + half.forward)
