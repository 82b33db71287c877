"""Stand-ins for the training loop that fail in every way a rank can."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stretto.spec.errors import CheckpointError
from stretto.spec.run import RunSpec
from stretto.trainer.hooks import Hooks
from stretto.trainer.world import World

STEPS = 6


def _marker(run: RunSpec, name: str) -> Path:
    return Path(run.run.dir) / name


def _step(hooks: Hooks, step: int, seconds: float = 0.05) -> bool:
    """A step that all ranks take together; True if any was asked to stop."""
    hooks.observer.begin(f"0F{step}")
    time.sleep(seconds)
    hooks.observer.end()
    hooks.observer.begin("REDUCE_GRAD")
    wish = torch.tensor(float(hooks.should_stop()))
    dist.all_reduce(wish)
    hooks.observer.end()
    return wish.item() > 0


def train(run: RunSpec, world: World, hooks: Hooks) -> dict[str, Any]:
    """All goes well; the ranks leave a marker each."""
    for step in range(STEPS):
        _step(hooks, step)
    _marker(run, f"done-{world.rank}").write_text(str(world.restarts))
    return {"step": STEPS, "stopped": False}


def raise_on_rank_1(run: RunSpec, world: World, hooks: Hooks) -> dict[str, Any]:
    """Rank 1 raises in step 2, while the others wait for it."""
    for step in range(STEPS):
        if world.rank == 1 and step == 2:
            raise KeyError("the culprit")
        _step(hooks, step)
    return {}


def refuse_checkpoint(run: RunSpec, world: World, hooks: Hooks) -> dict[str, Any]:
    """Every rank meets the same error that the user can repair."""
    _step(hooks, 0)
    raise CheckpointError("checkpoint x can't be used: shard 3 is damaged")


def killed_once(run: RunSpec, world: World, hooks: Hooks) -> dict[str, Any]:
    """The first time, rank 1 is killed as if by the kernel."""
    for step in range(STEPS):
        if world.rank == 1 and world.restarts == 0 and step == 2:
            hooks.observer.begin("2F7", peer=0)
            os.kill(os.getpid(), signal.SIGKILL)
        _step(hooks, step)
    _marker(run, f"done-{world.rank}").write_text(str(world.restarts))
    return {}


def stopped_by_signal(run: RunSpec, world: World, hooks: Hooks) -> dict[str, Any]:
    """Rank ``run.seed`` is frozen in step 2, like a process on a machine that swaps."""
    for step in range(STEPS):
        if world.rank == run.run.seed and step == 2:
            time.sleep(2.0)  # long enough that every rank was heard, also where the machine is busy
            hooks.observer.begin("3F1", peer=1 - world.rank)
            os.kill(os.getpid(), signal.SIGSTOP)
        _step(hooks, step)
    return {}


def hang(run: RunSpec, world: World, hooks: Hooks) -> dict[str, Any]:
    """Rank 1 computes for ever in step 2, its heart beating."""
    for step in range(STEPS):
        if world.rank == 1 and step == 2:
            hooks.observer.begin("1B4")
            time.sleep(600)
        _step(hooks, step)
    return {}


def long_compute(run: RunSpec, world: World, hooks: Hooks) -> dict[str, Any]:
    """One operation of rank 1 takes three times ``silent_seconds``."""
    _step(hooks, 0)
    if world.rank == 1:
        hooks.observer.begin("1F0")
        time.sleep(3 * run.run.silent_seconds)
        hooks.observer.end()
    _step(hooks, 1)
    _marker(run, f"done-{world.rank}").write_text("")
    return {}


def until_asked(run: RunSpec, world: World, hooks: Hooks) -> dict[str, Any]:
    """Steps until asked to stop, then leaves a checkpoint's marker."""
    step = 0
    _marker(run, f"pid-{world.rank}").write_text(str(os.getpid()))
    while not _step(hooks, step):
        step += 1
    _marker(run, f"saved-{world.rank}").write_text(str(step))
    return {"step": step, "stopped": True}
