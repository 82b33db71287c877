"""Counts the bytes of live tensors, the same way for everybody.

Nothing on a CPU counts allocations, so storages are: each storage that any torch operation reads,
writes or makes counts from the first time it is seen until it is let go.  Storages that several tensors
share count once; resizing one (how shards are freed) counts.  Kernels' own scratch does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

PLAIN = (Tensor, nn.Parameter)
"""Types that own storage; fakes used to infer shapes don't."""


class MemoryCounter(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.bytes = 0
        self.peak_bytes = 0

    def start_peak(self) -> int:
        """Look for the peak from here on; return the bytes held now."""
        self.peak_bytes = self.bytes
        return self.bytes

    def __enter__(self) -> MemoryCounter:
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._see(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at all tensors that it touches."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own operations on local tensors come by here
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs, result)):
            self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._sizes[key] = 0
        size = storage.nbytes()
        self.bytes += size - self._sizes[key]
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _forget(self, key: int) -> None:
        self._watched.pop(key)
        self.bytes -= self._sizes.pop(key)


def _tensors(value: Any) -> Iterator[Tensor]:
    if type(value) in PLAIN:
        if value.device.type != "meta":
            yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
