"""Faults on purpose (``run.drill``): the Observer that strikes where an operation has just begun.

Each fault strikes once, and only in a run's first life, so that a restart shows the recovery.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable

from stretto.spec.contract import Observer
from stretto.spec.drill import Fault

_KIND = re.compile(r"[A-Z_]+")


class DrillError(RuntimeError):
    """What ``raise`` raises."""


class Drill:
    """An Observer around another one."""

    def __init__(self, observer: Observer, faults: Iterable[Fault], rank: int) -> None:
        """``faults`` of other ranks are left out."""
        self._observer = observer
        self._faults = [fault for fault in faults if fault.rank == rank]

    @property
    def step(self) -> int:
        """The optimizer step under way."""
        return self._observer.step

    @step.setter
    def step(self, step: int) -> None:
        self._observer.step = step

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        """Pass it on, and strike if it is time."""
        self._observer.begin(operation, peer=peer)
        for fault in self._faults:
            if self._is_time(fault, operation):
                self._faults.remove(fault)
                _strike(fault, operation)
                return

    def end(self) -> None:
        """Pass it on."""
        self._observer.end()

    def _is_time(self, fault: Fault, operation: str) -> bool:
        if fault.step is not None and fault.step != self._observer.step:
            return False
        kind = _KIND.search(operation)
        return fault.at == operation or (kind is not None and fault.at == kind[0])


def _strike(fault: Fault, operation: str) -> None:
    if fault.action == "delay":
        time.sleep(fault.seconds)
    elif fault.action == "raise":
        raise DrillError(f"drill: an error in {operation}")
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)
