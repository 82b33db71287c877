"""Moments in which nothing moved, kept in ``stalls.jsonl`` of a run: who was waited for, and where that one was.

A rank that is slow, not hung, isn't ended; this is how ``stretto diagnose`` can name it, in whatever phase it was.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "stalls.jsonl"
"""In the run's directory."""
_KEPT = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """One such moment."""

    seconds: float
    """How long nothing moved, as far as it was seen."""
    ranks: tuple[int, ...]
    """Who was waited for."""
    sentence: str
    """Who waited for what from whom, and where that one was."""


class Stalls:
    """Writes the stalls of one attempt; a stall that goes on replaces what it was."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is the run's directory; what an earlier attempt wrote there is forgotten."""
        self._path = folder / FILE
        self._found: dict[float, Stall] = {}
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def note(self, since: float, ranks: Sequence[int], sentence: str, *, now: float) -> None:
        """Nothing has moved since ``since``; both times of one clock, in seconds."""
        if since not in self._found and len(self._found) == _KEPT:
            return
        self._found[since] = Stall(seconds=now - since, ranks=tuple(ranks), sentence=sentence)
        with contextlib.suppress(OSError):  # a full disk must not end the watching
            self._path.write_text("".join(json.dumps(asdict(stall)) + "\n" for stall in self._found.values()))


def read_stalls(folder: Path) -> list[Stall]:
    """The stalls of a run, longest first; none where nothing was written."""
    found = []
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a line half-written, and all after it
        for line in (folder / FILE).read_text().splitlines():
            record = json.loads(line)
            ranks = tuple(int(rank) for rank in record["ranks"])
            found.append(Stall(seconds=float(record["seconds"]), ranks=ranks, sentence=str(record["sentence"])))
    return sorted(found, key=lambda stall: -stall.seconds)
