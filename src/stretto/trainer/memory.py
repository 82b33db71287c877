"""Memory of a rank: the device's own count on CUDA, tracked tensors on the CPU.

On the CPU nothing counts allocations, so tensors are: parameters, masters, gradients and moments as they
lie, and the activations of one step, seen as autograd saves and releases them.  Storages that several
tensors share count once.  Activations are the same every step, so one step is watched and the figure kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stretto.trainer.session import Session


class ActivationMeter:
    """Counts the bytes that autograd and the pipeline keep for the backward pass."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._holders: dict[int, int] = {}
        self._bytes = 0
        self.peak_bytes = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count during the block."""
        runtime = self._session.runtime
        # Where activations are offloaded autograd asks the offloader, which says what it keeps on the device; S keeps
        # what autograd never sees.
        with (
            torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack),
            _watching(runtime.offloader, self._pack),
            _watching(runtime.vocabulary, self._measure),
        ):
            yield

    @torch.compiler.disable  # it is called where compiled code saves tensors
    def _pack(self, tensor: Tensor) -> _Held:
        key = _key(tensor)
        held = _Held(tensor.detach(), None if self._is_own(key) else self, key)
        if held.meter is not None:
            if not self._holders.get(key):
                self._bytes += tensor.untyped_storage().nbytes()
            self._holders[key] = self._holders.get(key, 0) + 1
            self._measure()
        return held

    @property
    def held_bytes(self) -> int:
        """What is kept now."""
        kept = self._of_stages()
        if (passes := self._session.runtime.vocabulary) is not None:
            kept |= {_key(t): t for t in passes.tensors()}
        return self._held(kept)

    @property
    def layer_bytes(self) -> int:
        """Of that, without what vocabulary passes keep."""
        return self._held(self._of_stages())

    def _of_stages(self) -> dict[int, Tensor]:
        return {_key(t): t for stage in self._session.model.stages.values() for t in stage.kept_tensors()}

    def _held(self, kept: dict[int, Tensor]) -> int:
        return self._bytes + sum(t.untyped_storage().nbytes() for k, t in kept.items() if not self._holders.get(k))

    def _measure(self) -> None:
        """Compare what is kept now with the peak."""
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)

    def _is_own(self, key: int) -> bool:
        """Whether it is a parameter; looked up each time, since zero 3 gives them new storage with every gathering."""
        module: Any = self._session.model.stack
        return any(key == _key(parameter) for parameter in module.parameters())

    def release(self, held: _Held) -> None:
        """A saved tensor was let go."""
        self._holders[held.key] -= 1
        if not self._holders[held.key]:
            self._bytes -= held.tensor.untyped_storage().nbytes()


@contextmanager
def _watching(whom: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Let it call when what it keeps is most."""
    if whom is None:
        yield
        return
    before, whom.watch = whom.watch, call
    try:
        yield
    finally:
        whom.watch = before


class _Held:
    """What autograd keeps instead of a tensor while a meter watches."""

    __slots__ = ("key", "meter", "tensor")

    def __init__(self, tensor: Tensor, meter: ActivationMeter | None, key: int) -> None:
        self.tensor, self.meter, self.key = tensor, meter, key

    def __del__(self) -> None:
        if self.meter is not None:
            self.meter.release(self)


def _unpack(held: _Held) -> Tensor:
    return held.tensor


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def persistent_tensors(session: Session) -> Iterable[Tensor]:
    """All that lives between steps."""
    for unit in session.model.units:
        yield from unit.buffers()
    for state in session.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def persistent_bytes(session: Session) -> int:
    """Bytes of the tensors that live between steps, each storage once."""
    storages = {_key(t): t.untyped_storage().nbytes() for t in persistent_tensors(session)}
    return sum(storages.values())


def passing_bytes(session: Session) -> int:
    """Bytes of gradients that live only inside a step, until they are reduced."""
    return sum(unit.passing_bytes() for unit in session.model.units)
