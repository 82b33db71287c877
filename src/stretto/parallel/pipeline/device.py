"""What the runtime's operations compute on, as far as the runtime must know.

    begin ──► the operation's kernels are launched ──► (the channel tends its messages) ──► end

On a host that computes itself there is nothing to do in either; an accelerator goes on computing after ``end``, in
the order of its stream; a virtual device (virtual.py) makes ``end`` wait.
"""

from __future__ import annotations

from typing import Protocol

from stretto.schedule.op import Op


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
