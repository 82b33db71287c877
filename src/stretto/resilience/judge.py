"""When is a rank silent, when does the whole run hang?  Decided from heartbeats, without clocks of others.

Every rank tells a counter that grows with each beat.  Only *when I last heard it change* is compared,
by my own monotonic clock, so clocks of machines needn't agree and a beat left over from an earlier
attempt means nothing.

    silent   a rank's counter has not changed for silent_seconds: dead, stopped, or its machine lost
    hang     all beat, but no rank has finished an operation for hang_seconds
    stall    the same for a moment: nobody is ended, but who is waited for is noted (stall.py)

Starting, loading and writing a checkpoint may take longer than any operation of a step, so during them the
second limit is PATIENCE times longer; so is the first for a rank that has never been heard.
"""

from __future__ import annotations

from stretto.resilience.beat import Beat, refreshed
from stretto.resilience.diagnose import causes, sentence

SLOW = ("START", "JOIN", "BUILD", "LOAD", "COMPILE", "SAVE")
"""Operations outside a step, which take as long as a disk, a network or a compiler takes."""
PATIENCE = 10
"""How many times longer than ``hang_seconds`` they may take."""
STALL = 1 / 3
"""Share of ``silent_seconds`` without progress after which it is noted who is waited for."""


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
        beat = Beat.parse(text)
        if beat is not None:
            self.note(rank, beat, now)

    def note(self, rank: int, beat: Beat, now: float) -> None:
        """``beat`` is of this life, and what it says now."""
        last = self._beats.get(rank)
        if beat == last:
            return
        if last is None or last.finished != beat.finished:
            self._progress = now
        if last is None or last.count != beat.count:
            self._heard[rank] = now
        self._beats[rank] = beat

    def beats(self) -> list[Beat]:
        """The last beat of each rank that has been heard."""
        return list(self._beats.values())

    def verdict(self, now: float) -> str | None:
        """Why the run must end, or None."""
        told = next((b.verdict for b in self._beats.values() if b.verdict), None)
        if told is not None:
            return told
        gap, self._looked = now - self._looked, now
        if gap > self._silent_seconds / 4:  # this process didn't run; time that it missed says nothing of the others
            self._heard = {rank: min(now, heard + gap) for rank, heard in self._heard.items()}
            self._progress = min(now, self._progress + gap)
            return None
        silent = {rank: seconds for rank in self._present() if (seconds := self._silence(rank, now))}
        if silent:
            ill = {
                rank: f"has been silent for {seconds:.0f} s" if rank in self._beats else
                f"has never been heard, for {seconds:.0f} s"
                for rank, seconds in sorted(silent.items())
            }  # fmt: skip
            return sentence(self._states(), ill)
        return self._hang(now)

    def stall(self, now: float) -> tuple[float, list[int], str] | None:
        """Since when nothing has moved (of this clock), who seems to be the cause, and the sentence; None where all
        is well or nobody waits."""
        since = self._progress
        if now - since < STALL * self._silent_seconds:
            return None
        states = self._states()
        found = causes(states)
        if not found or len(found) == len(states) or any(states[rank].operation == "START" for rank in found):
            return None
        return since, found, sentence(states, {}, look=False)

    def _present(self) -> list[int]:
        return [rank for rank in self._heard if rank not in self._beats or not self._beats[rank].left]

    def _silence(self, rank: int, now: float) -> float:
        """For how long a rank has been silent, if that is too long, else 0."""
        seconds = now - self._heard[rank]
        limit = self._silent_seconds * (1 if rank in self._beats else PATIENCE)
        return seconds if seconds > limit else 0.0

    def _states(self) -> dict[int, Beat]:
        return {rank: refreshed(beat) for rank, beat in sorted(self._beats.items()) if not beat.left}

    def _hang(self, now: float) -> str | None:
        running = [beat for beat in self._beats.values() if not beat.left]
        if not any(beat.finished or beat.operation for beat in running):
            return None  # nobody has begun to train: loading, compiling
        patience = PATIENCE if any(beat.operation in SLOW for beat in running) else 1
        if now - self._progress <= self._hang_seconds * patience:
            return None
        return f"no operation has finished on any rank for {now - self._progress:.0f} s: {sentence(self._states(), {})}"
