"""What operations cost: the values that a simulation is given.

Scalars are for a rank's whole share of the model; with V chunks per rank each costs 1/V of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from stretto.schedule.op import Kind
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Scalar costs, in any unit of time.  Raises ScheduleError for a cost that can't be."""

    F: float = 1.0
    """Forward."""
    I: float = 1.0  # noqa: E741
    """Gradient of the inputs; B costs I + W."""
    W: float = 1.0
    """Gradient of the weights."""
    R: float = 1.0
    """Recompute, where the schedule has it."""
    comm: float = 0.0
    """Latency of a stage boundary between two ranks; it occupies neither of them."""
    act_w: float = 1.0
    """Fraction of an activation kept between I and W."""

    def __post_init__(self) -> None:
        """Refuse what would make times meaningless."""
        for name in ("F", "I", "W", "R"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise ScheduleError(f"Cost {name} is {value:g}, but an operation takes a time above 0.")
        if not (math.isfinite(self.comm) and self.comm >= 0):
            raise ScheduleError(f"Cost comm is {self.comm:g}, but a latency is 0 or more.")
        if not 0 <= self.act_w <= 1:
            raise ScheduleError(f"Cost act_w is {self.act_w:g}, but a fraction is between 0 and 1.")

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Read ``F=1,I=1,W=1,comm=0,act_w=1``; what is left out keeps its default.

        >>> Costs.parse("F=2,comm=0.5").F
        2.0
        """
        names = [field.name for field in fields(cls)]
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
        return cls(**values)

    def of_chunk(self, schedule: Schedule) -> dict[int, float]:
        """Duration of each kind of operation on one stage of the schedule; kinds left out take no time."""
        chunks = schedule.num_stages / schedule.num_ranks
        whole = {Kind.F: self.F, Kind.B: self.I + self.W, Kind.I: self.I, Kind.W: self.W, Kind.R: self.R}
        return {int(kind): cost / chunks for kind, cost in whole.items()}
