"""Starting a run: checked and its data prepared first, then as the ranks that there are.

                 ┌─ torchrun, Slurm, Kubernetes started us ──► join them            (member.py)
run_training ────┼─ one rank, no restarts ──────────────────► train in this process (member.py)
                 └─ else ───────────────────────────────────► start local processes (local.py)
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path

from stretto.planner.remedy import refuse_unfit
from stretto.resilience import StopRequest
from stretto.spec import toml
from stretto.spec.check import check
from stretto.spec.run import RunSpec
from stretto.trainer.compiling import check_compiler
from stretto.trainer.corpus import prepare_corpus
from stretto.trainer.local import run_local
from stretto.trainer.member import CONNECTIONS, STOPPED, Train, train_as_member
from stretto.trainer.placement import Membership, find_membership
from stretto.trainer.progress_bar import ProgressBar
from stretto.trainer.schedules import schedules_of, searched
from stretto.trainer.world import World

ENTRY = "stretto.trainer.loop:train_rank"
"""What a rank runs, as ``module:function``."""


def run_training(run: RunSpec, *, run_file: Path | None = None, entry: str = ENTRY) -> int:
    """Train ``run``; returns 0 when all its steps are done, STOPPED (143) if it was asked to stop before.

    Args:
        run_file: where the run was read from, for messages.
        entry: ``module:function`` with the signature of ``loop.train_rank``.

    Raises:
        ConfigError, DataError, CheckpointError: what a user can repair, with one sentence.
        RankError: a rank raised, died or fell silent, and no restarts were left; names the root cause.
    """
    membership = find_membership(os.environ)
    if membership is not None:
        os.environ.setdefault(*CONNECTIONS)
    check(run, world_size=membership.world.world_size if membership else None)
    check_compiler(run, cuda=_on_cuda(run))
    if _knows_memory(run):
        refuse_unfit(run)
    if membership is None:
        run = searched(run)
    if run.plan.schedule != "auto" or run.plan.schedule_file is not None:
        schedules_of(run)  # built and proved before any process starts; joined processes search together
    if membership:
        return _join(run, membership, load_entry(entry))
    _say_plan(run, run_file)
    _prepare_data(run)
    toml.save(run, Path(run.run.dir) / "run.toml")
    if run.plan.num_ranks == 1 and run.run.max_restarts == 0:
        return _train_here(run, load_entry(entry))
    return run_local(run, entry=entry)


def _knows_memory(run: RunSpec) -> bool:
    """Whether ``[cluster]`` says whose memory it is: a CPU's says nothing of the devices that a run then uses."""
    return not _on_cuda(run) or run.cluster.name.partition(":")[0] != "local-cpu"


def _on_cuda(run: RunSpec) -> bool:
    """Whether the run's ranks compute on CUDA devices."""
    if run.run.device == "cpu":
        return False
    import torch  # takes longer than all else that is done before the ranks start

    return torch.cuda.is_available()


def load_entry(entry: str) -> Train:
    """The function that ``module:function`` names."""
    module, _, function = entry.partition(":")
    found: Train = getattr(importlib.import_module(module), function)
    return found


def _train_here(run: RunSpec, train: Train) -> int:
    import signal
    import threading

    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        return _code(train_as_member(run, Membership(world=World()), train, stop=stop))
    with stop.listening(signal.SIGINT):
        return _code(train_as_member(run, Membership(world=World()), train, stop=stop))


def _join(run: RunSpec, membership: Membership, train: Train) -> int:
    from torch.distributed.elastic.multiprocessing.errors import record

    if membership.world.rank == 0:
        toml.save(run, Path(run.run.dir) / "run.toml")
    stop = StopRequest()
    with stop.listening():
        # record: torchrun's own report shows our exception, too
        result = record(lambda: train_as_member(run, membership, train, stop=stop))()
        return _code(result or {})


def _code(result: Mapping[str, object]) -> int:
    return STOPPED if result.get("stopped") else 0


def _say_plan(run: RunSpec, run_file: Path | None) -> None:
    degrees = {axis: getattr(run.plan, axis) for axis in ("pp", "tp", "cp", "ep", "dp_replicate", "dp_shard")}
    product = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1)
    ranks = f"{run.plan.num_ranks} ranks ({product})" if product else "1 rank"
    print(f"{run_file or 'run'}: {ranks}, in {run.run.dir}", flush=True)
    if run.plan.schedule == "skip-pipe":
        print("skip-pipe: micro-batches leave out layers, so losses differ from those of other schedules", flush=True)


def _prepare_data(run: RunSpec) -> None:
    with ProgressBar() as progress:
        corpus = prepare_corpus(run, progress)
    print(f"corpus: {corpus.describe()}", flush=True)
    _check_checkpoint(run, corpus.encoding)


def _check_checkpoint(run: RunSpec, tokenizer: str) -> None:
    """Refuse a checkpoint that doesn't fit before any process starts."""
    from stretto.trainer.fitting import check_fits, checkpoint_folder, find_checkpoint

    if run.checkpoint.resume == "auto" and not checkpoint_folder(run).exists():
        return
    path = find_checkpoint(run)
    if path is not None:
        from stretto.checkpoint import read_state, verify

        verify(path)
        check_fits(run, read_state(path), path, tokenizer=tokenizer)
