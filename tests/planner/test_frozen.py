"""Frozen parameters, other optimizers and updates without a barrier, in memory and in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from stretto.models.build import build_model
from stretto.planner.barrier import saved_seconds
from stretto.planner.estimate import estimate, least_peak_bytes, least_seconds, least_state_bytes, turns
from stretto.planner.flops import parameters
from stretto.planner.frozen import block, trained
from stretto.planner.memory import memory
from stretto.planner.request import Request
from stretto.planner.step import stage_turns, step_time
from stretto.planner.tracked import tracked
from stretto.planner.workload import Workload
from stretto.schedule.families import build
from stretto.schedule.simulate import Costs, simulate
from stretto.spec.cluster import ClusterSpec
from stretto.spec.errors import ConfigError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_cluster import cluster_preset
from stretto.spec.presets_model import model_preset
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.measure import packed_batch
from stretto.trainer.memory import ActivationMeter, passing_bytes, persistent_bytes
from stretto.trainer.session import Session

SHAPES = (
    {},
    {"qkv_bias": True, "qk_norm": True, "tied_embeddings": True},
    {"family": "gpt2", "num_kv_heads": 4, "tied_embeddings": True},
)


def run_of(plan: Mapping[str, Any], **training: Any) -> RunSpec:
    """A 7B model on 16 A100s."""
    return RunSpec(
        model=model_preset("llama-2-7b"),
        cluster=cluster_preset("a100:16"),
        plan=PlanSpec(**plan),
        training=TrainingSpec(global_batch_size=64, sequence_length=2048, dtype="bfloat16", **training),
    )


def work_of(plan: Mapping[str, Any], **training: Any) -> Workload:
    run = run_of(plan, **training)
    return Request(run=run).work(run.plan)


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_sizes_are_the_models_own(shape: dict[str, Any]) -> None:
    model = ModelSpec(num_layers=2, **shape)
    with torch.device("meta"):
        stack: Any = build_model(model)
    of_block = {name: p.numel() for name, p in stack.named_parameters() if name.startswith("blocks.1.")}
    assert dict(block(model, 1)) == of_block
    everything, counts = trained(model, ()), parameters(model)
    assert sum(everything.matrices) == counts.layer_matrices and sum(everything.vectors) == counts.layer_vectors
    found = (everything.embedding, everything.final_norm, everything.head if not counts.tied else counts.head)
    assert found == (counts.embedding, counts.final_norm, counts.head)


def test_wrong_patterns_are_refused() -> None:
    for patterns, said in ((("block.*",), "no parameter is named 'block"), (("*",), "leaves nothing to train")):
        with pytest.raises(ConfigError, match=said):
            step_time(work_of({"pp": 2, "dp_shard": 8}, freeze=patterns))


def test_what_is_frozen_has_no_gradient_no_moments_and_no_backward() -> None:
    plan = {"pp": 2, "dp_shard": 8}
    whole, frozen, norms = (
        work_of(plan, freeze=patterns)
        for patterns in ((), ("inputs.*", *(f"blocks.{i}.*" for i in range(16))), ("*norm*",))
    )
    first, last = memory(frozen)
    assert first.gradients == first.activations == 0 and first.parameters == memory(whole)[0].parameters
    assert first.optimizer == pytest.approx(memory(whole)[0].optimizer / 3)  # masters stay, moments don't
    assert (last.gradients, last.optimizer) == (memory(whole)[1].gradients, memory(whole)[1].optimizer)
    turns, before = stage_turns(frozen), stage_turns(whole)
    assert turns.backward[0] == 0 and turns.backward[1] == before.backward[1] and turns.forward == before.forward
    assert step_time(frozen).total < step_time(whole).total
    assert norms.weight_layers == whole.weight_layers and norms.largest_trained < whole.largest_trained
    heads = work_of(plan, freeze=("inputs.*", "blocks.*"))
    assert heads.backward_layers == (0, 0) and heads.shares[0].trained == 0 < heads.shares[1].trained


def test_freezing_lets_plans_fit_that_the_search_may_then_look_at() -> None:
    small = replace(cluster_preset("a100:2"), memory_bytes=40e9)
    for patterns, fits in (((), False), (("inputs.*", *(f"blocks.{i}.*" for i in range(30))), True)):
        run = replace(run_of({"pp": 2}, freeze=patterns), cluster=small)
        found = estimate(Request(run=run), run.plan)
        assert found.fits == fits
        assert least_state_bytes(found.work) <= found.peak_bytes and least_peak_bytes(found.work) <= found.peak_bytes
        assert least_seconds(found.work, turns(found.work, None)) <= found.seconds


def test_sgd_keeps_less_and_an_early_update_more() -> None:
    plan = {"pp": 4, "dp_shard": 4, "schedule": "zb-h2"}
    adam, velocity, plain = (
        memory(work_of(plan, **training))[0].optimizer
        for training in ({}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0})
    )
    assert (velocity / adam, plain / adam) == (pytest.approx(8 / 12), pytest.approx(4 / 12))
    assert memory(work_of({**plan, "optimizer_barrier": False}))[0].optimizer == pytest.approx(2 * adam)
    assert step_time(work_of(plan, optimizer="sgd")).optimizer < step_time(work_of(plan)).optimizer


def test_without_a_barrier_a_step_takes_the_longest_span() -> None:
    for family, chunks in (("zb-h2", 1), ("v-half", 2), ("1f1b", 1)):
        plan = {"pp": 4, "dp_shard": 4, "schedule": family, "chunks": chunks, "micro_batch_size": 2}
        free = work_of({**plan, "optimizer_barrier": False})
        count = 4 * chunks
        one = [1.0] * count
        figures = simulate(build(family, ranks=4, microbatches=8), Costs(F=tuple(one), I=tuple(one), W=tuple(one)))
        assert saved_seconds(free, one, one, one, 0.0) == pytest.approx(figures.makespan - figures.span, rel=1e-3)
        gain = step_time(work_of(plan)).total - step_time(free).total
        assert gain > 0 if family == "zb-h2" else gain == pytest.approx(0) if family == "1f1b" else gain >= 0


@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "sgd", "momentum": 0.0, "freeze": ("inputs.*", "blocks.0.*")},
        {"optimizer": "sgd", "freeze": ("blocks.1.*",)},
    ],
)
def test_tracked_tensors_are_those_of_training(training: dict[str, Any]) -> None:
    run = RunSpec(
        run=RunSettings(device="cpu"),
        model=ModelSpec(num_layers=3, hidden_size=128, intermediate_size=352),
        cluster=ClusterSpec(name="local-cpu:1"),
        training=TrainingSpec(global_batch_size=2, sequence_length=64, **training),
    )
    session = Session.start(run, 0)
    meter = ActivationMeter(session)
    with meter.watch():
        session.train_step(1, [packed_batch(1, 64)] * 2)
    held = persistent_bytes(session) + passing_bytes(session) + meter.peak_bytes
    (rank,) = tracked(Request(run=run).work(run.plan))
    assert rank.total == pytest.approx(held, rel=0.1)
