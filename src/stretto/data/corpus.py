"""A prepared corpus: token shards, how they are split and packed, and ``prepare``, which makes it.

DataSpec ──► sources ──► token shards (cached) ──► split ──► packing (cached) ──► Corpus ──► Loader
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stretto.data.cache import kept
from stretto.data.packing import Packing, Rows, Stream, Whole, fill, pack_stream, pack_whole
from stretto.data.source import Listing, Reader, list_files
from stretto.data.split import split
from stretto.data.tokenizer import BatchTokenizer, load_tokenizer
from stretto.data.tokens import TokenShard, open_shard, write_shard
from stretto.spec.contract import Progress
from stretto.spec.data import DataSpec, SourceSpec
from stretto.spec.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedSource:
    """One source of a split."""

    shard: TokenShard
    """Its tokens."""
    packing: Packing
    """Its rows."""
    weight: float
    """Share of samples drawn from it, relative to the other sources."""
    num_documents: int
    """Documents in the split."""
    num_tokens: int
    """Tokens in the split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The training or the validation part of a corpus."""

    sources: tuple[PackedSource, ...]
    """In the order of the run file."""
    pad: int
    """Token id in padding."""
    isolate: bool
    """Whether documents of a row are kept apart."""

    @property
    def num_samples(self) -> int:
        """Rows in all sources together."""
        return sum(source.packing.num_samples for source in self.sources)

    @property
    def num_documents(self) -> int:
        """Documents in all sources together."""
        return sum(source.num_documents for source in self.sources)

    @property
    def num_tokens(self) -> int:
        """Tokens in all sources together."""
        return sum(source.num_tokens for source in self.sources)

    def rows(self, source: int, samples: np.ndarray) -> Rows:
        """Rows ``samples`` (int64 [B]) of a source."""
        packed = self.sources[source]
        pieces = packed.packing.pieces(samples)
        return fill(packed.shard, pieces, rows=len(samples), pad=self.pad, isolate=self.isolate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """All that a Loader needs; the same on every rank."""

    train: Split
    """What is trained on."""
    validation: Split | None
    """What is held out; None where data.validation_fraction is 0."""
    tokenizer: BatchTokenizer
    """What made the tokens."""
    sequence_length: int
    """T."""
    skipped: int
    """Files that were neither UTF-8 text nor of a known format."""
    fingerprint: str
    """Hash of the tokens and of how they are packed and blended: equal means the same samples in the same order."""

    @property
    def encoding(self) -> str:
        """Fingerprint of the tokenizer."""
        return self.tokenizer.fingerprint

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.train.num_documents:,} documents, {self.train.num_tokens:,} tokens"]
        if self.validation is not None:
            parts.append(
                f"{self.validation.num_documents:,} documents ({self.validation.num_tokens:,} tokens) held out"
            )
        if self.skipped:
            parts.append(f"{self.skipped:,} files skipped (binary or not UTF-8)")
        return "; ".join(parts)


def prepare(
    spec: DataSpec, *, cache: Path, sequence_length: int, vocab_size: int, progress: Progress | None = None
) -> Corpus:
    """Tokenise what ``spec`` names into ``cache``, unless that was done before, and open it.

    Every rank may call it: one works, the others wait.  Raises DataError for a corpus or tokenizer that
    can't be used and ConfigError for a vocabulary larger than the model's ``vocab_size``.
    """
    tokenizer = load_tokenizer(spec.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"The tokenizer {spec.tokenizer} has {tokenizer.vocab_size} ids but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size to at least {tokenizer.vocab_size} or choose another data.tokenizer."
        )
    if sequence_length < 1:
        raise ConfigError(f"training.sequence_length = {sequence_length} must be at least 1.")
    sources = spec.sources or ((SourceSpec(path=spec.path),) if spec.path else ())
    if not sources:
        raise ConfigError("There is no corpus: set data.path to a file, a folder or 'stdlib', or list data.sources.")
    opened = [_open_source(source, spec, tokenizer, cache=cache, progress=progress) for source in sources]
    splits: dict[str, list[PackedSource]] = {}
    for source, (folder, facts) in zip(sources, opened, strict=True):
        for name, packed in _pack(source, spec, (folder, facts), sequence_length).items():
            splits.setdefault(name, []).append(packed)
    made = {
        name: Split(sources=tuple(packed), pad=tokenizer.end_of_text, isolate=spec.isolate_documents)
        for name, packed in splits.items()
    }
    shards = [facts["files"] for _, facts in opened]
    choices = [spec.packing, spec.isolate_documents, spec.validation_fraction, [s.weight for s in sources]]
    return Corpus(
        train=made["train"],
        validation=made.get("validation"),
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        skipped=sum(facts["skipped"] for _, facts in opened),
        fingerprint=_hash([shards, choices, sequence_length, tokenizer.fingerprint]),
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _open_source(
    source: SourceSpec, spec: DataSpec, tokenizer: BatchTokenizer, *, cache: Path, progress: Progress | None
) -> tuple[Path, dict[str, Any]]:
    """The token shard of one source: folder and manifest."""
    listing = list_files(source.path, spec.suffixes, without=cache)
    reading = [spec.format, spec.text_field, spec.messages_field, spec.train_on]
    name = _hash([listing.fingerprint, tokenizer.fingerprint, reading])[:24]
    return kept(cache, name, lambda folder: _write(folder, Reader(listing, spec), tokenizer, progress))


def _write(folder: Path, reader: Reader, tokenizer: BatchTokenizer, progress: Progress | None) -> dict[str, Any]:
    listing: Listing = reader.listing
    facts = write_shard(folder, reader, tokenizer, total_bytes=listing.bytes, progress=progress)
    if facts["tokens"] <= facts["documents"]:  # nothing but ends of documents
        why = (
            f"{reader.skipped} of its {len(listing.files)} files aren't UTF-8 text"
            if reader.skipped
            else "it holds no text"
        )
        raise DataError(f"The corpus {listing.path} is empty: {why}.")
    return {**facts, "skipped": reader.skipped}


def _pack(
    source: SourceSpec, spec: DataSpec, shard_folder: tuple[Path, dict[str, Any]], sequence_length: int
) -> dict[str, PackedSource]:
    """Split and pack one source; the arrays are kept beside its shard."""
    folder, facts = shard_folder
    shard = open_shard(folder, facts)
    length = sequence_length if spec.packing == "whole" else 0  # a stream's arrays serve every length

    def build(target: Path) -> dict[str, Any]:
        summary = {}
        for name, (start, lengths) in split(shard.documents, spec.validation_fraction).items():
            if not len(start):
                raise DataError(
                    f"The corpus {source.path} is too short to hold out anything; set data.validation_fraction to 0."
                )
            arrays = pack_whole(start, lengths, length) if length else pack_stream(start, lengths)
            for key, array in arrays.items():
                np.save(target / f"{name}.{key}.npy", array)
            summary[name] = {"documents": len(start), "tokens": int(lengths.sum())}
        return {"splits": summary}

    name = f"{folder.name}-{_hash([spec.packing, length, spec.validation_fraction])[:12]}"
    index, manifest = kept(folder.parent, name, build)
    packed = {}
    for name, summary in manifest["splits"].items():
        keys = ("start", "length", "rows") if length else ("start", "cumulative")
        arrays = [np.asarray(np.load(index / f"{name}.{key}.npy", mmap_mode="r")) for key in keys]
        packing: Packing = (Whole if length else Stream)(sequence_length, *arrays)
        packed[name] = PackedSource(
            shard=shard,
            packing=packing,
            weight=source.weight,
            num_documents=summary["documents"],
            num_tokens=summary["tokens"],
        )
    return packed
