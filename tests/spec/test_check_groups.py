"""What dynamic groups can't be combined with is said before a process starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stretto.spec.check import check
from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec

DYNAMIC: dict[str, Any] = {"cp": 2, "dp_shard": 2, "context_groups": "dynamic"}


def run_of(plan: dict[str, Any], **model: Any) -> RunSpec:
    spec = ModelSpec(vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, max_positions=64)
    training = TrainingSpec(global_batch_size=4, sequence_length=32)
    return RunSpec(model=replace(spec, **model), plan=PlanSpec(**{**DYNAMIC, **plan}), training=training)


def test_a_plan_with_dynamic_groups_is_fine() -> None:
    check(run_of({"context_tokens": 8, "zero": 3, "recompute": "full", "tp": 2, "offload": True, "pp": 2}), data=False)
    check(run_of({"pp": 2, "schedule": "gpipe", "context": "ulysses"}), data=False)
    check(run_of({"context": "mesh", "ulysses": 4, "cp": 1, "dp_shard": 4}), data=False)


@pytest.mark.parametrize(
    ("plan", "model", "words"),
    [
        ({"pp": 2, "optimizer_barrier": False}, {}, r"leave plan\.optimizer_barrier out"),
        ({"pp": 2, "schedule": "zb-h1"}, {}, r"zb-h1.*it may be 1f1b or gpipe"),
        ({"passes": ("offload",)}, {}, r"steps differ in their micro-batches"),
        ({"compile": "regions"}, {}, r'set plan\.compile = "none"'),
        ({"context_keep": True}, {}, r"leave plan\.context_keep out"),
        ({"context_keep": True, "cp": 1, "dp_shard": 4, "recompute": "full"}, {}, r"leave plan\.context_keep out"),
    ],
)
def test_what_it_cannot_be_combined_with(plan: dict[str, Any], model: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        check(run_of(plan, **model), data=False)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"context_groups": "both"}, r"static.*dynamic"),
        ({"context_tokens": 0}, r"context_tokens = 0 leaves no room .* at least 8"),
        ({"context_tokens": 7}, r"32 tokens on 4 ranks; set it to at least 8"),
        ({"context_groups": "static", "context_tokens": 8}, r"leave plan\.context_tokens out"),
        ({"context": "mesh", "ulysses": 3}, r"can't divide the 4 ranks evenly; it may be 1, 2 or 4"),
        ({"context": "mesh", "ulysses": 4, "tp": 2}, r"2 heads of .* plan\.ulysses = 4; it may be 1 or 2"),
        ({"context": "mesh", "ulysses": 4, "cp": 1, "dp_shard": 4, "tp": 2}, r"plan\.ulysses = 4; it may be 1 or 2"),
        ({"inner_ring": 3}, r"can't divide a ring of 4 evenly; it may be 1, 2 or 4"),
        (
            {"context": "ulysses", "dp_shard": 4, "context_tokens": 7},
            r"on 4 ranks \(no larger .* 4 heads\); .* 8",
        ),
        ({"context": "ulysses", "dp_shard": 3}, r"= 16 \(what the static .* on 1 rank .* at least 32"),
    ],
)
def test_bad_values(plan: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(run_of(plan), data=False)
