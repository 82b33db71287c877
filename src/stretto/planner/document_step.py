"""What a step takes whose documents have groups of their own, from their lengths: placed as the run itself places them.

    data rank 0   │   F0   │      B0      │ F1 │ B1 │      ranks that share a document begin it together; under zero 3
    data rank 1   │   F0   │      B0      │F1│B1│          all ranks gather, and so begin, a micro-batch together
    data rank 2   │  F0  │    B0    │F1│ B1 │              the step is over when the last rank is

Every data rank plays the same schedule, so an operation is looked at on all of them at once.  On a measured CPU ranks
share cores: between two events all who are at work are slowed alike (as in ``contention``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import hypot
from typing import TYPE_CHECKING

from stretto.planner.calibration import Calibration, published
from stretto.planner.compute import optimizer_seconds
from stretto.planner.document_costs import costs_of
from stretto.planner.document_portions import Portion, portions, step_work
from stretto.planner.document_seconds import Measured, Published, Turn, Turns
from stretto.planner.measured_step import MODEL_ERROR, data_seconds, schedule_of, update_seconds
from stretto.planner.request import Request
from stretto.planner.step import StepTime, causes, exposed_seconds
from stretto.planner.uncertainty import expected_error
from stretto.schedule.op import Kind
from stretto.spec.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.planner.workload import Workload
    from stretto.schedule.op import Op

    Values = npt.NDArray[np.float64]
    Numbers = npt.NDArray[np.int64]

Held = Sequence[Sequence[Portion]]
"""By data rank and micro-batch."""


def document_step(request: Request, lengths: Sequence[int]) -> StepTime:
    """A step of the request's run with documents of ``lengths``; UnsupportedError where rates are only assumed, and for
    layers that keep a state on a calibrated machine, whose figures have no such document.

    ConfigError for a document that doesn't fit on all ranks together.
    """
    run = request.run
    if request.assumed:
        raise UnsupportedError(
            f"The time of a step can't be told, because {' and '.join(request.assumed)} of [cluster] isn't known; take "
            "a preset that has it, or calibrate (stretto diagnose --calibrate)."
        )
    held = portions(run, lengths)
    work = step_work(request.work(run.plan), len(held[0]))
    calibration, seconds = rates_of(request, work)
    machine = calibration.machine
    if machine is not None and run.model.keeps_states:
        raise UnsupportedError("What linear and delta layers take of documents in groups isn't calibrated.")
    played = _play(work, held, _operations(work, held, seconds), message=seconds.message)
    if machine is None:
        time = StepTime(
            work=played.busiest,
            tensor_communication=0.0,
            bubble=played.ends - played.busiest,
            data_communication=exposed_seconds(work, played.busiest, calibration),
            optimizer=optimizer_seconds(work, calibration),
            context_communication=played.waits,
        )
        return replace(time, expected_error=expected_error(causes(time), work.cluster.name))
    stretched = played.stretched(lambda ranks: machine.slowdown(work.plan.tp * ranks))
    stretched *= machine.factor("waiting", work.plan.pp)
    return StepTime(
        work=min(stretched, played.busiest * stretched / played.ends),
        tensor_communication=0.0,
        bubble=stretched * max(0.0, 1 - played.busiest / played.ends),
        data_communication=data_seconds(work, machine),
        optimizer=sum(update_seconds(work, machine)),
        context_communication=played.waits,
        expected_error=hypot(MODEL_ERROR, machine.spread),
    )


def rates_of(request: Request, work: Workload) -> tuple[Calibration, Published | Measured]:
    """What is known of the machines, and what portions of the run take on them."""
    costs, calibration = costs_of(request.run), request.calibration or published(work.cluster.name)
    if calibration.machine is None:
        return calibration, Published(work, calibration, costs)
    return calibration, Measured(work, calibration.machine, costs)


@dataclass(frozen=True, slots=True)
class _Played:
    """Operations on all data ranks, at full speed."""

    spans: list[tuple[Values, Values]]
    """When each is at work, from and to, per data rank."""
    ends: float
    """When the last is over."""
    busiest: float
    """What the rank with most to do works and waits inside its operations."""
    waits: float
    """Of that, for messages."""

    def stretched(self, slowdown: Callable[[float], float]) -> float:
        """The same where so many ranks at work slow each other."""
        import numpy as np

        begins = np.sort(np.concatenate([begin for begin, _ in self.spans]))
        overs = np.sort(np.concatenate([over for _, over in self.spans]))
        moments = np.unique(np.concatenate([[0.0], begins, overs, [self.ends]]))
        number = np.searchsorted(begins, moments, side="right") - np.searchsorted(overs, moments, side="right")
        slower = {count: max(1.0, slowdown(count)) if count else 1.0 for count in np.unique(number).tolist()}
        return float(sum(span * slower[n] for span, n in zip(np.diff(moments), number.tolist(), strict=False)))


def _operations(work: Workload, held: Held, seconds: Published | Measured) -> dict[Portion, list[Turns]]:
    """Forward and backward of each different portion, stage by stage."""
    found: dict[Portion, list[Turns]] = {}
    last = len(work.layers) - 1
    for portion in {portion for row in held for portion in row}:
        layer, (first, final) = seconds.layer(portion), seconds.ends(portion)
        besides = [Turn(call, 0.0) for call in seconds.operation(portion)]
        stages = []
        for stage, layers in enumerate(work.layers):
            both = []
            for way in (0, 1):
                turn = layer[way].times(layers) + besides[way]
                turn += first[way] if stage == 0 else Turn()
                both.append(turn + (final[way] if stage == last else Turn()))
            stages.append((both[0], both[1]))
        found[portion] = stages
    return found


def _play(
    work: Workload, held: Held, turns: dict[Portion, list[Turns]], *, message: Callable[[Portion], float]
) -> _Played:
    """Follow the schedule on all data ranks side by side."""
    import numpy as np

    plan, schedule = work.plan, schedule_of(work)
    together = work.states.parameters > 1
    carried = {portion: message(portion) for portion in turns} if plan.pp > 1 else dict.fromkeys(turns, 0.0)
    leaders = [np.array([row[m].first for row in held]) for m in range(work.num_microbatches)]
    travels = [np.array([carried[row[m]] for row in held]) for m in range(work.num_microbatches)]
    zero = np.zeros(len(held))
    free, busy, waited = ([zero.copy() for _ in range(plan.pp)] for _ in range(3))
    over: dict[tuple[bool, int, int], Values] = {}
    spans = []
    for rank, op in _ordered([list(schedule.ops(rank)) for rank in range(plan.pp)]):
        forward = op.kind is Kind.F
        ready = free[rank]
        source = op.stage - 1 if forward else op.stage + 1
        if 0 <= source < plan.num_stages:
            ready = np.maximum(ready, over[forward, source, op.microbatch] + travels[op.microbatch])
        ready = _met(ready, leaders[op.microbatch], together)
        own = [turns[row[op.microbatch]][op.stage][0 if forward else 1] for row in held]
        works, waits = np.array([turn.work for turn in own]), np.array([turn.waits for turn in own])
        spans.append((ready, ready + works))
        free[rank] = over[forward, op.stage, op.microbatch] = ready + works + waits
        busy[rank], waited[rank] = busy[rank] + works + waits, waited[rank] + waits
    fullest = max(((float(b.max()), rank, int(b.argmax())) for rank, b in enumerate(busy)))
    return _Played(
        spans=spans,
        ends=max(float(each.max()) for each in free),
        busiest=fullest[0],
        waits=float(waited[fullest[1]][fullest[2]]),
    )


def _met(ready: Values, leader: Numbers, together: bool) -> Values:
    """When ranks that share documents, or all, can begin."""
    import numpy as np

    if together:
        return np.full_like(ready, ready.max())
    latest = np.zeros_like(ready)
    np.maximum.at(latest, leader, ready)
    found: Values = latest[leader]
    return found


def _ordered(orders: list[list[Op]]) -> list[tuple[int, Op]]:
    """Operations of all pipeline ranks, each behind what it needs: F and B of one chunk per rank (1f1b, gpipe)."""
    at, done = [0] * len(orders), set[tuple[bool, int, int]]()
    found: list[tuple[int, Op]] = []
    last = len(orders) - 1
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        before = len(found)
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                op = order[at[rank]]
                forward = op.kind is Kind.F
                source = op.stage - 1 if forward else op.stage + 1
                if 0 <= source <= last and (forward, source, op.microbatch) not in done:
                    break
                done.add((forward, op.stage, op.microbatch))
                found.append((rank, op))
                at[rank] += 1
        assert len(found) > before, "a schedule was validated before it is timed"
    return found
