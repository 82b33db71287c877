"""The checks that look at one section alone: sizes, ranges, choices, files that must exist."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from stretto.spec import capabilities
from stretto.spec.data import DataSpec
from stretto.spec.drill import faults_of
from stretto.spec.errors import ConfigError, nearest
from stretto.spec.model import ModelSpec
from stretto.spec.run import RunSpec
from stretto.spec.traced_steps import traced_steps
from stretto.spec.training import TrainingSpec

LARGEST = {"num_layers": 2**16, "num_heads": 2**16, "hidden_size": 2**31, "intermediate_size": 2**31}
LARGEST |= {"vocab_size": 2**31, "max_positions": 2**40}
"""What the sizes of a model may be at most."""
TEXT_ONLY: tuple[str, ...] = ("path", "vocab_size", "num_kv_heads", "head_dim", "max_positions", "rope_theta")
TEXT_ONLY += ("rope_scaling", "tied_embeddings", "qkv_bias", "sliding_window", "qk_norm", "dropout", "attention")
TEXT_ONLY += ("weights",)
"""Keys of [model] that a model of clips doesn't read."""
LARGEST_BATCH = 2**40
"""Sequences of a step."""


def one_of(key: str, value: Any, choices: Collection[Any]) -> None:
    """ConfigError with the nearest choice where ``value`` is none of ``choices``."""
    if value not in choices:
        names = [choice for choice in choices if isinstance(choice, str)]
        near = nearest(value, names) if isinstance(value, str) else ""
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(f"{key} = {value!r} is none of {listed}{near or '.'}")


def check_settings(run: RunSpec) -> None:
    """[run] and [checkpoint], and that no number anywhere is infinite or NaN."""
    for section in dataclasses.fields(run):
        _finite(section.name, getattr(run, section.name))
    settings, checkpoint = run.run, run.checkpoint
    one_of("run.device", settings.device, capabilities.DEVICES)
    if not settings.dir:
        raise ConfigError('run.dir is empty; name a folder, for example "runs/first".')
    if Path(settings.dir).is_file():
        raise ConfigError(f"run.dir = {settings.dir!r} is a file; name a folder.")
    if not 0 <= settings.seed < 2**63:
        raise ConfigError(f"run.seed = {settings.seed} must be at least 0 and below 2^63.")
    _positive("run", settings, ("silent_seconds", "hang_seconds"))
    _at_least_zero("run", settings, ("max_restarts",))
    traced_steps(settings.trace)
    for fault in faults_of(settings.drill):
        if fault.rank >= run.plan.num_ranks:
            raise ConfigError(
                f"run.drill names rank {fault.rank}, but the plan has {run.plan.num_ranks} ranks, from 0."
            )
        if fault.step is not None and not 1 <= fault.step <= run.training.steps:
            raise ConfigError(f"run.drill names step {fault.step}, but training.steps = {run.training.steps}, from 1.")
    _at_least_zero("checkpoint", checkpoint, ("every", "keep"))
    resume = checkpoint.resume
    if resume not in ("auto", "never") and not (resume and Path(resume).exists()):
        raise ConfigError(
            f"checkpoint.resume = {checkpoint.resume!r} doesn't exist; write the path of a checkpoint, "
            '"auto" for the newest good one of this run, or "never".'
        )


def check_model(model: ModelSpec) -> None:
    """Sizes that are positive and fit each other, and nothing that the family would ignore."""
    one_of("model.family", model.family, capabilities.FAMILIES)
    if model.family == "foreign":
        _foreign(model)
        return
    if model.module is not None:
        raise ConfigError(
            f'model.module = {model.module!r} is read with model.family = "foreign" only, not with '
            f"{model.family!r}; set that family, or leave it out."
        )
    check_shape(model)
    _attention(model)
    _positive(
        "model",
        model,
        ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "kv_heads", "max_positions"),
    )
    for key, most in LARGEST.items():
        if getattr(model, key) > most:
            raise ConfigError(f"model.{key} = {getattr(model, key)} is too large; it may be up to {most:,}.")
    _positive("model", model, ("norm_eps", "rope_theta"))
    if model.head_dim is not None and model.head_dim < 1:
        raise ConfigError(f"model.head_dim = {model.head_dim} must be above 0, or be left out.")
    _at_least_zero("model", model, ("initial_std",))
    _fraction("model.dropout", model.dropout)
    if model.head_dim is None and model.hidden_size % model.num_heads:
        fitting = [n for n in range(1, model.num_heads + 8) if model.hidden_size % n == 0][-3:]
        raise ConfigError(
            f"model.hidden_size = {model.hidden_size} can't be divided among {model.num_heads} heads; "
            f"take {' or '.join(map(str, fitting))} heads, or write model.head_dim."
        )
    if model.num_heads % model.kv_heads:
        fitting = [n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0]
        raise ConfigError(
            f"{model.num_heads} heads can't share {model.kv_heads} key/value heads evenly; "
            f"model.num_kv_heads may be {', '.join(map(str, fitting))}."
        )
    if model.sliding_window is not None and model.sliding_window < 1:
        raise ConfigError(f"model.sliding_window = {model.sliding_window} must be at least 1, or be left out.")
    _FAMILIES[model.family](model)
    if model.weights != "random" and not (model.weights and Path(model.weights).is_dir()):
        raise ConfigError(
            f'model.weights = {model.weights!r} is no folder; write "random" or a Hugging Face directory '
            "with safetensors."
        )


def check_training(training: TrainingSpec) -> None:
    """Steps, sizes, rates and the learning-rate schedule."""
    _positive("training", training, ("steps", "global_batch_size", "sequence_length", "eval_steps", "eps"))
    if training.global_batch_size > LARGEST_BATCH:
        raise ConfigError(
            f"training.global_batch_size = {training.global_batch_size} is too large; it may be up to "
            f"{LARGEST_BATCH:,} sequences."
        )
    one_of("training.dtype", training.dtype, capabilities.DTYPES)
    one_of("training.schedule", training.schedule, capabilities.RATE_SCHEDULES)
    zero_or_more = ("learning_rate", "min_learning_rate", "warmup_steps", "decay_steps", "weight_decay", "clip_norm")
    _at_least_zero("training", training, (*zero_or_more, "eval_every"))
    if "" in training.freeze:
        raise ConfigError('training.freeze has an empty pattern; write names such as "inputs.*" or "blocks.0.*".')
    for key in ("beta1", "beta2", "momentum"):
        _fraction(f"training.{key}", getattr(training, key))
    if training.min_learning_rate > training.learning_rate:
        raise ConfigError(
            f"training.min_learning_rate = {training.min_learning_rate:g} is above training.learning_rate = "
            f"{training.learning_rate:g}; the schedule goes down to it."
        )
    if training.warmup_steps > training.steps:
        raise ConfigError(
            f"training.warmup_steps = {training.warmup_steps} is longer than the run's {training.steps} steps."
        )
    if training.schedule == "wsd" and training.warmup_steps + training.decay_steps > training.steps:
        raise ConfigError(
            f"training.warmup_steps = {training.warmup_steps} and decay_steps = {training.decay_steps} are together "
            f"longer than the run's {training.steps} steps."
        )


def check_data(run: RunSpec) -> None:
    """A corpus that exists, and a tokenizer that exists and fits the vocabulary."""
    data = run.data
    if data.path is None and not data.sources:
        raise ConfigError(
            "There is no corpus: write data.path (a file or folder), [[data.sources]] for a blend, or "
            f'data.path = "{capabilities.EMBEDDED_CORPUS}" for Python\'s own standard library.'
        )
    if data.path is not None and data.sources:
        raise ConfigError("data.path and data.sources are both written; a corpus is one or the other.")
    for path in _paths(data):
        if not path:
            raise ConfigError(
                f'The path of a corpus is empty; name a file or folder, or "{capabilities.EMBEDDED_CORPUS}".'
            )
        if path != capabilities.EMBEDDED_CORPUS and not Path(path).expanduser().exists():
            raise ConfigError(
                f"The corpus {path!r} doesn't exist (paths are relative to the working directory, {Path.cwd()}); "
                f'name a file or folder, or "{capabilities.EMBEDDED_CORPUS}".'
            )
    check_held_out(run)
    _tokenizer(run)


def check_held_out(run: RunSpec) -> None:
    """Weights of the sources, and what is held out of them."""
    data = run.data
    for index, source in enumerate(data.sources):
        _positive(f"data.sources[{index}]", source, ("weight",))
    _fraction("data.validation_fraction", data.validation_fraction)
    if run.training.eval_every and not data.validation_fraction:
        raise ConfigError(
            f"training.eval_every = {run.training.eval_every} evaluates on what is held out, but "
            "data.validation_fraction = 0 holds none out; set it, for example to 0.01, or eval_every = 0."
        )


def _tokenizer(run: RunSpec) -> None:
    name = run.data.tokenizer
    if name == capabilities.BYTES_TOKENIZER:
        if run.model.family != "foreign" and run.model.vocab_size < capabilities.BYTES_VOCABULARY:
            raise ConfigError(
                f"The bytes tokenizer has {capabilities.BYTES_VOCABULARY} ids (256 bytes and end of text), but "
                f"model.vocab_size = {run.model.vocab_size}; set at least {capabilities.BYTES_VOCABULARY}."
            )
    elif not name or not Path(name).expanduser().exists():
        near = nearest(name, [capabilities.BYTES_TOKENIZER])
        raise ConfigError(
            f'The tokenizer {name!r} doesn\'t exist; write "{capabilities.BYTES_TOKENIZER}" or a Hugging Face '
            f"tokenizer.json (or the folder that holds one){near or '.'}"
        )


def _paths(data: DataSpec) -> list[str]:
    return [data.path] if data.path is not None else [source.path for source in data.sources]


def _foreign(model: ModelSpec) -> None:
    if model.attention != ModelSpec().attention:
        raise ConfigError("model.attention has no meaning in a foreign model, whose layers are its own; leave it out.")
    if not model.module or not all(model.module.rpartition(":")[::2]):
        raise ConfigError(
            'model.family = "foreign" needs model.module = "package.module:function" or "file.py:function" that '
            f"returns the model as a Stack, not {model.module!r}."
        )


def _attention(model: ModelSpec) -> None:
    """Kinds of layers that there are, and nothing that none of them reads."""
    if not model.attention:
        raise ConfigError('model.attention is empty; write a kind of layer, for example ["linear", "softmax"].')
    for index, kind in enumerate(model.attention):
        one_of(f"model.attention[{index}]", kind, capabilities.ATTENTION)
    if "softmax" in model.attention:
        return
    for key in ("sliding_window", "rope_scaling", "qk_norm"):
        if getattr(model, key):
            raise ConfigError(
                f"model.{key} is read by softmax layers only, and model.attention has none; leave it out, or put "
                '"softmax" into model.attention.'
            )


def _llama(model: ModelSpec) -> None:
    if model.head_size % 2:
        raise ConfigError(f"A head of {model.head_size} can't be rotated in pairs; model.head_dim must be even.")
    scaling = model.rope_scaling
    if scaling is not None:
        _positive("model.rope_scaling", scaling, tuple(field.name for field in dataclasses.fields(scaling)))
        if scaling.high_frequency_factor <= scaling.low_frequency_factor:
            raise ConfigError("model.rope_scaling.high_frequency_factor must be above low_frequency_factor.")


def _gpt2(model: ModelSpec) -> None:
    """GPT-2 has one form; a key that it would ignore must not look as if it did something."""
    if model.kv_heads != model.num_heads:
        raise ConfigError(
            f"gpt2 has as many key/value heads as heads ({model.num_heads}); leave out model.num_kv_heads."
        )
    if model.head_size * model.num_heads != model.hidden_size:
        raise ConfigError("gpt2's heads together are as wide as model.hidden_size; leave out model.head_dim.")
    for key in ("rope_scaling", "sliding_window", "qk_norm"):
        if getattr(model, key):
            raise ConfigError(f'model.{key} has no meaning in gpt2; leave it out, or take model.family = "llama".')


def _video(model: ModelSpec) -> None:
    """Nothing that belongs to text alone."""
    for key in TEXT_ONLY:
        if getattr(model, key) != getattr(ModelSpec(), key):
            raise ConfigError(f"model.{key} has no meaning in family video; leave it out.")


_FAMILIES = {"llama": _llama, "gpt2": _gpt2, "video": _video}


def check_shape(model: ModelSpec) -> None:
    """That clips have a shape where the family trains on clips, and only there."""
    shape = model.video
    if (shape is None) == (model.family == "video"):
        raise ConfigError(
            'model.family = "video" needs [model.video] with frames, patches and channels of a clip.'
            if shape is None
            else f'[model.video] is read with model.family = "video" only, not with {model.family!r}; leave it out.'
        )
    if shape is not None:
        _positive("model.video", shape, ("frames", "patches", "channels"))


def _finite(section: str, spec: Any) -> None:
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{section}.{field.name} = {value} must be a finite number.")
        for place, part in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if dataclasses.is_dataclass(part):
                _finite(f"{section}.{field.name}" + ("" if place is None else f"[{place}]"), part)


def _positive(section: str, spec: Any, keys: Iterable[str]) -> None:
    for key in keys:
        if getattr(spec, key) <= 0:
            name = "num_kv_heads" if key == "kv_heads" else key
            raise ConfigError(f"{section}.{name} = {getattr(spec, key)} must be above 0.")


def _at_least_zero(section: str, spec: Any, keys: Iterable[str]) -> None:
    for key in keys:
        if getattr(spec, key) < 0:
            raise ConfigError(f"{section}.{key} = {getattr(spec, key)} must not be negative.")


def _fraction(key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{key} = {value} must be at least 0 and below 1.")
