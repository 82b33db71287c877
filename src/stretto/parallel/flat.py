"""The shard unit: a unit whose parameters lie in one flat buffer (ZeRO; FSDP's flat parameter; AMSP).

    flat, compute type   │ q │ k │ v │ o │ gate ........ │ down │ norms │pad│   parameters are views of it
    kept, P = 2          ├───── ranks 0, 2 ──────┼───── ranks 1, 3 ─────────┤   what a rank keeps of it
    masters, O = 4       ├─ rank 0 ──┼─ rank 2 ──┼─ rank 1 ──┼─── rank 3 ───┤   what a rank updates

Parameters are divided over P ranks, gradients over G and masters (with their moments) over O, each shard inside the
one before (spec/states.py).  What a step sends, each time between the ranks that a larger factor adds:

    P > 1      all-gather before every forward and backward
    G > 1      reduce-scatter every backward, over P and then over G / P
    O > G      reduce-scatter once a step, over O / G
    O < all    all-reduce of the masters' shard once a step, over its copies
    O > P      all-gather of what was updated, over O / G and then over G / P

Ranks of cp hold equal parameters and read other tokens, like those of dp_shard and dp_replicate.

Gradients are summed in the masters' type.  Parameters that tp ranks hold whole come first in the
buffer, so that their partial gradients (tensor.py) are one contiguous range to sum over tp.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stretto.parallel.collectives import DONE, Pending, Then, all_gather, all_reduce, reduce_scatter
from stretto.parallel.gradient import Gradient, add_gradient
from stretto.parallel.master import Master, counts_here
from stretto.parallel.mesh import SHARDS, Holders, Mesh
from stretto.spec.sharding import Sharding

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_REDUCING = 2
"""Gradient buffers that may be on their way at once where gradients are divided."""


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
        unit.take_shard(shard)


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
        compute: torch.dtype,
        queue: ReduceQueue,
        holders: Holders | None = None,
    ) -> None:
        """Move the values of ``held`` into the buffer and make the parameters views of it.

        Args:
            held: parameters in the type of masters and gradients, with their shardings.
            mesh: says who divides parameters, gradients and masters.
            compute: type that the parameters get.
            holders: pipeline ranks that hold these parameters too; gradients are also summed over them.
        """
        self.name = name
        self._mesh, self._queue, self._holders = mesh, queue, holders
        held = sorted(held, key=lambda pair: pair[1].tp_dim is not None)
        self._sizes = [p.numel() for p, _ in held]
        self._partial = sum(p.numel() for p, s in held if s.tp_dim is None) if mesh.size("tp") > 1 else 0
        self._width = -(-sum(self._sizes) // mesh.size(*SHARDS))
        self._low = mesh.shard_index * self._width
        self._summed_width = self._width * mesh.size("optimizer")
        self._kept_width = self._summed_width * mesh.size("gradients")
        self._divided = mesh.size("parameters") > 1
        self._reduces_each = mesh.size("parameters", "gradients") > 1
        self._make_buffers(held, compute)
        self._make_masters(held)
        self._gathering: Pending = DONE
        self._reducing: Pending = DONE
        self._remaining, self._told = 0, False
        self._fresh, self._reduced = True, False
        self._whole_gradient: Tensor | None = None  # where each backward is reduced, until it is
        self._holds = 0
        self._whole = not self._divided
        if self._divided:
            self._free()
        self._free_gradients()

    def _make_buffers(self, held: Sequence[tuple[nn.Parameter, Sharding]], compute: torch.dtype) -> None:
        first, mesh = held[0][0], self._mesh
        values = first.new_zeros(self._kept_width * mesh.size("parameters"), requires_grad=False)
        for (parameter, _), view in zip(held, values[: sum(self._sizes)].split(self._sizes), strict=True):
            view.view(parameter.shape).copy_(parameter.detach())
        self._flat = values if first.dtype == compute else values.to(compute)
        start = mesh.index("parameters") * self._kept_width
        self._kept = self._flat[start : start + self._kept_width]
        if self._divided:
            self._kept = self._kept.clone()
        self._own = self._kept[self._low - start : self._low - start + self._width]
        self._main = self._own if first.dtype == compute else values[self._low : self._low + self._width].clone()
        self._sum = self._main.new_zeros(self._summed_width)
        self._grad_shard = self._sum if self._summed_width == self._width else torch.zeros_like(self._main)
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
            if self._mesh.size(*SHARDS) == 1:
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
                    owned=counted and self._mesh.index("copies") == 0,
                    trained=parameter.requires_grad,
                )
            )

    def begin_step(self, contributions: int, *, told: bool = False) -> None:
        """Let the last step's gradients go, so that the forward pass has their memory."""
        self._remaining, self._told = contributions, told
        self._fresh, self._reduced = True, False
        self._free_gradients()

    def _free_gradients(self) -> None:
        for buffer in (self._sum, self._grad_shard):
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
        """Start gathering the parameters, where they are divided."""
        if not self._whole:
            self.ready()  # of what ``publish`` gathers
            self._flat.untyped_storage().resize_(self._bytes)
            self._gathering = all_gather(self._kept, self._flat, self._mesh.group("parameters"))
            self._whole = True

    def ready(self) -> None:
        """Wait for ``unshard`` or ``publish``."""
        self._gathering.wait()
        self._gathering = DONE

    def reshard(self) -> None:
        """Give the memory of the gathered parameters back, where they are divided, unless they are held."""
        if self._divided and self._whole and not self._holds:
            self.ready()
            self._free()

    def _free(self) -> None:
        self._flat.untyped_storage().resize_(0)
        self._whole = False

    def add_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Add one backward pass into the buffer; reduce when each or the last pass is, unless told when."""
        if not self._trained:
            return
        buffer, fresh = self._accumulator()
        views = buffer[: sum(self._sizes)].split(self._sizes)
        for i, parameter, gradient in zip(self._trained, self.parameters, gradients, strict=True):
            add_gradient(views[i].view(parameter.shape), gradient, fresh=fresh)
        self._fresh = False
        self._remaining -= 1
        # Holders finish a unit at different times and in different orders: unless told, they meet when settling.
        if not self._told and (self._reduces_each or self._holders is None):
            self.reduce_gradients()

    def _accumulator(self) -> tuple[Tensor, bool]:
        """The whole gradients that accumulate, and whether what is in them doesn't count."""
        if not self._reduces_each:
            return _held(self._sum), self._fresh
        if self._whole_gradient is not None:
            return self._whole_gradient, False
        self._whole_gradient = self._main.new_empty(self._flat.numel())
        return self._whole_gradient, True

    def reduce_gradients(self) -> None:
        """Start to reduce: what came since the last time where gradients are divided, else all once it is there."""
        if not self._trained:
            return
        if self._reduces_each:
            if self._whole_gradient is not None:
                buffer, self._whole_gradient = self._whole_gradient, None
                self._scatter(buffer, "parameters" if self._divided else "gradients")
        elif self._remaining == 0 and not self._reduced:
            self._reduced = True
            if self._mesh.size("optimizer") > 1:
                self._reducing = self._scatter_once()
                return
            if self._fresh:  # no micro-batch came by, here and on all shards; other holders may have had some
                _held(self._sum).zero_()
            self._reducing = all_reduce(self._sum, self._replicas)

    def _scatter(self, buffer: Tensor, axis: str) -> None:
        """Start to reduce ``buffer`` to this rank's part of it along ``axis``."""
        shard = self._main.new_empty(buffer.numel() // self._mesh.size(axis))
        self._queue.push(self, reduce_scatter(buffer, shard, self._mesh.group(axis)), shard)

    def _scatter_once(self) -> Pending:
        """Start to reduce the accumulated gradients to what the masters need (O > G)."""
        if self._fresh:
            _held(self._grad_shard).zero_()
            return DONE
        return reduce_scatter(self._sum, _held(self._grad_shard), self._mesh.group("optimizer"))

    @property
    def _replicas(self) -> ProcessGroup | None:
        """The ranks that have gradients of the same masters: their copies, and other holders."""
        return self._mesh.group("copies") if self._holders is None else self._holders.group

    def take_shard(self, shard: Tensor) -> None:
        """A reduction of ``reduce_gradients`` has arrived: pass it on along the next axis, or add it."""
        if shard.numel() > self._summed_width:
            self._scatter(shard, "gradients")
        elif self._sum.untyped_storage().nbytes():
            self._sum.add_(shard)
        else:
            _held(self._sum).copy_(shard)

    def settle(self, phase: int) -> Pending:
        """Phase 0 ends the reduction to G ranks, 1 goes on to O, 2 sums over copies and holders, 3 over tp."""
        if not self._trained:  # frozen: no gradient has memory
            return DONE
        grad = self._grad_shard
        if phase == 0:
            return self._finish_reduction()
        if phase == 1:
            further = self._reduces_each and self._mesh.size("optimizer") > 1
            return self._scatter_once() if further else DONE
        if phase == 2:
            if self._sum is not grad:
                self._sum.untyped_storage().resize_(0)  # the shard has it now
            alone = self._mesh.size(*SHARDS) == 1  # has been summed
            return DONE if alone else all_reduce(grad, self._replicas)
        held_partial = min(self._partial, self._low + self._width) - self._low
        return all_reduce(grad[: max(0, held_partial)], self._mesh.group("tp"))

    def _finish_reduction(self) -> Pending:
        assert self._remaining == 0, f"{self.name} misses {self._remaining} backward passes"
        if self._fresh and self._reduces_each:  # no micro-batch came by
            _held(self._sum).zero_()
        self.reduce_gradients()
        self._queue.drain()
        pending, self._reducing = self._reducing, DONE
        return pending

    def publish(self) -> None:
        """Round masters to the parameters' type and gather what others have updated of this rank's parameters."""
        if self._main is not self._own:
            self._own.copy_(self._main)
        mesh = self._mesh
        start = mesh.index("gradients") * self._summed_width
        summed = self._kept[start : start + self._summed_width]
        if mesh.size("optimizer") > 1:
            self._gathering = all_gather(self._own.clone(), summed, mesh.group("optimizer"))
        if mesh.size("gradients") > 1:

            def further() -> Pending:
                return all_gather(summed.clone(), self._kept, mesh.group("gradients"))

            self._gathering = Then(self._gathering, further) if mesh.size("optimizer") > 1 else further()

    def buffers(self) -> Iterable[Tensor]:
        """Parameters, masters and gradients."""
        return [self._flat, self._kept, self._main, self._sum, self._grad_shard]

    def passing_bytes(self) -> int:
        """The gradients that are let go when their shards are reduced (O > G)."""
        return 0 if self._sum is self._grad_shard else self._sum.numel() * self._sum.element_size()
