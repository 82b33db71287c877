"""A gradient that has not been computed yet, and adding any gradient to a total.

The gradient of a linear layer's weight is a product of two tensors that the pass for the inputs has at
hand anyway.  Keeping the two puts the product off until the schedule's ``W``, and then it goes straight
into the unit's buffer, without a tensor of its own in between:

    I    dx = dy @ weight           keep (x, dy)
    W    total += dy^T @ x          one matrix product with accumulation
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor


class Deferred:
    """The sum of ``dy^T x`` over the uses of a weight (of ``dy`` over the uses of a bias), to be computed.

    Args:
        ready: what other operations than linear layers have already given to the same parameter.
    """

    __slots__ = ("_ready", "_uses")

    def __init__(self, ready: Tensor | None = None) -> None:
        self._ready = ready
        self._uses: list[tuple[Tensor | None, Tensor]] = []

    def use(self, x: Tensor | None, dy: Tensor) -> None:
        """Count a use: ``x`` [..., in] or None for a bias, ``dy`` [..., out]."""
        self._uses.append((x, dy))

    def tensors(self) -> Iterator[Tensor]:
        """What is kept until it is computed."""
        if self._ready is not None:
            yield self._ready
        for x, dy in self._uses:
            if x is not None:
                yield x
            yield dy

    def into(self, total: Tensor, *, fresh: bool) -> None:
        """Add it to ``total``, or overwrite that where ``fresh``."""
        if self._ready is not None:
            add_gradient(total, self._ready, fresh=fresh)
            fresh = False
        for x, dy in self._uses:
            rows = dy.reshape(-1, dy.shape[-1])
            if x is None:
                add_gradient(total, rows.sum(0), fresh=fresh)
            elif total.dtype == dy.dtype:
                total.addmm_(rows.t(), x.reshape(-1, x.shape[-1]), beta=0.0 if fresh else 1.0)
            else:
                add_gradient(total, rows.t() @ x.reshape(-1, x.shape[-1]), fresh=fresh)
            fresh = False


Gradient = Tensor | Deferred | None
"""A parameter's gradient of one backward pass; None where it has none."""


def add_gradient(total: Tensor, gradient: Gradient, *, fresh: bool) -> None:
    """``total += gradient``; ``fresh``: whatever ``total`` held doesn't count.  ``total`` may be wider."""
    if isinstance(gradient, Deferred):
        gradient.into(total, fresh=fresh)
    elif gradient is None:
        if fresh:
            total.zero_()
    elif fresh:
        total.copy_(gradient)
    else:
        total.add_(gradient)


def apart(gradients: Sequence[Tensor | None], beside: Iterable[Tensor] = ()) -> list[Tensor | None]:
    """The gradients without memory that they share with each other or with ``beside``.

    autograd gives both summands of a sum one and the same tensor; units add to and scale what they get.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in beside}
    found: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None:
            if (key := gradient.untyped_storage().data_ptr()) in seen:
                gradient = gradient.clone()
            else:
                seen.add(key)
        found.append(gradient)
    return found
