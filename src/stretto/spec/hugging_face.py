"""Hugging Face's config.json to ModelSpec and back.

A setting that changes the arithmetic and that our models lack is refused by name: a model that
loads but computes something else is worse than one that doesn't load.  Both ways of writing rotary
settings are read: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters`` (transformers 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stretto.spec.errors import ConfigError, StrettoError, UnsupportedError, nearest
from stretto.spec.fields import accept, is_table, keys_of, strip_none
from stretto.spec.model import ModelSpec, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""``model_type`` of config.json -> class of transformers, for each architecture that is read and written."""

LLAMA_NEEDS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
"""Settings of the Llama family -> the values that our model implements."""

GPT2_NEEDS: Mapping[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
"""The same for GPT-2."""

LLAMA_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "num_key_value_heads": 8,
    },
    "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "max_window_layers": 28, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "max_window_layers": 28,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
"""What transformers assumes for a key that config.json leaves out."""


def model_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """Return the model that a config.json describes.

    Raises UnsupportedError for an architecture or a setting that our models lack, ConfigError for a
    missing key and for a value of the wrong type.
    """
    architecture = config.get("model_type")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"model_type {architecture!r} is not an architecture that Stretto ships; it may be "
            f"{', '.join(ARCHITECTURES)}{nearest(str(architecture), ARCHITECTURES)} "
            f"(others can be wrapped with family = 'foreign')."
        )
    try:
        if architecture == "gpt2":
            found = gpt2_from_config(config)
        else:
            found = llama_from_config(architecture, {**LLAMA_DEFAULTS[architecture], **config})
    except StrettoError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"config.json of a {architecture} model has a value that can't be read ({error}).") from None
    for key, annotation in keys_of(ModelSpec).items():
        (kind, optional), value = strip_none(annotation), getattr(found, key)
        if not is_table(kind) and not (optional and value is None):
            accept(value, annotation, key=f"model.{key}", place="config.json")
    return found


def llama_from_config(architecture: str, config: Mapping[str, Any]) -> ModelSpec:
    """Return the Llama-family model; absent keys already hold transformers' defaults."""
    check_settings(config, LLAMA_NEEDS)
    theta, scaling = rotary_settings(config)
    return ModelSpec(
        family="llama",
        vocab_size=require(config, "vocab_size"),
        hidden_size=require(config, "hidden_size"),
        intermediate_size=require(config, "intermediate_size"),
        num_layers=require(config, "num_hidden_layers"),
        num_heads=require(config, "num_attention_heads"),
        num_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        max_positions=config["max_position_embeddings"],
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=config.get("tie_word_embeddings") or False,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        sliding_window=window_of(architecture, config),
        initial_std=float(config.get("initializer_range", 0.02)),
    )


def gpt2_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """Return the GPT-2 model."""
    check_settings({"activation_function": "gelu_new", "scale_attn_weights": True, **config}, GPT2_NEEDS)
    rates = {key: float(config.get(key) or 0.0) for key in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(set(rates.values())) > 1:
        said = ", ".join(f"{key} = {rate}" for key, rate in rates.items())
        raise UnsupportedError(f"{said}: one rate is used for all dropout; make the three equal.")
    width = require(config, "n_embd")
    return ModelSpec(
        family="gpt2",
        vocab_size=require(config, "vocab_size"),
        hidden_size=width,
        intermediate_size=config.get("n_inner") or 4 * width,
        num_layers=require(config, "n_layer"),
        num_heads=require(config, "n_head"),
        max_positions=config.get("n_positions", 1024),
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        tied_embeddings=config.get("tie_word_embeddings", True) or False,
        qkv_bias=True,
        dropout=rates["resid_pdrop"],
        initial_std=float(config.get("initializer_range", 0.02)),
    )


def require(config: Mapping[str, Any], key: str) -> Any:
    """Return ``config[key]``; ConfigError where it is missing."""
    if config.get(key) is None:
        raise ConfigError(f"config.json of a {config['model_type']} model has no {key!r}{nearest(key, config) or '.'}")
    return config[key]


def check_settings(config: Mapping[str, Any], needs: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise UnsupportedError for the first setting whose value our models don't implement."""
    for key, allowed in needs.items():
        if key in config and config[key] not in allowed:
            choices = " or ".join(repr(value) for value in allowed if value is not None) or "left out"
            raise UnsupportedError(
                f"{key} = {config[key]!r} of this {config['model_type']} model is not implemented; it may be {choices}."
            )


def window_of(architecture: str, config: Mapping[str, Any]) -> int | None:
    """Return the sliding window that all layers share, or None for full attention."""
    if architecture == "llama":
        others = sorted({*(config.get("layer_types") or ())} - {"full_attention"})
        if others:
            raise UnsupportedError(f"layer_types {others} of a llama model are not implemented; full_attention is.")
        return None
    window = config.get("sliding_window")
    if architecture == "mistral":
        return window
    if not config.get("use_sliding_window", False) or window is None:
        return None
    layers, first = config["num_hidden_layers"], config["max_window_layers"]
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if len(set(kinds)) > 1:
        raise UnsupportedError(
            "Only some layers of this model have a sliding window (layer_types / max_window_layers); "
            "all layers or none may have one."
        )
    return window if kinds[0] == "sliding_attention" else None


def rotary_settings(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return rotary base and scaling from either way of writing them."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    said = (settings.pop("rope_theta", None), config.get("rope_theta"), 10000.0)
    theta = float(next(value for value in said if value is not None))
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if settings.get("partial_rotary_factor", 1) != 1:
        raise UnsupportedError(
            f"partial_rotary_factor = {settings['partial_rotary_factor']} is not implemented; it may be 1."
        )
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedError(f"rope_type {kind!r} is not implemented; it may be 'default' or 'llama3'.")
    original = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
    try:
        return theta, RopeScaling(
            factor=float(settings["factor"]),
            low_frequency_factor=float(settings["low_freq_factor"]),
            high_frequency_factor=float(settings["high_freq_factor"]),
            original_positions=int(original),
        )
    except KeyError as error:
        raise ConfigError(f"rope_type 'llama3' needs {error.args[0]!r} beside it.") from None


def architecture_of(spec: ModelSpec) -> str:
    """Return the ``model_type`` that can hold ``spec``; UnsupportedError where none can."""
    if spec.family == "gpt2":
        return "gpt2"
    if spec.family == "foreign":
        raise UnsupportedError("A foreign model has no config.json of ours; save it with its own library.")
    if spec.family == "video":
        raise UnsupportedError("No Hugging Face architecture is a model of family video; keep its checkpoints.")
    if spec.qkv_bias and spec.qk_norm:
        raise UnsupportedError("No Hugging Face architecture has both qkv_bias and qk_norm; switch one off.")
    if spec.qk_norm:
        return "qwen3"
    if spec.qkv_bias:
        return "qwen2"
    # transformers' LlamaConfig insists on hidden_size being a multiple of the heads; Mistral is otherwise the same.
    return "mistral" if spec.sliding_window is not None or spec.hidden_size % spec.num_heads else "llama"


def config_from_model(spec: ModelSpec) -> dict[str, Any]:
    """Return the config.json of ``spec``, in a form that transformers 4 and 5 both read.

    Dropout is written for GPT-2 only: elsewhere it belongs to the training, not to the model.
    """
    architecture = architecture_of(spec)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tied_embeddings,
        "initializer_range": spec.initial_std,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return config | (gpt2_settings(spec) if architecture == "gpt2" else llama_settings(spec, architecture))


def gpt2_settings(spec: ModelSpec) -> dict[str, Any]:
    """Return what only GPT-2 writes."""
    return {
        "n_embd": spec.hidden_size,
        "n_inner": spec.intermediate_size,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_positions": spec.max_positions,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": "gelu_new",
        "resid_pdrop": spec.dropout,
        "embd_pdrop": spec.dropout,
        "attn_pdrop": spec.dropout,
    }


def llama_settings(spec: ModelSpec, architecture: str) -> dict[str, Any]:
    """Return what only the Llama family writes."""
    settings: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_size,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    if spec.rope_scaling is not None:
        settings["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_frequency_factor,
            "high_freq_factor": spec.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_positions,
        }
    if architecture != "llama":
        settings["sliding_window"] = spec.sliding_window
    if architecture in ("qwen2", "qwen3"):
        settings |= {"use_sliding_window": spec.sliding_window is not None, "max_window_layers": 0}
    return settings
