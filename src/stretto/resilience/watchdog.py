"""Ends this process when another rank has died, stopped or hung, and says which.

    rank r   every few seconds ── beat/r ──►  store  ──►  rank 0 reads all beats and judges
    rank r   ◄── beat/0, with the verdict if there is one ──  store

Reading is O(ranks) in all.  The store is the one that the process group was started from (of torchrun's
agent, or of rank 0), over a connection of our own.  One thread talks to it, and may block for as long as
it likes; another, which never blocks, looks at the clock: a store that doesn't answer is a silent rank
too.  Both run beside the main thread, so long computations and slow disks are no silence.

torch by itself notices a stopped rank after 30 minutes and then names a healthy one.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from stretto.resilience.beat import Beat, from_log
from stretto.resilience.judge import PATIENCE, Judge
from stretto.resilience.oplog import OpLog
from stretto.resilience.stack import end_stopped
from stretto.resilience.stall import Stalls
from stretto.spec.run import RunSettings

EXIT_CODE = 75
"""How a process ends that the watchdog ends."""
_NOBODY = "nothing yet"


class Store(Protocol):
    """What is used of torch's TCPStore."""

    def set(self, key: str, value: str, /) -> None:
        """Write."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Read; waits until all keys exist."""

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Write if the key has the expected value, or doesn't exist and "" is expected."""


def connect(address: str, port: int, *, restarts: int) -> Callable[[], Store]:
    """A function that opens a connection of our own to the store at ``address``; each attempt has its own keys."""

    def open_store() -> Store:
        from torch.distributed import PrefixStore, TCPStore

        store = TCPStore(address, port, is_master=False, wait_for_workers=False)
        return PrefixStore(f"stretto/beats/{restarts}", store)

    return open_store


class Watchdog:
    """Beats for this rank and listens for the others, in two daemon threads."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        log: OpLog,
        settings: RunSettings,
        open_store: Callable[[], Store],
        on_verdict: Callable[[str], None],
    ) -> None:
        """``settings`` gives silent_seconds and hang_seconds.

        ``on_verdict(text)`` is called once, on a thread, when the run must end; it is to end the process.
        """
        self._rank, self._world_size, self._log = rank, world_size, log
        self._open_store, self._on_verdict = open_store, on_verdict
        self._silent_seconds = settings.silent_seconds
        self._interval = min(5.0, max(0.05, settings.silent_seconds / 8))
        now = time.monotonic()
        # Only rank 0 hears everybody, so only it can tell a hang from a pause of one rank.
        hang_seconds = settings.hang_seconds if rank == 0 else math.inf
        self._stalls = Stalls(Path(settings.dir)) if rank == 0 else None
        self._judge = Judge(silent_seconds=settings.silent_seconds, hang_seconds=hang_seconds, now=now)
        self._contact, self._spoken = now, False
        self._lock = threading.Lock()
        self._leaving = threading.Event()
        self._gone = threading.Event()
        self._beat = Beat(
            count=0, life=os.urandom(4).hex(), host=socket.gethostname(), pid=os.getpid(), file=str(log.path)
        )

    def start(self) -> None:
        """Start both threads."""
        for target in (self._talk, self._watch):
            threading.Thread(target=target, name=f"stretto-watchdog{target.__name__}", daemon=True).start()

    def leave(self) -> None:
        """Say goodbye: from now on this rank is missed by nobody.  Waits for that at most a few seconds."""
        self._leaving.set()
        self._gone.wait(timeout=3.0)

    def fail(self, reason: str) -> None:
        """Tell all ranks, through rank 0, that this one can't go on."""
        with self._lock:
            self._beat = replace(self._beat, verdict=reason)
        self._leaving.set()
        self._gone.wait(timeout=3.0)

    def _talk(self) -> None:
        try:
            store = self._open_store()
            listened = list(range(self._world_size)) if self._rank == 0 else [0]
            keys = [f"beat/{rank}" for rank in listened]
            for key in keys:
                store.compare_set(key, "", _NOBODY)
            with self._lock:
                self._judge.expect([r for r in listened if r != self._rank], time.monotonic())
            while True:
                leaving = self._leaving.is_set()
                store.set(f"beat/{self._rank}", self._next_beat(leaving).text())
                if leaving:
                    return
                self._hear(listened, store.multi_get(keys))
                self._leaving.wait(self._interval)
        except RuntimeError:
            return  # the store is gone; the other thread sees that nobody answers
        finally:
            self._gone.set()

    def _next_beat(self, leaving: bool) -> Beat:
        with self._lock:
            left = leaving and self._beat.verdict is None
            self._beat = from_log(replace(self._beat, count=self._beat.count + 1, left=left), self._log)
            return self._beat

    def _hear(self, ranks: list[int], values: list[bytes]) -> None:
        now = time.monotonic()
        with self._lock:
            self._contact, self._spoken = now, True
            for rank, value in zip(ranks, values, strict=True):
                self._judge.hear(rank, value.decode(), now)

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._leaving.wait(self._interval / 2):
            before, looked = looked, time.monotonic()
            now = looked
            with self._lock:
                if now - before > self._silent_seconds / 2:  # this process slept; the store had no chance to answer
                    self._contact = now
                verdict = self._judge.verdict(now) or self._lost(now)
                if verdict is None:
                    self._note_stall(now)
                    continue
                self._beat = replace(self._beat, verdict=verdict)
            if self._rank == 0:  # the others learn it from rank 0's next beat
                self._leaving.set()
                self._gone.wait(timeout=2.0)
                self._end_stopped_neighbours()
            self._on_verdict(verdict)
            return

    def _end_stopped_neighbours(self) -> None:
        for beat in self._judge.beats():
            if beat.host == self._beat.host and beat.pid != self._beat.pid:
                end_stopped(beat.pid, Path(beat.file))

    def _note_stall(self, now: float) -> None:
        stall = self._judge.stall(now) if self._stalls is not None else None
        if stall is not None and self._stalls is not None:
            since, ranks, told = stall
            self._stalls.note(since, ranks, told, now=now)

    def _lost(self, now: float) -> str | None:
        seconds = now - self._contact
        if seconds <= self._silent_seconds * (1 if self._spoken else PATIENCE):
            return None
        return (
            f"the store, which rank 0 or its launcher keeps, has not answered rank {self._rank} for {seconds:.0f} s: "
            "rank 0 is dead or stopped, or its machine or the network is lost"
        )
