"""The kernels and precisions of Stretto's own runs, by ``training.dtype``.

bfloat16   parameters 2 bytes; gradients, their sums, masters and both moments float32: 4, 4 and 12
float32    parameters, gradients and sums 4; two moments 8
float64    parameters, gradients and sums 8; two moments 16

Attention is the flash kernel of ``scaled_dot_product_attention``, a norm keeps its input alone, activations between
attention and feed-forward and the logits are split over tp, and gradients are reduced under the last backward pass
(under ZeRO-2 and 3 under each).  Attention that is cut over cp has no kernel of its own yet (``blockwise``).
"""

from __future__ import annotations

from stretto.planner.stack import KernelStack

WIDTHS = {"bfloat16": (2, 4, 12), "float32": (4, 4, 8), "float64": (8, 8, 16)}
"""Bytes of a parameter, of its gradient (accumulated and summed), of what the optimizer keeps."""


def own_stack(dtype: str) -> KernelStack:
    """The stack that ``stretto train`` runs in ``dtype``.

    >>> own_stack("float32").optimizer_bytes
    8
    """
    parameter, gradient, optimizer = WIDTHS[dtype]
    return KernelStack(
        parameter_bytes=parameter,
        gradient_bytes=gradient,
        reduction_bytes=gradient,
        optimizer_bytes=optimizer,
        overlapped_reduction=True,
        reduces_each=True,
        scatters_once=True,
        context_kernel="blockwise",
    )
