"""A stand-in for the package ``flash_attn``, which needs a GPU: the CPU's kernel, which Stretto uses too, by its names.

With it ring-flash-attention and yunchang run their rings unchanged on a CPU, on the same kernel as ours.  What is left
between the two sides is then what each does around the kernel.

Shapes are theirs: q [B, T, H, K], k and v [B, S, G, K], log-sum-exp [B, H, T].
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stretto.parallel.sequence.blockwise import Rows
from stretto.parallel.sequence.flash import CpuFlash


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    """``_flash_attn_forward``; its parameters are the package's."""
    assert (dropout_p, window_size_left, softcap, alibi_slopes) == (0, -1, 0.0, None)
    assert softmax_scale == q.shape[-1] ** -0.5 and (not causal or q.shape[1] == k.shape[1])
    out, lse = CpuFlash().forward(*_swapped(q, k, v), causal=causal, bias=None)
    return out.transpose(1, 2), lse, None, None


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    rng_state: Tensor | None = None,
) -> None:
    """``_flash_attn_backward``: writes dq, dk and dv."""
    dout, q, k, v, out = _swapped(dout, q, k, v, out)
    rows = Rows(q=q, dout=dout, lse=softmax_lse, delta=softmax_lse, out=out)
    found = CpuFlash().backward(rows, k, v, causal=causal, bias=None)
    for into, gradient in zip((dq, dk, dv), found, strict=True):
        into.copy_(gradient.transpose(1, 2))


def _swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def _missing(*_: Any, **__: Any) -> None:
    raise NotImplementedError("not part of this stand-in for flash_attn")


def install() -> None:
    """Let ``import flash_attn`` find the stand-in.

    So does ring-flash-attention's adapter for transformers, which is not needed and fits few versions of it.
    """
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__dict__.update(__version__="2.8.0", flash_attn_interface=interface, flash_attn_func=_missing)
    varlen = dict.fromkeys(("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"), _missing)
    interface.__dict__.update(_flash_attn_forward=forward, _flash_attn_backward=backward, **varlen)
    adapters = ModuleType("ring_flash_attn.adapters")
    adapters.__dict__.update(dict.fromkeys(("substitute_hf_flash_attn", "update_ring_flash_attn_params"), _missing))
    sys.modules.update({"ring_flash_attn.adapters": adapters})
    sys.modules.update({"flash_attn": package, "flash_attn.flash_attn_interface": interface})
    torch.jit.set_fusion_strategy([])  # their merge is scripted; profiling it again and again would only slow them down
