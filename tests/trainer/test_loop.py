"""The loop of a rank: what it writes, when it stops, and what it goes on from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ranks import Ranks
from stretto.spec.errors import CheckpointError
from stretto.spec.plan import PlanSpec
from stretto.trainer.loop import Loop
from trainer.small import MODEL, small_run, train, write_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    return tmp_path / "run"


def records(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_tied_model_is_saved_from_two_stages_and_goes_on_under_tp(ranks: Ranks, folder: Path) -> None:
    model = replace(MODEL, tied_embeddings=True)
    whole = small_run(folder.with_name("whole"), {"pp": 2}, model=model)
    ranks.run(train, 2, whole)
    run = small_run(folder, {"pp": 2}, model=model)
    (last, _), _ = ranks.run(train, 2, run, 2)
    assert last["stopped"] and last["step"] == 2
    for plan in ({"pp": 2}, {"tp": 2}):
        (last, said), _ = ranks.run(train, 2, replace(run, plan=PlanSpec(**plan)), 1)
        assert any("going on from" in line for line in said) and last["step"] >= 3
    for mine, uninterrupted in zip(records(folder), records(folder.with_name("whole")), strict=True):
        assert mine["loss"] == pytest.approx(uninterrupted["loss"], rel=1e-9)


def test_a_record_says_what_is_known(folder: Path) -> None:
    last, _ = train(0, 1, small_run(folder, eval_every=2, eval_steps=1))
    found = records(folder)
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    # No cluster says what this machine's peak rate is, so the MFU isn't known.
    keys = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_s", "memory_bytes"}
    assert all(set(r) == keys for r in found)
    assert all(r["memory_bytes"] > 0 and 0 < r["tokens"] <= 4 * 32 for r in found)
    assert [r["step"] for r in records(folder, "eval")] == [2, 4]
    assert last["eval_loss"] == records(folder, "eval")[-1]["loss"]


def test_offloading_is_told_with_what_it_took(ranks: Ranks, folder: Path) -> None:
    plan = {"pp": 2, "schedule": "gpipe"}
    ranks.run(train, 2, small_run(folder, {**plan, "offload": True}))
    ranks.run(train, 2, small_run(folder.with_name("without"), plan))
    offloaded, without = records(folder), records(folder.with_name("without"))
    assert [r["loss"] for r in offloaded] == [r["loss"] for r in without]
    assert all(r["host_bytes"] == offloaded[0]["host_bytes"] > 0 for r in offloaded)
    assert all("host_bytes" not in r for r in without)
    assert offloaded[0]["memory_bytes"] < without[0]["memory_bytes"]


def test_documents_with_groups_of_their_own_are_those_of_the_run(ranks: Ranks, folder: Path) -> None:
    plan = {"dp_shard": 2, "context_groups": "dynamic", "context_tokens": 20, "offload": True}
    ranks.run(train, 2, small_run(folder, plan, eval_every=2, eval_steps=1))
    train(0, 1, small_run(folder.with_name("one"), eval_every=2, eval_steps=1))
    for name in ("metrics", "eval"):
        for mine, other in zip(records(folder, name), records(folder.with_name("one"), name), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-9) and mine["tokens"] == other["tokens"]


def test_evaluation_changes_nothing(folder: Path) -> None:
    train(0, 1, small_run(folder, eval_every=1, eval_steps=2))
    train(0, 1, small_run(folder.with_name("without")))
    assert [r["loss"] for r in records(folder)] == [r["loss"] for r in records(folder.with_name("without"))]


def spoil_step_three(loop: Loop) -> None:
    """The loss of step 3 overflows."""
    stage = max(loop._session.model.stages)
    segment = loop._session.model.stages[stage].segments[-1]
    step, run = loop._session.step.run, segment.run
    at: list[int] = []

    def watched(number: int, *args: Any, **kwargs: Any) -> Any:
        at.append(number)
        return step(number, *args, **kwargs)

    def wrong(x: Any, context: Any, batch: Any) -> Any:
        y = run(x, context, batch)
        return y * math.inf if at[-1] == 3 and segment.name == "outputs" else y

    loop._session.step.run = watched  # type: ignore[method-assign]
    segment.run = wrong


@pytest.mark.parametrize("plan", [{}, {"dp_replicate": 2}, {"pp": 2}], ids=str)
def test_a_gradient_that_is_not_finite_is_left_out_and_said(ranks: Ranks, folder: Path, plan: dict[str, int]) -> None:
    run = small_run(folder, plan, steps=3)
    (_, said), *_ = ranks.run(train, run.plan.num_ranks, run, 0, spoil_step_three)
    found = records(folder)
    assert [r.get("skipped") for r in found] == [None, None, True]
    assert any("gradient not finite, update left out" in line for line in said)
    # What is not a number is absent, so that every line is JSON for everybody.
    assert "loss" not in found[2] and "NaN" not in (folder / "metrics.jsonl").read_text()
    # The checkpoint of step 3 holds the weights of step 2.
    (_, _), *_ = ranks.run(train, run.plan.num_ranks, replace(run, training=replace(run.training, steps=4)))
    assert math.isfinite(records(folder)[3]["loss"])


def without_patience(loop: Loop) -> None:
    """Every update is made before it is validated."""
    unbarred = loop._session.unbarred
    assert unbarred is not None
    unbarred.patience = unbarred._calm = 0


def test_without_a_barrier_records_and_checkpoints_are_those_with_one(ranks: Ranks, folder: Path) -> None:
    barred, free = folder.with_name("barred"), folder.with_name("free")
    given = {"steps": 5, "eval_every": 2, "eval_steps": 1, "clip_norm": 2.0}
    ranks.run(train, 2, small_run(barred, {"pp": 2}, **given))
    run = small_run(free, {"pp": 2, "optimizer_barrier": False}, **given)
    # A wish to stop is known when its step is validated, in the next one.
    (last, _), _ = ranks.run(train, 2, run, 3, without_patience)
    assert last["stopped"] and last["step"] == 4
    (last, said), _ = ranks.run(train, 2, run, 0, without_patience)
    assert any("step 4" in line for line in said) and last["step"] == 5
    for name in ("metrics", "eval"):
        for mine, theirs in zip(records(free, name), records(barred, name), strict=True):
            assert mine.keys() == theirs.keys()
            same = {"step", "loss", "tokens", "lr", "grad_norm"} & mine.keys()
            assert all(mine[key] == pytest.approx(theirs[key], rel=1e-9) for key in same)
    assert [r["step"] for r in records(free)] == [1, 2, 3, 4, 5] and all(r["step_s"] > 0 for r in records(free))


def test_an_asynchronous_run_says_what_it_is_and_goes_on_bitwise(ranks: Ranks, folder: Path) -> None:
    plan = {"pp": 2, "asynchronous": "predict-spike"}
    given = {"optimizer": "sgd", "clip_norm": 0.0, "learning_rate": 0.05}
    whole = small_run(folder.with_name("whole"), plan, **given)
    (_, said), _ = ranks.run(train, 2, whole)
    assert any('asynchronous = "predict-spike": this is not the training of one rank' in line for line in said)
    run = small_run(folder, plan, **given)
    ranks.run(train, 2, run, 2)
    ranks.run(train, 2, run)
    assert [r["loss"] for r in records(folder)] == [r["loss"] for r in records(folder.with_name("whole"))]
    with pytest.raises(CheckpointError, match="holds what sgd keeps, here training"):
        train(0, 1, replace(run, plan=PlanSpec(), training=replace(run.training, optimizer="adamw")))
    # No gradient of a whole step exists, so its norm is not known.
    assert all("grad_norm" not in r and r["tokens"] > 0 for r in records(folder))
    with pytest.raises(AssertionError, match="isn't finite, and updates after every micro-batch"):
        ranks.run(train, 2, small_run(folder.with_name("wild"), plan, **{**given, "learning_rate": 1e6}))


def test_nothing_to_do_is_said(folder: Path) -> None:
    run = small_run(folder, steps=2)
    train(0, 1, run)
    last, said = train(0, 1, run)
    assert last == {"step": 2, "stopped": False} and any("nothing to do" in line for line in said)


def test_bitwise_the_same_after_a_stop(folder: Path) -> None:
    whole, halved = small_run(folder.with_name("whole")), small_run(folder)
    train(0, 1, whole)
    train(0, 1, halved, 2)
    train(0, 1, halved)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records(folder)] == [r[key] for r in records(folder.with_name("whole"))]


FROZEN = """
import torch
from torch import nn
from stretto.models.foreign import ForeignStack

class Layer(nn.Module):
    def __init__(self, trained):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.requires_grad_(trained)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))

def build(spec):
    torch.manual_seed(1)
    embed = nn.Embedding(spec.vocab_size, 16)
    embed.weight.requires_grad_(False)
    blocks = [Layer(trained) for trained in (False, True)]
    return ForeignStack(embed=embed, blocks=blocks, head=nn.Linear(16, spec.vocab_size), tensor_rules={})
"""


@pytest.mark.parametrize("plan", [{}, {"pp": 2}], ids=str)
def test_a_model_with_a_frozen_beginning_goes_on_bitwise(ranks: Ranks, folder: Path, plan: dict[str, int]) -> None:
    # Rank 0 trains nothing, so its optimizer never counts a step; bias correction must go on all the same.
    module = folder.with_name("frozen_beginning.py")
    module.write_text(FROZEN)
    model = replace(MODEL, family="foreign", module=f"{module}:build")
    whole, halved = (small_run(d, plan, model=model) for d in (folder.with_name("whole"), folder))
    ranks.run(train, whole.plan.num_ranks, whole)
    ranks.run(train, halved.plan.num_ranks, halved, 2)
    ranks.run(train, halved.plan.num_ranks, halved)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records(folder)] == [r[key] for r in records(folder.with_name("whole"))]
