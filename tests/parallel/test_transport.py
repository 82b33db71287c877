"""Messages on CUDA, as far as a host can tell: which calls are made, in which order and on which stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from parallel.test_offloading import Fake
from stretto.parallel.collectives import DONE
from stretto.parallel.mesh import build_mesh
from stretto.parallel.pipeline.transport import CONNECTIONS, CudaTransport, check_connections
from stretto.parallel.pipeline.vocabulary import groups
from stretto.spec.errors import ConfigError
from stretto.spec.plan import PlanSpec

CPU = torch.device("cpu")
GROUP: Any = "route"


@dataclass(frozen=True)
class Part:
    """A tensor that remembers whose it is."""

    fake: Fake
    name: str

    def record_stream(self, stream: Any) -> None:
        self.fake.calls.append(f"{self.name} belongs to {stream.name} too")


class FakeP2P:
    """The calls of ``torch.distributed`` that only remember themselves."""

    isend, irecv = "send", "receive"

    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def P2POp(self, call: str, tensor: Any, *, group: str, group_peer: int, tag: int) -> str:
        what = tensor.name if isinstance(tensor, Part) else f"{str(tensor.dtype)[6:]}{list(tensor.shape)}"
        return f"{call} {what} {group} {group_peer} {tag}"

    def batch_isend_irecv(self, operations: Sequence[str]) -> list[Any]:
        self.fake.calls.append(f"on {self.fake.current}: {', '.join(operations)}")
        return [self]

    def wait(self) -> None:
        self.fake.calls.append(f"{self.fake.current} waits")


def transport() -> tuple[Fake, CudaTransport]:
    fake = Fake()
    return fake, CudaTransport(CPU, cuda=fake, p2p=FakeP2P(fake))


def test_a_message_is_one_batch_behind_the_arithmetic() -> None:
    fake, cuda = transport()
    parts: Any = [Part(fake, "x"), Part(fake, "mask")]
    works, kept = cuda.send(GROUP, 1, parts, 7)
    assert fake.calls == ["on compute: send x route 1 7, send mask route 1 8"] and kept is parts
    cuda.wait((works, kept))
    assert fake.calls[1:] == ["compute waits", "x belongs to compute too", "mask belongs to compute too"]
    assert cuda.send(GROUP, 1, [], 9)[0] == ()


def test_receives_are_posted_on_a_stream_of_their_own_and_handed_to_the_arithmetic() -> None:
    fake, cuda = transport()
    works, tensors = cuda.receive(GROUP, 0, [((2, 3), torch.float32), ((2,), torch.bool)], 4)
    assert [tuple(t.shape) for t in tensors] == [(2, 3), (2,)] and fake.current == "compute"
    assert fake.calls == ["on out: receive float32[2, 3] route 0 4, receive bool[2] route 0 5"]
    received: Any = [Part(fake, "x")]
    cuda.wait((works, received))
    assert fake.calls[1:] == ["compute waits", "x belongs to compute too"]


def test_routes_are_made_by_a_number_each() -> None:
    fake, cuda = transport()
    cuda.connect(GROUP, 1, sending=True)
    cuda.connect(GROUP, 0, sending=False)
    assert fake.calls == [
        "on compute: send float32[1] route 1 0",
        "compute waits",
        "on compute: receive float32[1] route 0 0",
        "compute waits",
    ]


def test_ranks_of_vocabulary_passes_meet_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[int, bool]] = []

    class Meeting:
        def connect(self, group: str, peer: int, *, sending: bool) -> None:
            met.append((peer, sending))

    stands_for = {"make_group": GROUP, "all_reduce": DONE, "index_in": 1, "size_of": 3}
    for name, found in stands_for.items():
        monkeypatch.setattr(groups, name, lambda *_, found=found: found)
    transport: Any = Meeting()
    groups.make_groups(build_mesh(PlanSpec(), 0), CPU, transport)
    assert met == 3 * [(0, False), (0, True), (2, True), (2, False)]


@pytest.mark.parametrize(("routes", "given"), [(4, None), (4, "32"), (4, "6"), (40, "32"), (4, "many")])
def test_enough_queues_for_the_streams(routes: int, given: str | None) -> None:
    check_connections(routes, {} if given is None else {CONNECTIONS: given})


def test_too_few_queues_for_the_streams_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"CUDA_DEVICE_MAX_CONNECTIONS = 1 has the streams of 4 .* set it to 32\."):
        check_connections(4, {CONNECTIONS: "1"})
