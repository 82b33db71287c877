"""The heart of a rank: a thread that writes beats, and where the main thread is, into the rank's file.

It needs neither a process group nor torch, so it beats from the first moment of a process on.  A beat looks at
the stack of the main thread, which takes some 20 microseconds.
"""

from __future__ import annotations

import sys
import threading

from stretto.resilience.oplog import OpLog
from stretto.resilience.place import lines_of, place_of

_SLOWEST, _FASTEST = 1.0, 0.05
_BEATS = 8
"""Beats in ``silent_seconds``."""


def interval_of(silent_seconds: float) -> float:
    """Seconds between two beats."""
    return min(_SLOWEST, max(_FASTEST, silent_seconds / _BEATS))


class Heart:
    """Beats for this process until it ends or ``stop`` is called."""

    def __init__(self, log: OpLog, *, silent_seconds: float) -> None:
        """``log`` is where it writes."""
        self._log, self._interval = log, interval_of(silent_seconds)
        self._watched = threading.main_thread().ident
        self._stopped = threading.Event()

    def start(self) -> None:
        """Beat from now on."""
        threading.Thread(target=self._run, name="stretto-heart", daemon=True).start()

    def stop(self) -> None:
        """Beat no more."""
        self._stopped.set()

    def _run(self) -> None:
        while True:
            self.beat()
            if self._stopped.wait(self._interval):
                return

    def beat(self) -> None:
        """Once."""
        frames = sys._current_frames()
        self._log.beat(place_of(lines_of(frames.get(self._watched or 0))))
