"""SIGTERM and SIGUSR1 mean: stop with a checkpoint at the next step boundary.

The signal only sets a flag.  Ranks get it at different times, and some may not get it at all, so the
training step sums the flags over all ranks and everybody stops after the same step.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take a machine away."""


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        """True once asked."""
        return self._asked

    def ask(self) -> None:
        """Ask from within the process."""
        self._asked = True

    @contextlib.contextmanager
    def listening(self, *more: signal.Signals) -> Iterator[StopRequest]:
        """Answer SIGNALS, and ``more``, with the flag; to be entered by the main thread.

        A second SIGINT is a KeyboardInterrupt: someone at a terminal means it.
        """

        def on_signal(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._asked:
                raise KeyboardInterrupt
            self._asked = True

        before = {number: signal.signal(number, on_signal) for number in (*SIGNALS, *more)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
