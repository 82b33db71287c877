"""Trains a plan on worker ranks and puts the pieces of its gradients together again."""

from __future__ import annotations

from typing import Any

import torch

from equivalence.reference import Record, global_batch, rows_of
from ranks import Ranks
from stretto.spec.contract import Batch, Piece
from stretto.spec.run import RunSpec
from stretto.trainer.session import Session

Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]


def batches_of(run: RunSpec, step: int, dp_index: int, *, documents: bool) -> list[Batch]:
    """The micro-batches of one data-parallel rank."""
    whole = global_batch(run, step, documents=documents)
    rows = run.training.global_batch_size // run.plan.dp
    size = run.plan.micro_batch_size
    start = dp_index * rows
    return [rows_of(whole, at, at + size) for at in range(start, start + rows, size)]


def plain(pieces: list[Piece]) -> Pieces:
    """Pieces that travel between processes."""
    return [(p.name, p.shape, p.offset, p.tensor.detach().clone()) for p in pieces if p.owned]


def train_on_rank(rank: int, world: int, run: RunSpec, steps: int, documents: bool) -> dict[str, Any]:
    """Train; return this rank's share of every step's gradients and of the final weights."""
    session = Session.start(run, rank)
    found: dict[str, Any] = {"losses": [], "norms": [], "tokens": [], "gradients": []}
    for step in range(1, steps + 1):
        batches = batches_of(run, step, session.mesh.dp_index, documents=documents)
        masters = session.model.masters
        fills = session.filling is not None and step < steps
        ahead = batches_of(run, step + 1, session.mesh.dp_index, documents=documents) if fills else []
        result = session.train_step(step, batches, ahead=ahead)
        assert result.updated
        factor = min(1.0, run.training.clip_norm / result.grad_norm) if run.training.clip_norm else 1.0
        gradients = [
            p for m in masters if m.tensor.grad is not None for p in m.pieces("gradient", m.tensor.grad / factor)
        ]
        found["gradients"].append(plain(gradients))
        found["losses"].append(result.loss)
        found["norms"].append(result.grad_norm)
        found["tokens"].append(result.tokens)
    found["weights"] = plain([p for m in session.model.masters for p in m.pieces("model", m.tensor)])
    return found


def together(parts: list[Pieces]) -> dict[str, torch.Tensor]:
    """Global tensors from the pieces of all ranks; every element must be there exactly once."""
    values: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for pieces in parts:
        for kind_name, shape, offset, tensor in pieces:
            name = kind_name.split(".", 1)[1]
            window = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
            values.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))[window] = tensor
            seen.setdefault(name, torch.zeros(shape, dtype=torch.int64))[window] += 1
    assert all(bool((count == 1).all()) for count in seen.values())
    return values


def train_plan(ranks: Ranks, run: RunSpec, steps: int, *, documents: bool = True) -> Record:
    """Train ``run`` on as many ranks as its plan needs."""
    found = ranks.run(train_on_rank, run.plan.num_ranks, run, steps, documents)
    first = found[0]
    for other in found:
        assert (other["losses"], other["norms"], other["tokens"]) == (first["losses"], first["norms"], first["tokens"])
    return Record(
        losses=first["losses"],
        norms=first["norms"],
        tokens=first["tokens"],
        gradients=[together([f["gradients"][step] for f in found]) for step in range(steps)],
        weights=together([f["weights"] for f in found]),
    )
