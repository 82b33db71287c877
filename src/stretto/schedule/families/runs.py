"""Orders written as runs: one operation of one stage for several micro-batches in a row.

    Run(F, stage 2, microbatches 4 to 7)   ──►   2F4 2F5 2F6 2F7

Families that go stage by stage have few runs and many operations, so that their columns are made at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from stretto.schedule.op import Kind

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Run(NamedTuple):
    """``length`` operations of one kind and stage; one by default, as for operations on a block."""

    kind: Kind
    """What is done."""
    stage: int
    """Stage worked on."""
    first: int = 0
    """First micro-batch (or block)."""
    length: int = 1
    """How many micro-batches."""


class Columns(TypedDict):
    """What ``Schedule.from_columns`` takes; see there."""

    kind: npt.NDArray[np.int64]
    stage: npt.NDArray[np.int64]
    microbatch: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]


def columns(orders: Sequence[Sequence[Run]]) -> Columns:
    """The columns ``kind``, ``stage``, ``microbatch`` and ``offsets`` of one list of runs per rank."""
    import numpy as np

    runs = np.array([run for order in orders for run in order], dtype=np.int64).reshape(-1, 4)
    kind, stage, first, length = runs.T
    starts = np.cumsum(length) - length
    lengths = [sum(run.length for run in order) for order in orders]
    return {
        "kind": np.repeat(kind, length),
        "stage": np.repeat(stage, length),
        "microbatch": np.arange(length.sum()) + np.repeat(first - starts, length),
        "offsets": np.concatenate(([0], np.cumsum(lengths))),
    }
