"""The one-rank reference that every plan is held to: plain autograd, torch's own optimizer, nothing of the runtime.

It shares with the system under test only the model's modules and the way values are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stretto.assemble.draw import draw
from stretto.data import ClipLoader, Share, prepare_clips
from stretto.models.build import build_model
from stretto.spec.contract import IGNORE, Batch, Place
from stretto.spec.data import DataSpec
from stretto.spec.run import RunSpec
from stretto.spec.sharding import Sharding
from stretto.trainer.rate import learning_rate

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Record:
    """What a run produced, per step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def global_batch(run: RunSpec, step: int, *, documents: bool = True) -> Batch:
    """A whole step's data: random tokens, very unequal numbers of valid labels, several documents a row.

    Of clips what the loader gives.
    """
    rows, length = run.training.global_batch_size, run.training.sequence_length
    if run.model.video is not None:
        share = Share(global_batch_size=rows, micro_batch_size=rows, seed=run.run.seed)
        return ClipLoader(prepare_clips(DataSpec(path="waves"), run.model.video), share).step(step)[0]
    generator = torch.Generator().manual_seed(1000 * run.run.seed + step)
    tokens = torch.randint(0, run.model.vocab_size, (rows, length), generator=generator)
    labels = torch.randint(0, run.model.vocab_size, (rows, length), generator=generator)
    share = torch.rand(rows, 1, generator=generator)
    labels[torch.rand(rows, length, generator=generator) < share] = IGNORE
    positions = torch.arange(length).expand(rows, length).clone()
    ids = torch.zeros(rows, length, dtype=torch.int64)
    if documents:
        for row in range(rows):
            cut = int(torch.randint(1, length, (), generator=generator))
            positions[row, cut:] -= cut
            ids[row, cut:] = 1
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=positions,
        documents=ids if documents else None,
        samples=torch.arange(rows) + (step - 1) * rows,
    )


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a batch."""
    parts = {n: getattr(batch, n) for n in ("tokens", "labels", "positions", "documents", "samples")}
    clips = batch.clips
    if clips is not None:
        clips = replace(clips, **{n: getattr(clips, n)[start:stop] for n in ("noisy", "velocity", "time")})
    return Batch(clips=clips, **{n: None if t is None else t[start:stop] for n, t in parts.items()})


def build_reference(run: RunSpec, dtype: torch.dtype) -> Any:
    """The model with drawn values, ordinary parameters."""
    model: Any = build_model(run.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = Sharding.whole(name, tuple(parameter.shape))
            how = model.initial_value(name)
            parameter.copy_(draw(run.run.seed, name, whole.shape, whole.slice, how))
    return model.to(dtype)


def train_reference(run: RunSpec, steps: int, *, documents: bool = True, model: Any = None) -> Record:
    """Train the plain model for some steps."""
    dtype = DTYPES[run.training.dtype]
    model = model if model is not None else build_reference(run, dtype)
    t = run.training
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": t.weight_decay},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if t.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=t.learning_rate, momentum=t.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.eps)
    record = Record()
    for step in range(1, steps + 1):
        batch = global_batch(run, step, documents=documents)
        tokens = int((batch.labels != IGNORE).sum())
        context = model.context(batch, Place(seed=run.run.seed, step=step, training=True))
        x = model.inputs(batch, context)
        for block in model.blocks:
            x = block(x, context)
        loss = model.loss(model.outputs(x, context), batch) / tokens
        optimizer.zero_grad()
        loss.backward()
        record.losses.append(loss.item())
        record.tokens.append(tokens)
        record.gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        record.norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in named.values() if p.grad is not None)))
        if t.clip_norm and record.norms[-1] > t.clip_norm:
            for p in named.values():
                if p.grad is not None:
                    p.grad.mul_(t.clip_norm / record.norms[-1])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, step)
        optimizer.step()
    record.weights = {n: p.detach().clone() for n, p in named.items()}
    return record


def error(found: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def vanishing(gradients: dict[str, Tensor]) -> set[str]:
    """Parameters whose gradient is zero but for rounding: 1e-13 of the model's largest or less.

    A key bias without rotary positions is one: it adds the same to all scores of a query, which softmax
    takes away again.  What is left is noise, and no plan has to repeat it.
    """
    largest = max(float(g.abs().max()) for g in gradients.values())
    return {name for name, g in gradients.items() if float(g.abs().max()) <= 1e-13 * largest}


def worst_gradient(record: Record, reference: Record) -> tuple[float, str]:
    """Largest error of a parameter's gradient over all steps, and whose it is."""
    worst = (0.0, "")
    for found, expected in zip(record.gradients, reference.gradients, strict=True):
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        assert vanishing(found) == vanishing(expected)
        for name in expected.keys() - vanishing(expected):
            worst = max(worst, (error(found[name], expected[name]), name))
    return worst


def worst_of(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative error of a list of numbers."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def assert_same_training(record: Record, reference: Record, *, tolerance: float) -> None:
    """Losses, tokens, gradients, norms and weights of every step are those of the reference.

    AdamW divides a gradient by its own size, so where it is only noise the weight is noise too and isn't compared.
    """
    assert record.tokens == reference.tokens
    assert worst_of(record.losses, reference.losses) <= tolerance
    gradient_error, name = worst_gradient(record, reference)
    assert gradient_error <= tolerance, name
    assert worst_of(record.norms, reference.norms) <= tolerance
    compared = reference.weights.keys() - vanishing(reference.gradients[0])
    weight_errors = {n: error(record.weights[n], reference.weights[n]) for n in compared}
    assert max(weight_errors.values()) <= tolerance, max(weight_errors, key=weight_errors.__getitem__)
