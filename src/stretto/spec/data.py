"""What is trained on, and how text becomes token sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["auto", "text", "jsonl", "parquet"]
Packing = Literal["stream", "whole"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """One corpus of a blend."""

    path: str
    """File or folder."""
    weight: float = 1.0
    """Share of samples drawn from it, relative to the other sources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """The corpus, its tokenizer and how documents are packed into sequences."""

    path: str | None = None
    """File or folder; instead of ``sources``.  The value ``stdlib`` is Python's own standard library.  Of family
    = video .npy or .safetensors files of clips [clips, frames, patches, channels]; ``waves`` are drawn clips."""
    sources: tuple[SourceSpec, ...] = ()
    """Several corpora and their weights; instead of ``path``."""
    tokenizer: str = "bytes"
    """``bytes``, or a Hugging Face tokenizer.json (or the folder that holds one)."""
    format: Format = "auto"
    """How files are read; auto: by their suffix (.jsonl, .parquet, all else is text)."""
    suffixes: tuple[str, ...] = ()
    """In folders, only files with these suffixes (``.py``); empty: all that can be read."""
    text_field: str = "text"
    """Field of a JSON line or Parquet row that holds the text."""
    messages_field: str = "messages"
    """Field that holds a chat record: a list of {role, content}."""
    train_on: tuple[str, ...] = ("assistant",)
    """Roles of a chat record whose tokens count in the loss."""
    packing: Packing = "stream"
    """``stream`` cuts the concatenated documents every sequence_length tokens; ``whole`` never cuts
    a document that fits, and pads."""
    isolate_documents: bool = True
    """Mask attention between documents of one sequence and restart positions."""
    validation_fraction: float = 0.0
    """Share of documents held out for evaluation."""
    cache: str | None = None
    """Folder for token shards; None: ``tokens`` in the run's directory."""
