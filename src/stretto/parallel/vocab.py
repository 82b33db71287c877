"""The vocabulary split over tp: embedding, head and cross-entropy without full logits (Megatron-LM, section 3).

Rank r holds rows [start, start + n) of the vocabulary.  The embedding looks up what it has and sums;
the loss needs three small all-reduces per token: the maximum, the sum of exponentials, and the logit
of the label, which exactly one rank holds.

                logits [B, T, V/tp]
      max ──all-reduce──► exp, sum ──all-reduce──► log Z      label's logit ──all-reduce──► loss = log Z - logit
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, autograd, nn
from torch.nn import functional

from stretto.parallel.collectives import all_reduce
from stretto.parallel.tensor import scatter_sequence
from stretto.spec.contract import IGNORE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VocabParallelEmbedding(nn.Module):
    """Rows [start, start + n) of an embedding; ids [B, T] -> slice of the sequence [B, T/tp, D]."""

    def __init__(self, weight: nn.Parameter, start: int, group: ProcessGroup) -> None:
        super().__init__()
        self.weight = weight
        self._start = start
        self._group = group

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the ids held here, zeros elsewhere, and sum over tp."""
        held, local = _locate(ids, self._start, self.weight.shape[0])
        if self.weight.shape[0] == 0:
            # The empty sum keeps this rank in the graph: its peers' backward pass needs it in their collective.
            found = ids.new_zeros(*ids.shape, self.weight.shape[1], dtype=self.weight.dtype) + self.weight.sum()
        else:
            found = functional.embedding(local, self.weight) * held.unsqueeze(-1)
        return scatter_sequence(found, self._group)


def _locate(ids: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Which ids lie in [start, start + count), and their local row (0 for the others)."""
    held = (ids >= start) & (ids < start + count)
    return held, torch.where(held, ids - start, torch.zeros_like(ids))


class _CrossEntropy(autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, group: ProcessGroup) -> Tensor:
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        rows, width = wide.shape
        top = wide.amax(dim=1) if width else wide.new_full((rows,), -torch.inf)
        all_reduce(top, group, maximum=True).wait()
        exponentials = (wide - top.unsqueeze(1)).exp_()
        held, local = _locate(labels, start, width)
        sums = wide.new_zeros(2, rows)
        torch.sum(exponentials, dim=1, out=sums[0])
        if width:
            sums[1] = torch.where(held, wide.gather(1, local.unsqueeze(1)).squeeze(1), sums[1])
        all_reduce(sums, group).wait()
        valid = labels != IGNORE
        loss = torch.where(valid, sums[0].log() + top - sums[1], torch.zeros_like(top))
        softmax = exponentials.div_(sums[0].unsqueeze(1))
        ctx.save_for_backward(softmax, held & valid, local, valid)
        ctx.dtype = logits.dtype
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, held, local, valid = ctx.saved_tensors
        grad = softmax * valid.unsqueeze(1)
        if grad.shape[1]:
            grad.scatter_add_(1, local.unsqueeze(1), -held.to(grad.dtype).unsqueeze(1))
        return (grad * grads[0]).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, start: int, group: ProcessGroup) -> Tensor:
    """Sum of the cross-entropy over valid tokens, equal on every tp rank.

    Args:
        logits: [B, T, n], the scores of vocabulary rows [start, start + n).
        labels: [B, T], IGNORE where there is nothing to predict.
    """
    return _CrossEntropy.apply(logits.flatten(0, 1), labels.flatten(), start, group)
