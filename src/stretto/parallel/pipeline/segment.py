"""A segment: one part of a model (inputs, a block, outputs) between two cuts of the autograd graph.

The runtime differentiates segment by segment.  Nothing hides in hooks: right before a segment runs its
unit is unsharded, right after its backward the gradients are handed to the unit, which reduces them
while the next segment is differentiated.  Full recompute is the same cut without a graph:

    forward    x ──► [run] ──► y          keep (x, y)          recompute: keep x only, y without graph
    backward   dx, dparameters ◄── [autograd.grad] ◄── dy      recompute: run again, then the same
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stretto.parallel.unit import Unit

Value = Tensor | tuple[Tensor, ...] | None
"""What travels between segments: a tensor, a tuple of tensors, or nothing (into the inputs)."""


def tensors_of(value: Value) -> tuple[Tensor, ...]:
    """The tensors of a value."""
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) else value


def detached(value: Value) -> Value:
    """The same data as new leaves; floating-point ones require gradients."""
    leaves = tuple(t.detach().requires_grad_(t.is_floating_point()) for t in tensors_of(value))
    return None if value is None else leaves[0] if isinstance(value, Tensor) else leaves


@dataclass(slots=True)
class Kept:
    """What a segment holds between its forward and its backward."""

    x: Value
    """Its input, as leaves of its graph."""
    y: tuple[GradientEdge | None, ...] | None
    """Where its graph ends (the output itself need not live on), or None where it will be recomputed."""


@dataclass(slots=True, kw_only=True, eq=False)
class Segment:
    """One part of the model and the units that hold its parameters."""

    name: str
    """``inputs``, ``blocks.<i>`` or ``outputs``."""
    run: Callable[[Value, Any, Any], Any]
    """``run(x, context, batch) -> y``."""
    units: Sequence[Unit]
    """Units of the parameters it uses."""
    recompute: bool = False
    """Run the forward again in the backward instead of keeping its graph."""

    def unshard(self) -> None:
        """Start gathering its parameters."""
        for unit in self.units:
            unit.unshard()

    def _ready(self) -> None:
        for unit in self.units:
            unit.unshard()
            unit.ready()

    def reshard(self) -> None:
        """Its parameters are not needed for a while."""
        for unit in self.units:
            unit.reshard()

    def forward(self, x: Value, context: Any, batch: Any) -> tuple[Kept, Value]:
        """Run it; return what to keep and the output."""
        self._ready()
        x = detached(x)
        if self.recompute:
            with torch.no_grad():
                y = self.run(x, context, batch)
            return Kept(x, None), y
        y = self.run(x, context, batch)
        return Kept(x, _edges(y)), y

    def evaluate(self, x: Value, context: Any, batch: Any) -> Value:
        """Run it without a graph."""
        self._ready()
        return self.run(x, context, batch)

    def backward(self, kept: Kept, dy: Value, context: Any, batch: Any) -> Value:
        """Gradient of its input; gradients of its parameters go to the units."""
        self._ready()
        ends = kept.y
        if ends is None:
            ends = _edges(self.run(kept.x, context, batch))
        sources = [t for t in tensors_of(kept.x) if t.requires_grad]
        parameters = [p for unit in self.units for p in unit.parameters]
        outputs, seeds = _differentiable(ends, tensors_of(dy))
        if not outputs or not (sources or parameters):
            for unit in self.units:  # each backward is a contribution that the unit counts
                unit.add_gradients([None] * len(unit.parameters))
            return None
        gradients = _apart(torch.autograd.grad(outputs, [*sources, *parameters], seeds, allow_unused=True))
        at = len(sources)
        for unit in self.units:
            unit.add_gradients(gradients[at : at + len(unit.parameters)])
            at += len(unit.parameters)
        return _gradients_of(kept.x, gradients[: len(sources)])


def _edges(y: Value) -> tuple[GradientEdge | None, ...]:
    """Where the graph of each output ends, None for one without a graph."""
    return tuple(get_gradient_edge(t) if t.requires_grad else None for t in tensors_of(y))


def _differentiable(
    ends: Sequence[GradientEdge | None], dys: Sequence[Tensor]
) -> tuple[list[GradientEdge], list[Tensor]]:
    """The outputs that have a graph, with their seeds."""
    pairs = [(end, dy) for end, dy in zip(ends, dys, strict=True) if end is not None]
    return [end for end, _ in pairs], [dy for _, dy in pairs]


def _apart(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients without shared memory.

    autograd gives both summands of a sum one and the same tensor; units add to and scale what they get.
    """
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None and gradient.untyped_storage().data_ptr() in seen:
            gradient = gradient.clone()
        if gradient is not None:
            seen.add(gradient.untyped_storage().data_ptr())
        found.append(gradient)
    return found


def _gradients_of(x: Value, gradients: Sequence[Tensor | None]) -> Value:
    """Shape the gradients like ``x``: zeros where a tensor was unused or isn't differentiable."""
    found = iter(gradients)
    full = []
    for t in tensors_of(x):
        gradient = next(found) if t.requires_grad else None
        full.append(torch.zeros_like(t) if gradient is None else gradient)
    if x is None:
        return None
    return full[0] if isinstance(x, Tensor) else tuple(full)
