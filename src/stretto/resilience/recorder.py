"""Records when each operation of a step began and ended, for ``stretto diagnose``.

An Observer around another one: it passes everything on, and notes what belongs to a step that is wanted:

    last     the last KEPT steps, in memory; written when the run ends, also when it fails
    off      nothing is noted, the recorder isn't even there
    5,10-12  these steps, each written when it is over

A noted operation costs two readings of the clock and two extensions of a list.  The format is that of
schedule/measured/format.py.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stretto.schedule.measured.document_format import Held, document_line, documents_path
from stretto.schedule.measured.format import SCHEDULE, Event, Source, header, path_of, record
from stretto.schedule.measured.identity import places_documents
from stretto.spec.contract import Observer

KEPT = 8
"""Steps that ``last`` keeps."""
FIELDS = 6
"""Entries of the list for one operation: those of ``Event``."""

Noted = tuple[int, int, int, list[Any], list[Held]]
"""Step, begin, end (ns), the fields of its operations one after the other, and the documents that it placed."""


class Recorder:
    """The Observer that records; used by one thread.

    Args:
        observer: hears everything too.
        wanted: whether a step is to be recorded; None: the last ``KEPT``.
        source: whose trace it is.
    """

    def __init__(self, observer: Observer, folder: Path, *, source: Source, wanted: Callable[[int], bool] | None):
        self._observer, self._wanted = observer, wanted
        self._inner_begin, self._inner_end = observer.begin, observer.end
        self._path, self._source = path_of(folder, source.rank), source
        self._documents = documents_path(folder, source.rank)
        self.noting = False
        """Whether the step under way is recorded."""
        self._began = 0
        self._noted: list[Any] = []
        self.placed: list[Held] = []
        """What this rank has of the documents of the step under way, where steps place them."""
        self._open: list[int] = []
        self._waiting: deque[Noted] = deque(maxlen=KEPT)
        self._started = False
        self.schedule: str | None = None
        """Text of the schedule file to write beside the trace; one rank has it."""
        self.waited: Callable[[], float] | None = None
        """Seconds that the rank has spent waiting for messages inside operations, where somebody counts them."""
        self.failure: OSError | None = None
        """Why the trace could not be written: that ends the recording, not the run."""

    @property
    def step(self) -> int:
        """The optimizer step under way; setting it begins a step."""
        return self._observer.step

    @step.setter
    def step(self, step: int) -> None:
        self._observer.step = step
        self.noting = self._wanted is None or self._wanted(step)
        self._noted, self._open, self.placed = [], [], []
        self._began = time.perf_counter_ns()

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        """Pass it on and note it."""
        if self.noting:  # first, so that whatever it does is part of the operation
            self._open.append(len(self._noted))
            waited = 0 if self.waited is None else round(self.waited() * 1e9)
            self._noted += (operation, peer, time.perf_counter_ns(), 0, 0, waited)
        self._inner_begin(operation, peer=peer)

    def end(self) -> None:
        """Note it and pass it on."""
        if self.noting and self._open:
            at = self._open.pop()
            self._noted[at + 3] = time.perf_counter_ns()
            if self.waited is not None:
                self._noted[at + 5] = round(self.waited() * 1e9) - self._noted[at + 5]
        self._inner_end()

    def carried(self, num_bytes: int) -> None:
        """The operation under way moved a message of so many bytes."""
        if self.noting and self._open:
            self._noted[self._open[-1] + 4] += num_bytes

    def finish_step(self) -> None:
        """The step is over: keep it, or write it; what follows until the next step isn't recorded."""
        if not self.noting:
            return
        self.noting = False
        self._waiting.append((self.step, self._began, time.perf_counter_ns(), self._noted, self.placed))
        if self._wanted is not None:
            self.flush()

    def flush(self) -> None:
        """Write the steps that wait; what an earlier run recorded stays until there is something newer."""
        if not self._waiting or self.failure is not None:
            return
        try:
            if not self._started:
                self._start()
            with self._path.open("ab") as file:
                while self._waiting:
                    step, begin, end, noted, placed = self._waiting.popleft()
                    file.write(record(step, begin, end, _events(noted)))
                    if places_documents(self._source.plan):
                        with self._documents.open("a", encoding="utf-8") as lines:
                            lines.write(document_line(step, placed))
        except OSError as error:
            self.failure = error
            self._waiting.clear()

    def _start(self) -> None:
        """Begin the file anew."""
        self._started = True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._documents.unlink(missing_ok=True)
        self._path.write_bytes(header(self._source))
        if places_documents(self._source.plan):  # no schedule is that of all steps
            self._path.with_name(SCHEDULE).unlink(missing_ok=True)
        elif self.schedule is not None:
            self._path.with_name(SCHEDULE).write_text(self.schedule, encoding="utf-8")


def _events(noted: list[Any]) -> list[Event]:
    """One for each operation that ended."""
    events = [tuple(noted[at : at + FIELDS]) for at in range(0, len(noted), FIELDS)]
    return [event for event in events if event[3]]  # type: ignore[misc]


def epoch_of_clock() -> int:
    """When this machine's monotonic clock stood at 0, in nanoseconds since 1970: the closest of a few readings."""
    readings = []
    for _ in range(5):
        before = time.perf_counter_ns()
        now = time.time_ns()
        after = time.perf_counter_ns()
        readings.append((after - before, now - (before + after) // 2))
    return min(readings)[1]
