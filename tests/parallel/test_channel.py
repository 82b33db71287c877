"""Channels: the header handshake, the order of receives, and another batch shape in the next step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ranks import Ranks
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.channel import Message, PeerChannel, routes_of
from stretto.parallel.pipeline.segment import tensors_of
from stretto.schedule.families import build
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
    channel = PeerChannel(build_mesh(PlanSpec(), 0), torch.device("cpu"), [ALONE])
    channel.begin_step([], [(1,)])
    with pytest.raises(UnsupportedError, match=r"stage 0 passes on .* at most 6 tensors of at most 6 dims"):
        channel.send(Message("F", 0, 0, 1), value)


def test_routes_are_those_of_the_sends() -> None:
    assert routes_of(SCHEDULE) == {("F", 0, 1), ("B", 1, 0)}
    loop = lower(build("interleaved", ranks=2, microbatches=2, chunks=2))
    assert routes_of(loop) == {("F", 0, 1), ("F", 1, 0), ("B", 0, 1), ("B", 1, 0)}
    assert routes_of(ALONE) == set()
