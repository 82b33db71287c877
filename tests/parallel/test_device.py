"""How far the host comes ahead of an accelerator, as far as a host can tell."""

from __future__ import annotations

import sys
from typing import Any

import torch

from stretto.parallel.pipeline.device import AHEAD, Accelerator, Present, device_for
from stretto.resilience.place import lines_of, place_of
from stretto.schedule.op import Kind, Op


class Events:
    """Events like those of ``torch.cuda``, that only remember the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.launched = 0
        self.waiting = False

    def Event(self, *, blocking: bool) -> Mark:
        assert blocking, "a host that spins takes a core from the ranks beside it"
        return Mark(self)


class Mark:
    def __init__(self, events: Events) -> None:
        self.events, self.of = events, ""

    def record(self) -> None:
        self.of = f"F{self.events.launched}"
        self.events.launched += 1

    def synchronize(self) -> None:
        if self.of:
            self.events.calls.append(f"F{self.events.launched} waits for {self.of}")
            self.events.waiting = place_of(lines_of(sys._getframe(1))).waits


def test_the_host_is_a_few_operations_ahead() -> None:
    events: Any = Events()
    device = Accelerator(cuda=events)
    for microbatch in range(AHEAD + 3):
        op = Op(Kind.F, stage=0, microbatch=microbatch)
        device.begin(op)
        device.end(op)
    assert events.calls == [f"F{AHEAD + n} waits for F{n}" for n in range(3)]
    assert events.waiting, "who watches takes it for the cause of a hang"


def test_a_host_that_computes_itself_waits_for_nothing() -> None:
    assert isinstance(device_for(torch.device("cpu")), Present)
