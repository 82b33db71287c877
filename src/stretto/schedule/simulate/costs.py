"""What operations cost: the values that a simulation is given.

A cost is either one number, for a rank's whole share of the model, or one number per stage, absolute:

    Costs(F=2.0)                   with 2 chunks per rank, each F takes 1.0
    Costs(F=(1.0, 1.5, 1.0, 2.5))  4 stages; F of stage 3 takes 2.5

``Costs.of(schedule)`` turns both into arrays per stage, checked against the schedule's shape.

Memory is counted in units, not bytes: one unit is what one micro-batch keeps alive over one rank's whole
share of the layers.  Where stages keep different numbers of bytes that is the average rank's share, so

    activation of a stage = its activation_bytes x ranks / sum of activation_bytes of all stages

All stages together always weigh as many units as there are ranks, and limits and peaks mean the same
whether or not bytes are given.  ``StageCosts.unit_bytes`` leads back to bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stretto.schedule.document import once
from stretto.schedule.simulate.stage_costs import StageCosts
from stretto.spec.errors import ScheduleError, nearest

if TYPE_CHECKING:
    from stretto.schedule.simulate.stage_costs import Values

Cost = float | Sequence[float]
"""A number for a rank's whole share, or a sequence with one per stage."""

EMPTY = 1e-9
"""What an empty W takes of its backward: an operation's cost is above 0."""
POSITIVE = ("F", "I", "W", "R")
"""Work that always takes time."""
PASSES = ("F", "I", "W", "R", "O", "L", "UNSHARD", "RESHARD", "REDUCE_GRAD")
"""Costs of a rank's whole share that its chunks divide among them; S, T and OPT happen per rank instead."""
BYTES = (
    *("activation_bytes", "input_bytes", "rerun_bytes", "stash_bytes"),
    *("vocabulary_bytes", "output_bytes", "row_bytes"),
)
"""What is in bytes."""
PER_STAGE = (*PASSES, "S", "T", *BYTES, "act_w")
"""What has one entry per stage where it is a sequence."""
MOST = 1e100
"""Largest cost: sums over any number of operations stay far from what a float can hold."""
REQUIRED = ("F", "I", "W")
"""Keys that a costs file must have."""


class Shape(Protocol):
    """What costs must fit: a schedule, or anything with its shape."""

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""

    @property
    def num_stages(self) -> int:
        """Stages of one replica."""

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """``placement[voice][stage]``: the rank that holds the stage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs in any unit of time.  Raises ScheduleError for a cost that can't be, or lengths that differ."""

    F: Cost = 1.0
    """Forward."""
    I: Cost = 1.0  # noqa: E741
    """Gradient of the inputs; B costs I + W."""
    W: Cost = 1.0
    """Gradient of the weights."""
    R: Cost | None = None
    """Recompute; None: as long as F, which it repeats."""
    S: Cost = 0.0
    """First vocabulary pass over one rank's shard; as a sequence, entry k is for shard k."""
    T: Cost = 0.0
    """Second vocabulary pass, likewise."""
    O: Cost = 0.0  # noqa: E741
    """Offload of an activation."""
    L: Cost = 0.0
    """Load of an activation."""
    UNSHARD: Cost = 0.0
    """Gathering parameters."""
    RESHARD: Cost = 0.0
    """Letting them go."""
    REDUCE_GRAD: Cost = 0.0
    """Reducing gradients."""
    OPT: Cost = 0.0
    """Optimizer step of a rank; as a sequence, one entry per rank."""
    comm: Cost = 0.0
    """Latency of a stage boundary between two ranks; as a sequence, entry s is for stages s and s + 1."""
    act_w: Cost = 1.0
    """Fraction of an activation kept between I and W."""
    activation_bytes: Sequence[float] | None = None
    """What one micro-batch keeps alive on each stage; None: the same everywhere."""

    input_bytes: Sequence[float] | None = None
    """Of that, what each stage keeps where R runs its forward again: its input; None: nothing that counts."""
    rerun_bytes: Sequence[float] | None = None
    """What B and I hold besides while they run, where they run layers again; None: nothing that counts."""
    stash_bytes: Sequence[float] | None = None
    """What each stage keeps between I and W, where that isn't ``act_w`` of its activation: it may be more than F
    kept, where I runs layers again."""
    vocabulary_bytes: Sequence[float] | None = None
    """What S of each vocabulary shard keeps until its T, besides what it scored; None: nothing that counts."""
    output_bytes: Sequence[float] | None = None
    """The last stage's output, which S of each vocabulary shard scores; None: nothing that counts."""
    row_bytes: Sequence[float] | None = None
    """Embeddings of a micro-batch that each vocabulary shard looks up; None: nothing that counts."""

    def __post_init__(self) -> None:
        """Make sequences tuples of floats and refuse what would make times meaningless."""
        for field in fields(self):
            value = getattr(self, field.name)
            value = value.tolist() if hasattr(value, "tolist") else value  # numpy's arrays and scalars
            value = tuple(map(float, value)) if isinstance(value, Sequence) else value
            object.__setattr__(self, field.name, value)
            for where, item in _items(field.name, value):
                _check(field.name, where, item)
        lengths = {name: len(value) for name in PER_STAGE if isinstance(value := getattr(self, name), tuple)}
        for name, length in lengths.items():
            first = next(iter(lengths))
            if length != lengths[first]:
                raise ScheduleError(
                    f"Cost {first} has {lengths[first]} entries, but {name} has {length}; each has one per stage."
                )
        if lengths and isinstance(self.comm, tuple) and len(self.comm) != (stages := next(iter(lengths.values()))) - 1:
            raise ScheduleError(
                f"Cost comm has {len(self.comm)} entries, but {stages} stages have {stages - 1} boundaries."
            )
        for name in BYTES[1:]:
            if getattr(self, name) is not None and self.activation_bytes is None:
                raise ScheduleError(f"Cost {name} says nothing without activation_bytes; give both.")
        if isinstance(self.activation_bytes, tuple) and sum(self.activation_bytes) == 0:
            raise ScheduleError("Cost activation_bytes is 0 on every stage; leave it out where memory doesn't matter.")

    def whole(self) -> Costs:
        """The same for layers that are compiled as a whole: I is the full backward, W is empty and keeps nothing.

        >>> costs = Costs(I=(2.0, 3.0), W=1.0).whole()
        >>> costs.I, max(costs.W) < 1e-8, costs.act_w
        ((3.0, 4.0), True, 0.0)
        """
        number = next((len(value) for value in (self.I, self.W) if isinstance(value, tuple)), 1)
        inputs, weights = (value if isinstance(value, tuple) else (value,) * number for value in (self.I, self.W))
        both = [a + b for a, b in zip(inputs, weights, strict=True)]
        empty = [EMPTY * seconds for seconds in both]
        single = not isinstance(self.I, tuple) and not isinstance(self.W, tuple)
        return replace(
            self, I=both[0] if single else both, W=empty[0] if single else empty, act_w=0.0, stash_bytes=None
        )

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Read ``F=1,I=1,W=1,comm=0,act_w=1``; what is left out keeps its default.

        >>> Costs.parse("F=2,comm=0.5").F
        2.0
        """
        names = [field.name for field in fields(cls) if field.name not in BYTES]
        values: dict[str, float] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = item.partition("=")
            name = name.strip()
            if name not in names:
                raise ScheduleError(
                    f"There is no cost {name!r}{nearest(name, names) or '.'} Costs: {', '.join(names)}."
                )
            if not equals:
                raise ScheduleError(f"Cost {name} has no value; write {name}=1.")
            if name in values:
                raise ScheduleError(f"Cost {name} is given twice.")
            try:
                values[name] = float(value)
            except ValueError:
                raise ScheduleError(f"Cost {name} is {value.strip()!r}, which is not a number.") from None
        return cls(**values)  # type: ignore[arg-type]  # activation_bytes isn't among them

    @classmethod
    def load(cls, path: Path | str) -> Costs:
        """Read a costs file: a JSON object of lists with one entry per stage, absolute, times in seconds.

        ``F``, ``I`` and ``W`` are needed; ``comm`` has one entry per boundary and ``OPT`` one per rank.
        Raises ScheduleError where it can't be read or says what can't be.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once)
        except (OSError, ValueError, RecursionError) as error:
            raise ScheduleError(f"The costs file {path} can't be read: {error}.") from None
        if not isinstance(document, dict):
            raise ScheduleError(f"The costs file {path} holds no JSON object.")
        known = [field.name for field in fields(cls)]
        for name, value in document.items():
            if name not in known:
                close = nearest(name, known) or "."
                raise ScheduleError(
                    f"The costs file {path} has the unknown key {name!r}{close} Keys: {', '.join(known)}."
                )
            if not isinstance(value, list) or any(type(item) not in (int, float) for item in value):
                raise ScheduleError(f"The costs file {path} has {name}={value!r}; it is a list of numbers.")
        for name in REQUIRED:
            if name not in document:
                raise ScheduleError(f"The costs file {path} has no {name!r}; it needs {', '.join(REQUIRED)}.")
        try:
            return cls(**document)
        except (ScheduleError, OverflowError) as error:  # JSON's integers have no end
            raise ScheduleError(f"{path}: {error}") from None

    def of(self, shape: Shape) -> StageCosts:
        """The costs of each stage.  Raises ScheduleError where a sequence has another length than the shape wants."""
        import numpy as np

        stages, ranks = shape.num_stages, shape.num_ranks
        crossing = np.zeros(stages - 1, dtype=bool)
        for replica in shape.placement:
            crossing |= np.diff(replica) != 0
        chunks = stages / ranks
        costs = {name: self._column(name, stages, chunks if name in PASSES else 1.0) for name in PER_STAGE}
        weight, kept, rerun, stash, *shards = (costs.pop(name) for name in BYTES)
        vocabulary, output, row = (held * (ranks / weight.sum()) for held in shards)
        if self.stash_bytes is not None:
            costs["act_w"] = np.divide(stash, weight, out=np.zeros(stages), where=weight > 0)
        return StageCosts(
            **costs,
            OPT=self._column("OPT", ranks, 1.0),
            comm=self._column("comm", stages - 1, 1.0) * crossing,
            activation=weight * (ranks / weight.sum()),
            input=kept * (ranks / weight.sum()),
            rerun=rerun * (ranks / weight.sum()),
            vocabulary=vocabulary,
            output=output,
            row=row,
            unit_bytes=None if self.activation_bytes is None else float(weight.sum()) / ranks,
        )

    def _column(self, name: str, length: int, parts: float) -> Values:
        """A cost as an array; a single number is divided into ``parts``."""
        import numpy as np

        value = getattr(self, name)
        if value is None and name in BYTES:
            return np.full(length, float(name == "activation_bytes"))
        if value is None:
            return self._column("F", length, parts)
        if not isinstance(value, tuple):
            return np.full(length, value / parts)
        if len(value) != length:
            entries = {"OPT": "ranks", "comm": "boundaries between stages"}.get(name, "stages")
            raise ScheduleError(f"Cost {name} has {len(value)} entries, but the schedule has {length} {entries}.")
        return np.array(value)


def _items(name: str, value: Cost | None) -> Iterator[tuple[str, float]]:
    """Each number of a cost with its name in messages."""
    if isinstance(value, Sequence):
        yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
    elif value is not None:
        yield name, value


def _check(name: str, where: str, value: float) -> None:
    """Raise ScheduleError for a number that the cost can't be."""
    finite = math.isfinite(value)
    if finite and value > MOST:
        raise ScheduleError(f"Cost {where} is {value:g}; the most is {MOST:g}.")
    if name in POSITIVE and not (finite and value > 0):
        raise ScheduleError(f"Cost {where} is {value:g}, but an operation takes a time above 0.")
    if name == "comm" and not (finite and value >= 0):
        raise ScheduleError(f"Cost {where} is {value:g}, but a latency is 0 or more.")
    if name == "act_w" and not 0 <= value <= 1:
        raise ScheduleError(f"Cost {where} is {value:g}, but a fraction is between 0 and 1.")
    if not (finite and value >= 0):
        raise ScheduleError(f"Cost {where} is {value:g}, but it is 0 or more.")
