"""Joined pairs: an F overlaps with the B or I of another micro-batch that follows it (``2F7+5B3``)."""

from __future__ import annotations

from stretto.schedule.arrows import Places
from stretto.schedule.op import Kind
from stretto.schedule.verifier.fault import fault


def check_joined(places: Places) -> None:
    """Raise ScheduleError where a joined operation and the one behind it are no such pair."""
    import numpy as np

    schedule = places.schedule
    if schedule.joined is None:
        return
    rows = np.flatnonzero(schedule.joined)
    pair = (schedule.kind[rows] == Kind.F) & np.isin(schedule.kind[rows + 1], (Kind.B, Kind.I))
    broken = ~pair | (schedule.microbatch[rows] == schedule.microbatch[rows + 1])
    if broken.any():
        row = int(rows[broken.argmax()])
        raise fault(schedule, row, "joined to no B or I of another micro-batch; a pair is an F and such a backward")
