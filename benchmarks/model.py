"""What both sides train: a decoder of 6.4 million parameters, the same values, the same tokens.

8 layers of width 256 with 4 heads, feed-forward 672, vocabulary 256, 4 sequences of 128 tokens per rank,
float32, AdamW, gradients clipped at norm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.pairs import Side
from stretto.assemble.draw import draw
from stretto.models.build import build_model
from stretto.spec.contract import Batch, Place
from stretto.spec.model import ModelSpec
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.sharding import Sharding
from stretto.spec.training import TrainingSpec
from stretto.trainer.session import Session

SEQUENCES, LENGTH = 4, 128
"""Sequences per rank and step, tokens per sequence."""
MODEL = ModelSpec(
    name="6.4M",
    vocab_size=256,
    hidden_size=256,
    intermediate_size=672,
    num_layers=8,
    num_heads=4,
    max_positions=LENGTH,
)


def run_of(plan: PlanSpec) -> RunSpec:
    """The run of ``plan`` with SEQUENCES per rank."""
    training = TrainingSpec(global_batch_size=SEQUENCES * plan.num_ranks // plan.tp, sequence_length=LENGTH)
    return RunSpec(model=MODEL, plan=plan, training=training)


def batches_of(run: RunSpec, step: int, dp_index: int) -> list[Batch]:
    """The micro-batches of one data-parallel rank; every label is valid."""
    rows, size = run.training.global_batch_size // run.plan.dp, run.plan.micro_batch_size
    generator = torch.Generator().manual_seed(1000 * step + dp_index)
    text = torch.randint(0, MODEL.vocab_size, (rows, LENGTH + 1), generator=generator)
    return [
        Batch(
            tokens=part[:, :-1].contiguous(),
            labels=part[:, 1:].contiguous(),
            positions=torch.arange(LENGTH).expand(size, LENGTH),
            documents=None,
            samples=torch.arange(size),
        )
        for part in text.split(size)
    ]


def ours(run: RunSpec, rank: int) -> Side:
    """Stretto's side."""
    session = Session.start(run, rank)

    def step(number: int) -> tuple[float, float]:
        result = session.train_step(number, batches_of(run, number, session.mesh.dp_index))
        return result.loss, result.grad_norm

    def finish() -> None:
        for unit in session.model.units:
            unit.ready()

    return Side(step=step, finish=finish)


def plain_stack(run: RunSpec) -> Any:
    """The very modules that our side runs, with the same values, as ordinary parameters."""
    stack: Any = build_model(run.model)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            whole = Sharding.whole(name, tuple(parameter.shape))
            how = stack.initial_value(name)
            parameter.copy_(draw(run.run.seed, name, whole.shape, whole.slice, how))
    return stack


class MeanLoss(nn.Module):
    """A whole stack from batch to mean loss, as a bare loop calls it."""

    def __init__(self, stack: Any) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, batch: Batch) -> Tensor:
        """Mean over the tokens of the batch."""
        context = self.stack.context(batch, Place())
        x = self.stack.inputs(batch, context)
        for block in self.stack.blocks:
            x = block(x, context)
        return self.stack.loss(self.stack.outputs(x, context), batch) / batch.labels.numel()


def adamw(parameters: Iterable[nn.Parameter], run: RunSpec) -> torch.optim.AdamW:
    """Fused AdamW with the groups and numbers of our side."""
    held, t = list(parameters), run.training
    groups = [
        {"params": [p for p in held if (p.ndim >= 2) == decays], "weight_decay": t.weight_decay * decays}
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.eps, fused=True)


def bare_loop(
    run: RunSpec, rank: int, module: nn.Module, mean_loss: Callable[[Batch], Tensor], *, average: bool = False
) -> Side:
    """A plain PyTorch loop: loss, backward, clip, step.

    Args:
        rank: index along the data-parallel axis.
        average: whether the loss printed is the mean over the ranks.
    """
    parameters = list(module.parameters())
    optimizer = adamw(parameters, run)

    def step(number: int) -> tuple[float, float]:
        total = 0.0
        batches = batches_of(run, number, rank)
        for batch in batches:
            loss = mean_loss(batch) / len(batches)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(parameters, run.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return mean_over_ranks(total) if average else total, whole(norm)

    return Side(step=step)


def whole(norm: Tensor) -> float:
    """The value of a norm that may be a DTensor."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def mean_over_ranks(value: float) -> float:
    """One small all-reduce, as every trainer that logs its loss does."""
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found)
    return float(found) / dist.get_world_size()


def clip_by_total(parameters: Iterable[nn.Parameter], loss: float, limit: float) -> tuple[float, float]:
    """Clip by the norm over all ranks, each of which holds other parameters; also sum the loss."""
    held = [p for p in parameters if p.grad is not None]
    local = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
    sums = torch.tensor([loss, float(local) ** 2], dtype=torch.float64)
    dist.all_reduce(sums)
    total, norm = float(sums[0]), math.sqrt(float(sums[1]))
    nn.utils.clip_grads_with_norm_(held, limit, torch.tensor(norm))
    return total, norm


def our_builder(run: RunSpec, rank: int) -> Callable[[], Side]:
    """What builds our side of a case."""
    return partial(ours, run, rank)
