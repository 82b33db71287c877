"""Text from a model on disk: where the model comes from, and text in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from stretto.checkpoint.safetensors import HuggingFaceReader
from stretto.checkpoint.weights import Stored, find_stored, read_weights
from stretto.data import ByteTokenizer, load_tokenizer
from stretto.inference.generate import generate
from stretto.inference.sampling import Sampling
from stretto.models.build import build_decoder
from stretto.spec.errors import CheckpointError, DataError, UnsupportedError
from stretto.spec.resolve import read_model
from stretto.spec.sharding import Sharding

if TYPE_CHECKING:
    from torch import Tensor

    from stretto.models.decoder import Decoder
    from stretto.spec.contract import Stack, Tokenizer
    from stretto.spec.model import ModelSpec

MAX_BYTE_VOCABULARY = 512
"""A model with a larger vocabulary wasn't trained on bytes."""

LONGEST_CHARACTER = 4
"""Most tokens that one character takes: a byte of UTF-8 each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that can continue text."""

    model: Stack
    """The whole model on one device, in evaluation mode."""
    tokenizer: Tokenizer
    """What turns text into its tokens."""


def load_source(source: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Source:
    """Load the model of a run's directory, a checkpoint, or a Hugging Face directory, with its tokenizer.

    ``dtype``: None keeps the stored one.  Raises CheckpointError where ``source`` is none of these or is
    damaged, ConfigError and DataError where its configuration or tokenizer can't be used.
    """
    stored = find_stored(source)
    if stored is not None:
        return load_stored(stored, dtype=dtype, device=device)
    directory = Path(source)
    spec = read_model(directory)
    with HuggingFaceReader(directory, spec) as reader:
        model = fill_decoder(spec, lambda s: reader.read(s).to(device=device, dtype=dtype))
    return Source(model=cast("Stack", model), tokenizer=tokenizer_of(directory, spec))


def load_stored(stored: Stored, *, dtype: torch.dtype | None, device: str) -> Source:
    """Load a checkpoint; the tokenizer must be the one that it was trained with."""
    if stored.model.family == "video":
        raise UnsupportedError(f"{stored.path} holds a model of family video, which writes no text.")
    tokenizer = load_tokenizer(stored.tokenizer)
    if tokenizer.fingerprint != stored.fingerprint:
        raise CheckpointError(
            f"{stored.path} was trained with another tokenizer than {stored.tokenizer} is now; put the old one back."
        )
    weights = read_weights(stored, dtype=dtype)
    model = fill_decoder(stored.model, lambda s: weights[s.name].to(device))
    return Source(model=cast("Stack", model), tokenizer=tokenizer)


def tokenizer_of(directory: Path, spec: ModelSpec) -> Tokenizer:
    """Return the tokenizer that lies beside the weights."""
    if (directory / "tokenizer.json").is_file():
        return load_tokenizer(str(directory / "tokenizer.json"))
    if ByteTokenizer.vocab_size <= spec.vocab_size <= MAX_BYTE_VOCABULARY:
        return load_tokenizer("bytes")
    raise DataError(
        f"{directory} has no tokenizer.json, and a vocabulary of {spec.vocab_size} isn't one of bytes; "
        f"copy the tokenizer.json that the model was trained with into it."
    )


def fill_decoder(spec: ModelSpec, read: Callable[[Sharding], Tensor]) -> Decoder:
    """Return the model of ``spec`` with the weights that ``read`` gives."""
    with torch.device("meta"):
        model = build_decoder(spec)
    for name, parameter in list(model.named_parameters()):
        assign(model, name, torch.nn.Parameter(read(Sharding.whole(name, parameter.shape)), requires_grad=False))
    for copy, original in model.tied.items():
        assign(model, copy, cast("torch.nn.Parameter", model.get_parameter(original)))
    return model.eval()


def assign(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Put ``parameter`` in the place called ``name``."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


def generate_text(
    source: Source | str | Path, prompt: str, *, max_tokens: int = 200, sampling: Sampling | None = None
) -> Iterator[str]:
    """Yield the continuation of ``prompt`` piece by piece as it is generated, up to the end of the text.

    ``source``: what ``load_source`` takes or returns.  An empty prompt starts a new document.
    """
    if not isinstance(source, Source):
        source = load_source(source)
    tokenizer = source.tokenizer
    tokens = list(tokenizer.encode(prompt)) or [tokenizer.end_of_text]
    sampling = sampling or Sampling()
    stream = generate(source.model, tokens, max_tokens=max_tokens, sampling=sampling, stop=tokenizer.end_of_text)
    return pieces(stream, tokenizer, before=tokens[-1])


def pieces(tokens: Iterator[int], tokenizer: Tokenizer, *, before: int) -> Iterator[str]:
    """Yield the text of ``tokens`` as soon as it is certain: no half characters, and spaces in place.

    ``before``: the token in front; some tokenizers drop the space before the first word of a text,
    so one token is always kept as context.
    """
    pending = [before]
    said = tokenizer.decode(pending)
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        # A character may need several tokens; until they are there it decodes to the replacement mark.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) <= LONGEST_CHARACTER:
            continue
        yield text.removeprefix(said)
        pending = pending[-1:]
        said = tokenizer.decode(pending)
    if len(pending) > 1:
        yield tokenizer.decode(pending).removeprefix(said)
