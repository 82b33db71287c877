"""Continues a sequence token by token.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from stretto.inference.cache import Cache
from stretto.inference.sampling import Sampler, Sampling
from stretto.models.decoder import Decoder
from stretto.spec.contract import Batch, Place
from stretto.spec.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.spec.contract import Stack

GREEDY = Sampling(temperature=0)
"""Always the likeliest token."""


def generate(
    model: Stack,
    tokens: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: int | None = None,
    cache: bool = True,
) -> Iterator[int]:
    """Yield up to ``max_tokens`` tokens that continue ``tokens``; ``stop`` ends the text and isn't yielded.

    Without ``cache`` (and always for foreign models) every token runs the whole sequence again.
    Raises ConfigError for an empty prompt or a sequence beyond the model's positions.
    """
    if not tokens:
        raise ConfigError("The prompt holds no token; give at least one.")
    check_length(model, len(tokens), max_tokens)
    return run(model, list(tokens), max_tokens, Sampler(sampling), stop=stop, cache=cache)


def check_length(model: Any, prompt: int, max_tokens: int) -> None:
    """Raise ConfigError where prompt and continuation exceed the positions of ``model``."""
    if not isinstance(model, Decoder) or prompt + max_tokens <= model.spec.max_positions:
        return
    most = model.spec.max_positions
    choice = f"max_tokens may be at most {most - prompt}" if prompt < most else "shorten the prompt"
    raise ConfigError(
        f"A prompt of {prompt} tokens and {max_tokens} new ones exceed the model's {most} positions; {choice}."
    )


def run(
    model: Any, tokens: list[int], max_tokens: int, sampler: Sampler, *, stop: int | None, cache: bool
) -> Iterator[int]:
    """Yield the tokens; arguments are checked."""
    if isinstance(model, Decoder) and cache:
        with Cache(model, len(tokens) + max_tokens) as filled:
            yield from choose(lambda new, _: cached_logits(model, filled, new), tokens, max_tokens, sampler, stop=stop)
    else:
        yield from choose(lambda _, whole: logits_of(model, whole), tokens, max_tokens, sampler, stop=stop)


def choose(
    logits: Callable[[list[int], list[int]], Tensor],
    tokens: list[int],
    max_tokens: int,
    sampler: Sampler,
    *,
    stop: int | None,
) -> Iterator[int]:
    """Yield tokens chosen from ``logits(new tokens, all tokens)`` [V]."""
    new = tokens
    for _ in range(max_tokens):
        token = sampler(logits(new, tokens))
        if token == stop:
            return
        yield token
        new = [token]
        tokens = [*tokens, token]


def batch_of(tokens: list[int], start: int, device: torch.device) -> Batch:
    """Return one row of tokens at positions ``start`` onwards, without labels to learn."""
    row = torch.tensor([tokens], device=device)
    positions = torch.arange(start, start + len(tokens), device=device)[None]
    samples = torch.zeros(1, dtype=torch.int64, device=device)
    return Batch(tokens=row, labels=row, positions=positions, documents=None, samples=samples)


def device_of(model: Any) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(iter(model.parameters())).device


@torch.no_grad()
def cached_logits(model: Decoder, cache: Cache, new: list[int]) -> Tensor:
    """Return the logits [V] after ``new``, given what the cache holds."""
    batch = batch_of(new, cache.length, device_of(model))
    context = cache.context(batch.tokens)
    x = model.inputs(batch, context)
    for block in model.blocks:
        x = block(x, context)
    return model.outputs(x[:, -1:], context)[0, -1]


@torch.no_grad()
def logits_of(model: Stack, tokens: list[int]) -> Tensor:
    """Return the logits [V] after ``tokens``, computed from the whole sequence."""
    batch = batch_of(tokens, 0, device_of(model))
    context = model.context(batch, Place(training=False))
    x = model.inputs(batch, context)
    for block in model.blocks:
        x = block(x, context)
    return model.outputs(x, context)[0, -1]
