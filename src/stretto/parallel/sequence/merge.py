"""The online softmax: partial attention over two sets of keys becomes attention over both.

A partial result is (out, lse): the weighted mean of the values under a softmax over the keys seen so far, and
the logarithm of that softmax's denominator.  With more keys both are means weighted by exp(lse):

    lse = log(exp(lse_a) + exp(lse_b))
    out = out_a + share (out_b - out_a)         share = 1 / (1 + exp(lse_a - lse_b))

Written with the difference of the two, nothing overflows and no digits are lost where both are large; a query that
has seen nothing yet (lse = -inf, out = 0) is a neutral element (FlashAttention; Rabe and Staats 2021).  Every way of
cutting attention uses this one function.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Put (``more_out``, ``more_lse``) into (``out``, ``lse``), in place.

    Args:
        out: [..., T, K], in float32 or wider.
        lse: [..., T], the same dtype; -inf where nothing was seen.
    """
    share = (more_lse - lse).sigmoid_().masked_fill_(more_lse == float("-inf"), 0.0)
    out.lerp_(more_out.to(out.dtype), share.unsqueeze(-1))
    torch.logaddexp(lse, more_lse, out=lse)
