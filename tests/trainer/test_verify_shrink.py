"""Shrinking keeps what a plan can get wrong, and makes everything else small."""

from __future__ import annotations

import doctest
from dataclasses import replace
from typing import Any

import pytest

from stretto.spec.check import check
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.presets_model import MODELS, model_preset
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer import verify_shrink
from stretto.trainer.verify_shrink import MAX_RANKS, shrink

KEPT = ("family", "tied_embeddings", "qkv_bias", "qk_norm", "rope_scaling", "rope_theta", "dropout", "norm_eps")
PLANS: list[dict[str, Any]] = [
    {},
    {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 3, "recompute": "full"},
    {"pp": 3, "dp_replicate": 3, "micro_batch_size": 4},
    {"pp": 2, "schedule": "interleaved", "chunks": 3},
    {"cp": 8, "context": "mesh", "ulysses": 4, "inner_ring": 2, "tp": 2},
    {"cp": 16, "context": "ulysses", "pp": 4},
    {"tp": 4, "pp": 4, "dp_replicate": 2, "dp_shard": 16, "schedule": "gpipe"},
]


def run_of(model: ModelSpec, **plan: Any) -> RunSpec:
    training = TrainingSpec(global_batch_size=1152, sequence_length=256)
    return RunSpec(model=model, plan=PlanSpec(**plan), training=training)


def test_clips_keep_a_part_for_each_rank() -> None:
    run = run_of(model_preset("stdit-xl"), cp=16, context="switch", dp_shard=2, zero=3)
    run = replace(run, training=replace(run.training, sequence_length=16 * 1024))
    small = shrink(run).run
    check(small, data=False)
    clip = small.model.video
    assert clip is not None and small.training.sequence_length == clip.tokens
    assert small.plan.cp == 8 and clip.frames % 8 and clip.patches % 8, "uneven parts"


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [n for n in MODELS if not n.startswith(("tiny", "demo", "stdit"))])
def test_any_preset_under_any_plan(name: str, plan: dict[str, Any]) -> None:
    model = model_preset(name, dropout=0.1)
    tp, shared = plan.get("tp", 1), plan.get("ulysses", plan["cp"] if plan.get("context") == "ulysses" else 1)
    if model.kv_heads % tp or model.num_heads % (tp * shared):
        model = replace(model, num_heads=8, num_kv_heads=8 if model.num_kv_heads else None, hidden_size=512)
    run = run_of(model, **plan)
    small = shrink(run).run
    check(small, data=False)
    assert small.plan.num_ranks <= MAX_RANKS
    assert all(getattr(small.model, key) == getattr(model, key) for key in KEPT)
    assert small.model.num_heads / small.model.kv_heads == model.num_heads / model.kv_heads
    for key in ("schedule", "chunks", "recompute", "zero"):
        assert getattr(small.plan, key) == getattr(run.plan, key)
    for axis in ("pp", "tp", "cp", "dp_replicate", "dp_shard"):
        assert (getattr(small.plan, axis) > 1) == (getattr(run.plan, axis) > 1)
    assert small.model.vocab_size % 2 and (small.plan.tp == 1 or small.model.vocab_size % small.plan.tp)
    assert small.model.hidden_size <= 256 and small.training.sequence_length <= max(
        32, 4 * small.plan.cp * small.plan.tp
    )
    assert small.num_microbatches >= 2 and small.model.num_layers <= 4 * small.plan.num_stages


def test_uneven_stages_stay_uneven() -> None:
    run = run_of(model_preset("llama-2-7b"), pp=4, stages=(5, 10, 10, 7))
    assert shrink(run).run.plan.stages == (1, 3, 3, 2)
    run = run_of(replace(model_preset("tiny"), num_layers=7), pp=3, stages=(1, 4, 2))
    assert shrink(run).run.plan.stages == (1, 4, 2)


def test_states_stay_divided_differently() -> None:
    plan = {"dp_replicate": 8, "dp_shard": 16, "shard_parameters": 2, "shard_gradients": 8}
    small = shrink(run_of(model_preset("tiny"), **plan, shard_optimizer=128)).run.plan
    assert (small.dp, small.shard_parameters, small.shard_gradients, small.shard_optimizer) == (16, 2, 4, 16)
    small = shrink(run_of(model_preset("tiny"), pp=4, **plan, zero=3)).run.plan
    assert (small.dp, small.shard_parameters, small.shard_gradients, small.shard_optimizer) == (4, 2, 4, 4)


def test_too_many_ranks_are_reduced_and_said() -> None:
    shrunk = shrink(run_of(model_preset("llama-3-70b"), pp=8, tp=8, dp_shard=8))
    plan = shrunk.run.plan
    assert plan.num_ranks == MAX_RANKS and min(plan.pp, plan.tp, plan.dp_shard) == 2
    assert {note.split(" ")[0] for note in shrunk.notes} >= {"plan.tp", "plan.dp_shard"}


def test_window_stays_active_or_inactive() -> None:
    active = shrink(run_of(replace(model_preset("mistral-7b"), sliding_window=64))).run
    assert active.model.sliding_window == active.training.sequence_length // 4
    idle = shrink(run_of(model_preset("mistral-7b"))).run
    assert idle.model.sliding_window == idle.training.sequence_length


def test_head_wider_than_the_model_stays_so() -> None:
    model = ModelSpec(hidden_size=64, num_heads=8, head_dim=16)
    small = shrink(run_of(model)).run.model
    assert small.num_heads * small.head_size > small.hidden_size


def test_foreign_model_keeps_its_sizes() -> None:
    model = ModelSpec(family="foreign", module="some.where:build", num_layers=6, vocab_size=999, hidden_size=48)
    small = shrink(run_of(model, pp=2, stages=(2, 4), compile="regions")).run
    assert small.model == model and small.plan.stages == (2, 4) and small.plan.compile == "none"


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(verify_shrink).failed == 0
