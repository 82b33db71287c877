"""AdamW over the masters: decay on weights, none on norms and biases; fused where torch has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from stretto.parallel.master import Master
from stretto.spec.contract import Piece
from stretto.spec.training import TrainingSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The tensors that AdamW keeps for each master, as torch names them."""


def build_optimizer(masters: Sequence[Master], training: TrainingSpec) -> torch.optim.AdamW:
    """AdamW on the ``masters`` that train, with the numbers of ``training``; its state exists from the start."""
    masters = [master for master in masters if master.trained]
    groups = [
        {"params": [m.tensor for m in masters if m.decays == decays], "weight_decay": training.weight_decay * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]] or [{"params": [torch.zeros(0)]}],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
        fused=True,
    )
    for master in masters:
        state = optimizer.state[master.tensor]
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.tensor.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(master.tensor, requires_grad=False)
    return optimizer


def optimizer_pieces(masters: Sequence[Master], optimizer: torch.optim.AdamW) -> Iterator[Piece]:
    """Masters, and both moments of those that train, as pieces of global tensors, for checkpoints."""
    for master in masters:
        yield from master.pieces("model", master.tensor)
        for moment in MOMENTS if master.trained else ():
            yield from master.pieces(f"optimizer.{moment}", optimizer.state[master.tensor][moment])


def set_steps_taken(optimizer: torch.optim.AdamW, steps: int) -> None:
    """Restore the count that bias correction uses (skipped updates don't count)."""
    for state in optimizer.state.values():
        state["step"].fill_(float(steps))
