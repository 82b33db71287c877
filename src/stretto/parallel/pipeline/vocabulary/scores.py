"""One micro-batch on one shard of the vocabulary: logits, what S knows of them, what T makes of that.

Rank r scores its own rows of the head alone.  With m_r the largest logit of a token there, and s_r the sum of
exp(z - m_r), everything over the whole vocabulary follows from what ranks can sum:

    M = max m_r        Z = sum of s_r exp(m_r - M)        loss = log Z + M - z[label]
    softmax on r       exp(z - m_r) · exp(m_r - M) / Z
    d loss / d x       sum over r of (exp(z - m_r) W_r) · exp(m_r - M) / Z,  less W[label]      (algorithm 2)

The last line lets S multiply with the weights before M and Z are known: a factor per token makes it right afterwards.

Shapes: N tokens, D model width, n rows of the shard (may be 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stretto.spec.contract import IGNORE


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What is known of a micro-batch once all shards are summed."""

    top: Tensor
    """Largest logit of each token, [N]."""
    mass: Tensor
    """Sum of exp(logit - top) over the vocabulary, [N]."""
    loss: Tensor
    """Summed over the valid tokens, a scalar."""


def loss_of(valid: Tensor, top: Tensor, mass: Tensor, label: Tensor) -> Tensor:
    """Summed over the valid tokens: from [N] each, the logits of the labels among them."""
    return torch.where(valid, mass.log() + top - label, torch.zeros_like(top)).sum()


class Scores:
    """What a rank keeps of a micro-batch between S and T: the input and one table [N, n].

    The table holds exponentials, or the logits themselves where those are narrower than float32: half the memory,
    and as exact, since the exponentials are taken anew in float32.

    Args:
        x: [N, D], the last stage's output.
        labels: [N], IGNORE where there is nothing to predict.
        weight: [n, D], rows [start, start + n) of the head.
        early: also multiply the exponentials with the weights (algorithm 2).
    """

    def __init__(self, x: Tensor, labels: Tensor, weight: Tensor, *, start: int, early: bool) -> None:
        rows = weight.shape[0]
        self.x, self.valid = x, labels != IGNORE
        self._hot = (labels >= start) & (labels < start + rows)
        self._local = torch.where(self._hot, labels - start, torch.zeros_like(labels))
        logits = functional.linear(x, weight)
        self._narrow = logits.dtype in (torch.bfloat16, torch.float16)
        wide = logits.float() if self._narrow else logits
        self.top = wide.amax(1) if rows else wide.new_full((len(x),), -torch.inf)
        """Largest logit of each token on this shard, [N], float32 at least."""
        self.label = torch.zeros_like(self.top)
        """Logit of the label where this shard has it, else 0; [N]."""
        if rows:
            self.label = torch.where(self._hot, wide.gather(1, self._local.unsqueeze(1)).squeeze(1), self.label)
        exponentials = wide.sub_(self.top.unsqueeze(1)).exp_()  # of bfloat16, ``wide`` is a copy
        self.mass = exponentials.sum(1)
        """Sum of exp(logit - top) on this shard, [N]."""
        self._table = logits if self._narrow else exponentials
        self._products = (exponentials.to(x.dtype) @ weight, self._label_rows(weight)) if early else None

    def _label_rows(self, weight: Tensor) -> Tensor:
        if not weight.shape[0]:
            return weight.new_zeros(len(self._local), weight.shape[1])
        return weight[self._local] * self._hot.unsqueeze(1)

    def take_input_gradient(self, top: Tensor, mass: Tensor) -> Tensor:
        """This shard's part of d loss / d x, [N, D], given the totals; once, and of ``early`` scores alone."""
        assert self._products is not None
        (summed, label_rows), self._products = self._products, None
        if summed.is_cuda:  # the caller's stream isn't the one that made them
            for tensor in (summed, label_rows):
                tensor.record_stream(torch.cuda.current_stream())
        factor = (self.top - top).exp_().div_(mass)
        gradient = summed.to(factor.dtype).mul_(factor.unsqueeze(1)).sub_(label_rows)
        return gradient.mul_(self.valid.unsqueeze(1))

    def take_logit_gradient(self, totals: Totals, seed: Tensor) -> Tensor:
        """d (seed · loss) / d logits, [N, n] in the type of ``x``; once, since the table becomes the result."""
        table, self._table = self._table, self._table.new_empty(0)
        if self._narrow:
            softmax = table.float().sub_(totals.top.unsqueeze(1)).exp_().div_(totals.mass.unsqueeze(1))
        else:
            softmax = table.mul_((self.top - totals.top).exp_().div_(totals.mass).unsqueeze(1))
        if softmax.shape[1]:
            softmax.scatter_add_(1, self._local.unsqueeze(1), -self._hot.to(softmax.dtype).unsqueeze(1))
        return softmax.mul_((self.valid * seed).unsqueeze(1)).to(self.x.dtype)

    def forget(self) -> None:
        """Let go of what only T needs."""
        self.x = self._table = self.x.new_empty(0)

    def tensors(self) -> tuple[Tensor, ...]:
        """What it keeps that is as large as activations."""
        return (self.x, self._table, *(self._products or ()))
