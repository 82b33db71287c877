"""config.json to ModelSpec and back, and what is refused by name."""

from __future__ import annotations

import dataclasses

import pytest
import transformers

from stretto.spec.errors import ConfigError, UnsupportedError
from stretto.spec.hugging_face import config_from_model, model_from_config
from stretto.spec.model import ModelSpec, RopeScaling

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {"model_type": "llama", **SIZES}
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4}
LLAMA3["original_max_position_embeddings"] = 16

SPECS = [
    ModelSpec(num_kv_heads=2, head_dim=16, norm_eps=1e-5),
    ModelSpec(num_kv_heads=2, head_dim=16, rope_scaling=RopeScaling(original_positions=128), rope_theta=5e5),
    ModelSpec(num_kv_heads=4, head_dim=16, sliding_window=7),
    ModelSpec(num_kv_heads=4, head_dim=24, hidden_size=62),
    ModelSpec(num_kv_heads=2, head_dim=16, qkv_bias=True, tied_embeddings=True),
    ModelSpec(num_kv_heads=2, head_dim=16, qkv_bias=True, sliding_window=9),
    ModelSpec(num_kv_heads=2, head_dim=32, qk_norm=True, sliding_window=9),
    ModelSpec(family="gpt2", intermediate_size=100, qkv_bias=True, dropout=0.1, tied_embeddings=True),
]


@pytest.mark.parametrize("spec", SPECS)
def test_there_and_back(spec):
    assert model_from_config(config_from_model(spec)) == spec


@pytest.mark.parametrize("spec", SPECS)
def test_there_and_back_through_transformers(spec):
    config = transformers.AutoConfig.for_model(**config_from_model(spec))
    assert model_from_config(config.to_dict()) == spec


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config", "GPT2Config"])
def test_defaults_are_those_of_transformers(name):
    config = getattr(transformers, name)()
    full = config.to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("n_embd", "n_layer", "n_head", "resid_pdrop", "embd_pdrop", "attn_pdrop", "num_key_value_heads")
    bare = {key: full[key] for key in sizes if key in full} | {"model_type": full["model_type"]}
    ours, theirs = model_from_config(bare), model_from_config(full)
    if ours.head_dim is None:
        ours = dataclasses.replace(ours, head_dim=theirs.head_dim)
    assert ours == theirs


def test_both_ways_of_writing_rotary_settings():
    old = model_from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = model_from_config({**LLAMA, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}})
    assert old == new
    assert old.rope_theta == 5e5 and old.rope_scaling == RopeScaling(factor=4.0, original_positions=16)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma2"}, "'gemma2' is not .* llama, mistral, qwen2, qwen3, gpt2"),
        ({"model_type": "qwen"}, "did you mean 'qwen"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear' .* 'default' or 'llama3'"),
        ({**LLAMA, "rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({**LLAMA, "attention_bias": True}, "attention_bias = True .* may be False"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias = True"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act = 'gelu' .* 'silu'"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config .* left out"),
        ({**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "Only some layers"),
        ({**GPT2, "attn_pdrop": 0.2}, "attn_pdrop = 0.2: one rate"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({**GPT2, "activation_function": "relu"}, "activation_function = 'relu'"),
    ],
)
def test_unsupported_settings_are_named(config, words):
    with pytest.raises(UnsupportedError, match=words):
        model_from_config(config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**LLAMA, "hidden_size": "wide"}, "model.hidden_size must be a whole number, not 'wide'"),
        ({**LLAMA, "num_hidden_layers": 2.5}, "model.num_layers must be a whole number, not 2.5"),
        ({**LLAMA, "vocab_size": True}, "model.vocab_size must be a whole number, not True"),
        ({**LLAMA, "num_key_value_heads": [4]}, "model.num_kv_heads must be a whole number"),
        ({**LLAMA, "tie_word_embeddings": "yes"}, "model.tied_embeddings must be true or false, not 'yes'"),
        ({**LLAMA, "max_position_embeddings": None}, "model.max_positions must be a whole number, not None"),
        ({**LLAMA, "rms_norm_eps": "small"}, "a value that can't be read .*small"),
        ({**LLAMA, "rope_scaling": 3}, "a value that can't be read"),
        ({**LLAMA, "rope_scaling": {**LLAMA3, "factor": [8]}}, "a value that can't be read"),
        ({**GPT2, "n_embd": "32"}, "model.hidden_size must be a whole number"),
        ({**GPT2, "resid_pdrop": "x"}, "a value that can't be read"),
    ],
)
def test_values_of_the_wrong_type_are_named(config, words):
    with pytest.raises(ConfigError, match=words):
        model_from_config(config)


def test_a_rotary_base_of_zero_stays_what_it_is():
    assert model_from_config({**LLAMA, "rope_theta": 0}).rope_theta == 0.0


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="no 'num_hidden_layers'"):
        model_from_config({key: value for key, value in LLAMA.items() if key != "num_hidden_layers"})
    with pytest.raises(ConfigError, match="needs 'factor'"):
        model_from_config({**LLAMA, "rope_scaling": {"rope_type": "llama3"}})


def test_specs_that_no_architecture_holds():
    with pytest.raises(UnsupportedError, match="both qkv_bias and qk_norm"):
        config_from_model(ModelSpec(qkv_bias=True, qk_norm=True))
    with pytest.raises(UnsupportedError, match="foreign"):
        config_from_model(ModelSpec(family="foreign"))
