"""Channels: the header handshake, the order of receives, and another batch shape in the next step."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from ranks import Ranks
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline import channel as channels
from stretto.parallel.pipeline.channel import AHEAD, Message, PeerChannel, routes_of
from stretto.parallel.pipeline.delivery import arrivals
from stretto.parallel.pipeline.header import HEADER, header_of, shapes_in
from stretto.parallel.pipeline.segment import tensors_of
from stretto.schedule.families import build
from stretto.schedule.op import Kind
from stretto.schedule.passes.communication import lower
from stretto.spec.errors import UnsupportedError
from stretto.spec.plan import PlanSpec

COUNT = 5
ALONE = lower(build("gpipe", ranks=1, microbatches=2))
SCHEDULE = lower(build("1f1b", ranks=2, microbatches=COUNT))


def value_of(microbatch: int, length: int) -> tuple[Tensor, ...]:
    """Every type of tensor that a model may pass on; one of them transposed, one a number."""
    x = torch.arange(2 * length * 3, dtype=torch.float64).view(2, length, 3) + 100 * microbatch
    return (
        x.transpose(0, 1),
        torch.full((length,), microbatch),
        x[0] > 3,
        x.bfloat16(),
        torch.tensor(float(microbatch), dtype=torch.float32),
    )


def equal(found: Any, expected: Any) -> bool:
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    pairs = zip(tensors_of(found), tensors_of(expected), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def exchange(rank: int, world: int, lengths: list[int], single: bool) -> list[bool]:
    """Rank 0 sends forward, rank 1 answers backward; one step for each length."""
    channel = PeerChannel(build_mesh(PlanSpec(pp=2), rank), torch.device("cpu"), [SCHEDULE])

    def pick(microbatch: int, length: int) -> Any:
        return value_of(microbatch, length)[0] if single else value_of(microbatch, length)

    found = []
    for length in lengths:
        direction = "B" if rank == 0 else "F"
        receives = [Message(direction, 0, m, 1 - rank) for m in range(COUNT)]  # type: ignore[arg-type]
        channel.begin_step(receives, [(2, length)] * COUNT)
        if rank == 0:
            for m in range(COUNT):
                channel.send(Message("F", 0, m, 1), pick(m, length))
        for message in receives:
            value = channel.receive(message)
            found.append(equal(value, pick(message.microbatch, length)))
            if rank == 1:
                channel.send(Message("B", 0, message.microbatch, 0), value)
        channel.end_step()
    return found


@pytest.mark.parametrize("single", [True, False])
def test_values_arrive_as_sent_under_every_batch_shape(ranks: Ranks, single: bool) -> None:
    found = ranks.run(exchange, 2, [4, 7, 4], single)
    assert found == [[True] * 3 * COUNT] * 2


def order_on_rank(rank: int, world: int) -> tuple[str, str, list[float]]:
    channel = PeerChannel(build_mesh(PlanSpec(pp=2), rank), torch.device("cpu"), [SCHEDULE])
    messages = [Message("F", 0, m, 1 - rank) for m in range(2)]
    channel.begin_step(messages if rank else [], [(1,), (1,)])
    if rank == 0:
        for message in messages:
            channel.send(message, torch.tensor([float(message.microbatch)]))
        channel.end_step()
        return "", "", []
    with pytest.raises(AssertionError) as wrong:
        channel.receive(messages[1])
    first = tensors_of(channel.receive(messages[0]))[0].item()
    with pytest.raises(AssertionError) as early:
        channel.end_step()
    second = tensors_of(channel.receive(messages[1]))[0].item()
    channel.end_step()
    return str(wrong.value), str(early.value), [first, second]


def test_receives_come_in_the_order_of_the_schedule(ranks: Ranks) -> None:
    _, (wrong, early, values) = ranks.run(order_on_rank, 2)
    assert "is not the next from its source" in wrong and "were not received" in early
    assert values == [0.0, 1.0]


class Arriving:
    """A transport on which everything has arrived; it remembers what was asked for."""

    def __init__(self, *, early: bool) -> None:
        self.early, self.posted = early, 0

    def receive(self, group: None, peer: int, layout: Any, tag: int) -> Any:
        if layout is HEADER:
            return (), [header_of(torch.zeros(3), 0)]
        self.posted += 1
        return (), [torch.zeros(3)]

    def wait(self, started: Any) -> None:
        """It is there."""


@pytest.mark.parametrize(("early", "ahead"), [(True, AHEAD), (False, 0)])
def test_no_receive_is_posted_early_where_it_must_not_be(
    early: bool, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport: Any = Arriving(early=early)
    monkeypatch.setattr(channels, "transport_for", lambda device, routes: transport)
    channel = PeerChannel(build_mesh(PlanSpec(), 0), torch.device("cpu"), [ALONE])
    channel._inlets = {("F", 0): channels._Inlet(None, 0)}  # type: ignore[arg-type]
    messages = [Message("F", 0, m, 0) for m in range(COUNT)]
    channel.begin_step(messages, [(3,)] * COUNT)
    for at, message in enumerate(messages):
        channel.tend()
        assert transport.posted == (0 if at == 0 else min(at + ahead, COUNT))  # of the first the shape isn't known
        assert isinstance(channel.receive(message), Tensor)
        assert transport.posted >= at + 1
    assert transport.posted == COUNT


def mixed_on_rank(rank: int, world: int) -> bool:
    """Micro-batches of one step with three lengths, met again in another order."""
    channel = PeerChannel(build_mesh(PlanSpec(pp=2), rank), torch.device("cpu"), [SCHEDULE])
    good = True
    for lengths in ([4, 7, 4, 2, 7], [2, 2, 7, 4, 4]):
        direction = "B" if rank == 0 else "F"
        receives = [Message(direction, 0, m, 1 - rank) for m in range(COUNT)]  # type: ignore[arg-type]
        channel.begin_step(receives, lengths)
        for m, length in enumerate(lengths if rank == 0 else []):
            channel.send(Message("F", 0, m, 1), value_of(m, length))
        for message, length in zip(receives, lengths, strict=True):
            channel.tend()
            value = channel.receive(message)
            good = good and equal(value, value_of(message.microbatch, length))
            if rank == 1:
                channel.send(Message("B", 0, message.microbatch, 0), value)
        channel.end_step()
    return good


def test_micro_batches_of_a_step_may_differ(ranks: Ranks) -> None:
    assert ranks.run(mixed_on_rank, 2) == [True, True]


def let_go_on_rank(rank: int, world: int) -> list[int]:
    """How many of the tensors that rank 0 sent are alive after each message that it receives."""
    channel = PeerChannel(build_mesh(PlanSpec(pp=2), rank), torch.device("cpu"), [SCHEDULE])
    alive: list[weakref.ref[Tensor]] = []
    counts = []
    proved = arrivals(SCHEDULE, rank)
    for name, stage, m, _ in SCHEDULE.rows(rank):
        kind = Kind(name)
        if (kind, stage, m) == next((Kind(k), s, b) for k, s, b, _ in SCHEDULE.rows(rank)):
            channel.begin_step(
                [
                    Message("F" if k == Kind.RECV_F else "B", 0, b, 1 - rank, proved[k, s, b])
                    for k, s, b, _ in SCHEDULE.rows(rank)
                    if k in (Kind.RECV_F, Kind.RECV_B)
                ],
                [(1,)] * COUNT,
            )
        direction: Any = "F" if kind in (Kind.SEND_F, Kind.RECV_F) else "B"
        if kind in (Kind.SEND_F, Kind.SEND_B):
            value = torch.zeros(3)
            alive.append(weakref.ref(value.untyped_storage()))
            channel.send(Message(direction, 0, m, 1 - rank), value)
            del value
        elif kind in (Kind.RECV_F, Kind.RECV_B):
            channel.receive(Message(direction, 0, m, 1 - rank, proved[kind, stage, m]))
            channel.tend()
            counts.append(sum(ref() is not None for ref in alive))
    channel.end_step()
    return [*counts, sum(ref() is not None for ref in alive)]


def test_what_has_arrived_is_let_go_within_the_step(ranks: Ranks) -> None:
    first, last = ranks.run(let_go_on_rank, 2)
    # 1f1b: when a gradient comes back, all that rank 0 sent has arrived but what it sent since.
    assert first == [1] * (COUNT - 1) + [0, 0]
    # The last rank's gradient is known to be gone when the next activation but one, sent after it, comes.
    assert last[-1] == 0 and max(last) <= 2


def test_a_receive_proves_what_its_sender_had_received() -> None:
    # Rank 1 sends the gradient of micro-batch m after it has received m + 1 activations.
    proved = arrivals(SCHEDULE, 0)
    assert [proved[Kind.RECV_B, 0, m] for m in range(COUNT)] == [(m + 1, 0) for m in range(COUNT)]
    # Rank 0 sends activations 0 and 1 before it has received a gradient, then one after each.
    proved = arrivals(SCHEDULE, 1)
    assert [proved[Kind.RECV_F, 1, m] for m in range(COUNT)] == [(0, max(0, m - 1)) for m in range(COUNT)]


@pytest.mark.parametrize(
    "value",
    [
        tuple(torch.zeros(1) for _ in range(7)),
        torch.zeros(1, 1, 1, 1, 1, 1, 1),
        torch.zeros(2, dtype=torch.complex64),
    ],
    ids=["seven tensors", "seven dims", "complex"],
)
def test_what_cannot_travel_is_refused_in_a_sentence(value: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"stage 3 passes on .* at most 6 tensors of at most 6 dims"):
        header_of(value, 3)


def test_a_header_says_what_follows() -> None:
    value = value_of(1, 4)
    shapes = shapes_in(header_of(value, 0))
    assert shapes.tensors == tuple((tuple(t.shape), t.dtype) for t in value) and not shapes.single
    assert shapes_in(header_of(value[0], 0)).single


def test_routes_are_those_of_the_sends() -> None:
    assert routes_of(SCHEDULE) == {("F", 0, 1), ("B", 1, 0)}
    loop = lower(build("interleaved", ranks=2, microbatches=2, chunks=2))
    assert routes_of(loop) == {("F", 0, 1), ("F", 1, 0), ("B", 0, 1), ("B", 1, 0)}
    assert routes_of(ALONE) == set()
