"""Split the backward in the gradient of the inputs and that of the weights.

    1B0 1SEND_B0 1F1   ──►   1I0 1SEND_B0 1W0 1F1

I is what the rank before waits for; W can wait (Qi et al. 2023, zero bubble).  This pass puts W right
behind I, which gains the time of W on the way back; families that move W further gain more.
"""

from __future__ import annotations

from stretto.schedule.op import Kind
from stretto.schedule.passes.communication import lower, operations, with_entries, without_messages
from stretto.schedule.schedule import Schedule


def split_backward(schedule: Schedule) -> Schedule:
    """Every B becomes I and W in its place, all else stays; no rank waits for more than it did."""
    import numpy as np

    bare = without_messages(schedule)
    whole = bare.kind == Kind.B
    entries = np.repeat(operations(bare), 1 + whole, axis=1)
    after = np.cumsum(1 + whole)
    weights = after[whole] - 1
    entries[0, weights - 1], entries[0, weights] = Kind.I, Kind.W
    split = with_entries(bare, entries, np.append(0, after)[bare.offsets])
    return lower(split) if schedule.lowered else split
