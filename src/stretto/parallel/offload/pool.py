"""Host memory for activations that are away: buffers that are used again, within a limit.

Activations of a step have the same sizes every time, and pinned memory is slow to get, so that a buffer is kept
when what it held has come back, for the next of its size:

    take 3 MB ──► new        give ──► kept        take 3 MB ──► the same one        take 9 MB ──► new, or None

torch gives pinned memory in powers of two (unless PYTORCH_ALLOC_CONF says otherwise, pinned_max_round_threshold_mb),
so a pinned buffer is as large as what is taken for it: the limit is of the host's memory, not of what is used of it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

GRAIN = 4096
"""Sizes are multiples of this, in bytes, so that nearly equal activations share buffers."""


def half_of_this_host(ranks: int = 1) -> int | None:
    """Half of the host's physical memory in bytes, divided among ``ranks`` processes; None where unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // ranks
    except (AttributeError, OSError, ValueError):
        return None


class HostPool:
    """Buffers in host memory.

    Args:
        limit_bytes: never hold more than this; None: no limit.
        pinned: in memory that a device can copy from and to by itself.
    """

    def __init__(self, limit_bytes: int | None = None, *, pinned: bool = False) -> None:
        self.limit_bytes, self.pinned = limit_bytes, pinned
        self._free: dict[int, list[Tensor]] = {}
        self.held_bytes = 0
        """Of all buffers, used or not."""
        self.used_bytes = 0
        """Of those that are taken."""
        self.peak_bytes = 0
        """The most that was taken at once."""
        self.refused = 0
        """How often the limit left no room."""

    def take(self, num_bytes: int) -> Tensor | None:
        """A buffer uint8 [at least num_bytes], or None where the limit leaves no room for it."""
        size = self.size_of(num_bytes)
        if self._free.get(size):
            buffer = self._free[size].pop()
        elif self._has_room(size):
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
            self.held_bytes += size
        else:
            self.refused += 1
            return None
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return buffer

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back; nothing may read or write it any more."""
        self.used_bytes -= buffer.numel()
        self._free.setdefault(buffer.numel(), []).append(buffer)

    def size_of(self, num_bytes: int) -> int:
        """Bytes of the buffer for so many."""
        grains = -(-num_bytes // GRAIN) * GRAIN
        return 1 << (grains - 1).bit_length() if self.pinned else grains

    def _has_room(self, size: int) -> bool:
        """Whether one more buffer may be made; unused ones of other sizes make room for it."""
        if self.limit_bytes is None:
            return True
        for unused in self._free.values():
            while unused and self.held_bytes + size > self.limit_bytes:
                self.held_bytes -= unused.pop().numel()
        return self.held_bytes + size <= self.limit_bytes
