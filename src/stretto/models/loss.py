"""Cross-entropy as a sum over valid tokens.

The loss of a run is (sum, token count); the mean is taken once, over the whole mesh.  The log
probabilities are the only table [N, V] kept for backward, where torch's own pair of operations
makes two more.

Shapes: N tokens (any leading dims), V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from stretto.spec.contract import IGNORE

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(logits)[label] over labels that aren't IGNORE."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, labels_N: Tensor) -> Tensor:
        """Return the sum in float32 at least."""
        exact = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
        log_NV = F.log_softmax(logits_NV, dim=-1, dtype=exact)
        ctx.save_for_backward(log_NV, labels_N)
        ctx.dtype = logits_NV.dtype
        return F.nll_loss(log_NV, labels_N, ignore_index=IGNORE, reduction="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return (softmax - one hot) times the incoming gradient, 0 in ignored rows."""
        log_NV, labels_N = ctx.saved_tensors
        valid_N1 = (labels_N != IGNORE).unsqueeze(1)
        grad_NV = log_NV.exp()
        hot_N1 = labels_N.unsqueeze(1).masked_fill(~valid_N1, 0)
        grad_NV.scatter_add_(1, hot_N1, grad_NV.new_full((1, 1), -1.0).expand(hot_N1.shape))
        return grad_NV.mul_(gradients[0] * valid_N1).to(ctx.dtype), None


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of ``logits`` [..., V] at ``labels`` [...], a scalar.

    Labels equal to IGNORE take no part.  Computed in float32, or in float64 for float64 logits.
    """
    return CrossEntropySum.apply(logits.flatten(0, -2), labels.flatten())
