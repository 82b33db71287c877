"""The gradient norm of the whole model, and clipping by it.

Every parameter counts once: of tp-replicated and tied copies only one is counted, and the sum runs
over pp, tp and the ranks that divide the masters, but not over copies of these, which hold equal gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from stretto.parallel.master import Master


def squared_norm_held(masters: Sequence[Master], *, device: torch.device) -> Tensor:
    """Sum of squares, a float64 scalar, of the gradients that count on this rank."""
    counted = [m.tensor.grad for m in masters if m.counted and m.tensor.grad is not None and m.tensor.grad.numel()]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    return get_total_norm(counted).to(torch.float64).square()


def scale_gradients(masters: Sequence[Master], factor: float) -> None:
    """Multiply all gradients by ``factor``."""
    gradients = [m.tensor.grad for m in masters if m.tensor.grad is not None]
    for gradient in gradients:
        gradient.mul_(factor)
