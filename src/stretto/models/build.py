"""From a ModelSpec to a Stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from stretto.models.foreign import load_foreign
from stretto.models.gpt import GPT
from stretto.models.llama import Llama
from stretto.models.video import VideoTransformer
from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    from stretto.models.decoder import Decoder
    from stretto.spec.contract import Stack
    from stretto.spec.model import ModelSpec


def build_model(spec: ModelSpec) -> Stack:
    """Build the whole model on torch's current default device; ``torch.device("meta")`` costs nothing.

    Parameters hold whatever torch's constructors leave; ``Stack.initial_value`` says how each is to
    start.  A tied head and embedding are one Parameter here.  A foreign model comes from
    ``spec.module``, on the CPU and with the values that its builder gave it.  Raises ConfigError
    where the heads don't fit.
    """
    if spec.family == "foreign":
        # Its values are all there is of it, so a meta device around this call is not for it.
        with torch.device("cpu"):
            return load_foreign(spec)
    if spec.family == "video":
        check_heads(spec)
        return cast("Stack", VideoTransformer(spec))
    return cast("Stack", build_decoder(spec))


def build_decoder(spec: ModelSpec) -> Decoder:
    """Build a model of text, of a family that Stretto ships."""
    check_heads(spec)
    return Llama(spec) if spec.family == "llama" else GPT(spec)


def check_heads(spec: ModelSpec) -> None:
    """Raise ConfigError where head counts and widths don't divide."""
    if spec.head_dim is None and spec.hidden_size % spec.num_heads:
        raise ConfigError(
            f"hidden_size {spec.hidden_size} can't be split over {spec.num_heads} heads; "
            f"make it a multiple of num_heads or give head_dim."
        )
    if spec.num_heads % spec.kv_heads:
        raise ConfigError(
            f"{spec.num_heads} query heads can't share {spec.kv_heads} key/value heads evenly; "
            f"num_kv_heads must divide num_heads."
        )
    if spec.family == "llama" and spec.head_size % 2:
        raise ConfigError(f"Rotary positions turn pairs of channels, but head size {spec.head_size} is odd.")
