"""What messages hold, and how long, with a handle for each of them (gloo) and with one for all (NCCL)."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from stretto.parallel.wire import LINGERING, Wire


class Handle:
    """Of messages that have been sent and received; counts who waits for it."""

    def __init__(self) -> None:
        self.waits = 0

    def wait(self) -> None:
        self.waits += 1


@pytest.fixture(params=["one each", "one for all"])
def handles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """Those that were given out."""
    given: list[Handle] = []

    def batch(ops: list[Any]) -> list[Handle]:
        found = [Handle() for _ in (ops if request.param == "one each" else ops[:1])]
        given.extend(found)
        return found

    monkeypatch.setattr(dist, "P2POp", lambda *parts: None)
    monkeypatch.setattr(dist, "batch_isend_irecv", batch)
    return given


def test_what_was_waited_for_is_let_go(handles: list[Handle]) -> None:
    """A transfer that somebody still has, as those of a seat's exchanges, keeps nothing of what it brought."""
    transfer = Wire(None).start([], [(torch.zeros(3), 0)])
    arrived = weakref.ref(transfer.wait()[0])
    assert arrived() is None and [handle.waits for handle in handles] == [1]


def test_what_leaves_is_kept_until_its_handle_was_waited_for(handles: list[Handle]) -> None:
    """Also while many messages come and go that were begun later."""
    wire, leaving = Wire(None), torch.ones(3)
    sent = weakref.ref(leaving)
    transfer = wire.start([(leaving, 0)], [(torch.zeros(3), 0)])
    del leaving
    own = list(handles)
    for _ in range(2 * LINGERING):
        wire.start([(torch.ones(3), 0)], [(torch.zeros(3), 0)]).wait()
    assert sent() is not None or own[-1].waits
    transfer.wait()
    wire.flush()
    assert sent() is None and all(handle.waits for handle in handles)


def test_messages_that_only_leave_are_waited_for(handles: list[Handle]) -> None:
    wire = Wire(None)
    wire.start([(torch.ones(3), 0), (torch.ones(2), 0)], [])
    wire.flush()
    assert all(handle.waits for handle in handles)
