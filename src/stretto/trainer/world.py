"""Where a process stands among the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stretto.spec.run import RunSpec

PATIENCE = 10
"""Ranks may wait for each other this many times ``hang_seconds``: the watchdog, which knows why, is to be first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One process of a run, as its launcher numbered it."""

    rank: int = 0
    """Number among all processes."""
    world_size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Number among those of this node; picks the device."""
    restarts: int = 0
    """How often the run was started again after a failure."""


def collective_limit(run: RunSpec) -> timedelta:
    """How long a rank of ``run`` may wait for others before torch ends it."""
    return timedelta(seconds=PATIENCE * run.run.hang_seconds + 60)
