"""Asks a process of this machine where it is, even one that is frozen or whose interpreter is stuck.

    in the rank       faulthandler writes the stacks into rank-<n>.stack when SIGUSR2 comes; that is done in C and
                      needs no interpreter
    who wants to know SIGUSR2; to a process stopped by SIGSTOP also SIGCONT, and SIGSTOP again.  The main thread is to
                      take it, before it does anything else; another would while that one goes on

It is asked once the run has to end anyway, so that a process that goes on for a moment does no harm.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

from stretto.resilience.place import Place, lines_in, place_of

_PATIENCE_SECONDS = 0.5
_SETTLED_SECONDS = 0.005


def stack_path(log: Path) -> Path:
    """Where the rank with that operation log writes its stack."""
    return log.with_name(f"{log.name}.stack")


def answer(log: Path) -> None:
    """From now on this process says where its main thread is when it is asked."""
    if sys.platform != "win32":
        file = stack_path(log).open("w")
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True, chain=False)


def ask(pid: int, log: Path) -> Place | None:
    """Where the main thread of process ``pid``, whose log is ``log``, is; None where it can't say.

    Raises nothing: a process that is gone, or another one that got its id meanwhile, isn't touched.
    """
    path = stack_path(log)
    with contextlib.suppress(OSError):
        if not _is_that(pid, log):
            return None
        before = path.stat().st_size
        stopped = _is_stopped(pid)
        _poke_main_thread(pid)
        if stopped:
            os.kill(pid, signal.SIGCONT)
        dump = _written(path, before)
        if stopped:
            os.kill(pid, signal.SIGSTOP)  # its run is over; it must not go on
        lines = lines_in(dump)
        return place_of(lines) if lines else None
    return None


def end_stopped(pid: int, log: Path) -> None:
    """SIGKILL to process ``pid``, whose log is ``log``, if it is stopped.

    For a run that is over: SIGTERM would lie in it unseen, and torchrun waits 30 s before it loses patience.
    """
    with contextlib.suppress(OSError):
        if _is_that(pid, log) and _is_stopped(pid):
            os.kill(pid, signal.SIGKILL)


def _is_that(pid: int, log: Path) -> bool:
    """Whether the process maps that log: then it is the rank, and has told ``answer`` to write."""
    maps = Path(f"/proc/{pid}/maps")
    return maps.exists() and str(log.resolve()) in maps.read_text(errors="replace")


def _poke_main_thread(pid: int) -> None:
    """SIGUSR2 to it, where the C library can; else to any thread."""
    try:
        ctypes.CDLL(None).tgkill(pid, pid, int(signal.SIGUSR2))
    except AttributeError:
        os.kill(pid, signal.SIGUSR2)


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _written(path: Path, before: int) -> str:
    """What comes to the file beyond its first ``before`` bytes, once it doesn't grow any more."""
    deadline, size = time.monotonic() + _PATIENCE_SECONDS, before
    while time.monotonic() < deadline:
        time.sleep(_SETTLED_SECONDS)
        now = path.stat().st_size
        if now > before and now == size:
            break
        size = now
    return path.read_bytes()[before:].decode(errors="replace")
