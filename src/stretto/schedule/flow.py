"""Where micro-batches go, as tables: for each stage the one before, the one after, and who gives the gradient.

Micro-batches with the same path and replica share a flow, one row of each table.  A micro-batch that visits
stages 0, 2 and 3 of four, of which 2 is frozen:

    stage      0    1    2    3
    position   0   -1    1    2       where the stage comes on the path, -1: not visited
    before    -1   -1    0    2       whose output it reads
    after      2   -1    3   -1       who reads its output
    source     3   -1    3   -1       whose backward gives the gradient of its output; frozen stages are passed over
    target    -1   -1    0    0       who needs the gradient of its input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from stretto.schedule.schedule import Schedule

    Table = npt.NDArray[np.int32]

NONE = -1
"""Entry of a table where there is nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flows:
    """Tables (flows, S) of stages and ranks, -1 where there is none."""

    of: Table
    """``of[m]`` is the flow of micro-batch m (M,)."""
    holder: Table
    """Rank that holds the stage."""
    position: Table
    """Where the stage comes on the path."""
    before: Table
    """Stage whose output this one reads."""
    after: Table
    """Stage that reads this one's output."""
    source: Table
    """Stage whose backward gives the gradient of this one's output."""
    target: Table
    """Stage that needs the gradient of this one's input."""
    last: Table
    """Last stage of the path (flows,)."""
    turn: Table
    """Last stage of the path that has a backward (flows,)."""
    backward: npt.NDArray[np.bool_]
    """Whether a stage has a backward (S,)."""


def flows(schedule: Schedule) -> Flows:
    """The tables of a schedule."""
    import numpy as np

    numbers: dict[tuple[Sequence[int], int], int] = {}
    of = [
        numbers.setdefault((schedule.path(m), voice), len(numbers)) for m, voice in enumerate(schedule.voice)
    ]  # equal ranges hash alike, so schedules without paths have one flow per replica
    backward = np.array([schedule.has_backward(stage) for stage in range(schedule.num_stages)])
    tables = np.full((5, len(numbers), schedule.num_stages), NONE, dtype=np.int32)
    ends = np.full((2, len(numbers)), NONE, dtype=np.int32)
    for (path, _), flow in numbers.items():
        position, before, after, source, target = tables[:, flow]
        way = np.array(path, dtype=np.int32)
        learns = backward[way]
        position[way] = np.arange(len(way))
        before[way[1:]], after[way[:-1]] = way[:-1], way[1:]
        learning = np.concatenate([[NONE], way[learns], [NONE]])
        behind = np.cumsum(learns)  # entry of ``learning`` for the last learning stage up to here
        source[way], target[way] = learning[behind + 1], learning[behind - learns]
        ends[:, flow] = way[-1], learning[-2]
    holder = np.array([schedule.placement[voice] for _, voice in numbers], dtype=np.int32)
    position, before, after, source, target = tables
    return Flows(
        of=np.array(of, dtype=np.int32),
        holder=holder.reshape(len(numbers), schedule.num_stages),
        position=position,
        before=before,
        after=after,
        source=source,
        target=target,
        last=ends[0],
        turn=ends[1],
        backward=backward,
    )
