"""Which backend computes a block of attention: ``plan.attention_backend``.

    blockwise   plain PyTorch: every device, type and mask
    flash       the fused kernels behind scaled_dot_product_attention; what needs a mask is theirs too on a CPU, and
                blockwise's on CUDA
    flex        FlexAttention, CUDA only: every mask, empty tiles left out
    auto        the fastest of these that is exact: flash where a fused kernel takes the type, else blockwise; on CUDA
                flex for what documents and windows cut

Dropout of attention weights is keyed by position, which only blockwise knows; under auto it serves such runs.
"""

from __future__ import annotations

import torch

from stretto.parallel.sequence.blockwise import Blockwise
from stretto.parallel.sequence.flash import Flash, operators_for
from stretto.parallel.sequence.pieces import Kernel
from stretto.spec.errors import UnsupportedError


def kernel_for(device: torch.device, backend: str = "auto") -> Kernel:
    """The backend of a device; UnsupportedError where it has none of that name."""
    operators = operators_for(device)
    if backend == "flash":
        if not operators:
            raise UnsupportedError(_lacks("flash", device, '"auto" or "blockwise"'))
        return Flash(operators, strict=True)
    if backend == "flex":
        if device.type != "cuda":
            raise UnsupportedError(_lacks("flex", device, '"auto", "flash" or "blockwise"'))
        return _flex()
    if backend == "blockwise" or not operators:
        return Blockwise()
    return Flash(operators, _flex() if device.type == "cuda" else None)


def _flex() -> Kernel:
    # Here, since importing it takes a second that a run without it needn't spend.
    from stretto.parallel.sequence.flex import Flex

    return Flex()


def _lacks(backend: str, device: torch.device, choices: str) -> str:
    return (
        f'plan.attention_backend = "{backend}" has no forward and backward on a device of type {device.type}; '
        f"set it to {choices}."
    )
