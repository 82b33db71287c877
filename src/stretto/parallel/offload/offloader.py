"""O and L of one rank: which activations are away, and when their memory is given back.

    arithmetic   │F0│F1      │F2│ ...        │B0│
    out             │copy of 0│              ▲          F0 notes what autograd saves, O0 starts the copy, F2 takes its
    memory of 0  ───────────┘         ┌──────┘          memory when the copy is done and that of F0 given back
    back                              │copy│            L0 takes memory and starts to fill it; B0 waits for it

An offload has the time of one operation before it is waited for (that computes, or of a load behind another): so long
it is planned where costs don't say, and so what a rank holds depends on its order alone, not on how fast copies are
(PipeOffload, Wan et al. 2025).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stretto.parallel.offload.activation import Activation, Storage, Watch
from stretto.parallel.offload.mover import Copies, Mover, mover_for
from stretto.parallel.offload.pool import HostPool

Key = tuple[int, int]
"""Stage and micro-batch."""
ALIGNMENT = 64
"""Storages lie in a buffer at multiples of this, in bytes."""


@dataclass(slots=True, kw_only=True)
class _Away:
    """An activation that left."""

    activation: Activation
    storages: list[Storage]
    buffer: Tensor
    """On the host."""
    leaving: Copies | None
    """The copies to it, until they were waited for."""
    since: int
    """Time when it left, in operations."""
    coming: Copies | None = None
    """The copies from it."""

    def parts(self) -> list[Tensor]:
        """Where each storage lies on the host."""
        found, at = [], 0
        for storage in self.storages:
            found.append(self.buffer[at : at + storage.num_bytes])
            at += _aligned(storage.num_bytes)
        return found


class Offloader:
    """Moves the activations of one rank.

    Args:
        keys: stages and micro-batches that the schedule offloads.
        mover: makes the copies; None: the one for the device of the first activation.
        pool: host memory; what it has no room for stays on the device.
    """

    def __init__(self, keys: Iterable[Key], *, mover: Mover | None = None, pool: HostPool | None = None) -> None:
        self.keys = frozenset(keys)
        self.pool = pool or HostPool(pinned=mover is not None and mover.pinned)
        self.watch: Watch = _nobody
        """Told of what the offloaded activations keep on the device."""
        self._mover = mover
        self._noted: dict[Key, Activation] = {}
        self._away: dict[Key, _Away] = {}
        self._leaving: deque[_Away] = deque()
        self._now = 0
        self._loaded = -1

    def note(self, key: Key, device: torch.device, shared: Iterable[object]) -> Activation:
        """A forward begins whose activation will be offloaded; ``shared`` holds what must stay."""
        if self._mover is None:
            self._mover = mover_for(device)
            self.pool.pinned = self._mover.pinned
        self._noted[key] = Activation(device, shared, lambda tensor: self.watch(tensor))
        return self._noted[key]

    def offload(self, key: Key, inputs: Iterable[Tensor]) -> None:
        """O: start the way to the host; ``inputs`` are the leaves that the segments' graphs start from."""
        assert self._mover is not None
        activation = self._noted.pop(key)
        activation.empty_inputs(inputs)
        storages = activation.storages()
        buffer = self.pool.take(sum(_aligned(storage.num_bytes) for storage in storages)) if storages else None
        if buffer is None:
            activation.fill_inputs()
            return
        away = _Away(activation=activation, storages=storages, buffer=buffer, leaving=None, since=self._now)
        away.leaving = self._mover.out(list(zip(away.parts(), _present(storages), strict=True)))
        self._away[key] = away
        self._leaving.append(away)

    def load(self, key: Key) -> None:
        """L: start the way back."""
        away = self._away.get(key)
        if away is None:
            return
        assert self._mover is not None
        self._now += self._now == self._loaded  # loads come one after the other
        self._loaded = self._now
        self.before_memory()
        while away.leaving is not None:
            self._let_go(self._leaving.popleft())
        for storage in away.storages:
            storage.come(_memory_on(away.activation.device, storage.num_bytes), self.watch)
        away.activation.fill_inputs()
        away.coming = self._mover.back(list(zip(_present(away.storages), away.parts(), strict=True)))

    def before_memory(self) -> None:
        """An operation that keeps activations begins: give back what had the time of one operation to leave."""
        while self._leaving and self._leaving[0].since < self._now:
            self._let_go(self._leaving.popleft())

    def let_leave(self, most: int) -> None:
        """Wait until at most so many offloads are under way, the oldest first, and give their memory back."""
        while len(self._leaving) > max(0, most):
            self._let_go(self._leaving.popleft())

    def before_backward(self, key: Key) -> None:
        """The backward begins that needs an activation: wait until it is back."""
        away = self._away.pop(key, None)
        if away is None:
            return
        assert away.coming is not None, f"stage {key[0]} begins its backward of micro-batch {key[1]} before its L"
        away.coming.wait()
        self.pool.give(away.buffer)

    def after_computing(self) -> None:
        """An operation has computed."""
        self._now += 1

    def _let_go(self, away: _Away) -> None:
        """Wait for the copies to the host and give the device memory back."""
        assert away.leaving is not None
        away.leaving.wait()
        away.leaving = None
        for storage in away.storages:
            storage.leave()


def _nobody(tensor: Tensor) -> object:
    """Nobody counts."""
    return None


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _memory_on(device: torch.device, num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _present(storages: Sequence[Storage]) -> list[Tensor]:
    """The storages' bytes on the device."""
    found = [storage.device for storage in storages]
    assert all(tensor is not None for tensor in found)
    return [tensor for tensor in found if tensor is not None]
