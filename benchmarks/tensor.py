"""tp over two processes, over DTensor's parallelize_module on the same modules.

    OMP_NUM_THREADS=1 python -m benchmarks.tensor

The peer's plan is the usual one: embedding and head split over the vocabulary, attention and
feed-forward column- then row-wise, norms and the residual stream split over the sequence.  Once its loss
is computed on the split logits (loss_parallel), once on gathered ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.model import adamw, batches_of, our_builder, plain_stack, run_of, whole
from benchmarks.pairs import Case, Side
from benchmarks.processes import main
from stretto.spec.contract import Batch, Place
from stretto.spec.plan import PlanSpec

RUN = run_of(PlanSpec(tp=2, micro_batch_size=4))


class TorchNorm(nn.Module):
    """torch's own RMSNorm in the place of ours, whose closed gradient DTensor can't follow."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim."""
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class TokensOnly(nn.Module):
    """The embedding alone: a plan is about tensors, not about our Batch."""

    def __init__(self, tokens: nn.Embedding) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, batch: Batch, context: Any) -> Tensor:
        """Look up [B, T] -> [B, T, D]."""
        return self.tokens(batch.tokens)


def parallelized(mesh: Any, *, split_loss: bool) -> Any:
    """Our stack under DTensor's tensor parallelism."""
    stack = plain_stack(RUN)
    stack.inputs = TokensOnly(stack.inputs.tokens)
    stack.outputs.norm = TorchNorm(stack.outputs.norm)
    ends = {
        "inputs.tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "outputs.norm": SequenceParallel(),
        "outputs.head": ColwiseParallel(
            input_layouts=Shard(1),
            output_layouts=Shard(-1) if split_loss else Replicate(),
            use_local_output=not split_loss,
        ),
    }
    parallelize_module(stack, mesh, ends)
    enter = PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None))
    column, row = ColwiseParallel, partial(RowwiseParallel, output_layouts=Shard(1))
    for block in stack.blocks:
        block.attention_norm, block.feed_forward_norm = (
            TorchNorm(block.attention_norm),
            TorchNorm(block.feed_forward_norm),
        )
        plan = {
            "attention_norm": SequenceParallel(),
            "attention": enter,
            "attention.q": column(),
            "attention.k": column(),
            "attention.v": column(),
            "attention.o": row(),
            "feed_forward_norm": SequenceParallel(),
            "feed_forward": enter,
            "feed_forward.gate": column(),
            "feed_forward.up": column(),
            "feed_forward.down": row(),
        }
        parallelize_module(block, mesh, plan)
    return stack


def dtensor(rank: int, *, split_loss: bool) -> Side:
    """A bare loop on DTensor."""
    stack = parallelized(init_device_mesh("cpu", (2,)), split_loss=split_loss)
    parameters = list(stack.parameters())
    optimizer = adamw(parameters, RUN)

    def step(number: int) -> tuple[float, float]:
        (batch,) = batches_of(RUN, number, 0)
        with loss_parallel() if split_loss else nullcontext():
            context = stack.context(batch, Place())
            x = stack.inputs(batch, context)
            for block in stack.blocks:
                x = block(x, context)
            logits = stack.outputs(x, context)
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, RUN.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return whole(loss.detach()), whole(norm)

    return Side(step=step)


def sides(split_loss: bool, rank: int) -> tuple[Callable[[], Side], Callable[[], Side]]:
    """What builds both sides."""
    return our_builder(RUN, rank), partial(dtensor, rank, split_loss=split_loss)


CASES = [
    Case(name="tp 2 : DTensor, loss parallel", num_ranks=2, make=partial(sides, True), wanted=0.7),
    Case(name="tp 2 : DTensor, gathered logits", num_ranks=2, make=partial(sides, False), wanted=0.7),
]

if __name__ == "__main__":
    main("tensor", __doc__, CASES)
