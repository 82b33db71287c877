"""The error of a broken schedule: a sentence, and the grid that points at the cell."""

from __future__ import annotations

from stretto.schedule.op import text
from stretto.schedule.render.text import grid
from stretto.schedule.schedule import Schedule
from stretto.spec.errors import ScheduleError


def fault(schedule: Schedule, row: int, reason: str) -> ScheduleError:
    """``rank 0 runs 1B5, but`` the reason; points at the row."""
    rank = rank_of(schedule, row)
    return fault_at(
        schedule, rank, row - int(schedule.offsets[rank]), f"rank {rank} runs {token(schedule, row)}, {reason}."
    )


def fault_at(schedule: Schedule, rank: int, position: int, sentence: str) -> ScheduleError:
    """The sentence; points at a position of a rank, or behind its last operation."""
    return ScheduleError(f"{schedule.name}: {sentence}\n{grid(schedule, rank=rank, position=position)}")


def token(schedule: Schedule, row: int) -> str:
    """Text form of a row."""
    return text(int(schedule.kind[row]), int(schedule.stage[row]), int(schedule.microbatch[row]))


def rank_of(schedule: Schedule, row: int) -> int:
    """Rank of a row."""
    return int(schedule.offsets.searchsorted(row, side="right")) - 1
