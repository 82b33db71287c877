"""Filling bubbles with frozen work: encoders that don't train run where the pipeline idles (DiffusionPipe, Tian et al.
2024, section 5).

    rank 0 │F0----F1----F2----F6-F6-F7-F7-F8-F8-      B0----------      B1----------      B2----------
    rank 1 │F3-F3-F0----F1----            B0----------F2----B1----------      B2----------
    rank 2 │F4-F4-F5-F5-F0----B0----------F1----B1----------F2----B2----------
    time   │0                                                                                       15

F3 to F8 are six units of two frozen layers that take half a forward each; in front of the pipeline they would take 2.

Text and image encoders of a diffusion model only read the data, so those of the next step's batch can run in this
step.  The batch is cut into units; any rank can take any unit, since each holds all the frozen layers, and runs the
unit's layers in their order, between its own operations.

In the schedule a frozen layer is a *frozen stage* behind the trained ones, a unit is a micro-batch whose path
is the frozen stages alone, and each rank is a replica of its own for them: ``placement`` has one more list per rank,
and ``voice`` says which rank runs a unit.  So a unit is checked, counted and drawn as everything else.

**Greedy**, as in the paper: bubbles are taken in the order of time, each filled from its start with the longest layer
that fits, of the units begun on its rank if one does, else of a fresh unit.  What is left runs at the end,
spread so that all ranks are done as early as can be.  Nothing of the pipeline starts later than it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stretto.schedule.op import COMPUTE, Kind, Op
from stretto.schedule.passes.chosen import together
from stretto.schedule.passes.communication import lower, without_messages
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs

Frozen = str | Sequence[float] | Sequence[Sequence[float]]
"""Times of one unit's frozen layers: those of one encoder (``0.5+0.5``), or of several that don't depend on each
other (``0.5+0.5/1``)."""
MOST = 100_000
"""Units that the batch of an encoder is cut into."""
WHERE = ("bubbles", "front")
"""Where frozen work goes; in front of the pipeline only to compare."""
TOLERANCE = 1e-9
"""How far, relative to the makespan, a layer may be longer than the bubble that it fills, for rounding."""


def fill_bubbles(
    schedule: Schedule, *, frozen: Frozen = "0.25", units: int = 0, where: str = "bubbles", costs: Costs | None = None
) -> Schedule:
    """Frozen work comes in where ranks idle; under ``costs`` no other operation starts later than it did.

    ``frozen``: see there; times in the unit of ``costs``.  ``units``: parts that the batch of each encoder is cut into,
    by default four for each rank.  The schedule has as many stages more as there are frozen layers, and costs that fit
    it are those of ``with_frozen``.  Raises ScheduleError for options that can't be and for a schedule that has
    vocabulary passes (the units would need them) or an optimizer step (nothing comes after it).
    """
    encoders = _encoders(frozen)
    if type(units) is not int or not 0 <= units <= MOST:
        raise ScheduleError(f"Bubbles can't be filled with {units!r} units; give a number from 1 to {MOST}.")
    if where not in WHERE:
        raise ScheduleError(f"Frozen work can't go {where!r}; it goes to {' or '.join(WHERE)}.")
    if (schedule.kind == Kind.S).any():
        raise ScheduleError(
            f"{schedule.name} has vocabulary passes, which frozen work has no use for; fill it without."
        )
    if (schedule.kind == Kind.OPT).any():
        raise ScheduleError(
            f"{schedule.name} has OPT already, after which no frozen work can come; fill it before sharding."
        )
    bare = without_messages(schedule)
    work = _Work(encoders, units or 4 * bare.num_ranks)
    ranks = _ranks(bare, costs)
    if where == "bubbles":
        _fill(ranks, work)
    _finish(ranks, work, front=where == "front")
    result = _result(bare, ranks, work)
    return lower(result) if schedule.lowered else result


def with_frozen(costs: Costs, schedule: Schedule, *, frozen: Frozen = "0.25", **_: Any) -> Costs:
    """Costs for the filled schedule, from those of the ``schedule`` that was filled."""
    from stretto.schedule.simulate.costs import PASSES, Costs

    layers = [time for encoder in _encoders(frozen) for time in encoder]
    before, nothing = costs.of(schedule), [0.0] * len(layers)
    lists = {
        name: [*getattr(before, name).tolist(), *(layers if name in ("F", "I", "W", "R") else nothing)]
        for name in (*PASSES, "S", "T")
    }
    unit = 1.0 if before.unit_bytes is None else before.unit_bytes
    return Costs(
        **lists,
        comm=[*before.comm.tolist(), *nothing],
        OPT=before.OPT.tolist(),
        activation_bytes=[*(before.activation * unit).tolist(), *nothing],
        input_bytes=[*(before.input * unit).tolist(), *nothing],
        rerun_bytes=[*(before.rerun * unit).tolist(), *nothing],
        stash_bytes=[*(before.act_w * before.activation * unit).tolist(), *nothing],
    )


def _encoders(frozen: Frozen) -> list[list[float]]:
    """Times of the layers of each encoder."""
    if isinstance(frozen, str):
        parts: Any = [part.split("+") for part in frozen.split("/")]
    else:
        parts = list(frozen) if isinstance(frozen, Sequence) else [frozen]
        parts = [parts] if parts and not isinstance(parts[0], Sequence) else parts
    try:
        encoders = [[float(time) for time in encoder] for encoder in parts]
    except (TypeError, ValueError):
        encoders = []
    if not encoders or not all(encoders) or not all(0 < time < float("inf") for each in encoders for time in each):
        raise ScheduleError(
            f"frozen={frozen!r} are no times of frozen layers; write 0.5+0.5, or 0.5+0.5/1 for two encoders, "
            "each above 0."
        )
    return encoders


@dataclass(slots=True)
class _Unit:
    """A part of the batch on its way through an encoder."""

    microbatch: int
    """Counted from 0 over all units."""
    encoder: int
    rank: int
    layer: int = 0
    """The next one."""


class _Work:
    """Frozen work that is still to do."""

    def __init__(self, encoders: list[list[float]], units: int) -> None:
        self.encoders = encoders
        self.fresh = [units for _ in encoders]
        self.begun: list[_Unit] = []

    def begin(self, encoder: int, rank: int) -> _Unit:
        """A fresh unit of an encoder, on a rank."""
        self.fresh[encoder] -= 1
        self.begun.append(_Unit(len(self.begun), encoder, rank))
        return self.begun[-1]

    def time(self, unit: _Unit) -> float:
        """Time of a unit's next layer; 0 where it is through."""
        layers = self.encoders[unit.encoder]
        return layers[unit.layer] if unit.layer < len(layers) else 0.0

    def stage(self, unit: _Unit) -> int:
        """Frozen stage of a unit's next layer, counted from 0."""
        return sum(map(len, self.encoders[: unit.encoder])) + unit.layer


@dataclass(slots=True)
class _Rank:
    """One rank's operations, where it idles, and what it does there."""

    units: list[list[Op]]
    bubbles: list[tuple[float, float]]
    """The one before each unit, and the one behind the last: start and end, which may be equal."""
    filled: list[list[tuple[int, int]]] = field(default_factory=list)
    """Frozen stage and micro-batch (both counted from 0) of what fills each."""

    def run(self, bubble: int, unit: _Unit, work: _Work) -> None:
        """Run a unit's next layer in a bubble."""
        self.filled[bubble].append((work.stage(unit), unit.microbatch))
        unit.layer += 1


def _ranks(schedule: Schedule, costs: Costs | None) -> list[_Rank]:
    """Each rank with its bubbles; what runs beside the arithmetic belongs to the unit before it."""
    from stretto.schedule.simulate.clock import run

    timeline = run(schedule, costs)
    ranks = []
    for rank in range(schedule.num_ranks):
        rows = timeline.rows(rank)
        times = zip(timeline.start[rows].tolist(), timeline.end[rows].tolist(), strict=True)
        units: list[list[Op]] = []
        bubbles: list[tuple[float, float]] = []
        free = 0.0
        for group in together(schedule.ops(rank)):
            spans = [next(times) for _ in group]
            units.append(group)
            if any(op.kind in COMPUTE for op in group):
                bubbles.append((free, spans[0][0]))
                free = max(end for _, end in spans)
            else:
                bubbles.append((free, free))
        bubbles.append((free, max(free, float(timeline.end.max()))))
        ranks.append(_Rank(units, bubbles, [[] for _ in bubbles]))
    return ranks


def _fill(ranks: list[_Rank], work: _Work) -> None:
    """Fill the bubbles of all ranks in the order of time."""
    queue = [(start, rank, at, end) for rank, each in enumerate(ranks) for at, (start, end) in enumerate(each.bubbles)]
    slack = TOLERANCE * max(end for *_, end in queue)
    for start, rank, at, end in sorted(queue):
        room = end - start + slack
        while unit := _longest(rank, room, work):
            room -= work.time(unit)
            ranks[rank].run(at, unit, work)
        ranks[rank].bubbles[at] = (end + slack - room, end)


def _longest(rank: int, room: float, work: _Work) -> _Unit | None:
    """The unit whose next layer fills a bubble best: one begun on the rank, else a fresh one."""
    fitting = [unit for unit in work.begun if unit.rank == rank and 0 < work.time(unit) <= room]
    if fitting:
        return max(fitting, key=work.time)
    fresh = [at for at, layers in enumerate(work.encoders) if work.fresh[at] and layers[0] <= room]
    return work.begin(max(fresh, key=lambda at: work.encoders[at][0]), rank) if fresh else None


def _finish(ranks: list[_Rank], work: _Work, *, front: bool) -> None:
    """Run what is left, behind or in front of all else: begun units on their ranks, fresh ones on the first free."""
    at = 0 if front else -1
    over = [0.0 if front else each.bubbles[-1][0] for each in ranks]
    for unit in work.begun:
        while time := work.time(unit):
            over[unit.rank] += time
            ranks[unit.rank].run(at, unit, work)
    for encoder in sorted(range(len(work.encoders)), key=lambda encoder: -sum(work.encoders[encoder])):
        while work.fresh[encoder]:
            unit = work.begin(encoder, min(range(len(ranks)), key=over.__getitem__))
            while time := work.time(unit):
                over[unit.rank] += time
                ranks[unit.rank].run(at, unit, work)


def _result(schedule: Schedule, ranks: list[_Rank], work: _Work) -> Schedule:
    """The schedule with the frozen stages, their units as micro-batches, and each rank as a replica for them."""
    stages, microbatches, voices = schedule.num_stages, schedule.num_microbatches, len(schedule.placement)
    layers = sum(map(len, work.encoders))
    orders = []
    for each in ranks:
        order: list[Op] = []
        for group, filled in zip([*each.units, []], each.filled, strict=True):
            order += [Op(Kind.F, stage=stages + stage, microbatch=microbatches + unit) for stage, unit in filled]
            order += group
        orders.append(order)
    paths = [tuple(schedule.path(microbatch)) for microbatch in range(microbatches)]
    for unit in work.begun:
        first = stages + sum(map(len, work.encoders[: unit.encoder]))
        paths.append(tuple(range(first, first + len(work.encoders[unit.encoder]))))
    return Schedule.from_orders(
        orders,
        name=schedule.name,
        num_stages=stages + layers,
        num_microbatches=microbatches + len(work.begun),
        placement=[replica + (replica[-1],) * layers for replica in schedule.placement]
        + [schedule.placement[0] + (rank,) * layers for rank in range(schedule.num_ranks)],
        voice=[*schedule.voice, *(voices + unit.rank for unit in work.begun)],
        paths=paths,
        frozen=schedule.frozen | frozenset(range(stages, stages + layers)),
        forward_only=schedule.forward_only,
    )
