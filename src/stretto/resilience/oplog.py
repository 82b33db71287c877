"""What a rank did last, in a file that outlives it.

    ┌────────┬───────┬──────────┬──────────┬──────────┬─── ring of the last 1,024 operations ──┐
    │ header │ heart │  2F6     │  2F7     │ 2RECV_F8 │                                        │
    └────────┴───────┴──────────┴──────────┴──────────┴────────────────────────────────────────┘
      rank, pid, host, how many begun / finished │ heart-beats, and where the main thread was at the last (heart.py)

The file is mapped into memory: an entry costs about a microsecond, no system call, and is in the file
even if the process is killed by SIGKILL in the middle of the operation.  Another process reads it at any
time with ``read_log``.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stretto.resilience.place import Place

_MAGIC = b"stretto.oplog/2\0"
_HEADER = struct.Struct("<16s i i 64s i 4x")
"""magic, rank, pid, host, capacity"""
_COUNTS = struct.Struct("<q q d")
"""operations begun, operations finished, time of the last finish"""
_ENTRY = struct.Struct("<d d i i 40s")
"""begin, end (0 while it runs), peer (-1: none), step, operation"""
_HEART = struct.Struct("<q q ? 7x 200s")
"""heart-beats, operations begun by the last, whether the rank was waiting then, file and line"""
_BEGUN = struct.Struct("<q")
_TIME = struct.Struct("<d")
_COUNTS_AT = 128
_HEART_AT = 160
_ENTRIES_AT = 384
_CAPACITY = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One entry of a log."""

    name: str
    """``2F7``, ``RECV_F 2 7``, ``OPT`` ..."""
    peer: int | None
    """Rank that it waits for, if it does."""
    step: int
    """Optimizer step that it belongs to, 0 if that was not told."""
    began: float
    """Seconds since the epoch."""
    ended: float | None
    """Same; None if it never ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What a rank's file says."""

    rank: int
    """Whose it is."""
    pid: int
    """Its process."""
    host: str
    """The machine it ran on."""
    begun: int
    """Operations begun since the process started."""
    finished: int
    """Operations finished since the process started."""
    beats: int
    """Heart-beats since the process started."""
    place: Place | None
    """Where its main thread was at the last of them; None before the first."""
    is_there: bool
    """Whether no operation has begun since then."""
    current: Operation | None
    """The operation begun last that has not ended."""
    operations: tuple[Operation, ...]
    """The last ones, oldest first."""


def log_path(folder: Path, rank: int) -> Path:
    """The file of a rank in the folder of all logs."""
    return folder / f"rank-{rank}"


class OpLog:
    """The Observer that writes a rank's file; used by one thread."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Start the file; one that a previous process left is kept as ``rank-<n>.previous``."""
        self.path = log_path(folder, rank)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.replace(self.path.with_name(f"{self.path.name}.previous"))
        with self.path.open("x+b") as file:
            # Not a hole: with a full disk, writing into a mapped hole would be a fatal signal.
            file.write(bytes(_ENTRIES_AT + _CAPACITY * _ENTRY.size))
            file.flush()
            self._map = mmap.mmap(file.fileno(), 0)
        host = socket.gethostname().encode()[:64]
        _HEADER.pack_into(self._map, 0, _MAGIC, rank, os.getpid(), host, _CAPACITY)
        self._begun = 0
        self._finished = 0
        self._open: list[int] = []
        self._beats = 0
        self._ranks: Sequence[int] = ()
        self.place: Place | None = None
        """Where the main thread was at the last heart-beat."""

    def meet(self, ranks: Sequence[int]) -> None:
        """From now on ``peer`` is a position in the pipeline of these ranks, of the world."""
        self._ranks = tuple(ranks)

    def begin(self, operation: str, /, *, peer: int | None = None) -> None:
        """Note that ``operation`` starts."""
        if peer is not None and self._ranks:
            peer = self._ranks[peer]
        at = _ENTRIES_AT + self._begun % _CAPACITY * _ENTRY.size
        _ENTRY.pack_into(self._map, at, time.time(), 0.0, -1 if peer is None else peer, self.step, operation.encode())
        self._begun += 1
        self._open.append(at)
        _BEGUN.pack_into(self._map, _COUNTS_AT, self._begun)

    def end(self) -> None:
        """Note that the operation begun last is over."""
        now = time.time()
        self._finished += 1
        _TIME.pack_into(self._map, self._open.pop() + 8, now)
        _COUNTS.pack_into(self._map, _COUNTS_AT, self._begun, self._finished, now)

    def beat(self, place: Place) -> None:
        """The process is alive and its main thread is at ``place``; called by another thread."""
        self._beats, self.place = self._beats + 1, place
        text = place.text.encode()[-200:]
        _HEART.pack_into(self._map, _HEART_AT, self._beats, self._begun, place.waits, text)

    @property
    def finished(self) -> int:
        """Operations finished so far; may be read by another thread."""
        return self._finished

    @property
    def current(self) -> Operation | None:
        """The operation begun last that has not ended; may be read by another thread."""
        open_ones = self._open[-1:]
        return _entry(self._map, open_ones[0]) if open_ones else None


def read_log(path: Path, *, last: int = _CAPACITY) -> Log:
    """Read a rank's file and its ``last`` operations, also while it is written; raises ValueError if it is no such
    file."""
    raw = path.read_bytes()
    if len(raw) < _ENTRIES_AT or not raw.startswith(_MAGIC):
        raise ValueError(f"{path} is not an operation log")
    _, rank, pid, host, capacity = _HEADER.unpack_from(raw, 0)
    begun, finished, _ = _COUNTS.unpack_from(raw, _COUNTS_AT)
    beats, seen, waits, place = _HEART.unpack_from(raw, _HEART_AT)
    at = [_ENTRIES_AT + i % capacity * _ENTRY.size for i in range(max(0, begun - capacity), begun)]
    running = next((where for where in reversed(at) if not _TIME.unpack_from(raw, where + 8)[0]), None)
    return Log(
        rank=rank,
        pid=pid,
        host=host.rstrip(b"\0").decode(),
        begun=begun,
        finished=finished,
        beats=beats,
        place=Place(text=place.rstrip(b"\0").decode(errors="replace"), waits=waits) if beats else None,
        is_there=seen == begun,
        current=None if running is None else _entry(raw, running),
        operations=tuple(_entry(raw, where) for where in at[len(at) - min(last, len(at)) :]),
    )


def _entry(buffer: bytes | mmap.mmap, at: int) -> Operation:
    began, ended, peer, step, name = _ENTRY.unpack_from(buffer, at)
    return Operation(
        name=name.rstrip(b"\0").decode(errors="replace"),
        peer=None if peer < 0 else peer,
        step=step,
        began=began,
        ended=ended or None,
    )
