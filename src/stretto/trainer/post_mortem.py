"""From exit codes, the failures that ranks wrote and their operation logs to one sentence: what came first."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from stretto.resilience import Lookout, RankFailure, describe
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


def explain(deaths: Sequence[Death], failures: Sequence[RankFailure], lookout: Lookout) -> Verdict:
    """The root cause: an exception, else a signal, else what was noticed."""
    if any("EADDRINUSE" in f.message or "address already in use" in f.message for f in failures):
        return Verdict(text=describe(failures[0]), port_taken=True)
    raised = [f for f in failures if not f.noticed]
    if raised:
        return Verdict(text=describe(raised[0]), users=raised[0].users)
    killed = {death.rank: f"was killed by {_signal(death.code)}" for death in deaths if death.code < 0}
    if killed:
        memory = "; if nobody did that, the machine may have run out of memory"
        by_kernel = any(death.code == -signal.SIGKILL for death in deaths)
        return Verdict(text=lookout.post_mortem(killed) + (memory if by_kernel else ""))
    if failures:
        return Verdict(text=describe(failures[0]))
    first = deaths[0]
    return Verdict(text=f"rank {first.rank} (pid {first.pid}) ended with exit code {first.code} without a message")


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
