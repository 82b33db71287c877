"""Model presets: ``model.name = "llama-3-8b"``.

Sizes are those of the config.json that the authors published (Hugging Face hub); each block names the
paper that states them.  The tiny ones and ``demo`` are ours and fit the bytes tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from stretto.spec.errors import ConfigError, nearest
from stretto.spec.model import ModelSpec, RopeScaling, VideoSpec


def model_preset(name: str, **overrides: Any) -> ModelSpec:
    """The preset ``name`` with fields replaced; ConfigError with the nearest name where there is none.

    >>> model_preset("gpt2", num_layers=2).hidden_size
    768
    """
    if name not in MODELS:
        raise ConfigError(
            f"There is no model preset {name!r}{nearest(name, MODELS) or '.'} Presets are {', '.join(MODELS)}."
        )
    return dataclasses.replace(MODELS[name], **overrides)


def _gpt2(name: str, hidden_size: int, num_layers: int, num_heads: int, **fields: Any) -> ModelSpec:
    sizes: dict[str, Any] = {"vocab_size": 50257, "max_positions": 1024, **fields}
    return ModelSpec(
        name=name,
        family="gpt2",
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        qkv_bias=True,
        tied_embeddings=True,
        **sizes,
    )


def _llama(name: str, sizes: tuple[int, int, int, int, int], **fields: Any) -> ModelSpec:
    """``sizes``: hidden, intermediate, layers, query heads, key/value heads."""
    hidden, intermediate, num_layers, num_heads, num_kv_heads = sizes
    return ModelSpec(
        name=name,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        **fields,
    )


def _video(name: str, sizes: tuple[int, int, int], clip: tuple[int, int, int]) -> ModelSpec:
    """``sizes``: hidden, layers, heads; ``clip``: frames, patches, channels."""
    hidden, num_layers, num_heads = sizes
    frames, patches, channels = clip
    return ModelSpec(
        name=name,
        family="video",
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        video=VideoSpec(frames=frames, patches=patches, channels=channels),
    )


# Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
_GPT2 = (
    _gpt2("gpt2", 768, 12, 12),
    _gpt2("gpt2-medium", 1024, 24, 16),
    _gpt2("gpt2-large", 1280, 36, 20),
    _gpt2("gpt2-xl", 1600, 48, 25),
)

# Touvron et al. 2023, "Llama 2", table 1 and appendix A.2.
_LLAMA_2: dict[str, Any] = {"vocab_size": 32000, "max_positions": 4096}
# Llama team 2024, "The Llama 3 Herd of Models", table 3.
_LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "max_positions": 8192, "rope_theta": 500000.0}
_LLAMA_31 = {**_LLAMA_3, "max_positions": 131072, "rope_scaling": RopeScaling(factor=8.0)}
# Llama 3.2 model card: one rotary factor for both small models, head tied to the embedding.
_LLAMA_32 = {**_LLAMA_31, "rope_scaling": RopeScaling(factor=32.0), "tied_embeddings": True}

_LLAMA = (
    _llama("llama-2-7b", (4096, 11008, 32, 32, 32), **_LLAMA_2),
    _llama("llama-2-13b", (5120, 13824, 40, 40, 40), **_LLAMA_2),
    _llama("llama-2-70b", (8192, 28672, 80, 64, 8), **_LLAMA_2),
    _llama("llama-3-8b", (4096, 14336, 32, 32, 8), **_LLAMA_3),
    _llama("llama-3-70b", (8192, 28672, 80, 64, 8), **_LLAMA_3),
    _llama("llama-3.1-8b", (4096, 14336, 32, 32, 8), **_LLAMA_31),
    _llama("llama-3.1-70b", (8192, 28672, 80, 64, 8), **_LLAMA_31),
    _llama("llama-3.1-405b", (16384, 53248, 126, 128, 8), **_LLAMA_31),
    _llama("llama-3.2-1b", (2048, 8192, 16, 32, 8), **_LLAMA_32),
    _llama("llama-3.2-3b", (3072, 8192, 28, 24, 8), **_LLAMA_32),
)

_RELATIVES = (
    # Jiang et al. 2023, "Mistral 7B", table 1 (v0.1, with its sliding window).
    _llama("mistral-7b", (4096, 14336, 32, 32, 8), vocab_size=32000, max_positions=32768, sliding_window=4096),
    # Qwen team 2024, "Qwen2 Technical Report", table 1; 152064 embedding rows as in its config.json.
    _llama(
        "qwen2-7b",
        (3584, 18944, 28, 28, 4),
        vocab_size=152064,
        max_positions=131072,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
    ),
    # Qwen team 2025, "Qwen3 Technical Report", table 1.
    _llama(
        "qwen3-8b",
        (4096, 12288, 36, 32, 8),
        vocab_size=151936,
        max_positions=40960,
        rope_theta=1e6,
        norm_eps=1e-6,
        qk_norm=True,
    ),
)

# Small enough for tests, and divisible by 2 and 4 along every dim that tensor parallelism cuts.
_TINY = (
    _llama("tiny", (64, 176, 4, 8, 4), vocab_size=260, max_positions=512),
    _llama("tiny-tied", (64, 176, 4, 8, 4), vocab_size=260, max_positions=512, tied_embeddings=True),
    _gpt2("tiny-gpt2", 64, 4, 8, vocab_size=260, max_positions=512),
    # 1.7 M parameters: learns to write something like Python within minutes on two cores.
    _llama("demo", (128, 352, 4, 4, 2), vocab_size=260, max_positions=1024),
)

_VIDEO = (
    # Zheng et al. 2024, "Open-Sora", version 1.0 without text: 16 frames of 512 x 512 pixels, 2 x 2 latents a patch.
    _video("stdit-xl", (1152, 28, 16), (16, 1024, 16)),
    # 8 x 16 = 128 tokens a clip, as many as training.sequence_length is by default.
    _video("tiny-video", (64, 4, 4), (8, 16, 4)),
)

MODELS: Mapping[str, ModelSpec] = MappingProxyType(
    {model.name: model for model in (*_GPT2, *_LLAMA, *_RELATIVES, *_TINY, *_VIDEO)}
)
"""Preset name -> model."""
