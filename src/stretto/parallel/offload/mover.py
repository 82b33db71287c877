"""Copies between device and host that run beside the arithmetic.

    arithmetic   F0      F1      F2          B0              wait: what comes behind it on the arithmetic's side may
    out             │copy 0│  wait                            use the targets, and give the sources' memory to others
    back                            │copy 0│ wait

On CUDA each direction is a stream, and ``wait`` an event that the compute stream waits for: the host goes on.  On a
CPU each direction is a thread, and the copy a real one into other memory, so that one code path serves both and
what is proved of the one holds for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Target and source of each copy, of equal size."""


class Copies(Protocol):
    """Copies under way."""

    def wait(self) -> None:
        """Let what is computed from now on come after them; to be called once."""


class Mover(Protocol):
    """Starts copies; each sees what was computed before it was asked for."""

    pinned: bool
    """Whether host memory should be pinned."""

    def out(self, pairs: Pairs) -> Copies:
        """Start copies to the host."""

    def back(self, pairs: Pairs) -> Copies:
        """Start copies from the host; what ``out`` brought there has been waited for."""


def mover_for(device: torch.device) -> Mover:
    """The mover of what lies on ``device``."""
    return CudaMover() if device.type == "cuda" else ThreadMover()


class ThreadMover:
    """One thread for each direction."""

    pinned = False

    def __init__(self) -> None:
        self._out, self._back = (ThreadPoolExecutor(1, f"stretto-{name}") for name in ("offload", "load"))

    def out(self, pairs: Pairs) -> Copies:
        """Copy in the one thread."""
        return _InThread(self._out.submit(_copy_once, list(pairs)))

    def back(self, pairs: Pairs) -> Copies:
        """Copy in the other."""
        return _InThread(self._back.submit(_copy_once, list(pairs)))


class _InThread:
    """Copies that a thread makes."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Return when they are made; an error of theirs is raised here."""
        self._future.result()


def _copy_once(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy; the thread lets go of all tensors before whoever waits goes on."""
    _copy(pairs)
    pairs.clear()


def _copy(pairs: Pairs, *, non_blocking: bool = False) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=non_blocking)


class CudaMover:
    """One stream for each direction.

    Memory needs no ``record_stream``: sources and targets are the compute stream's own, which waits for each copy
    before it may give them to others, so that what is reserved depends on the schedule and not on the hour.

    Args:
        cuda: where streams come from; tests give one that only remembers the calls.
    """

    pinned = True

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._out, self._back = cuda.Stream(), cuda.Stream()

    def out(self, pairs: Pairs) -> Copies:
        """Copy on the one stream."""
        return self._on(self._out, pairs)

    def back(self, pairs: Pairs) -> Copies:
        """Copy on the other."""
        return self._on(self._back, pairs)

    def _on(self, stream: Any, pairs: Pairs) -> Copies:
        # Behind the arithmetic so far, which made the sources, or still reads what lay where the targets are; as
        # the arithmetic has waited for every copy that was waited for, so has this one.
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            _copy(pairs, non_blocking=True)
        return _OnStream(self._cuda, stream.record_event())


class _OnStream:
    """Copies on a stream."""

    def __init__(self, cuda: Any, event: Any) -> None:
        self._cuda, self._event = cuda, event

    def wait(self) -> None:
        """The compute stream waits; the host doesn't."""
        self._cuda.current_stream().wait_event(self._event)
