"""What waits for the next step: results of frozen work on the rank of the pipeline's first stage (hand_over.py).

    rank 0 │ 0F0 0F1 ... 0B0 ... 4F2 4F3        kept   2  1  0  ...  1  2      micro-batches' first inputs

A step begins with what the one before has handed over.  F of a micro-batch's first stage makes its input part of what
it keeps; F of the landing adds one for the next step.  A first input weighs ``input_bytes`` of the landing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stretto.schedule.flow import NONE
from stretto.schedule.op import Kind

if TYPE_CHECKING:
    from stretto.schedule.arrows import Places, Rows
    from stretto.schedule.simulate.stage_costs import StageCosts, Values


def landing_changes(places: Places, costs: StageCosts) -> Values:
    """What each row of a schedule that hands frozen work over takes at its start and end, besides the rest (N, 2)."""
    import numpy as np

    schedule = places.schedule
    found = np.zeros((schedule.num_ops, 2))
    landed, read = _pairs(places)
    weight = costs.input[schedule.stage[landed]]
    np.add.at(found[:, 1], landed, weight)
    np.add.at(found[:, 0], read, -weight)
    np.add.at(found[:, 0], schedule.offsets[places.rank[landed]], weight)
    return found


def _pairs(places: Places) -> tuple[Rows, Rows]:
    """Rows of what lands, and of the F that reads the like in the next step; none where nothing is handed over."""
    import numpy as np

    schedule, flows = places.schedule, places.flows
    units = np.flatnonzero(flows.turn[flows.of] == NONE)
    first = np.flatnonzero(flows.turn[flows.of] != NONE)
    nothing = np.empty(0, dtype=np.int32)
    if not len(units) or len(units) != len(first):
        return nothing, nothing
    landed = places.find(Kind.F, flows.last[flows.of[units]], units)
    entries = np.array([schedule.path(int(microbatch))[0] for microbatch in first])
    read = places.find(Kind.F, entries, first)
    if (landed < 0).any() or (read < 0).any() or (places.rank[landed] != places.rank[read]).any():
        return nothing, nothing
    return landed, read
