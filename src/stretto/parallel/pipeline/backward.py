"""Split backward: the gradient of the inputs now (``I``), that of the weights later (``W``).

(Qi et al. 2023, zero bubble, section 2.)  A linear layer's backward is two matrix products that need each
other not at all:

    forward    y  = x @ weight^T                      I    dx = dy @ weight      stash (x, dy)
                                                      W    weight.grad += dy^T @ x

``I`` is the ordinary backward of a segment, once through its graph, in which linear layers give no
gradient of their weights but put (x, dy) aside.  Whatever else has parameters (norms, embeddings inside
a block, layers of foreign modules that aren't linear) is differentiated by autograd during ``I``: such
gradients are cheap or, where they aren't, at least right.  They wait with the stash, so that the unit
counts one contribution per micro-batch.  A segment without an input to differentiate (embeddings) does
nothing in ``I`` and everything in ``W``.  There is no second forward and no second way through the graph.

Between ``I`` and ``W`` lives what ``Stash.tensors`` gives and nothing else: x and dy of every linear
layer.  Parameters do not: a sharded unit can be resharded after ``I``.

Where everything between linear layers is compiled, the layers themselves stay out of the graphs (``compiled``), so
that they stash as ever.  Where a block is compiled as a whole they can't be reached: ``I`` then is the full backward
and ``W`` is empty (segment.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, autograd, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional

from stretto.parallel.gradient import Deferred, Gradient, apart
from stretto.parallel.tensor import RowParallelLinear


class Stash:
    """What ``I`` of one segment and micro-batch leaves for ``W``."""

    def __init__(self) -> None:
        self._uses: list[tuple[Tensor, nn.Parameter | None, Tensor, Tensor]] = []
        self._gradients: Sequence[Tensor | None] = ()
        self._outputs: Sequence[GradientEdge] = ()
        self._seeds: Sequence[Tensor] = ()

    def use(self, weight: Tensor, bias: nn.Parameter | None, x: Tensor, dy: Tensor) -> None:
        """A linear layer was passed: remember what its gradients are made of."""
        self._uses.append((weight, bias, x, dy))

    def keep(self, gradients: Sequence[Tensor | None], beside: Sequence[Tensor]) -> None:
        """Gradients of all parameters as far as ``I`` gave them; none may share memory with ``beside``."""
        self._gradients = apart(gradients, (*beside, *(dy for _, _, _, dy in self._uses)))

    def put_off(self, outputs: Sequence[GradientEdge], seeds: Sequence[Tensor]) -> None:
        """The whole backward is left to ``W``."""
        self._outputs, self._seeds = outputs, seeds

    @property
    def is_whole(self) -> bool:
        """Whether the whole backward was put off, so that ``W`` needs the parameters."""
        return bool(self._outputs)

    def differentiate(self, parameters: Sequence[nn.Parameter]) -> None:
        """Do what ``put_off`` left."""
        if parameters:
            found = torch.autograd.grad(self._outputs, parameters, self._seeds, allow_unused=True)
            self._gradients = apart(found, self._seeds)
        self._outputs = self._seeds = ()

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Gradient]:
        """A gradient for each of ``parameters``, those of linear layers as products yet to be computed."""
        found: list[Gradient] = list(self._gradients) or [None] * len(parameters)
        if not self._uses:
            return found
        index = {id(parameter): i for i, parameter in enumerate(parameters)}
        for weight, bias, x, dy in self._uses:
            _deferred(found, index[id(weight)]).use(x, dy)
            if bias is not None:
                _deferred(found, index[id(bias)]).use(None, dy)
        self._uses = []
        return found

    def tensors(self) -> Iterator[Tensor]:
        """What it keeps alive; what a graph keeps whose backward was put off isn't among it."""
        for _, _, x, dy in self._uses:
            yield x
            yield dy
        yield from (gradient for gradient in self._gradients if gradient is not None)
        yield from self._seeds


def _deferred(found: list[Gradient], at: int) -> Deferred:
    """The deferred gradient at a position, made around what autograd already gave."""
    there = found[at]
    if not isinstance(there, Deferred):
        there = found[at] = Deferred(there)
    return there


class Deferral:
    """Makes the linear layers below some modules stash what their weight gradients are made of.

    A layer counts as linear where it runs ``nn.Linear.forward`` or is a RowParallelLinear; subclasses with
    a forward of their own are left to autograd, as are layers whose weight is frozen.

        with deferral(stash):
            y = module(x)

    ``compiled``: the modules run through torch.compile, whose graphs end before each of these layers and begin
    again behind it.
    """

    def __init__(self, *modules: nn.Module, compiled: bool = False) -> None:
        self._stash: Stash | None = None
        linear, forward = self._linear, self._forward
        if compiled:
            linear, forward = torch.compiler.disable(linear), torch.compiler.disable(forward)
        for module in (m for root in modules for m in root.modules()):
            if type(module).forward is nn.Linear.forward:
                cast(Any, module).forward = partial(forward, cast(nn.Linear, module))
            elif isinstance(module, RowParallelLinear):
                module.linear = linear

    def __call__(self, stash: Stash | None) -> Deferral:
        """Linear layers that run inside ``with``, also those that a checkpoint runs again, will stash there."""
        self._stash = stash
        return self

    def __enter__(self) -> None:
        """Nothing more to do."""

    def __exit__(self, *_: object) -> None:
        """Layers are ordinary again."""
        self._stash = None

    def _forward(self, module: nn.Linear, x: Tensor) -> Tensor:
        return self._linear(x, module.weight, module.bias)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._stash is None or not weight.requires_grad or not torch.is_grad_enabled():
            return functional.linear(x, weight, bias)
        return _StashingLinear.apply(x, weight, bias, self._stash)


class _StashingLinear(autograd.Function):
    """A linear layer whose backward gives the gradient of its input and stashes what the others need.

    Weight and bias are inputs so that the backward runs even where x needs no gradient; autograd is told that
    they have none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stash: Stash) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameters, ctx.stash = (weight, bias), stash
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, values = ctx.saved_tensors
        dy = grads[0]
        weight, bias = ctx.parameters  # what was saved may come back as another view of it
        ctx.stash.use(weight, bias if bias is not None and bias.requires_grad else None, x.detach(), dy)
        # Without this the node would keep the stash's tensors for as long as anyone keeps the node.
        ctx.stash = None
        return (dy @ values if ctx.needs_input_grad[0] else None), None, None, None
