"""From exit codes, the failures that ranks wrote and their operation logs to one sentence: what came first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stretto.resilience import RankFailure, describe, log_path, read_log
from stretto.spec.errors import StrettoError


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """How a process ended that should not have."""

    rank: int
    """Which."""
    pid: int
    """Its process id."""
    code: int
    """Exit code; negative: by that signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How an attempt ended."""

    code: int | None = None
    """Exit code of the run, if the attempt did not fail."""
    text: str = ""
    """Why it failed."""
    users: type[StrettoError] | None = None
    """The error's class, if it is one that a user can repair: trying again would not help."""
    port_taken: bool = False
    """Whether another program took the port in the moment before it was used."""


def explain(deaths: Sequence[Death], failures: Sequence[RankFailure], run_dir: Path) -> Verdict:
    """The root cause: an exception, else a signal, else what the watchdog found, else what was noticed."""
    if any("EADDRINUSE" in f.message or "address already in use" in f.message for f in failures):
        return Verdict(text=describe(failures[0]), port_taken=True)
    raised = [f for f in failures if not f.noticed and f.kind != "Watchdog"]
    if raised:
        return Verdict(text=describe(raised[0]), users=raised[0].users)
    killed = [death for death in deaths if death.code < 0]
    if killed:
        return Verdict(text=_killed(killed[0], run_dir))
    if failures:
        return Verdict(text=describe(failures[0]))
    first = deaths[0]
    return Verdict(text=f"rank {first.rank} (pid {first.pid}) ended with exit code {first.code} without a message")


def _killed(death: Death, run_dir: Path) -> str:
    try:
        name = signal.Signals(-death.code).name
    except ValueError:
        name = f"signal {-death.code}"
    text = f"rank {death.rank} (pid {death.pid}) was killed by {name}"
    with contextlib.suppress(OSError, ValueError):
        log = read_log(log_path(run_dir / "oplog", death.rank))
        if log.pid == death.pid and log.current is not None:
            text += f" in {log.current.name}"
            text += f", waiting for rank {log.current.peer}" if log.current.peer is not None else ""
    if name == "SIGKILL":
        text += "; if nobody did that, the machine may have run out of memory"
    return text
