"""A unit: parameters that are gathered, reduced and updated together (a block, the embedding, the head).

The pipeline runtime calls a unit at fixed points and knows nothing of what happens there:

    unshard ─► ready ─► forward ─► reshard        unshard ─► ready ─► backward ─► add_gradients ─► reshard
                                                  unshard ─► ready ─► I ─► reshard ... W ─► add_gradients
    ... after the last backward of the step: settle (four phases) ─► optimizer on masters ─► publish

``LocalUnit`` serves a rank that shares its parameters with nobody: gradients stay where autograd put
them, nothing is copied.  ``FlatUnit`` (flat.py) serves every other plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from stretto.parallel.collectives import DONE, Pending
from stretto.parallel.gradient import Gradient, add_gradient
from stretto.parallel.master import Master, counts_here
from stretto.parallel.mesh import Mesh
from stretto.spec.sharding import Sharding


class Unit(Protocol):
    """What the runtime needs of a unit."""

    name: str
    """For messages, for example ``blocks.3``."""
    parameters: list[nn.Parameter]
    """The parameters that a backward pass differentiates, in the order of ``add_gradients``."""
    masters: list[Master]
    """What the optimizer updates."""

    def begin_step(self, contributions: int, *, told: bool = False) -> None:
        """A step starts in which ``add_gradients`` will be called so many times.

        ``told``: ``reduce_gradients`` says when a reduction starts; else the last contribution does, or
        where gradients are divided each of them.
        """

    def hold(self) -> None:
        """Make the parameters whole and keep them so, whatever ``reshard`` says, until ``release``."""

    def release(self) -> None:
        """Undo one ``hold``."""

    def unshard(self) -> None:
        """Start to make the parameters whole."""

    def ready(self) -> None:
        """Wait until the parameters are whole."""

    def reshard(self) -> None:
        """The parameters are not needed for a while."""

    def add_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Accumulate one backward pass."""

    def reduce_gradients(self) -> None:
        """Start to reduce what has accumulated, where that is possible before the last contribution."""

    def settle(self, phase: int) -> Pending:
        """Start phase 0 (to shards of gradients), 1 (to shards of masters), 2 (copies and holders) or 3 (tp) of the
        reduction; earlier ones are done."""

    def publish(self) -> None:
        """Masters have new values: start to bring them into the parameters."""

    def buffers(self) -> Iterable[Tensor]:
        """The tensors that it keeps between steps."""

    def passing_bytes(self) -> int:
        """Memory that a step needs beyond ``buffers`` until gradients are reduced, in bytes."""


SETTLE_PHASES = 4


def settle_all(units: Sequence[Unit]) -> None:
    """Finish the reduction of all units, overlapping them within a phase."""
    for phase in range(SETTLE_PHASES):
        for pending in [unit.settle(phase) for unit in units]:
            pending.wait()


class LocalUnit:
    """Parameters that this rank shares with nobody."""

    def __init__(
        self, name: str, held: Sequence[tuple[nn.Parameter, Sharding]], *, mesh: Mesh, compute: torch.dtype
    ) -> None:
        """Args: held: parameters in the type of the masters; compute: type that the parameters get."""
        self.name = name
        self.parameters = [p for p, _ in held if p.requires_grad]
        self.masters = []
        for parameter, sharding in held:
            tensor: Tensor = parameter
            if parameter.dtype != compute:
                tensor = parameter.detach()
                parameter.data = tensor.to(compute)
            self.masters.append(
                Master(
                    tensor=tensor,
                    sharding=sharding,
                    start=0,
                    stop=parameter.numel(),
                    counted=counts_here(sharding, mesh),
                    owned=counts_here(sharding, mesh),
                    trained=parameter.requires_grad,
                )
            )
        self._all = [p for p, _ in held]
        self._trained = [m.tensor for (p, _), m in zip(held, self.masters, strict=True) if p.requires_grad]

    def begin_step(self, contributions: int, *, told: bool = False) -> None:
        """Let the last step's gradients go, so that the forward pass has their memory."""
        for tensor in self._trained:
            tensor.grad = None

    def hold(self) -> None:
        """Parameters are always whole."""

    def release(self) -> None:
        """Parameters stay whole."""

    def unshard(self) -> None:
        """Parameters are always whole."""

    def ready(self) -> None:
        """Parameters are always whole."""

    def reshard(self) -> None:
        """Parameters stay whole."""

    def add_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Keep the first micro-batch's gradients as they are, add the others in place.

        A parameter that was not used has a gradient of zeros, as in the buffer of a FlatUnit, so that every
        plan decays it alike.
        """
        for tensor, gradient in zip(self._trained, gradients, strict=True):
            if tensor.grad is not None:
                add_gradient(tensor.grad, gradient, fresh=False)
            elif isinstance(gradient, Tensor):
                tensor.grad = _laid_out_like(tensor, gradient)
            else:
                tensor.grad = torch.empty_like(tensor, requires_grad=False)
                add_gradient(tensor.grad, gradient, fresh=True)

    def reduce_gradients(self) -> None:
        """Nothing to reduce."""

    def settle(self, phase: int) -> Pending:
        """Nothing to reduce; gradients are zeros where no micro-batch came by."""
        for tensor in self._trained:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        return DONE

    def publish(self) -> None:
        """Round masters into parameters of a narrower type."""
        with torch.no_grad():
            for parameter, master in zip(self._all, self.masters, strict=True):
                if master.tensor is not parameter:
                    parameter.copy_(master.tensor)

    def buffers(self) -> Iterable[Tensor]:
        """Parameters, masters and gradients."""
        yield from self._all
        for master in self.masters:
            yield master.tensor
            if master.tensor.grad is not None:
                yield master.tensor.grad

    def passing_bytes(self) -> int:
        """None."""
        return 0


def _laid_out_like(tensor: Tensor, gradient: Tensor) -> Tensor:
    """``gradient`` in the type and the strides of ``tensor``.

    autograd may give a transposed or expanded one, and fused AdamW reads parameter and gradient side by side.
    """
    gradient = gradient.to(tensor.dtype)
    if gradient.stride() == tensor.stride():
        return gradient
    return torch.empty_like(tensor, requires_grad=False).copy_(gradient)
