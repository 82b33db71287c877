"""The launcher's watch over its ranks: it reads their files, so it needs no process group, no store and no rank 0.

Code that holds the interpreter for seconds (importing torch, say) stops the heart, too; so processor time counts as
a sign of life.  Code that never gives it back again is a hang, not a silence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from stretto.resilience.beat import Beat, from_log
from stretto.resilience.diagnose import sentence
from stretto.resilience.heart import interval_of
from stretto.resilience.judge import Judge
from stretto.resilience.oplog import log_path, read_log
from stretto.resilience.stall import Stalls
from stretto.spec.run import RunSettings

GONE = "LEFT"
"""The operation of a rank that is done: it is missed by nobody."""


class Lookout:
    """Watches the ranks of one attempt."""

    def __init__(self, settings: RunSettings, pids: Mapping[int, int]) -> None:
        """``pids``: process of each rank; ``settings``: where they write, and how long they may be silent."""
        self._folder, self._pids = Path(settings.dir) / "oplog", dict(pids)
        self._interval = interval_of(settings.silent_seconds) / 2
        self._next = now = time.monotonic()
        self._judge = Judge(silent_seconds=settings.silent_seconds, hang_seconds=settings.hang_seconds, now=now)
        self._judge.expect(list(pids), now)
        self._stalls = Stalls(Path(settings.dir))

    def look(self, ended: Mapping[int, int]) -> str | None:
        """Why the run must end, or None; ``ended``: exit codes of the ranks that are gone.  Cheap if called often."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + self._interval
        for rank in self._pids:
            beat = self.beat(rank, left=rank in ended)
            if beat is not None:
                self._judge.note(rank, beat, now)
        verdict = self._judge.verdict(now)
        if verdict is None and (stall := self._judge.stall(now)):
            since, ranks, told = stall
            self._stalls.note(since, ranks, told, now=now)
        return verdict

    def post_mortem(self, ill: Mapping[int, str]) -> str:
        """The sentence about ranks that are gone."""
        beats = {rank: beat for rank in self._pids if (beat := self.beat(rank)) is not None}
        return sentence(beats, ill, look=False)

    def beat(self, rank: int, *, left: bool = False) -> Beat | None:
        """What a rank's file says; None where there is none of this life."""
        path, pid = log_path(self._folder, rank), self._pids[rank]
        try:
            log = read_log(path, last=0)
        except (OSError, ValueError):
            return None
        if log.pid != pid or not log.beats:
            return None
        left = left or (log.current is not None and log.current.name == GONE)
        count = log.beats + _processor_ticks(pid)
        beat = Beat(count=count, life=str(pid), host=log.host, pid=pid, file=str(path), left=left)
        return from_log(beat, log)


def _processor_ticks(pid: int) -> int:
    """Processor time of a process, in ticks; 0 where it isn't told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])
