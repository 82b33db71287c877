"""The shard unit: a unit whose parameters lie in one flat buffer (ZeRO D2; FSDP's flat parameter).

    flat, compute type   │ q │ k │ v │ o │ gate ........ │ down │ norms │pad│   parameters are views of it
    cut over the shards  ├──── rank 0 ────┼──── rank 1 ────┼──── rank 2 ────┤   each rank's masters

The shards are the ranks of dp_shard and of cp together: those of cp hold equal parameters and read other tokens,
like those of dp_shard.  What is kept whole between steps, by ``zero``:

    one shard       parameters, gradients, masters     all-reduce over dp_replicate
    zero 1          parameters, gradients              reduce-scatter once a step, all-gather after it
    zero 2          parameters                         reduce-scatter every backward
    zero 3          nothing                            also all-gather before every forward and backward

Gradients are summed in the masters' type.  Parameters that tp ranks hold whole come first in the
buffer, so that their partial gradients (tensor.py) are one contiguous range to sum over tp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stretto.parallel.collectives import DONE, Pending, all_gather, all_reduce, reduce_scatter
from stretto.parallel.gradient import Gradient, add_gradient
from stretto.parallel.master import Master, counts_here
from stretto.parallel.mesh import SHARDS, Holders, Mesh
from stretto.spec.sharding import Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_REDUCING = 2
"""Gradient buffers that may be on their way at once under zero 2 and 3."""


class ReduceQueue:
    """Bounds how many transient gradient buffers are alive: the oldest reduction is finished first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[FlatUnit, Pending, Tensor]] = []

    def push(self, unit: FlatUnit, pending: Pending, shard: Tensor) -> None:
        """Remember a reduction under way."""
        self._waiting.append((unit, pending, shard))
        if len(self._waiting) > MAX_REDUCING:
            self._finish_oldest()

    def drain(self) -> None:
        """Finish all."""
        while self._waiting:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        unit, pending, shard = self._waiting.pop(0)
        pending.wait()
        unit.accumulate_shard(shard)


def _held(buffer: Tensor) -> Tensor:
    """``buffer`` with memory behind it, whatever that holds; views of it stay valid."""
    storage = buffer.untyped_storage()
    if not storage.nbytes():
        storage.resize_(buffer.numel() * buffer.element_size())
    return buffer


class FlatUnit:
    """Parameters in one flat buffer, shared along dp_replicate, dp_shard, cp, tp or a tie."""

    def __init__(
        self,
        name: str,
        held: Sequence[tuple[nn.Parameter, Sharding]],
        *,
        mesh: Mesh,
        zero: int,
        compute: torch.dtype,
        queue: ReduceQueue,
        holders: Holders | None = None,
    ) -> None:
        """Move the values of ``held`` into the buffer and make the parameters views of it.

        Args:
            held: parameters in the type of masters and gradients, with their shardings.
            zero: 1, 2 or 3; with one shard it changes nothing.
            compute: type that the parameters get.
            holders: pipeline ranks that hold these parameters too; gradients are also summed over them.
        """
        self.name = name
        self._mesh, self._queue, self._holders = mesh, queue, holders
        self._ranks = mesh.size(*SHARDS)
        self._zero = zero if self._ranks > 1 else 0
        held = sorted(held, key=lambda pair: pair[1].tp_dim is not None)
        self._sizes = [p.numel() for p, _ in held]
        self._partial = sum(p.numel() for p, s in held if s.tp_dim is None) if mesh.size("tp") > 1 else 0
        total = sum(self._sizes)
        self._width = -(-total // self._ranks)
        self._low = mesh.shard_index * self._width
        self._make_buffers(held, compute)
        self._make_masters(held)
        self._gathering: Pending = DONE
        self._reducing: Pending = DONE
        self._remaining, self._told = 0, False
        self._fresh, self._reduced = True, False
        self._whole_gradient: Tensor | None = None  # zero 2 and 3, until it is reduced
        self._holds = 0
        self._whole = self._zero < 3
        if not self._whole:
            self._free()
        self._free_gradients()

    def _make_buffers(self, held: Sequence[tuple[nn.Parameter, Sharding]], compute: torch.dtype) -> None:
        first = held[0][0]
        values = first.new_zeros(self._width * self._ranks, requires_grad=False)
        for (parameter, _), view in zip(held, values[: sum(self._sizes)].split(self._sizes), strict=True):
            view.view(parameter.shape).copy_(parameter.detach())
        mine = slice(self._low, self._low + self._width)
        self._flat = values if first.dtype == compute else values.to(compute)
        self._shard = self._flat[mine].clone() if self._zero == 3 else self._flat[mine]
        self._main = self._shard if first.dtype == compute else values[mine].clone()
        self._grad = torch.zeros_like(values) if self._zero <= 1 else None
        self._grad_shard = torch.zeros_like(self._main) if self._zero else self._grad
        # `.data` has a version counter of its own: refilling the buffer doesn't invalidate saved tensors.
        views = self._flat.data[: sum(self._sizes)].split(self._sizes)
        self.parameters, self._trained = [], []
        for i, ((parameter, _), view) in enumerate(zip(held, views, strict=True)):
            parameter.data = view.view(parameter.shape)
            if parameter.requires_grad:
                self.parameters.append(parameter)
                self._trained.append(i)
        self._bytes = self._flat.untyped_storage().nbytes()

    def _make_masters(self, held: Sequence[tuple[nn.Parameter, Sharding]]) -> None:
        assert self._grad_shard is not None
        self.masters = []
        at = 0
        for (parameter, sharding), size in zip(held, self._sizes, strict=True):
            low, high = max(at, self._low), min(at + size, self._low + self._width)
            at += size
            if low >= high and size:
                continue
            counted = counts_here(sharding, self._mesh, self._holders)
            tensor = self._main[low - self._low : high - self._low]
            grad = self._grad_shard[low - self._low : high - self._low]
            if self._ranks == 1:
                tensor, grad = tensor.view(parameter.shape), grad.view(parameter.shape)
            if parameter.requires_grad:
                tensor.grad = grad
            self.masters.append(
                Master(
                    tensor=tensor,
                    sharding=sharding,
                    start=low - (at - size),
                    stop=high - (at - size),
                    counted=counted,
                    owned=counted and self._mesh.index("dp_replicate") == 0,
                    trained=parameter.requires_grad,
                )
            )

    def begin_step(self, contributions: int, *, told: bool = False) -> None:
        """Let the last step's gradients go, so that the forward pass has their memory."""
        self._remaining, self._told = contributions, told
        self._fresh, self._reduced = True, False
        self._free_gradients()

    def _free_gradients(self) -> None:
        for buffer in (self._grad, self._grad_shard):
            if buffer is not None:
                buffer.untyped_storage().resize_(0)

    def hold(self) -> None:
        """Gather the parameters and keep them until ``release``."""
        self._holds += 1
        self.unshard()

    def release(self) -> None:
        """Undo one ``hold``; the last one lets ``reshard`` free the parameters."""
        self._holds -= 1
        self.reshard()

    def unshard(self) -> None:
        """Start gathering the parameters (zero 3)."""
        if not self._whole:
            self._flat.untyped_storage().resize_(self._bytes)
            self._gathering = all_gather(self._shard, self._flat, self._mesh.group(*SHARDS))
            self._whole = True

    def ready(self) -> None:
        """Wait for ``unshard`` or ``publish``."""
        self._gathering.wait()
        self._gathering = DONE

    def reshard(self) -> None:
        """Give the memory of the gathered parameters back (zero 3), unless they are held."""
        if self._zero == 3 and self._whole and not self._holds:
            self.ready()
            self._free()

    def _free(self) -> None:
        self._flat.untyped_storage().resize_(0)
        self._whole = False

    def add_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Add one backward pass into the buffer; reduce when zero or the last pass says so, unless told when."""
        if not self._trained:
            return
        buffer, fresh = self._accumulator()
        views = buffer[: sum(self._sizes)].split(self._sizes)
        for i, parameter, gradient in zip(self._trained, self.parameters, gradients, strict=True):
            add_gradient(views[i].view(parameter.shape), gradient, fresh=fresh)
        self._fresh = False
        self._remaining -= 1
        # Holders finish a unit at different times and in different orders: unless told, they meet when settling.
        if not self._told and (self._zero >= 2 or self._holders is None):
            self.reduce_gradients()

    def _accumulator(self) -> tuple[Tensor, bool]:
        """The whole gradients that accumulate, and whether what is in them doesn't count."""
        if self._grad is not None:
            return _held(self._grad), self._fresh
        if self._whole_gradient is not None:
            return self._whole_gradient, False
        self._whole_gradient = self._main.new_empty(self._width * self._ranks)
        return self._whole_gradient, True

    def reduce_gradients(self) -> None:
        """Start to reduce: under zero 2 and 3 what came since the last time, else all once it is there."""
        if not self._trained:
            return
        if self._zero >= 2:
            if self._whole_gradient is not None:
                buffer, self._whole_gradient = self._whole_gradient, None
                shard = self._main.new_empty(self._width)
                self._queue.push(self, reduce_scatter(buffer, shard, self._mesh.group(*SHARDS)), shard)
        elif self._remaining == 0 and not self._reduced:
            assert self._grad is not None and self._grad_shard is not None
            self._reduced = True
            if self._fresh:  # no micro-batch came by, here and on all shards; other holders may have had some
                _held(self._grad if self._zero == 0 else self._grad_shard).zero_()
            if self._zero == 0:
                self._reducing = all_reduce(self._grad, self._replicas)
            elif not self._fresh:
                self._reducing = reduce_scatter(self._grad, _held(self._grad_shard), self._mesh.group(*SHARDS))

    @property
    def _replicas(self) -> ProcessGroup | None:
        """The ranks that have gradients of the same parameters: copies along dp_replicate, and other holders."""
        return self._mesh.group("dp_replicate") if self._holders is None else self._holders.group

    def accumulate_shard(self, shard: Tensor) -> None:
        """Add a reduced gradient shard (zero 2 and 3)."""
        assert self._grad_shard is not None
        if self._grad_shard.untyped_storage().nbytes():
            self._grad_shard.add_(shard)
        else:
            _held(self._grad_shard).copy_(shard)

    def settle(self, phase: int) -> Pending:
        """Phase 0 ends the reduction over the shards, 1 sums over replicas and holders, 2 over tp."""
        grad = self._grad_shard
        assert grad is not None
        if not self._trained:  # frozen: no gradient has memory
            return DONE
        if phase == 0:
            return self._finish_reduction(grad)
        if phase == 1:
            if self._zero == 1 and self._grad is not None:
                self._grad.untyped_storage().resize_(0)  # the shard has it now
            return all_reduce(grad, self._replicas) if self._zero else DONE
        held_partial = min(self._partial, self._low + self._width) - self._low
        return all_reduce(grad[: max(0, held_partial)], self._mesh.group("tp"))

    def _finish_reduction(self, grad: Tensor) -> Pending:
        assert self._remaining == 0, f"{self.name} misses {self._remaining} backward passes"
        if self._fresh and self._zero >= 2:  # no micro-batch came by
            _held(grad).zero_()
        self.reduce_gradients()
        self._queue.drain()
        pending, self._reducing = self._reducing, DONE
        return pending

    def publish(self) -> None:
        """Round masters to the parameters' type and gather them (zero 1 and 2)."""
        if self._main is not self._shard:
            self._shard.copy_(self._main)
        if self._zero in (1, 2):
            self._gathering = all_gather(self._shard.clone(), self._flat, self._mesh.group(*SHARDS))

    def buffers(self) -> Iterable[Tensor]:
        """Parameters, masters and gradients."""
        held = (self._flat, self._shard, self._main, self._grad, self._grad_shard)
        return [tensor for tensor in held if tensor is not None]

    def passing_bytes(self) -> int:
        """The whole gradients of zero 1, which end when their shards are reduced."""
        if self._zero != 1 or self._grad is None:
            return 0
        return self._grad.numel() * self._grad.element_size()
