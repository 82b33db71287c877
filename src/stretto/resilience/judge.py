"""When is a rank silent, when does the whole run hang?  Decided from heartbeats, without clocks of others.

Every rank tells a counter that grows with each beat.  Only *when I last heard it change* is compared,
by my own monotonic clock, so clocks of machines needn't agree and a beat left over from an earlier
attempt means nothing.

    silent   a rank's counter has not changed for silent_seconds: dead, stopped, or its machine lost
    hang     all beat, but no rank has finished an operation for hang_seconds

A checkpoint may take longer than any operation of a step, so while one is written the second limit is
PATIENCE times longer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stretto.resilience.oplog import read_log

SAVING = "SAVE"
"""The operation during which a checkpoint is written."""
COLLECTIVES = ("REDUCE_GRAD", "UNSHARD", SAVING)
"""Operations in which a rank may be waiting for any other."""
PATIENCE = 10
"""How many times longer than ``hang_seconds`` a checkpoint may take."""
_SHOWN = 4


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
    seconds: float = 0.0
    """How long the operation has been running."""
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

    def doing(self) -> str:
        """What the rank was at, as a clause."""
        if self.operation is None:
            return "it was between operations"
        words = f"it was in {self.operation}"
        if self.step:
            words += f", step {self.step}"
        if self.peer is not None:
            words += f", waiting for rank {self.peer}"
        return words


def refreshed(beat: Beat) -> Beat:
    """``beat`` with what the rank's file says by now, where we can read it: the file is newer than the last beat."""
    try:
        log = read_log(Path(beat.file))
    except (OSError, ValueError):
        return beat
    if (log.pid, log.host) != (beat.pid, beat.host):
        return beat
    running = log.current
    return replace(
        beat,
        finished=log.finished,
        operation=running.name if running else None,
        peer=running.peer if running else None,
        step=running.step if running else beat.step,
    )


class Judge:
    """Hears beats and says why the run must end, if it must.  Times are seconds of one monotonic clock."""

    def __init__(self, *, silent_seconds: float, hang_seconds: float, now: float) -> None:
        self._silent_seconds, self._hang_seconds = silent_seconds, hang_seconds
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._ignored: dict[int, str] = {}
        self._progress = now
        self._looked = now

    def expect(self, ranks: list[int], now: float) -> None:
        """From ``now`` on these ranks are to be heard."""
        for rank in ranks:
            self._heard.setdefault(rank, now)

    def hear(self, rank: int, text: str, now: float) -> None:
        """``text`` is what rank's beat says now.  What was there when we first looked may be of a former life."""
        if self._ignored.setdefault(rank, text) == text:
            return
        beat, last = Beat.parse(text), self._beats.get(rank)
        if beat is None or beat == last:
            return
        if last is None or last.finished != beat.finished:
            self._progress = now
        self._beats[rank], self._heard[rank] = beat, now

    def verdict(self, now: float) -> str | None:
        """Why the run must end, or None."""
        told = next((b.verdict for b in self._beats.values() if b.verdict), None)
        if told is not None:
            return told
        asleep, self._looked = now - self._looked > self._silent_seconds / 2, now
        if asleep:  # it was this process that didn't run; what it missed says nothing of the others
            self._heard = dict.fromkeys(self._heard, now)
            self._progress = now
            return None
        present = {r: t for r, t in self._heard.items() if r not in self._beats or not self._beats[r].left}
        silent = {rank: now - heard for rank, heard in present.items() if now - heard > self._silent_seconds}
        if silent:
            return "; ".join(self._silence(rank, seconds) for rank, seconds in sorted(silent.items()))
        return self._hang(now)

    def _silence(self, rank: int, seconds: float) -> str:
        beat = self._beats.get(rank) or Beat.parse(self._ignored.get(rank, ""))
        if beat is None:
            return f"rank {rank} has never been heard, for {seconds:.0f} s"
        beat = refreshed(beat)
        return (
            f"rank {rank} (host {beat.host}, pid {beat.pid}) has been silent for {seconds:.0f} s; "
            f"{beat.doing()}; its file is {beat.file}"
        )

    def _hang(self, now: float) -> str | None:
        running = {rank: beat for rank, beat in self._beats.items() if not beat.left}
        if not any(beat.finished or beat.operation for beat in running.values()):
            return None  # nobody has begun to train: loading, compiling
        patience = PATIENCE if any(beat.operation == SAVING for beat in running.values()) else 1
        if now - self._progress <= self._hang_seconds * patience:
            return None
        shown = [(rank, refreshed(running[rank])) for rank in self._suspects(running)[:_SHOWN]]
        first, beat = shown[0]
        others = "".join(f"; rank {rank}: {other.doing()}" for rank, other in shown[1:])
        return (
            f"no operation has finished on any rank for {now - self._progress:.0f} s; the first suspect is "
            f"rank {first} (host {beat.host}, pid {beat.pid}): {beat.doing()}; its file is {beat.file}{others}"
        )

    def _suspects(self, running: dict[int, Beat]) -> list[int]:
        """Whom the others may be waiting for, before those who wait: between operations (loading data), then
        computing, then in a collective, then waiting for a peer."""

        def rank_of_suspicion(rank: int) -> tuple[int, int]:
            beat = running[rank]
            if beat.operation is None:
                return 0, rank
            if beat.peer is None:
                return (2 if beat.operation.split()[0] in COLLECTIVES else 1), rank
            return 3, rank

        return sorted(running, key=rank_of_suspicion)
