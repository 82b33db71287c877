"""Virtual devices: the compute of each operation is a wait, everything else is real.

    F of stage 2 ──► real forward of a small layer, its graph kept ──► wait until start + F seconds
    I            ──► real split backward                           ──► wait until start + I seconds
    W            ──► real weight gradient                          ──► wait until start + W seconds

Processes, messages, the runtime and the split backward are those of training, and the wait counts from the
operation's actual start, so that the time a step takes beyond the simulated one is the runtime's own.
Eight ranks on two cores then behave like eight accelerators.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stretto.parallel.mesh import Mesh
from stretto.parallel.pipeline.backward import Deferral
from stretto.parallel.pipeline.segment import Segment, Value
from stretto.parallel.pipeline.stage import Stage
from stretto.parallel.pipeline.vocabulary.passes import Shard
from stretto.parallel.pipeline.vocabulary.rows import Table
from stretto.parallel.unit import LocalUnit
from stretto.schedule.op import Kind, Op
from stretto.schedule.schedule import Schedule
from stretto.spec.contract import Batch
from stretto.spec.sharding import Sharding

WIDTH = 64
"""Features of the small layer, and tokens of its input."""
ROWS = 8
"""Of a rank's shard, where the schedule has vocabulary passes."""
TIMER_SLACK = 29
"""Linux: ``prctl`` option that says how much later than asked a sleeping thread may wake, in nanoseconds."""


def wake_on_time() -> None:
    """Let sleeps of this thread end when they should instead of up to 50 microseconds later, where that can be had."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(TIMER_SLACK, 1)


class Sleeper:
    """Sleeps that end on time.

    A sleep ends late by what waking takes, a hundredth of an operation of 10 ms: so that much is left out, as learned
    from the sleeps before, and the last microseconds go by awake.
    """

    LEARNS = 0.1
    """Part of a sleep's lateness in what is expected of the next."""
    MOST = 200e-6
    """Seconds that are left out at most."""

    def __init__(self) -> None:
        self._late = 0.0

    def until(self, moment: float) -> None:
        """Return when ``time.perf_counter()`` is ``moment``, in seconds; at once where that is over."""
        now = time.perf_counter()
        asked = moment - now - self._late
        if asked > 0:
            time.sleep(asked)
            late = time.perf_counter() - now - asked
            self._late = min(self.MOST, self._late + self.LEARNS * (late - self._late))
        while time.perf_counter() < moment:
            pass


_sleeper = Sleeper()


def wait_until(moment: float) -> None:
    """Sleep until ``time.perf_counter()`` is ``moment``, in seconds; return at once where that is over."""
    _sleeper.until(moment)


class VirtualDevice:
    """A device on which each kind of operation takes as long as it is told.

    Args:
        seconds: of F, I and W, and of R, S and T where there are such; B takes ``I`` and ``W``.
    """

    def __init__(self, seconds: Mapping[Kind, float]) -> None:
        self._seconds = {Kind.B: seconds[Kind.I] + seconds[Kind.W], Kind.R: seconds[Kind.F], **seconds}
        self._began = 0.0

    def begin(self, op: Op) -> None:
        """Note the time."""
        self._began = time.perf_counter()

    def end(self, op: Op) -> None:
        """Wait for the rest of the operation's duration."""
        wait_until(self._began + self._seconds[op.kind])


def virtual_stages(schedule: Schedule, rank: int, *, mesh: Mesh, width: int = WIDTH) -> dict[int, Stage]:
    """The stages of a rank: a layer [width, width] on [width, width] activations each, the last one summed up.

    With vocabulary passes inputs of the first stage come, and outputs of the last one go, with them.  Parameters are
    this rank's own, also where replicas of a stage lie on other ranks.
    """
    held = {stage for voice in range(len(schedule.placement)) for stage in schedule.stages_of(rank, voice)}
    ends = (-1, -1) if (schedule.kind == Kind.S).any() else (0, schedule.num_stages - 1)
    return {index: _virtual_stage(index, ends, mesh, width) for index in sorted(held)}


def virtual_shard(mesh: Mesh, *, width: int = WIDTH) -> Shard:
    """A rank's rows [ROWS, width] of embedding and head each, for tokens below ROWS x ranks."""
    table, head = (_own(f"{name}.weight", ROWS, mesh, width) for name in ("embedding", "head"))
    rows = Table(weight=table[0], unit=table[1], height=ROWS, start=ROWS * mesh.index("pp"))
    return Shard(head=head[0], unit=head[1], table=rows)


def virtual_batch(schedule: Schedule, *, width: int = WIDTH) -> Batch:
    """Tokens [1, width] of all shards."""
    tokens = torch.arange(width).remainder(ROWS * schedule.num_ranks).view(1, width)
    return Batch(tokens=tokens, labels=tokens, positions=tokens, documents=None, samples=tokens[:, 0])


def _own(name: str, rows: int, mesh: Mesh, width: int) -> tuple[nn.Parameter, LocalUnit]:
    weight = nn.Parameter(torch.zeros(rows, width))
    sharding = Sharding.whole(name, (rows, width))
    return weight, LocalUnit(name, [(weight, sharding)], mesh=mesh, compute=weight.dtype)


def _virtual_stage(index: int, ends: tuple[int, int], mesh: Mesh, width: int) -> Stage:
    """``ends``: stages that make their own inputs and that sum up their output."""
    layer = nn.Linear(width, width, bias=False)
    layer.weight, unit = _own(f"blocks.{index}.weight", width, mesh, width)

    def run(x: Value, context: Any, batch: Any) -> Tensor:
        assert isinstance(x, Tensor)
        y: Tensor = layer(x)
        return y.sum() if index == ends[1] else y

    block = Segment(name=str(index), run=run, units=[unit], deferral=Deferral(layer))
    # The first stage has inputs of its own, so that the layer behind them has an I like all others.
    inputs = Segment(name="inputs", run=lambda x, context, batch: torch.ones(width, width), units=[])
    return Stage(index, [inputs, block] if index == ends[0] else [block])
