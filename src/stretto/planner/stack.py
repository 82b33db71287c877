"""Which kernels run a layer, and in what precision its states are kept: what memory and time depend on beyond the plan.

attention   unfused   every step over the [T, T] scores is a kernel of its own (softmax in float32)
            fused     scale, mask and softmax of the scores are one kernel (Megatron-LM); scores still stored
            flash-1   no scores in memory (Dao et al. 2022, arXiv 2205.14135)
            flash-2   the same with better division of work (Dao 2023, arXiv 2307.08691)
            flash-3   the same for Hopper (Shah et al. 2024, arXiv 2407.08608)
fused_norm  whether RMSNorm is one kernel, or a chain over float32 copies of its input
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Attention = Literal["unfused", "fused", "flash-1", "flash-2", "flash-3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelStack:
    """Kernels and precisions of a run; the defaults are a modern 16-bit run."""

    attention: Attention = "flash-2"
    """The kernel of scores, softmax and their use."""
    context_kernel: Literal["same", "blockwise"] = "same"
    """What computes attention whose sequence is cut over cp: the same kernel block by block, or our runtime, which has
    tiles in plain PyTorch for what no kernel takes (``blockwise``)."""
    fused_norm: bool = True
    """Whether a norm reads its input once and keeps only that."""
    sequence_parallel: bool = True
    """Whether tp also splits the norms and residuals, over the sequence (Korthikanti et al. 2022)."""
    gathers_again: bool = True
    """Whether sequence parallelism keeps a layer's inputs divided and gathers them once more for the gradients of the
    weights (Korthikanti et al. 2022, section 4.2.2), or keeps them whole."""
    sharded_logits: bool = True
    """Whether every tp rank keeps only its slice of the vocabulary's logits."""
    sharded_messages: bool = True
    """Whether each tp rank sends its slice of a message between stages (Narayanan et al. 2021, section 4.1); under
    sequence parallelism it has no more than that."""
    blocking_messages: bool = False
    """Whether a rank that sends or receives a message between stages waits until both ends are done with it."""
    adapters_per_ring: int | None = None
    """Network adapters of a node that one ring of a collective uses; None: one for each of its members there."""
    overlapped_reduction: bool = False
    """Whether gradients are summed, and parameters gathered, under the work of one micro-batch."""
    reduces_each: bool = False
    """Whether divided gradients (ZeRO-2) are reduced after each backward pass, or once, from whole ones."""
    scatters_once: bool = False
    """Whether gradients are scattered to those who update them (O > G), or summed by all and updated in part."""
    parameter_bytes: float = 2
    """Bytes of a parameter in the form that multiplies."""
    gradient_bytes: float = 4
    """Bytes of an accumulated gradient."""
    reduction_bytes: float = 4
    """Bytes of a gradient while the data ranks sum it; 16-bit gradients too are mostly summed in float32."""
    optimizer_bytes: float = 12
    """Bytes of master weight and two moments (Rajbhandari et al. 2020, section 3.1), float32 each."""
    master_bytes: float = 4
    """Of these the master weight, which parameters that don't train have, too; 0 where the parameter is its own."""

    @property
    def stores_scores(self) -> bool:
        """Whether attention keeps a [T, T] matrix per head for the backward pass."""
        return self.attention in ("unfused", "fused")
