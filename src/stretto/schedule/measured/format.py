"""The trace of a run: what every rank did, operation by operation, in the folder ``trace`` of the run's directory.

    trace/schedule.json   the schedule that was played (a schedule file, with its messages)
    trace/rank-0          one file for each rank, see below
    trace/rank-1 ...

A rank's file is a line of JSON that says whose it is, then one record for each step, little-endian:

    {"format": "stretto.trace/1", "rank": 3, "world_size": 8, "position": 1, "pipeline": 1, "host": "a",
     "epoch": 17..., "device": "cpu"}
    step, begin, end, rows          4 x int64
    rows times 41 bytes             kind int8, stage int16, peer int16, microbatch int32,
                                    start int64, end int64, wait int64, bytes int64

Times are nanoseconds of the machine's monotonic clock, which all processes of one machine share; ``epoch`` is
where that clock stood at 0, in nanoseconds since 1970.  ``kind`` counts as ``Kind`` does; what an operation doesn't
have (the stage of OPT, the peer of F) is -1.  ``wait`` is the time in which the rank waited for a message (inside an
operation for those of attention, where documents have groups of their own), ``bytes`` what a message carried.  A record
that a dying process left half-written isn't read.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stretto.schedule.op import Kind, numbers
from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FORMAT = "stretto.trace/1"
FOLDER = "trace"
"""In the run's directory."""
SCHEDULE = "schedule.json"
"""In that folder."""
HEAD = struct.Struct("<4q")
ROW = struct.Struct("<bhhi4q")
COLUMNS = [
    ("kind", "i1"), ("stage", "<i2"), ("peer", "<i2"), ("microbatch", "<i4"),
    ("start", "<i8"), ("end", "<i8"), ("wait", "<i8"), ("bytes", "<i8"),
]  # fmt: skip
RECEIVES = frozenset({Kind.RECV_F, Kind.RECV_B})
WHOLE = frozenset(kind.name for kind in Kind)
"""Operations that are named by their kind alone: those of the step, not of a stage."""

Event = tuple[str, int | None, int, int, int, int]
"""Operation as the Observer hears it, peer, start, end (ns), bytes, and how long it waited for messages (ns)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Whose trace a file is."""

    rank: int
    """Of the world."""
    world_size: int
    """Ranks of the run."""
    position: int
    """Along pp: the schedule's rank."""
    pipeline: int
    """Which of the pipelines that run side by side it belongs to."""
    host: str
    """Its machine."""
    epoch: int
    """Nanoseconds since 1970 at which the machine's monotonic clock stood at 0."""
    device: str
    """``cpu`` or ``cuda``; on the latter, times are those at which the host launched operations."""
    processor: str = ""
    """Name of the machine's processor; empty where it isn't known."""
    cores: int = 0
    """Of that machine, those that the rank may use; 0 where it isn't known."""
    compiled: str = "none"
    """``plan.compile``: under ``blocks`` a backward is one operation, I."""
    plan: str = ""
    """What was played (``identity``); empty where an older version recorded it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTrace:
    """One step of one rank."""

    step: int
    """From 1."""
    begin: int
    """When the step began, in nanoseconds."""
    end: int
    """When it was over, in nanoseconds."""
    rows: npt.NDArray[np.void]
    """Operations in the order in which they began; fields as in ``COLUMNS``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankTrace:
    """What a rank's file says."""

    source: Source
    """Whose it is."""
    steps: dict[int, StepTrace]
    """By their number."""


def path_of(folder: Path, rank: int) -> Path:
    """The file of a rank in the folder of the trace."""
    return folder / f"rank-{rank}"


def header(source: Source) -> bytes:
    """The first line of a rank's file."""
    about = {"format": FORMAT, **{name: getattr(source, name) for name in Source.__slots__}}
    return json.dumps(about).encode() + b"\n"


def record(step: int, begin: int, end: int, events: Sequence[Event]) -> bytes:
    """One step as bytes; what is no operation of a schedule (saving) is left out."""
    rows = []
    for name, peer, start, over, carried, waited in events:
        place = _place(name)
        if place is not None:
            kind, stage, microbatch = place
            wait = over - start if kind in RECEIVES else waited
            rows.append(ROW.pack(kind, stage, -1 if peer is None else peer, microbatch, start, over, wait, carried))
    return HEAD.pack(step, begin, end, len(rows)) + b"".join(rows)


@functools.cache
def _place(name: str) -> tuple[int, int, int] | None:
    """Kind, stage and micro-batch of an operation's name.

    >>> _place("2F7"), _place("REDUCE_GRAD"), _place("SAVE")
    ((0, 2, 7), (15, -1, -1), None)
    """
    if name in WHOLE:
        return Kind[name].value, -1, -1
    return numbers(name) if name[:1].isdigit() else None


def read(path: Path) -> RankTrace:
    """Read a rank's file.  Raises ConfigError where it is none, OSError where it can't be read."""
    import numpy as np

    line, _, body = path.read_bytes().partition(b"\n")
    source = _source(line, path)
    steps = {}
    for step, begin, end, data in _records(body):
        rows = np.frombuffer(data, dtype=np.dtype(COLUMNS))
        steps[step] = StepTrace(step=step, begin=begin, end=end, rows=rows)
    return RankTrace(source=source, steps=steps)


def _source(line: bytes, path: Path) -> Source:
    """What the first line says."""
    try:
        about: dict[str, Any] = json.loads(line)
        found = about.pop("format")
        source = Source(**about)
        kinds = {"int": int, "str": str}  # annotations are text
        whole = all(type(getattr(source, field.name)) is kinds[str(field.type)] for field in fields(source))
        if not whole or not 0 <= source.rank < source.world_size:
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(f"{path} is no trace of a rank: its first line doesn't say whose.") from None
    if found != FORMAT:
        raise ConfigError(f"{path} has the format {found!r}; this version reads {FORMAT!r}.")
    return source


def _records(body: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Step, begin, end and rows of every record that is whole."""
    at = 0
    while at + HEAD.size <= len(body):
        step, begin, end, count = HEAD.unpack_from(body, at)
        at += HEAD.size
        rows = body[at : at + count * ROW.size]
        if count < 0 or len(rows) < count * ROW.size:
            return
        at += len(rows)
        yield step, begin, end, rows
