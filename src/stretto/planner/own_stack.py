"""The kernels and precisions of Stretto's own runs, by ``training.dtype``.

bfloat16   parameters 2 bytes; gradients, their sums, masters and both moments float32: 4, 4 and 12
float32    parameters, gradients and sums 4; two moments 8
float64    parameters, gradients and sums 8; two moments 16

SGD has one moment, its velocity, and without momentum none.

Attention is the flash kernel of ``scaled_dot_product_attention``, a norm keeps its input alone, activations between
attention and feed-forward and the logits are split over tp, and gradients are reduced under the last backward pass
(under ZeRO-2 and 3 under each).  Attention that is cut over cp runs the same kernel block by block; without one it
is ``blockwise``.
"""

from __future__ import annotations

from stretto.planner.stack import KernelStack
from stretto.spec.training import TrainingSpec

WIDTHS = {"bfloat16": (2, 4, 4), "float32": (4, 4, 0), "float64": (8, 8, 0)}
"""Bytes of a parameter, of its gradient (accumulated and summed; a moment has as many), of a master beside it."""


def moments(training: TrainingSpec) -> int:
    """Tensors that the optimizer keeps for each that it updates."""
    if training.optimizer == "sgd":
        return 1 if training.momentum else 0
    return 2


def own_stack(training: TrainingSpec) -> KernelStack:
    """The stack that ``stretto train`` runs.

    >>> own_stack(TrainingSpec(dtype="float32")).optimizer_bytes
    8
    >>> own_stack(TrainingSpec(dtype="bfloat16", optimizer="sgd")).optimizer_bytes
    8
    """
    parameter, gradient, master = WIDTHS[training.dtype]
    return KernelStack(
        parameter_bytes=parameter,
        gradient_bytes=gradient,
        reduction_bytes=gradient,
        optimizer_bytes=master + moments(training) * gradient,
        master_bytes=master,
        overlapped_reduction=True,
        reduces_each=True,
        scatters_once=True,
        context_kernel="blockwise",
    )
