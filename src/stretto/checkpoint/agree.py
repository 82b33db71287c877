"""What the ranks of a save or load tell each other; alone where torch.distributed is not initialised."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_alone() -> bool:
    """Whether there is nobody to talk to: a single process without a process group."""
    return not (dist.is_available() and dist.is_initialized())


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in ``group`` (None: all ranks) and the group's size."""
    return (0, 1) if is_alone() else (dist.get_rank(group), dist.get_world_size(group))


def from_first(value: T | None, group: dist.ProcessGroup | None) -> T:
    """The ``value`` that rank 0 of ``group`` passes."""
    box = [value]
    if not is_alone():
        source = 0 if group is None else dist.get_global_rank(group, 0)
        dist.broadcast_object_list(box, src=source, group=group)
    return box[0]  # type: ignore[return-value]


def from_all(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """The ``value`` of every rank of ``group``, in rank order."""
    if is_alone():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]
