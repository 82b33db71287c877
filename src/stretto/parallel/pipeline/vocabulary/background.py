"""Collectives that follow one another while the device computes something else.

The gradient of S's input needs first what all ranks know of a token's logits: two collectives with arithmetic
between them.  They run beside the operations of the schedule, so that a rank waits for the last of
them where an arrow says so, and nowhere else:

    rank 0   S0 │ F5      │ B3      │ T0        on the host: a thread that waits
                └── scores ─── dx ──┘           on an accelerator: a stream, which waits by itself

Every rank hands over its tasks in the same order, which the verifier has checked (verifier/vocabulary.py).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

Task = Callable[[], tuple[Tensor, ...]]
"""Communicates, and gives what came of it."""
Jobs = SimpleQueue[tuple[Task, Future[tuple[Tensor, ...]]] | None]


class Promise(Protocol):
    """What a task will give."""

    def result(self) -> tuple[Tensor, ...]:
        """Wait for it; raises what the task raised."""

    def found(self) -> tuple[Tensor, ...]:
        """The same without waiting; nothing where it isn't there, or there is none."""


class Background(Protocol):
    """Runs tasks one after the other."""

    def submit(self, task: Task) -> Promise:
        """Run ``task`` when the earlier ones are over."""


def background(device: torch.device) -> Background:
    """What runs tasks beside the arithmetic of ``device``."""
    return SideStream(device) if device.type == "cuda" else SideThread()


class SideThread:
    """A thread that ends with its owner; it never keeps the process alive."""

    def __init__(self) -> None:
        self._jobs: Jobs = SimpleQueue()
        threading.Thread(target=_work, args=(self._jobs,), daemon=True, name="vocabulary").start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, task: Task) -> Promise:
        """Put it behind the others."""
        promise: Future[tuple[Tensor, ...]] = Future()
        self._jobs.put((task, promise))
        return _Later(promise)


def _work(jobs: Jobs) -> None:
    while (job := jobs.get()) is not None:
        _run(*job)
        del job  # its tensors can go while the thread waits


def _run(task: Task, promise: Future[tuple[Tensor, ...]]) -> None:
    try:
        with torch.no_grad():
            promise.set_result(task())
    except BaseException as error:
        promise.set_exception(error)


class _Later:
    def __init__(self, future: Future[tuple[Tensor, ...]]) -> None:
        self._future = future

    def result(self) -> tuple[Tensor, ...]:
        return self._future.result()

    def found(self) -> tuple[Tensor, ...]:
        return self._future.result() if self._future.done() and self._future.exception() is None else ()


class SideStream:
    """A stream of its own: tasks are launched at once and wait for each other there, not on the host."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def submit(self, task: Task) -> Promise:
        """Launch it behind what the current stream does so far."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.no_grad():
            found = task()
        return _Launched(found, self._stream.record_event(), task)


class _Launched:
    def __init__(self, found: tuple[Tensor, ...], event: torch.cuda.Event, task: Task) -> None:
        # The task holds its operands until the current stream has waited, after which their memory may be reused.
        self._found, self._event, self._task = found, event, task

    def result(self) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream()
        current.wait_event(self._event)
        for tensor in self._found:
            tensor.record_stream(current)
        del self._task
        return self._found

    def found(self) -> tuple[Tensor, ...]:
        return self._found
