"""A run of a few steps for tests of the trainer: a small model, a corpus of a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from stretto.spec.contract import Silent
from stretto.spec.data import DataSpec
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSettings, RunSpec
from stretto.spec.training import TrainingSpec
from stretto.trainer.hooks import Hooks
from stretto.trainer.loop import Loop
from stretto.trainer.world import World

MODEL = ModelSpec(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64
)
TRAINING = TrainingSpec(steps=4, global_batch_size=4, sequence_length=32, dtype="float64", learning_rate=0.01)


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(f"{i * number % 13} and {i}." for i in range(number + 4)))
    return folder


def small_run(folder: Path, plan: dict[str, Any] | None = None, **given: Any) -> RunSpec:
    """A run in ``folder`` beside its corpus; ``given``: fields of TrainingSpec, or ``model``."""
    model = given.pop("model", MODEL)
    return RunSpec(
        run=RunSettings(dir=str(folder), seed=3, device="cpu"),
        model=model,
        plan=PlanSpec(**(plan or {})),
        training=replace(TRAINING, **given),
        data=DataSpec(path=str(folder.parent / "corpus"), validation_fraction=0.2),
    )


def train(
    rank: int, world: int, run: RunSpec, stop_after: int = 0, change: Callable[[Loop], None] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Train on one rank; ``stop_after`` steps it asks to stop, ``change`` may spoil the loop first.

    Returns the last record and the lines said.
    """
    said: list[str] = []
    steps: list[int] = []

    def should_stop() -> bool:
        steps.append(1)
        return len(steps) == stop_after

    loop = Loop(
        run,
        World(rank=rank, world_size=world, local_rank=rank),
        Hooks(observer=Silent(), should_stop=should_stop, say=said.append),
    )
    if change is not None:
        change(loop)
    try:
        return loop.run(), said
    finally:
        loop.close()
