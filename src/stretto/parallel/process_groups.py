"""Process groups; those of gloo that may share a thread do.

gloo gives every group a device of its own, whose thread wakes a hundred times a second even where nothing comes.  A
rank of a plan with several axes is in some twenty groups: eight such ranks keep a quarter of a core busy with nothing.
So groups made here share their device with the others of their lane:

    messages      one thread: what the next operation waits for isn't behind a layer's gradients
    collectives   another one

Each group still has its own connections, and an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store


class Lane(StrEnum):
    """What a group is for; its members are names of backends, as torch.distributed knows them."""

    MESSAGES = "gloo-messages"
    COLLECTIVES = "gloo-collectives"


GLOO = ("gloo", *Lane)
"""Backends that are gloo."""


def new_group(ranks: Sequence[int], lane: Lane = Lane.COLLECTIVES, *, limit: timedelta | None = None) -> ProcessGroup:
    """Make a group of ``ranks``; collective over the world.

    ``limit``: how long its members may wait for each other; None: torch's own, which isn't that of the world's group.
    """
    shared = dist.get_backend() in GLOO and dist.is_gloo_available()
    return dist.new_group(list(ranks), timeout=limit, backend=_registered(lane) if shared else None)


def is_gloo(group: ProcessGroup | None) -> bool:
    """Whether a group's messages are gloo's."""
    return dist.get_backend(group) in GLOO


_shared: dict[tuple[Lane, timedelta], dist.ProcessGroupGloo.Options] = {}
"""What the groups of a lane, and of a limit of their waits, have in common: the device."""


def _registered(lane: Lane) -> str:
    if lane.value not in dist.Backend.backend_list:

        def create(store: Store, rank: int, size: int, limit: timedelta) -> dist.ProcessGroupGloo:
            if (lane, limit) in _shared:
                # (torch's stub lacks this signature.)
                return dist.ProcessGroupGloo(store, rank, size, _shared[lane, limit])  # type: ignore[arg-type]
            group = dist.ProcessGroupGloo(store, rank, size, timeout=limit)
            _shared[lane, limit] = group.options
            return group

        dist.Backend.register_backend(lane.value, create, devices=["cpu"])
    return lane.value
