"""A run stopped under one plan goes on under any other as if nothing had happened.

Float64; the curve is compared with the uninterrupted one within 1e-9 (another plan adds in another order),
and bitwise where the plan stays the same.  Which samples a step read is recorded on every rank.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ranks import RankFailure, Ranks
from stretto.spec.data import DataSpec
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.hooks import Hooks
from stretto.trainer.loop import Loop
from stretto.trainer.world import World

STEPS, STOP = 6, 3
MODEL = ModelSpec(
    vocab_size=260,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    dropout=0.1,
    attention=("softmax", "linear", "softmax", "delta"),
)
PLANS: dict[str, dict[str, Any]] = {
    "pp2-dp2": {"pp": 2, "dp_replicate": 2},
    "tp2": {"tp": 2},
    "dp_shard4": {"dp_shard": 4, "zero": 3, "micro_batch_size": 2},
    "one": {},
    "zero1": {"dp_shard": 2, "pp": 2},
    "both-ways": {"pp": 2, "schedule": "chimera", "dp_shard": 2, "zero": 3},
    "folded": {"pp": 2, "schedule": "zb-v", "chunks": 2},
    "vocabulary": {"pp": 4, "passes": ("vocabulary:algorithm=2",)},
    "cp2-shard2": {"cp": 2, "dp_shard": 2, "zero": 3},
    "factors": {"dp_replicate": 2, "dp_shard": 2, "shard_parameters": 2, "shard_gradients": 2, "shard_optimizer": 4},
}


class Deaf:
    """An observer that hears nothing."""

    def begin(self, operation: str, /, *, peer: int | None = None) -> None: ...

    def end(self) -> None: ...


def run_of(folder: Path, plan: str, *, corpus: Path, **training: Any) -> RunSpec:
    return RunSpec(
        run=RunSettings(dir=str(folder), seed=3),
        model=MODEL,
        plan=PlanSpec(**PLANS[plan]),
        training=TrainingSpec(
            steps=STEPS,
            global_batch_size=8,
            sequence_length=32,
            dtype="float64",
            learning_rate=0.01,
            schedule="cosine",
            warmup_steps=2,
            **training,
        ),
        data=DataSpec(path=str(corpus), validation_fraction=0.2),
    )


def train(rank: int, world: int, run: RunSpec, stop_after: int) -> list[list[int]]:
    """Train until the end or ``stop_after``; return the samples that this rank read, by step."""
    read: list[list[int]] = []

    def should_stop() -> bool:
        return len(read) >= stop_after

    loop = Loop(
        run,
        World(rank=rank, world_size=world),
        Hooks(observer=Deaf(), should_stop=should_stop, say=lambda line: None),
    )
    inner = loop._train.step

    def step(number: int) -> Any:
        batches = inner(number)
        read.append([int(s) for batch in batches for s in batch.samples])
        return batches

    loop._train.step = step  # type: ignore[method-assign]
    try:
        loop.run()
    finally:
        loop.close()
    return read


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        text = "\n".join(
            f"line {i} of document {number}: {i * number % 97} {'x' * (i % 7)}" for i in range(number % 9 + 3)
        )
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(ranks: Ranks, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    run = run_of(folder, "pp2-dp2", corpus=corpus, eval_every=3, eval_steps=1)
    ranks.run(train, 4, run, STEPS + 1)
    evals = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evals] == [3, 6] and evals[1]["loss"] < evals[0]["loss"]
    return records(folder)


@pytest.mark.parametrize(
    ("begun", "plan"),
    [*(("pp2-dp2", plan) for plan in PLANS), ("both-ways", "one"), ("factors", "tp2"), ("vocabulary", "tp2")],
)
def test_goes_on_under_any_plan(
    ranks: Ranks, corpus: Path, tmp_path: Path, begun: str, plan: str, uninterrupted: list[dict[str, Any]]
) -> None:
    first = run_of(tmp_path, begun, corpus=corpus)
    before = ranks.run(train, 4, first, STOP)
    # Records of steps after the checkpoint, as a run that died later leaves them, must vanish.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    second = run_of(tmp_path, plan, corpus=corpus)
    after = ranks.run(train, second.plan.num_ranks, second, STEPS + 1)

    found = records(tmp_path)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    for mine, whole in zip(found, uninterrupted, strict=True):
        for key in ("loss", "grad_norm"):
            exact = plan == "pp2-dp2"
            assert mine[key] == whole[key] if exact else abs(mine[key] - whole[key]) <= 1e-9 * abs(whole[key])
        assert (mine["tokens"], mine["lr"]) == (whole["tokens"], whole["lr"])
    assert samples_of(before, first) + samples_of(after, second) == [
        list(range(8 * s, 8 * s + 8)) for s in range(STEPS)
    ]


def samples_of(read: list[list[list[int]]], run: RunSpec) -> list[list[int]]:
    """Samples by step over all data-parallel ranks; ranks that share data must have read the same."""
    plan = run.plan
    by_dp: dict[int, list[list[int]]] = {}
    for rank, steps in enumerate(read):
        assert by_dp.setdefault(rank // (plan.tp * plan.cp) % plan.dp, steps) == steps
    return [sorted(s for dp in by_dp.values() for s in dp[step]) for step in range(len(read[0]))]


def test_another_model_is_refused_by_name(ranks: Ranks, corpus: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, "one", corpus=corpus)
    ranks.run(train, 1, run, 1)
    wider = replace(run, model=replace(MODEL, intermediate_size=64))
    with pytest.raises(RankFailure, match="intermediate_size is 48 there and 64 here"):
        ranks.run(train, 1, wider, 1)
    ranks.run(train, 1, replace(wider, run=replace(run.run, dir=str(tmp_path / "other"))), 1)
