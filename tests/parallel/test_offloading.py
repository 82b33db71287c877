"""Activations in the host's memory: the same gradients bit by bit, and the memory that the simulator says.

Each rank plays alone, with messages made up (test_runtime_memory); plans on several ranks are in equivalence/.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.test_master import mesh_at
from parallel.test_runtime_memory import BATCH, Echo
from stretto.parallel.offload.mover import CudaMover, ThreadMover
from stretto.parallel.offload.offloader import Offloader
from stretto.parallel.offload.pool import GRAIN, HostPool
from stretto.parallel.pipeline.backward import Deferral
from stretto.parallel.pipeline.runtime import Runtime, Seat
from stretto.parallel.pipeline.segment import Segment, Value
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.unit import LocalUnit
from stretto.schedule.families import build
from stretto.schedule.op import Op
from stretto.schedule.passes.communication import lower
from stretto.schedule.passes.offload import offload
from stretto.schedule.schedule import Schedule
from stretto.schedule.simulate.clock import run
from stretto.schedule.simulate.costs import Costs
from stretto.schedule.simulate.memory import peaks_over_time
from stretto.spec.sharding import Sharding

WIDTH = 4
UNIT = 2 * WIDTH * WIDTH * 4
FAMILIES = (("1f1b", {}), ("interleaved", {"chunks": 2}), ("v-half", {"chunks": 2}), ("gpipe", {}), ("zb-h2", {}))


class Tally:
    """Counts the bytes of activations on the device: what stages keep and what an offloader says, each storage once."""

    def __init__(self, stages: dict[int, Stage]) -> None:
        self._stages = stages
        self._own = {pointer(p) for stage in stages.values() for unit in stage.units for p in unit.parameters}
        self._seen: Counter[tuple[int, int]] = Counter()
        self.most = 0

    def __call__(self, tensor: Tensor) -> object:
        """Count it as long as what is returned lives."""
        seen, key = Seen(), (pointer(tensor), tensor.untyped_storage().nbytes())
        self._seen[key] += 1
        self._look()
        finalize(seen, self._forget, key)
        return seen

    def _forget(self, key: tuple[int, int]) -> None:
        self._seen[key] -= 1

    def begin(self, op: Op) -> None:
        """Nothing."""

    def end(self, op: Op) -> None:
        """Count."""
        self._look()

    def _look(self) -> None:
        kept = [t for stage in self._stages.values() for t in stage.kept_tensors()]
        here = {pointer(t): t.untyped_storage().nbytes() for t in kept if t.untyped_storage().nbytes() > 4}
        here |= {key: size for (key, size), count in self._seen.items() if count}
        self.most = max(self.most, sum(size for key, size in here.items() if key not in self._own))


class Seen:
    """Lives as long as what was counted."""


def pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def stage_of(index: int, num_stages: int) -> Stage:
    """A layer that keeps two tensors [WIDTH, WIDTH], its input and what tanh gives, and two between I and W."""
    layer = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(index))
    sharding = Sharding.whole(f"blocks.{index}.weight", (WIDTH, WIDTH))
    unit = LocalUnit(f"blocks.{index}", [(layer.weight, sharding)], mesh=mesh_at(), compute=torch.float32)

    def block(x: Value, context: Any, batch: Any) -> Tensor:
        y = torch.tanh(layer(x)) * 2.0
        return y.sum() if index == num_stages - 1 else y

    segment = Segment(name=str(index), run=block, units=[unit], deferral=Deferral(layer))
    inputs = Segment(name="inputs", run=lambda x, context, batch: torch.ones(WIDTH, WIDTH), units=[])
    return Stage(index, [segment] if index else [inputs, segment])


@dataclass(frozen=True, slots=True)
class Played:
    most: int
    """Bytes of activations."""
    gradients: list[Tensor]
    offloader: Offloader | None


def play(schedule: Schedule, rank: int, *, limit: int | None = None) -> Played:
    """Two steps of one rank."""
    held = {stage for voice in range(len(schedule.placement)) for stage in schedule.stages_of(rank, voice)}
    stages = {index: stage_of(index, schedule.num_stages) for index in sorted(held)}
    tally = Tally(stages)
    runtime = Runtime(stages, lower(schedule), Seat(rank=rank, channel=Echo(), device=tally))
    if runtime.offloader is not None:
        runtime.offloader.watch, runtime.offloader.pool.limit_bytes = tally, limit
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t.detach(), tally(t)), lambda pair: pair[0]):
            runtime.step([BATCH] * schedule.num_microbatches, lambda _: None, lambda: torch.ones(()))
    gradients = [unit.parameters[0].grad for unit in runtime.units if unit.parameters]
    return Played(tally.most, [g for g in gradients if g is not None], runtime.offloader)


@pytest.mark.parametrize(("name", "shape"), FAMILIES)
def test_what_a_rank_keeps_is_what_the_simulator_says(name: str, shape: dict[str, Any]) -> None:
    bare = build(name, ranks=4, microbatches=8, **shape)
    costs = Costs(O=1.0, L=1.0)
    schedule = offload(bare, costs=costs)
    peaks, before = peaks_over_time(run(schedule, costs)), peaks_over_time(run(bare, costs))
    unit = UNIT * (bare.num_stages // 4)
    for rank in range(4):
        with_it, without = play(schedule, rank), play(bare, rank)
        assert all(torch.equal(a, b) for a, b in zip(with_it.gradients, without.gradients, strict=True))
        assert without.most / unit == before[rank]
        assert with_it.most / unit == peaks[rank]
        if with_it.offloader is not None:
            pool = with_it.offloader.pool
            assert pool.held_bytes == pool.peak_bytes and pool.used_bytes == 0  # the second step's are the first's


def test_a_fraction_of_some_stages_moves() -> None:
    bare = build("gpipe", ranks=2, microbatches=8)
    schedule = offload(bare, fraction=0.5, stages="0")
    assert (play(schedule, 1).offloader, play(bare, 0).offloader) == (None, None)
    half, none = play(schedule, 0), play(bare, 0)
    assert torch.equal(half.gradients[0], none.gradients[0])
    assert half.most / UNIT == peaks_over_time(run(schedule, Costs(O=1.0, L=1.0)))[0] < none.most / UNIT


def test_what_the_host_has_no_room_for_stays() -> None:
    bare = build("gpipe", ranks=2, microbatches=6)
    schedule = offload(bare)
    full, tight = play(schedule, 0), play(schedule, 0, limit=4 * GRAIN)
    assert full.offloader is not None and tight.offloader is not None
    assert full.offloader.pool.refused == 0 and tight.offloader.pool.refused == 2 * 2
    assert tight.offloader.pool.held_bytes == 4 * GRAIN
    assert full.most < tight.most < play(bare, 0).most
    assert all(torch.equal(a, b) for a, b in zip(full.gradients, tight.gradients, strict=True))


def test_buffers_are_used_again_within_the_limit() -> None:
    pool = HostPool(3 * GRAIN)
    first, second = pool.take(GRAIN + 1), pool.take(5)
    assert first is not None and second is not None and pool.held_bytes == pool.used_bytes == 3 * GRAIN
    assert pool.take(1) is None
    pool.give(first)
    again = pool.take(2 * GRAIN)
    assert again is first
    pool.give(first)
    assert pool.take(1) is not None and pool.held_bytes == 2 * GRAIN  # the unused one of another size made room
    assert (pool.peak_bytes, pool.refused) == (3 * GRAIN, 1)


def test_pinned_buffers_are_as_large_as_what_is_taken_for_them() -> None:
    sizes = [1, GRAIN, GRAIN + 1, 3 * GRAIN, 4 * GRAIN, 5 * GRAIN]
    assert [HostPool(pinned=True).size_of(size) // GRAIN for size in sizes] == [1, 1, 2, 4, 4, 8]
    assert [HostPool().size_of(size) // GRAIN for size in sizes] == [1, 1, 2, 3, 4, 5]


def test_views_share_what_moves_and_what_others_hold_stays() -> None:
    weight, table = torch.randn(6, 6, requires_grad=True), torch.randn(4, 6)
    x = torch.randn(4, 6, requires_grad=True)
    offloader = Offloader([(0, 0)])
    activation = offloader.note((0, 0), x.device, ({"table": [table]},))

    def loss(x: Tensor) -> Tensor:
        q, k = (x @ weight * table).chunk(2, dim=1)  # two views of one storage
        return (functional.softmax(q * k, dim=1) * torch.exp(k)).sum()

    with activation.noting([weight]):
        result = loss(x)
    expected = torch.autograd.grad(loss(x), [x, weight])
    sizes = sorted(storage.num_bytes for storage in activation.storages())
    assert sizes.count(4 * 6 * 4) == 2 and pointer(weight) not in {pointer(s.device) for s in activation.storages()}
    there = [weakref.ref(s.device.untyped_storage()) for s in activation.storages()]
    offloader.offload((0, 0), [x])
    offloader.after_computing()
    offloader.before_memory()
    assert pointer(x) != 0 and x.untyped_storage().nbytes() == 4 and all(ref() is None for ref in there)
    offloader.load((0, 0))
    offloader.before_backward((0, 0))
    found = torch.autograd.grad(result, [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_more_than_bytes_stays() -> None:
    activation = Offloader([(0, 0)]).note((0, 0), torch.device("cpu"), ())
    table = torch.eye(3).to_sparse().requires_grad_()
    x = torch.randn(3, 3, dtype=torch.complex64, requires_grad=True)
    with activation.noting([]):
        result = torch.sparse.mm(table, torch.ones(3, 2)).sum() + (x.conj() * x).sum().real
    assert {storage.num_bytes for storage in activation.storages()} <= {x.untyped_storage().nbytes(), 3 * 2 * 4}
    found = torch.autograd.grad(result, x)[0]
    assert torch.equal(found, 2 * x.detach())


class Fake:
    """Streams and events like those of ``torch.cuda``, that only remember the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.made = 0
        self.current = "compute"

    def Stream(self) -> FakeStream:
        self.made += 1
        return FakeStream(self, ("out", "back")[self.made - 1])

    def current_stream(self) -> FakeStream:
        return FakeStream(self, self.current)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


@dataclass(frozen=True)
class FakeStream:
    cuda: Fake
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.calls.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.cuda.calls.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.cuda.calls.append(f"{self.name} is marked")
        return f"the mark of {self.name}"


class Traced:
    """A target that remembers on which stream it was copied to."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def copy_(self, source: object, *, non_blocking: bool) -> None:
        assert non_blocking
        self.fake.calls.append(f"{self.fake.current} copies")


def test_streams_wait_for_each_other_and_the_host_for_none() -> None:
    fake = Fake()
    mover = CudaMover(fake)
    going = mover.out([(Traced(fake), None)])  # type: ignore[list-item]
    going.wait()
    coming = mover.back([(Traced(fake), None)])  # type: ignore[list-item]
    coming.wait()
    assert mover.pinned and fake.calls == [
        "out waits for compute",
        "out copies",
        "out is marked",
        "compute waits for the mark of out",
        "back waits for compute",
        "back copies",
        "back is marked",
        "compute waits for the mark of back",
    ]


def test_an_error_of_the_copying_thread_is_raised_where_it_is_waited_for() -> None:
    copies = ThreadMover().out([(torch.empty(3), torch.empty(4))])
    with pytest.raises(RuntimeError, match="size"):
        copies.wait()
