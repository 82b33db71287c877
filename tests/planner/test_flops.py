"""The one count of parameters and FLOPs, against transformers' own modules and torch's own counter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stretto.planner import flops
from stretto.spec.errors import UnsupportedError
from stretto.spec.model import ModelSpec
from stretto.spec.presets_model import MODELS, model_preset

REFERENCE = ["gpt2", "gpt2-xl", "llama-2-7b", "llama-2-70b", "llama-3.1-405b", "llama-3.2-1b", "mistral-7b"]
REFERENCE += ["qwen2-7b", "qwen3-8b", "tiny", "tiny-tied", "tiny-gpt2", "demo"]


def hugging_face(model: ModelSpec, device: str = "meta") -> torch.nn.Module:
    """transformers' own module of the same sizes; on the meta device its parameters take no memory."""
    import transformers as hf

    if model.family == "gpt2":
        config = hf.GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.max_positions,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_inner=model.intermediate_size,
        )
    else:
        kind = hf.Qwen3Config if model.qk_norm else hf.Qwen2Config if model.qkv_bias else hf.LlamaConfig
        config = kind(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_size,
            tie_word_embeddings=model.tied_embeddings,
        )
    config._attn_implementation = "eager"
    with torch.device(device):
        return hf.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", REFERENCE)
def test_parameters_equal_transformers(name: str) -> None:
    module = hugging_face(MODELS[name])
    assert flops.parameters(MODELS[name]).total == sum(p.numel() for p in module.parameters())


WIDE_HEADS = model_preset("tiny", head_dim=32, qk_norm=True)


@pytest.mark.parametrize("model", [MODELS["tiny"], MODELS["tiny-gpt2"], WIDE_HEADS], ids=["llama", "gpt2", "qwen3"])
def test_flops_equal_torch_counter(model: ModelSpec) -> None:
    """Without the mask, as torch counts, forward FLOPs agree to the last product."""
    length = 32
    counter = FlopCounterMode(display=False)
    module = hugging_face(model, "cpu")
    with counter, torch.no_grad():
        module(torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    expected = flops.forward_flops_per_token(model, length, causal=False) * length
    assert counter.get_total_flops() == expected


def test_published_sizes() -> None:
    billions = {"llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-3-70b": 70.55, "llama-3.1-405b": 405.85}
    billions |= {"llama-3.2-3b": 3.21, "mistral-7b": 7.24, "qwen2-7b": 7.62, "qwen3-8b": 8.19, "gpt2": 0.124}
    for name, size in billions.items():
        assert flops.parameters(MODELS[name]).total / 1e9 == pytest.approx(size, rel=0.005), name


def test_keys_per_query_is_the_mean_over_the_mask() -> None:
    for window in (None, 1, 3, 7, 100):
        model = model_preset("tiny", sliding_window=window)
        brute = sum(min(i + 1, window or 100) for i in range(7)) / 7
        assert flops.keys_per_query(model, 7) == pytest.approx(brute), window


def test_training_is_three_forwards() -> None:
    model = MODELS["demo"]
    assert flops.flops_per_token(model, 128) == 3 * flops.forward_flops_per_token(model, 128)


def test_mfu() -> None:
    model = MODELS["tiny"]
    rate = 1e12 / flops.flops_per_token(model, 64)
    shared = {"sequence_length": 64, "tokens_per_second": rate}
    assert flops.mfu(model, num_devices=2, peak_flops=1e12, **shared) == pytest.approx(0.5)
    assert flops.mfu(model, num_devices=2, peak_flops=0.0, **shared) is None


def test_foreign_model_is_not_guessed() -> None:
    foreign = ModelSpec(family="foreign", module="m:f")
    with pytest.raises(UnsupportedError, match="foreign"):
        flops.parameters(foreign)
    assert flops.mfu(foreign, sequence_length=8, tokens_per_second=1.0, num_devices=1, peak_flops=1.0) is None


def test_layers_that_keep_states() -> None:
    from stretto.models.build import build_model

    for family, heads in (("llama", 2), ("gpt2", 4)):
        model = model_preset(
            "tiny" if family == "llama" else "tiny-gpt2", num_layers=3, num_heads=4, num_kv_heads=heads
        )
        hybrid = replace(model, attention=("linear", "softmax", "delta"))
        with torch.device("meta"):
            module: Any = build_model(hybrid)
        assert flops.parameters(hybrid).total == sum(p.numel() for p in module.parameters())
        # Kept: a third of the softmax products.  Instead: 2 K K of a write, a delta layer's read, and each query.
        states = 2 * model.head_size**2 * ((4 + heads) + (4 + 2 * heads))
        gates = 2 * model.hidden_size * 3 * heads
        products = 4 * 4 * model.head_size * flops.keys_per_query(model, 9)
        expected = flops.forward_flops_per_token(model, 9) - 2 * products + states + gates
        assert flops.forward_flops_per_token(hybrid, 9) == pytest.approx(expected, rel=1e-12)
