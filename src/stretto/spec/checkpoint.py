"""When a run's state is written and where it goes on from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSpec:
    """Checkpoints are plan-independent: any plan resumes from any."""

    dir: str | None = None
    """Folder; None: ``checkpoints`` in the run's directory."""
    every: int = 0
    """Write one each so many steps; 0: only at the end and on SIGTERM."""
    keep: int = 2
    """How many to keep, oldest removed first; 0: all."""
    resume: str = "auto"
    """``auto`` goes on from the newest good one if there is any, ``never`` starts anew, or the path of one."""
