"""What a rank says of itself: its heart-beat, as the others hear it or as its file tells."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stretto.resilience.oplog import Log, OpLog, read_log


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a rank says of itself every few seconds."""

    count: int
    """Grows by one each time."""
    life: str
    """Random name of the process, so that two lives of a rank differ."""
    host: str
    """Machine."""
    pid: int
    """Process."""
    file: str
    """Its operation log."""
    finished: int = 0
    """Operations finished."""
    operation: str | None = None
    """The running operation."""
    peer: int | None = None
    """Rank that it waits for."""
    step: int = 0
    """Optimizer step, 0 if not told."""
    place: str = ""
    """Where its main thread is, as ``file:line (function)``."""
    is_there: bool = True
    """False where it was seen there before its last operation began."""
    waits: bool = False
    """Whether that place is one that waits for other ranks."""
    left: bool = False
    """The rank is done and says goodbye."""
    verdict: str | None = None
    """Why the run must end."""

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Beat | None:
        """From JSON; None if it is anything else."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


def from_log(beat: Beat, log: Log | OpLog) -> Beat:
    """``beat`` with what the rank's log says."""
    running, place = log.current, log.place
    return replace(
        beat,
        finished=log.finished,
        operation=running.name if running else None,
        peer=running.peer if running else None,
        step=running.step if running else beat.step,
        place=place.text if place else "",
        is_there=log.is_there if isinstance(log, Log) else True,
        waits=place is not None and place.waits and (log.is_there if isinstance(log, Log) else True),
    )


def refreshed(beat: Beat) -> Beat:
    """``beat`` with what the rank's file says by now, where we can read it: the file is newer than the last beat."""
    try:
        log = read_log(Path(beat.file), last=0)
    except (OSError, ValueError):
        return beat
    return from_log(beat, log) if (log.pid, log.host) == (beat.pid, beat.host) else beat
