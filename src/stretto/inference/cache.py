"""Key/value cache: another way to attend.

With the cache in place, a model is fed only its new tokens; each attention appends their keys and
values and attends over all so far.  The model itself is unchanged, since ``attend`` is an opening.

    prompt ──► [k v ─ ─ ─ ─ ─ ─]      first call: all tokens of the prompt
    token  ──►       [k ─ ─ ─ ─ ]     then one at a time, until the capacity is full

Shapes: B sequences, H query heads, G key/value heads, T new tokens, S tokens so far, K head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stretto.models.attention import Attend, Attention, scaled_dot_product
from stretto.models.chunked import Summary, passed
from stretto.models.context import Context
from stretto.models.linear_attention import LinearAttention, States
from stretto.spec.contract import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from torch import Tensor

    from stretto.models.decoder import Decoder


class CachedAttend:
    """Attends over the keys and values of this call and of all calls before."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, context: Context) -> Tensor:
        """Append and attend; ``context.mask`` is [1, 1, T, S], or None where a causal one isn't needed."""
        if self.keys is None or self.values is None:
            batch, groups, _, size = k_BGTK.shape
            self.keys = k_BGTK.new_empty(batch, groups, self.capacity, size)
            self.values = torch.empty_like(self.keys)
        start, stop = self.length, self.length + k_BGTK.size(2)
        self.keys[:, :, start:stop], self.values[:, :, start:stop] = k_BGTK, v_BGTK
        self.length = stop
        keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        return scaled_dot_product(q_BHTK, keys, values, context.mask, causal=context.mask is None and start == 0)


class KeptState:
    """The state of a linear layer after all tokens so far: its cache, of one size whatever their number."""

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def lengths(self, context: Context, tokens: int) -> Sequence[int]:
        """All new tokens follow each other."""
        return (tokens,)

    def begin(self, stretches: Sequence[Summary], context: Context) -> Callable[[], Sequence[Tensor]]:
        """Give the state before the new tokens and keep the one after them."""
        (stretch,) = stretches
        before = torch.zeros_like(stretch.gain[:, :, 0]) if self.state is None else self.state
        through, gain = stretch.total()
        self.state = passed(through, before) + gain
        return lambda: (before,)


class Cache:
    """Puts a cache of ``capacity`` tokens into every attention of ``model`` while it is entered."""

    def __init__(self, model: Decoder, capacity: int) -> None:
        self.model = model
        self.capacity = capacity
        self.length = 0
        self.before: list[tuple[Attention, Attend]] = []
        self.states_before: list[tuple[LinearAttention, States]] = []

    def __enter__(self) -> Cache:
        """Take the place of each ``attend``."""
        for module in self.model.modules():
            if isinstance(module, Attention):
                self.before.append((module, module.attend))
                module.attend = CachedAttend(self.capacity)
            elif isinstance(module, LinearAttention):
                self.states_before.append((module, module.states))
                module.states = KeptState()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give each ``attend`` back."""
        for module, attend in self.before:
            module.attend = attend
        self.before.clear()
        for layer, states in self.states_before:
            layer.states = states
        self.states_before.clear()

    def context(self, tokens_BT: Tensor) -> Context:
        """Return the context of the next ``tokens_BT`` and count them as seen."""
        model, start, stop = self.model, self.length, self.length + tokens_BT.size(1)
        assert stop <= self.capacity, f"{stop} tokens in a cache of {self.capacity}"
        self.length = stop
        positions_BT = torch.arange(start, stop, device=tokens_BT.device).expand(tokens_BT.shape)
        rotary = None
        if model.rotary is not None:
            rotary = model.rotary.at(positions_BT, dtype=model.dtype, reach=self.capacity)
        return Context(
            place=Place(training=False),
            samples=torch.zeros(tokens_BT.size(0), dtype=torch.int64, device=tokens_BT.device),
            mask=continued_mask(start, stop, model.spec.sliding_window, device=tokens_BT.device),
            rotary=rotary,
        )


def continued_mask(start: int, stop: int, window: int | None, *, device: torch.device) -> Tensor | None:
    """Return which of the keys [0, ``stop``) the queries [``start``, ``stop``) see, bool [1, 1, T, S].

    None where one query sees all keys, and where plain causal attention from token 0 is right.
    """
    windowed = window is not None and window < stop
    if not windowed and (start == 0 or stop - start == 1):
        return None
    distance = torch.arange(start, stop, device=device).unsqueeze(1) - torch.arange(stop, device=device)
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    return mask[None, None]
