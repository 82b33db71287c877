"""What the runtime's operations compute on, as far as the runtime must know.

    begin ──► the operation's kernels are launched ──► (the channel tends its messages) ──► end

On a host that computes itself there is nothing to do in either; a virtual device (virtual.py) makes ``end`` wait.  An
accelerator goes on computing after ``end``, in the order of its stream, and the host comes so far ahead of it:

    host    F0 F1 F2 F3 F4 │ waits for F0 │ F5 │ waits for F1 │ ...            AHEAD = 4
    device  │──── F0 ────││──── F1 ────││── ...

Without that it would launch a whole step at once.  Then all messages of the step would have memory at the same time,
since what another stream received comes back only when the arithmetic has passed it, and whoever watches or records
the rank (resilience) would be told how far the host is, not the device.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from stretto.schedule.op import Op

AHEAD = 4
"""Operations that an accelerator may have before it: enough that it never waits for the host."""


class Device(Protocol):
    """Hears when an operation that computes begins and ends; nothing that it does may change what is computed."""

    def begin(self, op: Op) -> None:
        """The operands of ``op`` are there."""

    def end(self, op: Op) -> None:
        """Its results are there, or will be when the device has come so far."""


class Present:
    """The device that tensors lie on: it needs nothing."""

    def begin(self, op: Op) -> None:
        """Nothing."""

    def end(self, op: Op) -> None:
        """Nothing."""


class Accelerator:
    """A CUDA device, in the order of the stream that is current when an operation ends.

    Args:
        cuda: where events come from; tests give one that only remembers the calls.
    """

    def __init__(self, *, cuda: Any = torch.cuda) -> None:
        self._marks = [cuda.Event(blocking=True) for _ in range(AHEAD)]
        self._at = 0

    def begin(self, op: Op) -> None:
        """Nothing."""

    def end(self, op: Op) -> None:
        """Wait for the operation that was launched ``AHEAD`` before this one."""
        mark = self._marks[self._at % AHEAD]
        self.wait(mark)
        mark.record()
        self._at += 1

    def wait(self, mark: Any) -> None:
        """Until the device has come to a mark; at once, where nothing was marked yet.

        Where no rank moves, a device that isn't there waits for a message: a rank that is seen here isn't the cause
        (resilience/place.py knows it by the function's name).
        """
        mark.synchronize()


def device_for(device: torch.device) -> Device:
    """What an operation computes on whose tensors lie on ``device``."""
    return Accelerator() if device.type == "cuda" else Present()
