"""From measured steps to costs: the median duration of each kind on each stage.

F I W R ...  median over all micro-batches and steps, per stage
B            counts as I + W, half each where a stage never splits, or as I alone where layers are compiled as a whole
comm         median time from a send to its arrival, over the messages that found their receiver waiting
OPT          median update, per rank
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stretto.schedule.op import Kind
from stretto.schedule.simulate import Costs

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.measured.trace import Played
    from stretto.schedule.schedule import Schedule

    Rows = npt.NDArray[np.int64]

LEAST = 1e-9
"""Seconds that an operation counts at least: costs are above 0."""
OPTIONAL = ("R", "S", "T", "O", "L", "UNSHARD", "RESHARD", "REDUCE_GRAD")


def durations(steps: Sequence[Played]) -> dict[tuple[Kind, int], float]:
    """Median seconds by kind and stage."""
    import numpy as np

    schedule = steps[0].schedule
    taken = np.stack([played.end - played.start for played in steps])
    key = schedule.kind.astype(np.int64) * (schedule.num_stages + 1) + schedule.stage + 1
    found = {}
    for value in np.unique(key).tolist():
        kind, stage = divmod(value, schedule.num_stages + 1)
        found[Kind(kind), stage - 1] = float(np.median(taken[:, key == value]))
    return found


def costs_of(steps: Sequence[Played], *, whole: bool = False) -> Costs:
    """The costs under which the schedule is simulated, in seconds; ``whole``: I does all of a backward, W nothing."""
    import numpy as np

    schedule = steps[0].schedule
    found = durations(steps)
    columns: dict[str, Any] = {name: [] for name in ("F", "I", "W")}
    for stage in range(schedule.num_stages):
        for name, seconds in _triple(found, stage, share=0.0 if whole else 0.5).items():
            columns[name].append(max(seconds, LEAST))
    for name in OPTIONAL:
        entries = [found.get((Kind[name], stage)) for stage in range(schedule.num_stages)]
        if any(entry is not None for entry in entries):
            columns[name] = [max(entry or 0.0, LEAST) for entry in entries]
    columns["comm"] = _latencies(steps)
    columns["OPT"] = np.median([played.optimizer for played in steps], axis=0).tolist()
    return Costs(**columns)


def as_file(costs: Costs) -> dict[str, Any]:
    """What ``Costs.load`` reads: every list that was measured."""
    names = ("F", "I", "W", *OPTIONAL, "comm", "OPT")
    values = {name: getattr(costs, name) for name in names}
    return {name: list(value) for name, value in values.items() if isinstance(value, tuple)}


def _triple(found: Mapping[tuple[Kind, int], float], stage: int, *, share: float) -> dict[str, float]:
    """F, I and W of a stage, from what it played; the three where it played nothing are next to nothing.

    ``share``: what counts as W of a backward that isn't split.
    """
    forward, full = found.get((Kind.F, stage), 0.0), found.get((Kind.B, stage))
    inputs, weights = found.get((Kind.I, stage)), found.get((Kind.W, stage), 0.0)
    if inputs is None:
        weights = share * (full or 0.0)
        inputs = (full or 0.0) - weights
    return {"F": forward, "I": inputs, "W": weights}


def messages_of(schedule: Schedule) -> tuple[Rows, Rows]:
    """Rows of all sends, and of the receives that belong to them."""
    import numpy as np

    sends: dict[tuple[int, int | None, int], int] = {}
    receives: dict[tuple[int, int | None, int], int] = {}
    rows = zip(schedule.kind.tolist(), schedule.stage.tolist(), schedule.microbatch.tolist(), strict=True)
    for row, (kind, stage, microbatch) in enumerate(rows):
        if kind == Kind.SEND_F:
            sends[Kind.F, schedule.next_stage(stage, microbatch), microbatch] = row
        elif kind == Kind.SEND_B:
            sends[Kind.B, schedule.gradient_target(stage, microbatch), microbatch] = row
        elif kind in (Kind.RECV_F, Kind.RECV_B):
            receives[Kind.F if kind == Kind.RECV_F else Kind.B, stage, microbatch] = row
    assert sends.keys() == receives.keys(), "a message has one end only"
    pairs = np.array([(row, receives[key]) for key, row in sends.items()], dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _latencies(steps: Sequence[Played]) -> list[float]:
    """Seconds of each boundary between stages."""
    import numpy as np

    schedule = steps[0].schedule
    send, receive = messages_of(schedule)
    stages = np.stack([schedule.stage[send], schedule.stage[receive]])
    boundary, near = stages.min(axis=0), np.abs(np.diff(stages, axis=0))[0] == 1
    taken = np.stack([played.end[receive] - played.start[send] for played in steps])
    awaited = np.stack([played.start[receive] <= played.start[send] for played in steps])
    found = []
    for number in range(schedule.num_stages - 1):
        of_it = near & (boundary == number)
        waited = taken[:, of_it][awaited[:, of_it]]
        # A receiver that came late tells only that the message took no longer.
        latency = np.median(waited) if len(waited) else taken[:, of_it].min(initial=np.inf)
        found.append(max(0.0, float(latency)) if np.isfinite(latency) else 0.0)
    return found
