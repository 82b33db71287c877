"""The root cause first: which rank failed, and why, told apart from the ranks that merely noticed.

When one rank raises, the others soon raise too: their connections close, their collectives time out.
Each writes what happened to it into a file of its own; whoever reports picks the earliest that isn't
of the noticing kind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
import traceback
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from stretto.resilience.diagnose import words
from stretto.resilience.place import Line, Place, place_of
from stretto.spec import errors

_NOTICED = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection (was )?(closed|refused|reset|aborted)|timed out|timeout"
    r"|socket|NCCL|gloo|TCPStore|DistBackendError|remote process",
    re.IGNORECASE,
)
_FRAMES_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFailure:
    """How a rank failed, in its own words."""

    rank: int
    """Which."""
    host: str
    """Machine."""
    pid: int
    """Process."""
    time: float
    """Seconds since the epoch."""
    kind: str
    """Class of the exception, or ``Watchdog``."""
    message: str
    """Its text."""
    trace: str
    """The last lines of its traceback; empty for errors that a user can repair."""
    doing: str = ""
    """The operation that it was in."""
    step: int = 0
    """Its optimizer step, 0 if there was none."""
    noticed: bool
    """Whether it looks like the consequence of another rank's failure."""

    @classmethod
    def of(cls, rank: int, error: BaseException, *, doing: str = "", step: int = 0) -> RankFailure:
        """Of the exception that ended a rank, in operation ``doing`` of ``step``."""
        is_users = isinstance(error, errors.StrettoError)
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES_SHOWN:]
        message = str(error) or repr(error)
        return cls(
            rank=rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            kind=type(error).__name__,
            message=message,
            trace="" if is_users else "".join(traceback.format_list(frames)).rstrip(),
            doing=doing,
            step=step,
            noticed=not is_users and isinstance(error, RuntimeError) and _NOTICED.search(message) is not None,
        )

    @classmethod
    def watched(cls, rank: int, verdict: str) -> RankFailure:
        """Of a rank that the watchdog ended because of others."""
        return cls(
            rank=rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            kind="Watchdog",
            message=verdict,
            trace="",
            noticed=False,
        )

    @property
    def users(self) -> type[errors.StrettoError] | None:
        """The class of a user's error (``CheckpointError`` ...), else None."""
        found = getattr(errors, self.kind, None)
        return found if isinstance(found, type) and issubclass(found, errors.StrettoError) else None


def describe(failure: RankFailure) -> str:
    """For people: the sentence of a user's error, otherwise rank, exception and the end of its traceback."""
    if failure.users or failure.kind == "Watchdog":
        return failure.message
    where = f"rank {failure.rank} (host {failure.host}, pid {failure.pid})"
    during = f" in {words(failure.doing)}" if failure.doing else ""
    during += f", step {failure.step}" if failure.doing and failure.step else ""
    text = f"{where} failed{during}: {failure.kind}: {failure.message}"
    return f"{text}\n{failure.trace}" if failure.trace else text


def place_of_error(error: BaseException) -> Place:
    """Where an exception came from."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return place_of(Line(frame.filename, frame.lineno or 0, frame.name) for frame in frames)


class FirstErrors:
    """The failures of one attempt, in ``<run.dir>/errors/<attempt>``."""

    def __init__(self, run_dir: Path, attempt: str) -> None:
        """``attempt`` names this start of the run; all its ranks use the same."""
        self.folder = run_dir / "errors" / attempt

    def clear(self) -> None:
        """Forget what an earlier attempt of this name left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def write(self, failure: RankFailure) -> bool:
        """Add a failure, whole or not at all; False where that is impossible (the disk may be what failed)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"rank-{failure.rank}.partial"
            partial.write_text(json.dumps(asdict(failure)))
            partial.replace(self.folder / f"rank-{failure.rank}.json")
        except OSError:
            return False
        return True

    def read(self) -> list[RankFailure]:
        """All failures, root causes before those that noticed, each kind by time."""
        found = []
        for file in sorted(self.folder.glob("rank-*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(RankFailure(**json.loads(file.read_text())))
        return sorted(found, key=lambda f: (f.noticed, f.kind == "Watchdog", f.time))

    def claim(self, text: str) -> bool:
        """True for the first process of this machine that wants to say ``text``."""
        name = f"said-{socket.gethostname()}-{zlib.crc32(text.encode()):08x}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            pass  # rather twice than not at all
        return True
