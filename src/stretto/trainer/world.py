"""Where a process stands among the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass


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
