"""A segment: one part of a model (inputs, a block, outputs) between two cuts of the autograd graph.

The runtime differentiates segment by segment.  Nothing hides in hooks: right before a segment runs its
unit is unsharded, right after its backward the gradients are handed to the unit, which reduces them
while the next segment is differentiated.  Full recompute is the same cut without a graph:

    forward    x ──► [run] ──► y          keep (x, y)          recompute: keep x only, y without graph
    backward   dx, dparameters ◄── [autograd.grad] ◄── dy      recompute: run again, then the same
    split      dx ◄── [autograd.grad] ◄── dy  ...  dparameters ◄── stash      (backward.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stretto.parallel.gradient import Gradient, apart
from stretto.parallel.pipeline.backward import Deferral, Stash
from stretto.parallel.sequence.results import Results
from stretto.parallel.unit import Unit
from stretto.spec.plan import Compile

Value = Tensor | tuple[Tensor, ...] | None
"""What travels between segments: a tensor, a tuple of tensors, or nothing (into the inputs)."""


def tensors_of(value: Value) -> tuple[Tensor, ...]:
    """The tensors of a value."""
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) else value


def detached(value: Value, *, needs_gradient: bool = True) -> Value:
    """The same data as new leaves; floating-point ones require gradients where they are needed."""
    leaves = tuple(t.detach().requires_grad_(needs_gradient and t.is_floating_point()) for t in tensors_of(value))
    return None if value is None else leaves[0] if isinstance(value, Tensor) else leaves


@dataclass(slots=True)
class Kept:
    """What a segment holds between its forward and its backward."""

    x: Value
    """Its input, as leaves of its graph."""
    y: tuple[GradientEdge | None, ...] | None
    """Where its graph ends (the output itself need not live on), or None where it will be recomputed."""
    stash: Stash | None = None
    """Where its linear layers leave their weight gradients, where the backward is split."""
    results: list[Tensor] = field(default_factory=list)
    """What of its forward isn't computed again, where it is recomputed."""


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
    deferral: Deferral = field(default_factory=Deferral)
    """Reaches its linear layers; where it reaches none, all gradients come with ``I`` and ``W`` adds them."""
    compiled: Compile = "none"
    """``regions``: all but its linear layers is compiled; ``blocks``: it is compiled as a whole, so that ``I`` is the
    full backward, which hands its gradients over, and ``W`` is empty."""
    results: Results | None = None
    """Hands results of attention from the forward to its recomputation; None: all is computed again."""
    needs_input_gradient: bool = True
    """False where nothing before it trains: no gradient of its input is computed then."""
    _parameters: list[nn.Parameter] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look its parameters up once."""
        self._parameters = [p for unit in self.units for p in unit.parameters]

    @property
    def frozen(self) -> bool:
        """Whether nothing here is differentiated: it keeps nothing and its backward does nothing."""
        return not self._parameters and not self.needs_input_gradient

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

    def forward(self, x: Value, context: Any, batch: Any, *, split: bool = False) -> tuple[Kept, Value]:
        """Run it; return what to keep and the output.

        ``split``: the backward will be ``backward_inputs`` and ``backward_weights``.
        """
        self._ready()
        if self.frozen:
            with torch.no_grad():
                return Kept(None, (), Stash() if split else None), self.run(x, context, batch)
        x = detached(x, needs_gradient=self.needs_input_gradient)
        kept = Kept(x, None, Stash() if split else None)
        if self.recompute:
            keeping = nullcontext() if self.results is None else self.results.keep(kept.results)
            with torch.no_grad(), keeping:
                y = self.run(kept.x, context, batch)
            return kept, _handed_through(y, kept.x)
        return kept, _handed_through(self._run(kept, context, batch), kept.x)

    def _run(self, kept: Kept, context: Any, batch: Any) -> Value:
        """Run it with a graph, of which ``kept`` remembers the ends."""
        reusing = nullcontext() if self.results is None else self.results.reuse(kept.results)
        with self.deferral(kept.stash), reusing:
            y: Value = self.run(kept.x, context, batch)
        kept.y = _edges(y)
        return y

    def rehearse(self, x: Value, context: Any, batch: Any) -> None:
        """Run it forwards and backwards, both for nothing: when a step comes, what it needs is compiled."""
        kept, y = self.forward(x, context, batch)
        outputs, seeds, sources = self._ends(kept, detached(y, needs_gradient=False), context, batch)
        if outputs and (sources or self._parameters):
            torch.autograd.grad(outputs, [*sources, *self._parameters], seeds, allow_unused=True)
        self.reshard()

    def evaluate(self, x: Value, context: Any, batch: Any) -> Value:
        """Run it without a graph."""
        self._ready()
        return self.run(x, context, batch)

    def backward(self, kept: Kept, dy: Value, context: Any, batch: Any) -> Value:
        """Gradient of its input; gradients of its parameters go to the units."""
        if self.frozen:
            self._hand_over(())
            return None
        self._ready()
        parameters = self._parameters
        outputs, seeds, sources = self._ends(kept, dy, context, batch)
        if not outputs or not (sources or parameters):
            self._hand_over([None] * len(parameters))
            return None
        gradients = torch.autograd.grad(outputs, [*sources, *parameters], seeds, allow_unused=True)
        dx = _gradients_of(kept.x, gradients[: len(sources)]) if sources else None
        self._hand_over(apart(gradients[len(sources) :], (*seeds, *tensors_of(dx))))
        return dx

    def backward_inputs(self, kept: Kept, dy: Value, context: Any, batch: Any) -> Value:
        """Gradient of its input; ``backward_weights`` of the same ``kept`` follows."""
        assert kept.stash is not None, "the forward was not told that its backward would be split"
        if self.compiled == "blocks":
            dx = self.backward(kept, dy, context, batch)
            kept.x = kept.y = None
            return dx
        if self.frozen:
            return None
        self._ready()
        outputs, seeds, sources = self._ends(kept, dy, context, batch)
        if not outputs:
            return None
        if kept.x is None:
            kept.stash.put_off(outputs, seeds)
            return None
        with self.deferral(kept.stash):
            gradients = torch.autograd.grad(outputs, [*sources, *self._parameters], seeds, allow_unused=True)
        dx = _gradients_of(kept.x, gradients[: len(sources)]) if sources else None
        kept.stash.keep(gradients[len(sources) :], (*seeds, *tensors_of(dx)))
        kept.x = kept.y = None
        return dx

    def backward_weights(self, kept: Kept) -> None:
        """Gradients of its parameters go to the units; needs the parameters themselves only if it has no input."""
        stash, kept.stash = kept.stash, None
        assert stash is not None
        if self.compiled == "blocks":
            return
        parameters = self._parameters
        if stash.is_whole:
            self._ready()
            stash.differentiate(parameters)
            self.reshard()
        self._hand_over(stash.gradients(parameters))

    def _ends(
        self, kept: Kept, dy: Value, context: Any, batch: Any
    ) -> tuple[list[GradientEdge], list[Tensor], list[Tensor]]:
        """Outputs that have a graph, their seeds, and the inputs that need a gradient."""
        if kept.y is None:
            self._run(kept, context, batch)
        assert kept.y is not None
        outputs, seeds = _differentiable(kept.y, tensors_of(dy))
        return outputs, seeds, [t for t in tensors_of(kept.x) if t.requires_grad]

    def _hand_over(self, gradients: Sequence[Gradient]) -> None:
        """Give each unit its gradients; each call is a contribution that the unit counts."""
        at = 0
        for unit in self.units:
            unit.add_gradients(gradients[at : at + len(unit.parameters)])
            at += len(unit.parameters)


def _handed_through(y: Value, x: Value) -> Value:
    """The output, with inputs that are handed through as tensors of their own: where activations are offloaded an input
    is emptied, maybe before a next stage on this rank has read it."""
    leaves = {id(t) for t in tensors_of(x)}
    if not any(id(t) in leaves for t in tensors_of(y)):
        return y
    found = tuple(t.detach() if id(t) in leaves else t for t in tensors_of(y))
    return found[0] if isinstance(y, Tensor) else found


def _edges(y: Value) -> tuple[GradientEdge | None, ...]:
    """Where the graph of each output ends, None for one without a graph."""
    return tuple(get_gradient_edge(t) if t.requires_grad else None for t in tensors_of(y))


def _differentiable(
    ends: Sequence[GradientEdge | None], dys: Sequence[Tensor]
) -> tuple[list[GradientEdge], list[Tensor]]:
    """The outputs that have a graph, with their seeds."""
    pairs = [(end, dy) for end, dy in zip(ends, dys, strict=True) if end is not None]
    return [end for end, _ in pairs], [dy for _, dy in pairs]


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
