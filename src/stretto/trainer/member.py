"""The life of one rank: join the others, train under a watchdog, leave cleanly or say why not."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stretto.resilience import (
    EXIT_CODE,
    Drill,
    FirstErrors,
    Heart,
    OpLog,
    RankFailure,
    StopRequest,
    Watchdog,
    answer,
    connect,
    describe,
    place_of_error,
)
from stretto.resilience.lookout import GONE
from stretto.spec.contract import Observer
from stretto.spec.drill import faults_of
from stretto.spec.errors import RankError
from stretto.spec.run import RunSpec
from stretto.trainer.placement import Membership, device_of
from stretto.trainer.world import World, collective_limit

if TYPE_CHECKING:
    from stretto.trainer.hooks import Hooks

STOPPED = 128 + int(signal.SIGTERM)
"""Exit code of a run that was asked to stop and wrote its checkpoint: not finished, so not 0."""
CONNECTIONS = ("CUDA_DEVICE_MAX_CONNECTIONS", "32")
"""What each rank's environment has unless it says otherwise, before the driver starts (pipeline/transport.py)."""
_JOIN_SECONDS = 600.0


class Train(Protocol):
    """What a rank runs: ``loop.train_rank``, or a stand-in of the tests."""

    def __call__(self, run: RunSpec, world: World, hooks: Hooks, /) -> Mapping[str, Any]:
        """Train as one rank; the result has ``stopped`` True where the run was asked to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vital:
    """What tells others how a rank is."""

    log: OpLog
    """Its file."""
    observer: Observer
    """Writes there what the rank does, and suffers the drill, if there is one."""
    heart: Heart
    """Beats there."""

    @classmethod
    def start(cls, run: RunSpec, world: World) -> Vital:
        """Start the file and the heart of this process."""
        log = OpLog(Path(run.run.dir) / "oplog", world.rank)
        answer(log.path)
        heart = Heart(log, silent_seconds=run.run.silent_seconds)
        heart.start()
        drilled = run.run.drill and not world.restarts
        observer = Drill(log, faults_of(run.run.drill), world.rank) if drilled else log
        return cls(log=log, observer=observer, heart=heart)


def train_as_member(
    run: RunSpec, membership: Membership, train: Train, *, stop: StopRequest, vital: Vital | None = None
) -> Mapping[str, Any]:
    """Be one of the ranks of ``run`` until it is done; returns what ``train`` returns.

    ``vital`` is there where the process started it before.

    Raises what ``train`` raises if it is a user's error, else RankError with rank and traceback; where
    this rank merely noticed the failure of another, SystemExit without a word.  Either way the failure is
    written to the run's directory first.
    """
    from stretto.trainer.hooks import Hooks

    world, errors = membership.world, FirstErrors(Path(run.run.dir), membership.attempt)
    vital = vital or Vital.start(run, world)
    observer = vital.observer
    hooks = Hooks(observer=observer, should_stop=stop, say=_say, pipeline=vital.log.meet)
    if world.world_size == 1:
        vital.heart.stop()
        return train(run, world, hooks)
    watchdog = None if membership.supervised else _watchdog(run, membership, vital.log, errors)
    try:
        if watchdog is not None:
            watchdog.start()
        observer.begin("JOIN")
        with _process_group(run, membership):
            observer.end()
            result = train(run, world, hooks)
            observer.begin("LEAVE")
            _meet()
            if watchdog is not None:
                watchdog.leave()
            vital.log.begin(GONE)
        return result
    except BaseException as error:
        failure = leave_word(error, run, membership, vital)
        if watchdog is not None and not failure.noticed:
            watchdog.fail(describe(failure))
        _raise(failure, error, membership, errors)
        raise AssertionError from error


def leave_word(error: BaseException, run: RunSpec, membership: Membership, vital: Vital) -> RankFailure:
    """Write into the run's directory how this rank failed."""
    vital.heart.stop()
    vital.log.beat(place_of_error(error))
    running = vital.log.current
    doing = running.name if running else ""
    failure = RankFailure.of(membership.world.rank, error, doing=doing, step=vital.log.step)
    written = FirstErrors(Path(run.run.dir), membership.attempt).write(failure)
    if not written and membership.supervised:  # the launcher will find nothing to show
        _complain(describe(failure))
    return failure


def _watchdog(run: RunSpec, membership: Membership, log: OpLog, errors: FirstErrors) -> Watchdog:
    """What watches the ranks where no launcher of ours does."""
    world = membership.world
    return Watchdog(
        rank=world.rank,
        world_size=world.world_size,
        log=log,
        settings=run.run,
        open_store=connect(membership.address, membership.port, restarts=world.restarts),
        on_verdict=_ender(membership, errors),
    )


def _raise(failure: RankFailure, error: BaseException, membership: Membership, errors: FirstErrors) -> None:
    if membership.supervised or failure.users or not isinstance(error, Exception):
        said_elsewhere = failure.users and not membership.supervised and not errors.claim(failure.message)
        raise SystemExit(2) if said_elsewhere else error
    if failure.noticed:
        raise SystemExit(1) from error
    raise RankError(describe(failure)) from error


def _ender(membership: Membership, errors: FirstErrors) -> Callable[[str], None]:
    def end(verdict: str) -> None:
        written = errors.write(RankFailure.watched(membership.world.rank, verdict))
        if (not membership.supervised or not written) and errors.claim(verdict):
            _complain(verdict)
        os._exit(EXIT_CODE)

    return end


@contextmanager
def _process_group(run: RunSpec, membership: Membership) -> Iterator[None]:
    """torch.distributed over all ranks: nccl where devices are used, else gloo."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    world, device = membership.world, device_of(run, membership.world.local_rank)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    os.environ.update(MASTER_ADDR=membership.address, MASTER_PORT=str(membership.port))
    joined = timedelta(seconds=_JOIN_SECONDS)
    store, _, _ = next(iter(rendezvous("env://", world.rank, world.world_size, timeout=joined)))
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.world_size,
        timeout=collective_limit(run),
        device_id=device if on_cuda else None,
    )
    yield
    # Only after success: with a failed peer it may wait for messages that never come.
    dist.destroy_process_group()


def _meet() -> None:
    """Wait for all ranks: who leaves first would abort the messages of those still at work."""
    import torch.distributed as dist

    dist.barrier()


def _say(line: str) -> None:
    print(line, flush=True)


def _complain(text: str) -> None:
    print(f"stretto: error: {text}", file=sys.stderr, flush=True)
