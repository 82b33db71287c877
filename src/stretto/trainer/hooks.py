"""What the process around a training loop offers it; imports nothing that is slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stretto.spec.contract import Observer, Silent


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the process around the loop offers it."""

    observer: Observer
    """Hears every operation (oplog)."""
    should_stop: Callable[[], bool]
    """True once this process was asked to stop; the ranks agree at the end of a step."""
    say: Callable[[str], None]
    """Prints a line for people."""
    pipeline: Callable[[Sequence[int]], None] = lambda ranks: None
    """Told the ranks of the world, by position, of the pipeline that this one is part of."""


QUIET = Hooks(observer=Silent(), should_stop=lambda: False, say=lambda line: None)
"""Hooks that do nothing."""
