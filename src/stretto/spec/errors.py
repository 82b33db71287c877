"""The errors a user can meet, all under one root.

    StrettoError
    ├── ConfigError (ValueError)      a run file, override or argument that can't be
    ├── DataError (ValueError)        a corpus or tokenizer that can't be used
    ├── CheckpointError (ValueError)  a checkpoint that is damaged or doesn't fit
    ├── ScheduleError (ValueError)    a schedule that is incomplete, misordered or deadlocks
    ├── UnsupportedError              what this version can't run, said instead of pretended
    └── RankError                     a rank died, fell silent or raised while running

Each message says the fact, the reason and the choices.  Our own invariants are asserts, not these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class StrettoError(Exception):
    """Root of all errors that a user can cause or meet."""


class ConfigError(StrettoError, ValueError):
    """A run file, an override or an argument is wrong."""


class DataError(StrettoError, ValueError):
    """A corpus or a tokenizer is missing, empty or malformed."""


class CheckpointError(StrettoError, ValueError):
    """A checkpoint is missing, damaged, half-written or for another model."""


class ScheduleError(StrettoError, ValueError):
    """A schedule is not complete, not ordered, or can't finish."""


class UnsupportedError(StrettoError, NotImplementedError):
    """This version of Stretto can't do what was asked."""


class RankError(StrettoError, RuntimeError):
    """A rank raised, died or fell silent."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the choice closest to ``name``, or ``""``.

    >>> nearest("sequense_length", ["steps", "sequence_length"])
    "; did you mean 'sequence_length'?"
    """
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
