"""AdamW, or SGD with momentum, over the masters: decay on weights, none on norms and biases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from stretto.parallel.master import Master
from stretto.spec.contract import Piece
from stretto.spec.training import TrainingSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The tensors that AdamW keeps for each master, as torch names them."""
VELOCITY = ("momentum_buffer",)
"""Likewise SGD with momentum."""


def build_optimizer(masters: Sequence[Master], training: TrainingSpec) -> torch.optim.Optimizer:
    """AdamW or SGD on the ``masters`` that train, with the numbers of ``training``; its state exists from the start."""
    masters = [master for master in masters if master.trained]
    groups = [
        {"params": [m.tensor for m in masters if m.decays == decays], "weight_decay": training.weight_decay * decays}
        for decays in (True, False)
    ]
    groups = [g for g in groups if g["params"]] or [{"params": [torch.zeros(0)]}]
    optimizer: torch.optim.Optimizer
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=training.learning_rate, momentum=training.momentum, fused=True)
    else:
        optimizer = torch.optim.AdamW(
            groups, lr=training.learning_rate, betas=(training.beta1, training.beta2), eps=training.eps, fused=True
        )
    for master in masters:
        state = optimizer.state[master.tensor]
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.tensor.device)
        for moment in moments_of(optimizer):
            state[moment] = torch.zeros_like(master.tensor, requires_grad=False)
    return optimizer


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The tensors that an optimizer keeps for each master; SGD without momentum keeps none."""
    if isinstance(optimizer, torch.optim.SGD):
        return VELOCITY if any(group["momentum"] for group in optimizer.param_groups) else ()
    return MOMENTS


def optimizer_pieces(masters: Sequence[Master], optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
    """Masters, and the moments of those that train, as pieces of global tensors, for checkpoints."""
    for master in masters:
        yield from master.pieces("model", master.tensor)
        for moment in moments_of(optimizer) if master.trained else ():
            yield from master.pieces(f"optimizer.{moment}", optimizer.state[master.tensor][moment])


def set_steps_taken(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Restore the count that AdamW's bias correction uses (skipped updates don't count)."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(float(steps))
