"""pp over four processes, over torch.distributed.pipelining with the same modules cut in the same places.

    OMP_NUM_THREADS=1 python -m benchmarks.pipeline

8 micro-batches of 2 sequences.  1f1b is what is judged; gpipe and interleaved are for information.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from benchmarks.model import adamw, batches_of, clip_by_total, our_builder, plain_stack, run_of
from benchmarks.pairs import Case, Side
from benchmarks.processes import main
from stretto.models.loss import cross_entropy_sum
from stretto.spec.contract import Batch, Place
from stretto.spec.plan import PlanSpec
from stretto.spec.run import RunSpec
from stretto.spec.stages import stages_of

MICRO_BATCH = 2
PLANS = {
    "1f1b": PlanSpec(pp=4, schedule="1f1b", micro_batch_size=MICRO_BATCH),
    "gpipe": PlanSpec(pp=4, schedule="gpipe", micro_batch_size=MICRO_BATCH),
    "interleaved": PlanSpec(pp=4, schedule="interleaved", chunks=2, micro_batch_size=MICRO_BATCH),
}


class Part(nn.Module):
    """One stage's share of the stack, as torch's pipeline wants it: tensor in, tensor out."""

    def __init__(self, run: RunSpec, index: int) -> None:
        super().__init__()
        stack, layers = plain_stack(run), stages_of(run)
        start = sum(layers[:index])
        self.inputs = stack.inputs if index == 0 else None
        self.blocks = nn.ModuleList(stack.blocks[start : start + layers[index]])
        self.outputs = stack.outputs if index == len(layers) - 1 else None
        self.context_of: Any = stack.context
        self.rotary = stack.rotary

    def forward(self, x: Tensor) -> Tensor:
        """Tokens or activations of a micro-batch to activations or logits."""
        size, length = x.shape[:2]
        batch = Batch(
            tokens=x,
            labels=x,
            positions=torch.arange(length).expand(size, length),
            documents=None,
            samples=torch.arange(size),
        )
        context = self.context_of(batch, Place())
        if self.inputs is not None:
            x = self.inputs(batch, context)
        for block in self.blocks:
            x = block(x, context)
        return x if self.outputs is None else self.outputs(x, context)


def torch_schedule(run: RunSpec, rank: int, tokens: int) -> tuple[Any, list[nn.Parameter]]:
    """torch's schedule of the same name, and this rank's parameters."""
    plan = run.plan
    indices = range(rank, plan.num_stages, plan.pp)
    parts = [Part(run, index) for index in indices]
    device = torch.device("cpu")
    stages = [PipelineStage(p, i, plan.num_stages, device) for p, i in zip(parts, indices, strict=True)]
    kinds: dict[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B}

    def loss_share(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(logits, labels) / tokens

    schedule = kinds[plan.schedule](
        stages if plan.chunks > 1 else stages[0], run.num_microbatches, loss_fn=loss_share, scale_grads=False
    )
    return schedule, [p for part in parts for p in part.parameters()]


def torch_pipeline(run: RunSpec, rank: int) -> Side:
    """A plain loop on torch's pipeline."""
    num_tokens = run.training.global_batch_size * run.training.sequence_length
    schedule, parameters = torch_schedule(run, rank, num_tokens)
    return torch_side(run, schedule, parameters, first=rank == 0, last=rank == run.plan.pp - 1)


def torch_side(run: RunSpec, schedule: Any, parameters: list[nn.Parameter], *, first: bool, last: bool) -> Side:
    """Steps of a schedule object of torch's, of which this rank holds the first or the last stage, or neither."""
    optimizer = adamw(parameters, run)

    def step(number: int) -> tuple[float, float]:
        batches = batches_of(run, number, 0)
        inputs = (torch.cat([b.tokens for b in batches]),) if first else ()
        losses: list[Tensor] = []
        target = {"target": torch.cat([b.labels for b in batches]), "losses": losses} if last else {}
        schedule.step(*inputs, **target, return_outputs=False)
        loss = float(torch.stack(losses).detach().sum()) if last else 0.0
        found = clip_by_total(parameters, loss, run.training.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return found

    return Side(step=step)


def sides(schedule: str, rank: int) -> tuple[Callable[[], Side], Callable[[], Side]]:
    """What builds both sides."""
    run = run_of(PLANS[schedule])
    return our_builder(run, rank), partial(torch_pipeline, run, rank)


CASES = [
    Case(name="1f1b : Schedule1F1B", num_ranks=4, make=partial(sides, "1f1b"), wanted=1.02),
    Case(name="gpipe : ScheduleGPipe", num_ranks=4, make=partial(sides, "gpipe")),
    Case(name="interleaved 2 : ScheduleInterleaved1F1B", num_ranks=4, make=partial(sides, "interleaved")),
]

if __name__ == "__main__":
    main("pipeline", __doc__, CASES)
