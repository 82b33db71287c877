"""Text from a model on disk: where the model comes from, and text in and out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from stretto.checkpoint.safetensors import HuggingFaceReader
from stretto.data import ByteTokenizer, load_tokenizer
from stretto.inference.generate import generate
from stretto.inference.sampling import Sampling
from stretto.models.build import build_decoder
from stretto.spec.errors import ConfigError, DataError
from stretto.spec.hugging_face import model_from_config
from stretto.spec.sharding import Sharding

if TYPE_CHECKING:
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
    """Load a Hugging Face directory with its tokenizer.json, or, without one, as a model of bytes.

    ``dtype``: None keeps the stored one.  Raises ConfigError where ``source`` is no such directory,
    DataError where its tokenizer is missing.
    """
    directory = Path(source)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory} has no config.json; give a Hugging Face directory.")
    try:
        spec = model_from_config(json.loads((directory / "config.json").read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{directory / 'config.json'} is not JSON: {error}.") from None
    tokenizer = tokenizer_of(directory, spec)
    model = load_decoder(directory, spec, dtype=dtype, device=device)
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


def load_decoder(directory: Path, spec: ModelSpec, *, dtype: torch.dtype | None, device: str) -> Decoder:
    """Return the model of a Hugging Face directory with its weights."""
    with torch.device("meta"):
        model = build_decoder(spec)
    with HuggingFaceReader(directory, spec) as reader:
        for name, parameter in list(model.named_parameters()):
            tensor = reader.read(Sharding.whole(name, parameter.shape)).to(device=device, dtype=dtype)
            assign(model, name, torch.nn.Parameter(tensor, requires_grad=False))
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
