"""The ranks of a run as processes of this machine: started, watched, ended, started again.

    launcher ──┬── rank 0   standard output to the terminal
               ├── rank 1   errors of all to the terminal
               └── ...
                     │ one dies ──► the others are ended, the root cause is told,
                     │              and all start again from the last checkpoint
    SIGTERM/SIGINT ──► passed on: a checkpoint at the next step, then the end

No process is left behind: the launcher ends its ranks by id in every case, and ranks die with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stretto.resilience import FirstErrors, Lookout, StopRequest
from stretto.spec.errors import ConfigError, RankError
from stretto.spec.run import RunSpec
from stretto.trainer.member import CONNECTIONS, STOPPED
from stretto.trainer.post_mortem import Death, Verdict, explain
from stretto.trainer.worker import Assignment

_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 1.0
"""After the first death, how long the others get to say what happened to them."""
_PORT_TRIES = 3


@dataclass(slots=True)
class LocalRanks:
    """The processes of one attempt."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, run: RunSpec, assignment: Assignment, restarts: int) -> None:
        """Start all ranks."""
        command = [sys.executable, "-m", "stretto.trainer.worker", assignment.text()]
        port = _free_port()
        for rank in range(run.plan.num_ranks):
            self.processes.append(
                subprocess.Popen(
                    command,
                    env=_environment(rank, run.plan.num_ranks, port, restarts),
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
                )
            )

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended; negative: by that signal."""
        found = {rank: process.poll() for rank, process in enumerate(self.processes)}
        return {rank: code for rank, code in found.items() if code is not None}

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to every rank that is alive."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def end(self) -> None:
        """Kill what is alive, stopped processes included, and collect it."""
        self.tell(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def run_local(run: RunSpec, *, entry: str) -> int:
    """Train ``run`` on local processes; returns 0, or STOPPED if it was asked to stop.

    Raises a user's error as it is, and RankError when a rank failed and no restart is left.
    """
    folder, started, restarts, tries = Path(run.run.dir), time.time(), 0, _PORT_TRIES
    stop = StopRequest()
    with _only_one(folder), _listening(stop):
        while True:
            resume = _resume_of_restart(run, started) if restarts else None
            verdict = _attempt(run, entry, stop, restarts=restarts, resume=resume)
            if verdict.code is not None:
                return verdict.code
            if verdict.users is not None:
                raise verdict.users(verdict.text)
            if verdict.port_taken and tries > 0:
                tries -= 1
                continue
            if restarts == run.run.max_restarts or stop():
                raise RankError(verdict.text + (f" (after {restarts} restarts)" if restarts else ""))
            restarts += 1
            _say(f"{verdict.text}\nstarting again from the last checkpoint ({restarts} of {run.run.max_restarts})")


def _attempt(run: RunSpec, entry: str, stop: StopRequest, *, restarts: int, resume: str | None) -> Verdict:
    folder, attempt = Path(run.run.dir), f"{os.getpid()}-{secrets.token_hex(4)}"
    errors, ranks = FirstErrors(folder, attempt), LocalRanks()
    assignment = Assignment(
        run_file=str(folder / "run.toml"), entry=entry, parent=os.getpid(), attempt=attempt, resume=resume
    )
    try:
        ranks.start(run, assignment, restarts)
        pids = [process.pid for process in ranks.processes]
        lookout = Lookout(run.run, dict(enumerate(pids)))
        codes, verdict = _wait(ranks, stop, lookout, grace_seconds=run.run.hang_seconds)
    finally:
        ranks.end()
    if verdict is not None:
        return Verdict(text=verdict)
    if all(code in (0, STOPPED) for code in codes.values()) and len(codes) == len(pids):
        errors.clear()
        return Verdict(code=STOPPED if STOPPED in codes.values() else 0)
    if stop() and -int(signal.SIGTERM) in codes.values():  # asked to stop before it could listen
        return Verdict(code=STOPPED)
    deaths = [Death(rank=r, pid=pids[r], code=c) for r, c in codes.items() if c not in (0, STOPPED)]
    return explain(deaths, errors.read(), lookout)


def _wait(
    ranks: LocalRanks, stop: StopRequest, lookout: Lookout, *, grace_seconds: float
) -> tuple[dict[int, int], str | None]:
    """Until all have ended, one has failed or one is ill; returns the exit codes that were not of our making, and
    what is wrong where a rank is ill."""
    told_at = None
    while True:
        codes = ranks.codes()
        if len(codes) == len(ranks.processes):
            return codes, None
        if any(code not in (0, STOPPED) for code in codes.values()):
            return _settle(ranks), None
        if (verdict := lookout.look(codes)) is not None:
            return codes, verdict
        if stop() and told_at is None:
            told_at = time.monotonic()
            _say("stopping: a checkpoint is written at the end of this step (again to stop at once)")
            ranks.tell(signal.SIGTERM)
        if told_at is not None and time.monotonic() - told_at > grace_seconds:
            raise RankError(
                f"the ranks did not reach the end of a step within {grace_seconds:.0f} s of being asked to stop "
                "(run.hang_seconds); they were ended without a checkpoint of it"
            )
        time.sleep(_POLL_SECONDS)


def _settle(ranks: LocalRanks) -> dict[int, int]:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline and len(ranks.codes()) < len(ranks.processes):
        time.sleep(_POLL_SECONDS)
    return ranks.codes()


def _resume_of_restart(run: RunSpec, started: float) -> str | None:
    """Where a restart goes on: what this launch wrote last, whatever ``checkpoint.resume`` said at first."""
    if run.checkpoint.resume == "auto":
        return None
    from stretto.checkpoint import latest
    from stretto.checkpoint.manifest import FILE_NAME

    newest = latest(Path(run.checkpoint.dir) if run.checkpoint.dir else Path(run.run.dir) / "checkpoints")
    if newest is None or (newest / FILE_NAME).stat().st_mtime < started:
        return None
    return str(newest)


def _environment(rank: int, size: int, port: int, restarts: int) -> dict[str, str]:
    given = dict(os.environ)
    given.setdefault("OMP_NUM_THREADS", "1")
    given.setdefault(*CONNECTIONS)
    given.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each rank prints stack traces when another has died
    given.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    return given | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the run's directory; two runs in one would mix their files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run is at work in {folder}; wait for it or set run.dir.") from None
        yield


@contextlib.contextmanager
def _listening(stop: StopRequest) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, which is not ours
        return
    with stop.listening(signal.SIGINT):
        yield


def _say(text: str) -> None:
    print(f"stretto: {text}", file=sys.stderr, flush=True)
