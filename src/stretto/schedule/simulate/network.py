"""How messages travel.

    overlapped   0F0 0F1 ...                   the link works beside the ranks; the reader starts when the
                  └─ bytes ─┤ latency ├─ 1F0   message has arrived

    blocking     0F0 SEND  0F1                 a send occupies its rank until its bytes are on the way, a
                         └ latency ┤ 1F0       receive occupies its rank until they have arrived

    rendezvous   0F0 . . . SEND 0F1            both are over together, when the later one has come and
                 1W3 RECV- - - - 1F0           bytes and latency have passed

The latency of each boundary is a cost (``Costs.comm``); what is said here is the rest.  The default is
pure latency, overlapped: any number of messages travel at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from stretto.spec.errors import ScheduleError, nearest

if TYPE_CHECKING:
    from stretto.schedule.simulate.stage_costs import Values

Manner = Literal["overlapped", "blocking", "rendezvous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Messages between ranks.  Raises ScheduleError for what can't be."""

    manner: Manner = "overlapped"
    """Whether messages occupy ranks; the two that do time a schedule with its messages, written in where it has none.
    """
    message_bytes: float | Sequence[float] = 0.0
    """Size of a message; as a sequence, entry s is for the boundary of stages s and s + 1."""
    bandwidth: float = math.inf
    """Bytes per unit of the costs' time, on each link from one rank to another; a link sends one message at a time, in
    the order in which they are made."""
    in_flight: int | None = None
    """Messages that a channel (from rank to rank, activations or gradients) may hold: the next one leaves when a reader
    of those before it is over, or under blocking a receive; None: any number."""

    def __post_init__(self) -> None:
        """Refuse what would make times meaningless."""
        if self.manner not in get_args(Manner):
            raise ScheduleError(f"Messages can't be {self.manner!r}; they are {', '.join(get_args(Manner))}.")
        if isinstance(self.message_bytes, Sequence):
            object.__setattr__(self, "message_bytes", tuple(map(float, self.message_bytes)))
        for size in self.message_bytes if isinstance(self.message_bytes, tuple) else (self.message_bytes,):
            if not (math.isfinite(size) and size >= 0):
                raise ScheduleError(f"A message has {size:g} bytes, but a size is 0 or more.")
        if not self.bandwidth > 0:
            raise ScheduleError(f"The bandwidth is {self.bandwidth:g}, but bytes travel at a rate above 0.")
        if self.in_flight is not None and self.in_flight < 1:
            raise ScheduleError(f"A channel can't hold {self.in_flight} messages; it holds at least 1.")

    @classmethod
    def parse(cls, text: str) -> Network:
        """Read ``manner=blocking,message_bytes=1e6,bandwidth=1e9,in_flight=2``; what is left out keeps its default.

        >>> Network.parse("bandwidth=4,message_bytes=2").seconds(3).tolist()
        [0.5, 0.5]
        """
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if name not in names or not equals:
                close = (name not in names and nearest(name, names)) or "."
                raise ScheduleError(f"{item!r} says nothing of a network{close} Write {'=..., '.join(names)}=....")
            if name in values:
                raise ScheduleError(f"{name} of a network is given twice.")
            try:
                values[name] = value if name == "manner" else int(value) if name == "in_flight" else float(value)
            except ValueError:
                raise ScheduleError(f"{name} of a network is {value!r}, which is not a number.") from None
        return cls(**values)

    def seconds(self, num_stages: int) -> Values:
        """Time that each boundary's messages keep a link busy (S - 1,)."""
        import numpy as np

        if isinstance(self.message_bytes, tuple) and len(self.message_bytes) != num_stages - 1:
            raise ScheduleError(
                f"There are {len(self.message_bytes)} message sizes, but the schedule has {num_stages - 1} boundaries "
                "between stages."
            )
        return np.full(num_stages - 1, self.message_bytes) / self.bandwidth

    @property
    def links(self) -> bool:
        """Whether messages may wait for each other."""
        return self.in_flight is not None or (self.bandwidth < math.inf and self.message_bytes != 0)
