"""What a rank does outside its schedule, told to its observer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stretto.spec.contract import Observer


@contextmanager
def during(observer: Observer, phase: str) -> Iterator[None]:
    """The rank is in ``phase``; if that fails, it stays there for whoever asks later."""
    observer.begin(phase)
    yield
    observer.end()
