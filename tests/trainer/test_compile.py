"""plan.compile: regions and whole blocks give the training of one plain rank; nothing compiles inside a step.

The graphs are run by aot_eager, so no compiler is needed: what is cut where, what a backward keeps and when gradients
arrive is the same as with kernels, which benchmarks/compile_regions.py makes.  Tolerance as issue 4 asks: 1e-9.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from equivalence.plan_run import batches_of, together, train_on_rank
from equivalence.reference import Record, assert_same_training, train_reference
from ranks import Ranks
from stretto.parallel.pipeline.stage import Stage
from stretto.spec.errors import ConfigError
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.compiling import check_compiler, rehearse
from stretto.trainer.session import Session

TOLERANCE = 1e-9
LLAMA = ModelSpec(vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=4, num_heads=2)
GPT2 = replace(LLAMA, family="gpt2", tied_embeddings=True)
PLANS: list[dict[str, Any]] = [
    {"pp": 2},
    {"pp": 2, "schedule": "zb-h1", "optimizer_barrier": False},
    {"pp": 2, "schedule": "v-half", "chunks": 2, "offload": True},
    {"dp_shard": 2, "zero": 3, "schedule": "zb-h1"},
]
"""All with the same graphs, which are compiled once."""
SPLIT: list[dict[str, Any]] = [{"tp": 2, "schedule": "zb-h1", "recompute": "full"}, {"cp": 2, "schedule": "zb-h1"}]


def run_of(model: ModelSpec, **plan: Any) -> RunSpec:
    training = TrainingSpec(global_batch_size=8, sequence_length=8, dtype="float64", learning_rate=0.01, clip_norm=0.5)
    plan = {"micro_batch_size": 2, "compile_backend": "aot_eager", **plan}
    return RunSpec(model=model, plan=PlanSpec(**plan), training=training)


def train(rank: int, world: int, runs: list[RunSpec]) -> list[dict[str, Any]]:
    """What each run gave, and how much was compiled before it, and in it."""
    torch._dynamo.reset()
    found = []
    for run in runs:
        counters.clear()
        session = Session.start(run, rank)
        rehearse(session, batches_of(run, 1, session.mesh.dp_index, documents=True))
        before = dict(counters["frames"])
        found.append(train_on_rank(rank, world, run, 2, True) | {"frames": (before, dict(counters["frames"]))})
    return found


def check(ranks: Ranks, model: ModelSpec, plans: list[dict[str, Any]]) -> None:
    runs = [run_of(model, **plan) for plan in plans]
    found = ranks.run(train, 2, runs)
    assert all(rank[0]["frames"][0].get("ok", 0) > 0 for rank in found)
    for at, run in enumerate(runs):
        mine = [rank[at] for rank in found]
        assert all(before == after for before, after in (one["frames"] for one in mine)), "a step compiled something"
        record = Record(
            losses=mine[0]["losses"],
            norms=mine[0]["norms"],
            tokens=mine[0]["tokens"],
            gradients=[together([one["gradients"][step] for one in mine]) for step in range(2)],
            weights=together([one["weights"] for one in mine]),
        )
        assert_same_training(record, train_reference(run, 2), tolerance=TOLERANCE)


@pytest.mark.parametrize("compiles", ["regions", "blocks"])
def test_compiled_plans_train_like_one_plain_rank(ranks: Ranks, compiles: str) -> None:
    for model in (LLAMA, GPT2):
        check(ranks, model, [{**plan, "compile": compiles} for plan in PLANS])


def test_regions_between_messages_with_dropout(ranks: Ranks) -> None:
    model = replace(LLAMA, num_layers=2, dropout=0.1)
    check(ranks, model, [{**plan, "compile": "regions"} for plan in SPLIT])


def test_lengths_after_the_second_are_not_compiled_again() -> None:
    torch._dynamo.reset()
    counters.clear()
    run, compiled = run_of(replace(GPT2, num_layers=1), compile="regions"), []
    session = Session.start(run, 0)
    for length in (8, 12, 20, 16):
        run = replace(run, training=replace(run.training, sequence_length=length))
        assert session.train_step(1, batches_of(run, 1, 0, documents=True)).updated
        compiled.append(counters["frames"]["ok"])
    assert 0 < compiled[0] < compiled[1] == compiled[2] == compiled[3]


@pytest.mark.parametrize(("compiles", "stashed"), [("none", 7), ("regions", 7), ("blocks", 0)])
def test_what_waits_between_i_and_w(compiles: str, stashed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven products of a layer wait for W, or none does and the gradients are there already."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    session = Session.start(run_of(LLAMA, compile=compiles, schedule="zb-h1"), 0)
    stage, batch = session.model.stages[0], batches_of(session.run, 1, 0, documents=True)[0]
    block = Stage(0, stage.segments[1:2])
    context = session.model.context(batch, seed=0, step=1, training=True)
    x = torch.randn(*batch.tokens.shape, 16, dtype=torch.float64)
    y = block.forward(0, x, context, batch, split=True)
    block.backward_inputs(0, y, context, batch)
    weights = [p for p in block.units[0].parameters if p.ndim == 2]
    inputs = [t for t in block.stashed_tensors() if t.shape[:2] == x.shape[:2]]
    assert len(inputs) == 2 * stashed
    assert [p.grad is not None for p in weights] == [compiles == "blocks"] * 7
    block.backward_weights(0)
    assert all(p.grad is not None for p in weights) and block.num_in_flight == 0


def test_a_missing_compiler_is_told_before_the_start() -> None:
    run = run_of(LLAMA, compile="regions")
    check_compiler(run, cuda=False, environment={"PATH": "/nowhere"})  # aot_eager needs none
    inductor = replace(run, plan=replace(run.plan, compile_backend="inductor"))
    words = r'plan\.compile = "regions".* no clang-99 on this machine.*plan\.compile_backend = "aot_eager".*"none"'
    with pytest.raises(ConfigError, match=words):
        check_compiler(inductor, cuda=False, environment={"CXX": "clang-99", "PATH": "/nowhere"})
    check_compiler(replace(run, plan=PlanSpec()), cuda=False, environment={"PATH": "/nowhere"})
