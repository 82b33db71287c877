"""A pipeline schedule: which rank does what, in which order.  Pure data.

Rows of integers, one per operation, rank after rank; ``offsets`` says where each rank's rows start:

    rank 0 │ 0F0 0F1 0B0 0B1        kind        0 0 1 1   0 1 0 1
    rank 1 │ 1F0 1B0 1F1 1B1   ──►  stage       0 0 0 0   1 1 1 1
                                    microbatch  0 1 0 1   0 0 1 1
                                    peer        all -1 (no messages yet)
                                    offsets     0         4        8

Everything that may be said of a schedule (is it complete, how long does it take, what does it look
like) is derived from these columns elsewhere in the room; when a rank idles is never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypedDict, Unpack

from stretto.schedule.flow import flows
from stretto.schedule.op import Kind, Op, text
from stretto.schedule.well_formed import check_flow, check_rows
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Column = npt.NDArray[np.int32]

COLUMNS = ("kind", "stage", "microbatch", "peer", "offsets")


class Flow(TypedDict, total=False):
    """How micro-batches flow where it is not one replica, all stages in order, there and back."""

    voice: Sequence[int]
    paths: Sequence[Sequence[int]] | None
    frozen: Iterable[int]
    forward_only: bool


class Shape(TypedDict):
    """What every schedule has besides its rows."""

    name: str
    num_stages: int
    num_microbatches: int
    placement: Sequence[Sequence[int]]


class FlowAndColumns(Flow, total=False):
    """The flow, and the columns that most schedules leave out."""

    peer: npt.ArrayLike
    joined: npt.ArrayLike | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """Who does what in which order.  Raises ScheduleError where the parts don't fit each other."""

    name: str
    """Family that it comes from, or whatever its author calls it."""
    num_ranks: int
    """Pipeline ranks."""
    num_stages: int
    """Stages of one replica of the model."""
    num_microbatches: int
    """Micro-batches of a step, over all replicas."""
    placement: tuple[tuple[int, ...], ...]
    """``placement[voice][stage]`` is the rank that holds the stage; one entry per model replica."""
    voice: tuple[int, ...]
    """``voice[m]`` is the replica that micro-batch m flows through."""
    kind: Column
    """Kind of each operation."""
    stage: Column
    """Stage of each operation, -1 where there is none."""
    microbatch: Column
    """Micro-batch (or block index) of each operation, -1 where there is none."""
    peer: Column
    """Rank at the other end of each message, -1 elsewhere."""
    offsets: Column
    """Rank r's operations are rows ``offsets[r]`` to ``offsets[r + 1]``; R + 1 entries."""
    paths: tuple[tuple[int, ...], ...] | None = None
    """``paths[m]``: the stages that micro-batch m visits, in order; None: all of them, 0 to S-1."""
    frozen: frozenset[int] = frozenset()
    """Stages that have no backward."""
    forward_only: bool = False
    """True where no stage has a backward (evaluation, inference)."""
    joined: npt.NDArray[np.int8] | None = None
    """1 where an operation overlaps with the one that follows it on its rank (``2F7+5B3``); None: nowhere."""

    def __post_init__(self) -> None:
        """Make the columns read-only int32 (``joined`` int8) and check that all parts fit."""
        import numpy as np

        for name in COLUMNS:
            column = np.array(getattr(self, name), dtype=np.int32)
            column.setflags(write=False)
            object.__setattr__(self, name, column)
        if self.joined is not None:
            joined = np.array(self.joined, dtype=np.int8)
            joined.setflags(write=False)
            object.__setattr__(self, "joined", joined if joined.any() else None)
        check_flow(self)
        check_rows(self)

    @classmethod
    def from_orders(
        cls,
        orders: Sequence[Sequence[Op]],
        *,
        name: str,
        num_stages: int,
        num_microbatches: int,
        placement: Sequence[Sequence[int]],
        **flow: Unpack[Flow],
    ) -> Schedule:
        """Build a schedule from one list of operations per rank.

        ``flow`` may hold ``voice`` (default: all micro-batches through replica 0), ``paths``,
        ``frozen`` and ``forward_only``.  A message without a peer gets the one that placement gives.
        """
        rows = [op for order in orders for op in order]
        offsets = [0]
        for order in orders:
            offsets.append(offsets[-1] + len(order))
        return cls.from_columns(
            kind=[op.kind for op in rows],
            stage=[op.stage for op in rows],
            microbatch=[op.microbatch for op in rows],
            offsets=offsets,
            name=name,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            placement=placement,
            peer=[op.peer for op in rows],
            joined=[op.joined for op in rows],
            **flow,
        )

    @classmethod
    def from_columns(
        cls,
        *,
        kind: npt.ArrayLike,
        stage: npt.ArrayLike,
        microbatch: npt.ArrayLike,
        offsets: npt.ArrayLike,
        name: str,
        num_stages: int,
        num_microbatches: int,
        placement: Sequence[Sequence[int]],
        **rest: Unpack[FlowAndColumns],
    ) -> Schedule:
        """Build a schedule from its columns, without an object per operation.

        ``rest`` may hold what ``from_orders`` calls ``flow``, and the columns ``peer`` and ``joined``.
        """
        import numpy as np

        paths, peer = rest.get("paths"), rest.get("peer")
        voice = rest["voice"] if "voice" in rest else (0,) * num_microbatches
        starts = np.asarray(offsets)
        schedule = cls(
            name=name,
            num_ranks=len(starts) - 1,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            placement=tuple(tuple(replica) for replica in placement),
            voice=tuple(voice),
            kind=kind,  # type: ignore[arg-type]  # __post_init__ makes columns
            stage=stage,  # type: ignore[arg-type]
            microbatch=microbatch,  # type: ignore[arg-type]
            peer=np.full(np.shape(kind), -1) if peer is None else peer,  # type: ignore[arg-type]
            offsets=starts,
            paths=None if paths is None else tuple(tuple(path) for path in paths),
            frozen=frozenset(rest.get("frozen", ())),
            forward_only=rest.get("forward_only", False),
            joined=rest.get("joined"),  # type: ignore[arg-type]
        )
        return schedule._with_peers()

    def with_orders(self, orders: Sequence[Sequence[Op]]) -> Schedule:
        """The same shape and flow with other operations; what passes return."""
        return Schedule.from_orders(orders, **self._shape(), **self._flow())

    def with_columns(
        self,
        *,
        kind: npt.ArrayLike,
        stage: npt.ArrayLike,
        microbatch: npt.ArrayLike,
        offsets: npt.ArrayLike,
        peer: npt.ArrayLike | None = None,
        joined: npt.ArrayLike | None = None,
    ) -> Schedule:
        """The same shape and flow with other columns; ``peer`` left out comes from the placement."""
        rest: FlowAndColumns = {**self._flow(), "joined": joined}
        if peer is not None:
            rest["peer"] = peer
        return Schedule.from_columns(
            kind=kind, stage=stage, microbatch=microbatch, offsets=offsets, **self._shape(), **rest
        )

    def _shape(self) -> Shape:
        """Name, counts and placement."""
        return {
            "name": self.name,
            "num_stages": self.num_stages,
            "num_microbatches": self.num_microbatches,
            "placement": self.placement,
        }

    def _flow(self) -> Flow:
        """What ``from_orders`` calls flow."""
        return {
            "voice": self.voice,
            "paths": self.paths,
            "frozen": self.frozen,
            "forward_only": self.forward_only,
        }

    @property
    def num_chunks(self) -> int:
        """Stages of one replica that the fullest rank holds."""
        return max(replica.count(rank) for replica in self.placement for rank in range(self.num_ranks))

    @property
    def num_ops(self) -> int:
        """Operations over all ranks."""
        return len(self.kind)

    @property
    def lowered(self) -> bool:
        """True where messages are part of the order."""
        import numpy as np

        return bool(np.any((self.kind >= Kind.SEND_F) & (self.kind <= Kind.RECV_B)))

    def ops(self, rank: int) -> list[Op]:
        """Operations of a rank, in order."""
        start, end = int(self.offsets[rank]), int(self.offsets[rank + 1])
        joined = [0] * (end - start) if self.joined is None else self.joined[start:end].tolist()
        return [
            Op(Kind(kind), stage=stage, microbatch=microbatch, peer=peer, joined=bool(together))
            for (kind, stage, microbatch, peer), together in zip(self.rows(rank), joined, strict=True)
        ]

    def rows(self, rank: int) -> Iterator[tuple[int, int, int, int]]:
        """Kind, stage, micro-batch and peer of a rank's operations, as plain integers."""
        part = slice(int(self.offsets[rank]), int(self.offsets[rank + 1]))
        columns = (self.kind, self.stage, self.microbatch, self.peer)
        return zip(*(column[part].tolist() for column in columns), strict=True)

    def rank_of(self, stage: int, voice: int = 0) -> int:
        """Rank that holds a stage of a replica."""
        return self.placement[voice][stage]

    def stages_of(self, rank: int, voice: int = 0) -> tuple[int, ...]:
        """Stages of a replica that a rank holds, ascending."""
        return tuple(stage for stage, holder in enumerate(self.placement[voice]) if holder == rank)

    def path(self, microbatch: int) -> Sequence[int]:
        """Stages that a micro-batch visits, in order."""
        return range(self.num_stages) if self.paths is None else self.paths[microbatch]

    def next_stage(self, stage: int, microbatch: int) -> int | None:
        """Stage that reads this one's output, None after the last."""
        path = self.path(microbatch)
        at = self._position(stage, microbatch) + 1
        return path[at] if at < len(path) else None

    def previous_stage(self, stage: int, microbatch: int) -> int | None:
        """Stage whose output this one reads, None before the first."""
        at = self._position(stage, microbatch) - 1
        return self.path(microbatch)[at] if at >= 0 else None

    def _position(self, stage: int, microbatch: int) -> int:
        """Where a stage comes on a micro-batch's path."""
        if self.paths is None:
            return stage
        if stage not in self.paths[microbatch]:
            path = list(self.paths[microbatch])
            raise ScheduleError(f"Micro-batch {microbatch} doesn't visit stage {stage}; its path is {path}.")
        return self.paths[microbatch].index(stage)

    def has_backward(self, stage: int) -> bool:
        """Whether a stage has B, or I and W."""
        return not self.forward_only and stage not in self.frozen

    def gradient_source(self, stage: int, microbatch: int) -> int | None:
        """Stage whose backward gives the gradient of this one's output, None where the loss does.

        Frozen stages are passed over: they have no operation that could give it.
        """
        following = self.next_stage(stage, microbatch)
        while following is not None and not self.has_backward(following):
            following = self.next_stage(following, microbatch)
        return following

    def gradient_target(self, stage: int, microbatch: int) -> int | None:
        """Stage that needs the gradient of this one's input, None where none does."""
        preceding = self.previous_stage(stage, microbatch)
        while preceding is not None and not self.has_backward(preceding):
            preceding = self.previous_stage(preceding, microbatch)
        return preceding

    def _with_peers(self) -> Schedule:
        """Fill in the peers that no one gave."""
        import numpy as np

        open_ends = (self.kind >= Kind.SEND_F) & (self.kind <= Kind.RECV_B) & (self.peer < 0)
        if not open_ends.any():
            return self
        tables = flows(self)
        ends = np.stack([tables.after, tables.before, tables.target, tables.source])
        stage, flow = self.stage[open_ends], tables.of[self.microbatch[open_ends]]
        neighbour = ends[self.kind[open_ends] - Kind.SEND_F, flow, stage]
        peer = self.peer.copy()
        peer[open_ends] = np.where(neighbour >= 0, tables.holder[flow, neighbour], -1)
        return replace(self, peer=peer)

    def __eq__(self, other: object) -> bool:
        """Equal where every field is."""
        if not isinstance(other, Schedule):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        """Agrees with equality."""
        return hash(self._identity())

    def _identity(self) -> tuple[object, ...]:
        """All fields, columns as bytes."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value.tobytes() if hasattr(value, "tobytes") else value for value in values)

    def __str__(self) -> str:
        """Name and shape, then one line of operations per rank."""
        lines = [
            f"{self.name}: {self.num_ranks} ranks, {self.num_stages} stages, {self.num_microbatches} micro-batches"
        ]
        for rank in range(self.num_ranks):
            lines.append(f"rank {rank}: " + " ".join(text(*row[:3]) for row in self.rows(rank)))
        return "\n".join(lines)

    def __repr__(self) -> str:
        """One line; the operations are in ``str``."""
        return (
            f"Schedule({self.name!r}, ranks={self.num_ranks}, stages={self.num_stages}, "
            f"microbatches={self.num_microbatches}, ops={self.num_ops})"
        )
