"""Every plan gives the loss, the gradients and the weights of one plain rank.

Float64, three steps, very unequal numbers of valid tokens per micro-batch and rank, two documents
per row, clipping active.  Tolerance 1e-9: the plans add the same terms in another order, which costs
a few units of 1e-16 per addition; three steps of AdamW, whose first steps divide a gradient by its own
size, let that grow to about 1e-12 on the smallest gradients.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from equivalence.plan_run import train_plan
from equivalence.reference import (
    Record,
    assert_same_training,
    train_reference,
)
from ranks import Ranks
from stretto.spec.model import ModelSpec, RopeScaling
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec

STEPS = 3
TOLERANCE = 1e-9

LLAMA = ModelSpec(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    max_positions=64,
    rope_scaling=RopeScaling(original_positions=8),
    initial_std=0.2,
)
MODELS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tied_embeddings=True),
    "deep": replace(LLAMA, num_layers=7, tied_embeddings=True),
    "qwen": replace(LLAMA, qkv_bias=True, qk_norm=True),
    "window": replace(LLAMA, sliding_window=5),
    "dropout": replace(LLAMA, dropout=0.2),
    "gpt2": replace(LLAMA, family="gpt2", num_kv_heads=None, tied_embeddings=True, qkv_bias=True, rope_scaling=None),
}
TRAINING = TrainingSpec(
    steps=10, global_batch_size=8, sequence_length=16, dtype="float64", learning_rate=0.01, clip_norm=0.5
)

PLANS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"micro_batch_size": 8}),
    ("llama", {"recompute": "full"}),
    ("llama", {"recompute": "selective"}),
    ("llama", {"pp": 2}),
    ("llama", {"pp": 4}),
    ("llama", {"pp": 2, "schedule": "gpipe"}),
    ("llama", {"pp": 2, "schedule": "interleaved", "chunks": 2}),
    ("llama", {"pp": 3, "stages": (1, 2, 1), "recompute": "full"}),
    ("deep", {"pp": 4, "stages": (1, 3, 2, 1)}),
    ("deep", {"pp": 4, "stages": (2, 1, 1, 3), "dp_shard": 2, "zero": 3}),
    ("llama", {"tp": 2}),
    ("llama", {"tp": 4}),
    ("llama", {"tp": 2, "recompute": "selective"}),
    ("llama", {"dp_replicate": 2}),
    ("llama", {"dp_replicate": 4, "micro_batch_size": 2}),
    ("llama", {"dp_shard": 2}),
    ("llama", {"dp_shard": 4}),
    ("llama", {"dp_shard": 2, "zero": 2}),
    ("llama", {"dp_shard": 4, "zero": 2}),
    ("llama", {"dp_shard": 2, "zero": 3}),
    ("llama", {"dp_shard": 4, "zero": 3}),
    ("llama", {"dp_shard": 2, "zero": 3, "recompute": "full"}),
    ("llama", {"dp_replicate": 2, "dp_shard": 2, "zero": 3}),
    ("llama", {"dp_replicate": 2, "dp_shard": 2, "zero": 1, "micro_batch_size": 2}),
    ("llama", {"pp": 2, "tp": 2, "dp_shard": 2}),
    ("llama", {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 2}),
    ("llama", {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 3, "recompute": "selective"}),
    ("llama", {"pp": 2, "tp": 2, "dp_replicate": 2}),
    ("llama", {"pp": 2, "dp_shard": 2, "zero": 3}),
    ("llama", {"pp": 2, "dp_shard": 2, "zero": 3, "schedule": "interleaved", "chunks": 2}),
    ("llama", {"pp": 4, "dp_replicate": 2}),
    ("llama", {"tp": 4, "dp_shard": 2, "zero": 3}),
    ("tied", {"pp": 2}),
    ("tied", {"pp": 4}),
    ("tied", {"tp": 2}),
    ("tied", {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 3}),
    ("tied", {"dp_shard": 2, "zero": 2}),
    ("tied", {"pp": 2, "schedule": "interleaved", "chunks": 2, "dp_replicate": 2}),
    ("qwen", {"tp": 2}),
    ("qwen", {"pp": 2, "tp": 2, "dp_shard": 2}),
    ("window", {"pp": 2, "tp": 2}),
    ("dropout", {"pp": 2, "tp": 2, "dp_replicate": 2, "recompute": "full"}),
    ("dropout", {"dp_shard": 2, "zero": 3}),
    ("gpt2", {"pp": 2}),
    ("gpt2", {"pp": 4, "stages": (1, 1, 1, 1), "dp_shard": 2}),
    ("gpt2", {"tp": 2}),
    ("gpt2", {"pp": 2, "tp": 2, "dp_shard": 2, "zero": 3}),
]


def run_of(model: str, plan: dict[str, Any]) -> RunSpec:
    return RunSpec(run=RunSettings(seed=7), model=MODELS[model], plan=PlanSpec(**plan), training=TRAINING)


@cache
def reference_of(model: str) -> Record:
    return train_reference(run_of(model, {}), STEPS)


def name_of(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{k}={v}" for k, v in case[1].items())]).replace(" ", "")


@pytest.mark.parametrize("case", PLANS, ids=name_of)
def test_plan_equals_one_rank(ranks: Ranks, case: tuple[str, dict[str, Any]]) -> None:
    model, plan = case
    reference = reference_of(model)
    record = train_plan(ranks, run_of(model, plan), STEPS)
    assert_same_training(record, reference, tolerance=TOLERANCE)
