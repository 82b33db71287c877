"""Handing over: what frozen work gives for a micro-batch of the next step goes to the rank that will need it.

    this step                                          next step
    rank 0 │ 0F0 0F1 ... 3F4 │ 4F4 │ 4F5               rank 0 │ 0F0 0F1 ...          stages 0 and 1 train,
    rank 1 │     1F0 ... 3F5 │ ──────┘                 rank 1 │     1F0 ...          3 is frozen, 4 is the landing

``fill_bubbles`` leaves its units' results where they were computed.  Here each unit's path gets one more stage, the
*landing*, on the rank of the pipeline's first stage; its F takes no time and keeps what arrives until the next step.
So the way there is a message like all others, which is lowered, verified, timed and drawn.  Unit u of a step stands for
micro-batch u of the next one.

Four schedules come of it: the filled step, a step that is the last (``drained``), the frozen work of a first step
(``primed``), and an evaluation, where it goes before (``evaluated``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stretto.schedule.op import Kind, Op
from stretto.schedule.passes.communication import without_messages
from stretto.schedule.passes.fill_bubbles import fill_bubbles, with_frozen
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError

if TYPE_CHECKING:
    from stretto.schedule.simulate.costs import Costs

EMBEDDING = 0.01
"""What an embedding alone is taken to cost, in layers."""
MOMENT = 1e-9
"""What the landing's F costs, relative to an average forward: costs are above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Where the frozen front stands in a schedule: behind the stages of the pipeline."""

    stages: int
    """Stages of the pipeline; the frozen ones are numbered from here."""
    layers: int
    """Frozen stages; the landing comes behind them."""
    microbatches: int
    """Of a step; the units of frozen work are numbered from here."""

    @property
    def landing(self) -> int:
        """Number of the landing."""
        return self.stages + self.layers

    def first_layers(self) -> range:
        """The frozen stages, without the landing."""
        return range(self.stages, self.landing)


def times_of(layers: int, *, share: float, forward: float = 1.0) -> str:
    """What frozen layers are taken to cost, where a rank's ``share`` of the pipeline's layers costs ``forward``.

    No layer at all is an embedding alone.

    >>> times_of(2, share=4)
    '0.25+0.25'
    """
    return "+".join([repr(forward / share)] * layers) if layers else repr(EMBEDDING * forward / share)


def ahead(
    schedule: Schedule, *, frozen: str | float, where: str = "bubbles", costs: Costs | None = None
) -> tuple[Schedule, Costs]:
    """The front of the next step where ranks idle, handed over, and costs that fit; ``frozen``: see fill_bubbles."""
    from stretto.schedule.simulate.costs import Costs

    layers, costs = len(str(frozen).split("+")), costs or Costs()
    front = Front(stages=schedule.num_stages, layers=layers, microbatches=schedule.num_microbatches)
    frozen = str(frozen)
    filled = fill_bubbles(schedule, frozen=frozen, units=front.microbatches, where=where, costs=costs)
    return hand_over(filled, front), with_landing(with_frozen(costs, schedule, frozen=frozen))


def hand_over(schedule: Schedule, front: Front) -> Schedule:
    """Each unit's result lands on the rank of its micro-batch's first stage; no other operation moves.

    ``schedule`` is filled with one encoder, in as many units as there are micro-batches, and has no messages.  Raises
    ScheduleError where that isn't so, and where micro-batches have paths of their own.
    """
    _check(schedule, front)
    bare = without_messages(schedule)
    count, first = front.microbatches, front.stages
    trained = bare.placement[: 1 + max(bare.voice[:count])]
    units = range(count, 2 * count)
    routes = [(bare.rank_of(first, bare.voice[unit]), trained[bare.voice[unit - count]][0]) for unit in units]
    own = list(dict.fromkeys(routes))
    runs = own[0][0]
    orders = [bare.ops(rank) for rank in range(bare.num_ranks)]
    for unit, (_, home) in zip(units, routes, strict=True):
        orders[home].append(Op(Kind.F, stage=front.landing, microbatch=unit))
    return Schedule.from_orders(
        orders,
        name=bare.name,
        num_stages=front.landing + 1,
        num_microbatches=2 * count,
        placement=[
            *(replica[:first] + (runs,) * front.layers + (replica[0],) for replica in trained),
            *(trained[0][:first] + (rank,) * front.layers + (home,) for rank, home in own),
        ],
        voice=[*bare.voice[:count], *(len(trained) + own.index(route) for route in routes)],
        paths=[range(first)] * count + [range(first, front.landing + 1)] * count,
        frozen=bare.frozen | {front.landing},
    )


def with_landing(costs: Costs) -> Costs:
    """Costs for what ``hand_over`` gives, from those of the filled schedule: a landing costs its message alone."""
    from stretto.schedule.simulate.costs import PER_STAGE, POSITIVE

    found = {}
    for name in PER_STAGE:
        values = getattr(costs, name)
        if isinstance(values, tuple):
            moment = MOMENT * sum(values) / len(values) if name in POSITIVE else 0.0
            found[name] = (*values, values[0] if name == "input_bytes" else moment)  # it keeps the first stage's input
    if isinstance(costs.comm, tuple):
        found["comm"] = (*costs.comm, max(costs.comm, default=0.0))
    return replace(costs, **found)


def drained(schedule: Schedule, front: Front) -> Schedule:
    """The filled step without its frozen work: the last of a run."""
    bare = without_messages(schedule)
    kept = [[op for op in bare.ops(rank) if op.stage < front.stages] for rank in range(bare.num_ranks)]
    voice = bare.voice[: front.microbatches]
    return Schedule.from_orders(
        kept,
        name=f"{bare.name}, last step",
        num_stages=front.stages,
        num_microbatches=front.microbatches,
        placement=[replica[: front.stages] for replica in bare.placement[: 1 + max(voice)]],
        voice=voice,
        frozen=bare.frozen - {*front.first_layers(), front.landing},
    )


def primed(schedule: Schedule, front: Front) -> Schedule:
    """The frozen work of a step by itself, for the first one that a run or its continuation plays."""
    bare, count = without_messages(schedule), front.microbatches
    orders = [
        [
            replace(op, microbatch=op.microbatch - count)
            for op in bare.ops(rank)
            if op.kind is Kind.F and op.microbatch >= count
        ]
        for rank in range(bare.num_ranks)
    ]
    return Schedule.from_orders(
        orders,
        name=f"{bare.name}, frozen work",
        num_stages=front.landing + 1,
        num_microbatches=count,
        placement=bare.placement,
        voice=bare.voice[count:],
        paths=bare.paths[count:] if bare.paths is not None else None,
        frozen=bare.frozen,
        forward_only=True,
    )


def evaluated(schedule: Schedule, front: Front) -> Schedule:
    """Forwards alone: every rank its share of the frozen work, then the pipeline's forwards in their order."""
    bare, count = without_messages(schedule), front.microbatches
    runs = {unit - count: bare.rank_of(front.stages, bare.voice[unit]) for unit in range(count, 2 * count)}
    ways = {m: (bare.voice[m], runs[m]) for m in range(count)}
    own = list(dict.fromkeys(ways.values()))
    orders = []
    for rank in range(bare.num_ranks):
        ahead = [
            Op(Kind.F, stage=stage, microbatch=m)
            for m in range(count)
            if runs[m] == rank
            for stage in front.first_layers()
        ]
        forwards = [op for op in bare.ops(rank) if op.kind is Kind.F and op.microbatch < count]
        orders.append([*ahead, *(replace(op, joined=False) for op in forwards)])
    return Schedule.from_orders(
        orders,
        name=f"{bare.name}, forward only",
        num_stages=front.landing,
        num_microbatches=count,
        placement=[bare.placement[voice][: front.stages] + (rank,) * front.layers for voice, rank in own],
        voice=[own.index(ways[m]) for m in range(count)],
        paths=[(*front.first_layers(), *range(front.stages))] * count,
        forward_only=True,
    )


def _check(schedule: Schedule, front: Front) -> None:
    """Raise ScheduleError where units and micro-batches don't match."""
    asked: Sequence[Sequence[int]] = [range(front.stages)] * front.microbatches + [
        range(front.stages, front.landing)
    ] * front.microbatches
    paths = schedule.paths or ()
    if [tuple(path) for path in paths] != [tuple(path) for path in asked]:
        raise ScheduleError(
            f"{schedule.name} can't hand its frozen work over: it needs {front.layers} frozen layers of one encoder in "
            f"{front.microbatches} units, one for each micro-batch, and micro-batches that visit all stages in order."
        )
