"""A run over clips gives the loss, gradients and weights of one plain rank, however clips are cut (DSP) and shared.

Clips come through the loader, with the noise and times of a run; frames and patches are uneven over 2 and 4 ranks.
Tolerance 1e-9, for the reasons of ``test_plans``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equivalence.plan_run import batches_of, train_plan
from equivalence.reference import Record, assert_same_training, train_reference
from ranks import Ranks
from stretto.data.clips import wave
from stretto.parallel.sequence.switch import CutSwitch, switch_bytes
from stretto.parallel.wire import Wire
from stretto.spec.data import DataSpec
from stretto.spec.model import ModelSpec, VideoSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.loop import train_rank
from stretto.trainer.session import Session
from stretto.trainer.world import World

CLIP = VideoSpec(frames=7, patches=9, channels=4)
MODEL = ModelSpec(
    family="video", hidden_size=16, intermediate_size=24, num_layers=4, num_heads=4, initial_std=0.2, video=CLIP
)
TRAINING = TrainingSpec(
    steps=4, global_batch_size=4, sequence_length=CLIP.tokens, dtype="float64", learning_rate=0.01, clip_norm=0.5
)
STEPS = 2
SWITCHED = PlanSpec(cp=2, context="switch")
PLANS = (
    PlanSpec(cp=4, context="switch", micro_batch_size=2),
    replace(SWITCHED, dp_shard=2, zero=3),
    replace(SWITCHED, dp_replicate=2, zero=2, recompute="full"),
    PlanSpec(pp=2, schedule="hanayo", chunks=2, offload=True),
    replace(SWITCHED, pp=2, schedule="zb-h1"),
)


def run_of(plan: PlanSpec) -> RunSpec:
    return RunSpec(run=RunSettings(seed=7), model=MODEL, plan=plan, training=TRAINING)


@cache
def reference() -> Record:
    return train_reference(run_of(PlanSpec()), STEPS)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"cp{plan.cp}-dp{plan.dp}-zero{plan.zero}-{plan.recompute}")
def test_every_plan_is_one_rank(ranks: Ranks, plan: PlanSpec) -> None:
    assert_same_training(train_plan(ranks, run_of(plan), STEPS), reference(), tolerance=1e-9)


def sent(rank: int, world: int, run: RunSpec) -> int:
    """Bytes that a rank sends for its clips in a step."""
    session = Session.start(run, rank)
    session.train_step(1, batches_of(run, 1, session.mesh.dp_index, documents=False))
    switches = [module.switch for module in session.model.stack.blocks]
    assert all(isinstance(switch, CutSwitch) for switch in switches)
    found: int = switches[0].wire.sent
    return found


def test_bytes_are_the_closed_form(ranks: Ranks) -> None:
    run = run_of(PLANS[0])
    switch = CutSwitch(wire=Wire(None), ranks=4)
    frames, patches = switch.parts(CLIP.frames), switch.parts(CLIP.patches)
    for rank, found in enumerate(ranks.run(sent, 4, run)):
        token = TRAINING.global_batch_size * MODEL.hidden_size * 8
        there = switch_bytes((frames, patches), rank, token_bytes=token)
        back = switch_bytes((patches, frames), rank, token_bytes=token)
        # Each of four layers moves the cut to the patches, each but the first begins by moving it back; backward too.
        assert found == 7 * (there + back)


def loop(rank: int, world: int, run: RunSpec) -> None:
    train_rank(run, World(rank=rank, world_size=world))


def test_goes_on_under_another_plan_from_files(ranks: Ranks, tmp_path: Path) -> None:
    clips = np.stack([wave(number, CLIP) for number in range(12)])
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "a.npy", clips[:7].astype(np.float16))
    np.save(tmp_path / "clips" / "b.npy", clips[7:])

    def run(name: str, plan: PlanSpec, **training: Any) -> RunSpec:
        return replace(
            run_of(plan),
            run=RunSettings(dir=str(tmp_path / name), seed=3),
            training=replace(TRAINING, eval_every=2, eval_steps=1, **training),
            data=DataSpec(path=str(tmp_path / "clips"), validation_fraction=0.3),
        )

    train_rank(run("whole", PlanSpec()), World())
    ranks.run(loop, 2, run("parts", SWITCHED, steps=2))
    ranks.run(loop, 2, run("parts", PlanSpec(dp_shard=2, zero=3)))
    for file, keys in (("metrics.jsonl", ("step", "tokens", "loss", "grad_norm")), ("eval.jsonl", ("step", "loss"))):
        whole, parts = (
            [json.loads(line) for line in (tmp_path / name / file).read_text().splitlines()]
            for name in ("whole", "parts")
        )
        for one, other in zip(whole, parts, strict=True):
            assert [other[key] for key in keys] == pytest.approx([one[key] for key in keys], rel=1e-9), file
