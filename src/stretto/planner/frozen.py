"""What of a model trains where ``training.freeze`` names parameters that don't.

    inputs │ block 0 │ block 1 │ block 2 │ outputs      freeze = ["inputs.*", "blocks.0.*", "blocks.2.*.q.weight"]
    ───────────────── │ ─────────────────────────       before the first part that trains nobody needs a gradient:
    no backward, keeps │ gradients of inputs, and        no backward, nothing is kept for one; behind it only what
    nothing            │ of the weights that train       trains has gradients, moments and a product for them

Names and sizes are those of the models' own parameters (``models/llama.py``, ``gpt.py``), which a test holds them to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from stretto.spec.errors import ConfigError, UnsupportedError, nearest
from stretto.spec.model import ModelSpec

Named = tuple[str, int]
"""A parameter's name and its number of entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Numbers of parameters that train, and from which layer on there is a backward pass."""

    embedding: int
    matrices: tuple[int, ...]
    """Of each layer, weights that multiply."""
    vectors: tuple[int, ...]
    """Of each layer, norms and biases."""
    final_norm: int
    head: int
    """Of a tied head, those of the embedding."""
    first: int
    """First layer with a backward pass; the number of layers where only the head has one."""


@lru_cache(maxsize=64)
def trained(model: ModelSpec, patterns: tuple[str, ...]) -> Trained:
    """What trains.  ConfigError for a pattern that names nothing, and where nothing is left.

    >>> from stretto.spec.presets_model import model_preset
    >>> trained(model_preset("tiny"), ("inputs.*", "blocks.0.*")).first
    1
    """
    if (model.keeps_states or model.video is not None) and patterns:
        which = "of family video" if model.video is not None else "with linear or delta layers"
        raise UnsupportedError(f"What training.freeze leaves of a model {which} isn't estimated yet; leave it out.")
    everything = [*_inputs(model), *(one for i in range(model.num_layers) for one in block(model, i)), *_outputs(model)]
    names = [name for name, _ in everything]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"training.freeze: no parameter is named {pattern!r}{nearest(pattern, names) or '.'}")

    def count(some: Iterable[Named]) -> int:
        return sum(size for name, size in some if not any(fnmatchcase(name, pattern) for pattern in patterns))

    layers = range(model.num_layers)
    matrices = tuple(count(one for one in block(model, i) if multiplies(one[0])) for i in layers)
    vectors = tuple(count(one for one in block(model, i) if not multiplies(one[0])) for i in layers)
    embedding, head_and_norm = count(_inputs(model)), dict(_outputs(model))
    found = Trained(
        embedding=embedding,
        matrices=matrices,
        vectors=vectors,
        final_norm=count([one for one in head_and_norm.items() if ".norm." in one[0]]),
        head=embedding if model.tied_embeddings else count([("outputs.head.weight", _head(model))]),
        first=0 if embedding else next((i for i in layers if matrices[i] + vectors[i]), model.num_layers),
    )
    if not any((embedding, *matrices, *vectors, found.final_norm, found.head)):
        raise ConfigError(f"training.freeze = {list(patterns)} leaves nothing to train; freeze fewer parameters.")
    return found


def multiplies(name: str) -> bool:
    """Whether a parameter of a block is a weight that multiplies."""
    return name.endswith(".weight") and "norm" not in name


def block(model: ModelSpec, layer: int) -> Iterator[Named]:
    """The parameters of a block."""
    gpt2, width, inner = model.family == "gpt2", model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_size, model.kv_heads * model.head_size
    ups = ("up",) if gpt2 else ("gate", "up")
    products = (
        *(("attention." + name, width, rows) for name, rows in (("q", queries), ("k", keys), ("v", keys))),
        ("attention.o", queries, width),
        *(("feed_forward." + name, width, inner) for name in ups),
        ("feed_forward.down", inner, width),
    )
    for name, columns, rows in products:
        yield f"blocks.{layer}.{name}.weight", columns * rows
        if gpt2 or (model.qkv_bias and name[-1] in "qkv" and name.startswith("attention")):
            yield f"blocks.{layer}.{name}.bias", rows
    for name in ("attention_norm", "feed_forward_norm"):
        yield f"blocks.{layer}.{name}.weight", width
        if gpt2:
            yield f"blocks.{layer}.{name}.bias", width
    if model.qk_norm:
        yield f"blocks.{layer}.attention.q_norm.weight", model.head_size
        yield f"blocks.{layer}.attention.k_norm.weight", model.head_size


def _inputs(model: ModelSpec) -> list[Named]:
    """The embeddings."""
    positions = [("inputs.positions.weight", model.max_positions * model.hidden_size)]
    return [("inputs.tokens.weight", _head(model)), *(positions if model.family == "gpt2" else [])]


def _outputs(model: ModelSpec) -> list[Named]:
    """Norm and head; a tied head goes by the embedding's name."""
    found = [("outputs.norm.weight", model.hidden_size)]
    if model.family == "gpt2":
        found.append(("outputs.norm.bias", model.hidden_size))
    return found if model.tied_embeddings else [*found, ("outputs.head.weight", _head(model))]


def _head(model: ModelSpec) -> int:
    return model.vocab_size * model.hidden_size
