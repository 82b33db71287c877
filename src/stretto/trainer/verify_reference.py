"""The one-rank reference that a plan is held to: plain autograd, torch's own optimizer, nothing of the runtime.

It shares with the plan only the model's modules, how values are drawn, and the learning rate.  Rows go through
the model one at a time, and where nothing is dropped one *document* at a time, without any mask: so it
also shows whether documents packed in a row really don't see each other.

    row   │ a a a a b b b c │        plan: one row, masked        reference: │ a a a a │  │ b b b │  │ c │
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from stretto.assemble.draw import draw
from stretto.models.build import build_model
from stretto.spec.contract import IGNORE, Batch, Place, Stack
from stretto.spec.run import RunSpec
from stretto.spec.sharding import Sharding
from stretto.trainer.freezing import freeze
from stretto.trainer.rate import learning_rate
from stretto.trainer.verify_inputs import global_batch, lively, rows_of_clips
from stretto.trainer.verify_modules import Key, ModuleWatch, whole_values

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceStep:
    """What one step gave on one rank."""

    loss: float
    """Mean over the valid tokens."""
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Valid tokens."""
    outputs: Arrays
    """Output of each part: [rows, T, D], of clips [rows, F, P, D]; of ``outputs`` the summed loss, [rows]."""
    gradients: Arrays
    """Before clipping, by parameter in model order; zeros where a parameter got none."""
    weights: Arrays
    """After the step, by parameter in model order."""
    modules: dict[Key, np.ndarray]
    """What the modules inside the watched part were given and gave, in the last step, as they ran."""


def train_reference(run: RunSpec, steps: int, *, inside: str | None = None) -> Iterator[ReferenceStep]:
    """Train on this process, step by step; ``inside``: the part whose modules are watched in the last one."""
    stack = build_whole(run)
    t = run.training
    named = parameters_in_order(stack)
    trained = [p for p in named.values() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": t.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    optimizer: torch.optim.Optimizer
    if t.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=t.learning_rate, momentum=t.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.eps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        batch = global_batch(run, step)
        tokens = int((batch.labels != IGNORE).sum())
        watch = ModuleWatch(stack, inside) if inside is not None and step == steps else None
        loss, outputs = differentiate(stack, batch, run, step=step, tokens=tokens, watch=watch)
        gradients = {n: (torch.zeros_like(p) if p.grad is None else p.grad).numpy().copy() for n, p in named.items()}
        norm = math.sqrt(sum(float(np.square(g).sum()) for g in gradients.values()))
        if t.clip_norm and norm > t.clip_norm:
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.mul_(t.clip_norm / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, step)
        optimizer.step()
        weights = {n: p.detach().numpy().copy() for n, p in named.items()}
        yield ReferenceStep(
            loss=loss,
            grad_norm=norm,
            tokens=tokens,
            outputs=outputs,
            gradients=gradients,
            weights=weights,
            modules=whole_values(watch.take(), *batch.tokens.shape) if watch is not None else {},
        )


def build_whole(run: RunSpec) -> Stack:
    """The whole model with its values in float64, on this process."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(run.run.seed)
        stack = lively(build_model(run.model), run)
    module = cast(nn.Module, stack).to(torch.float64)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            how = stack.initial_value(name)
            if how is not None:
                whole = Sharding.whole(name, tuple(parameter.shape))
                parameter.copy_(draw(run.run.seed, name, whole.shape, whole.slice, how))
    freeze(stack, run.training.freeze)
    return stack


def parameters_in_order(stack: Stack) -> dict[str, nn.Parameter]:
    """Parameters by global name from inputs over blocks to outputs; tied ones once."""
    found: dict[str, nn.Parameter] = {}
    for part in ("inputs", "blocks", "outputs"):
        for name, parameter in cast(Any, stack).get_submodule(part).named_parameters(prefix=part):
            if name not in stack.tied:
                found[name] = parameter
    return found


def differentiate(
    stack: Stack, batch: Batch, run: RunSpec, *, step: int, tokens: int, watch: ModuleWatch | None
) -> tuple[float, Arrays]:
    """Mean loss of ``batch`` and the output of each part; gradients accumulate in the parameters."""
    rows, length = batch.tokens.shape
    outputs: Arrays = {}
    apart = run.model.dropout == 0 and run.model.family != "foreign"
    for row, start, stop in pieces(batch, apart=apart):
        if watch is not None:
            watch.row, watch.start = row, start
        piece = piece_of(batch, row, start, stop, whole=not apart)
        context = stack.context(piece, Place(seed=run.run.seed, step=step, training=True))
        x = stack.inputs(piece, context)
        values = {"inputs": x}
        for index, block in enumerate(stack.blocks):
            x = values[f"blocks.{index}"] = block(x, context)
        loss = stack.loss(stack.outputs(x, context), piece)
        (loss / tokens).backward()
        for part, value in values.items():
            first: Tensor = value if isinstance(value, Tensor) else value[0]
            row_shape = first.shape[1:] if batch.documents is None else (length, *first.shape[2:])
            where = outputs.setdefault(part, np.zeros((rows, *row_shape)))
            where[row, start:stop] = first.detach()[0].numpy()
        outputs.setdefault("outputs", np.zeros(rows))[row] += loss.item()
    return float(outputs["outputs"].sum()) / tokens, outputs


def pieces(batch: Batch, *, apart: bool) -> Iterator[tuple[int, int, int]]:
    """``(row, start, stop)`` of every document, or of every row where they are not taken ``apart``."""
    rows, length = batch.tokens.shape
    for row in range(rows):
        if batch.documents is None or not apart:
            yield row, 0, length
            continue
        ids = batch.documents[row].tolist()
        starts = [at for at in range(length) if at == 0 or ids[at] != ids[at - 1]]
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            yield row, start, stop


def piece_of(batch: Batch, row: int, start: int, stop: int, *, whole: bool) -> Batch:
    """Tokens ``start`` to ``stop`` of a row as a batch of one; documents only where it is a ``whole`` row."""
    window = (slice(row, row + 1), slice(start, stop))
    return Batch(
        tokens=batch.tokens[window],
        labels=batch.labels[window],
        positions=batch.positions[window],
        documents=batch.documents[window] if whole and batch.documents is not None else None,
        samples=batch.samples[row : row + 1],
        clips=rows_of_clips(batch.clips, row, row + 1),
    )
