"""Token shards: a corpus as memory-mapped integers.

    tokens.bin     │ t t t t E │ t t E │ t t t t t E │      uint16 or uint32, E = end_of_text
    documents.npy  0           5       8             14     int64 [documents + 1]
    mask.bin       one bit per token, 1 where it counts in the loss; absent where all of them do

Documents are told apart by their offsets, never by looking for E: in a chat every turn ends with one.
Nothing is loaded: the pages that a rank touches come from the page cache that all ranks of a node share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from stretto.data.chat import Segment
from stretto.data.source import Document
from stretto.data.tokenizer import BatchTokenizer
from stretto.spec.contract import Progress

GROUP_CHARACTERS = 2 << 20
"""Text encoded at a time: enough to keep all cores of a batch encoder busy, little to hold in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShard:
    """An opened shard; arrays are views of the files."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens]."""
    documents: np.ndarray
    """int64 [documents + 1], where each document starts; the last entry is the number of tokens."""
    mask: np.ndarray | None
    """uint8 [ceil(tokens / 8)], bit i % 8 of byte i // 8 says whether token i counts; None: all do."""

    def counts(self, at: np.ndarray) -> np.ndarray:
        """bool, shaped like ``at``: whether the tokens at these places count in the loss."""
        assert self.mask is not None
        return (self.mask[at >> 3] >> (at & 7).astype(np.uint8)) & np.uint8(1) == 1


def open_shard(folder: Path, facts: dict[str, Any]) -> TokenShard:
    """Map the shard in ``folder``; ``facts`` are what ``write_shard`` returned."""
    mask = np.memmap(folder / "mask.bin", dtype=np.uint8, mode="r") if facts["masked"] else None
    return TokenShard(
        tokens=np.asarray(np.memmap(folder / "tokens.bin", dtype=facts["dtype"], mode="r")),
        documents=np.asarray(np.load(folder / "documents.npy", mmap_mode="r")),
        mask=None if mask is None else np.asarray(mask),
    )


class MaskWriter:
    """Packs booleans to bits as they come."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.rest = np.zeros(0, dtype=bool)
        self.all_count = True

    def write(self, counts: np.ndarray) -> None:
        """Append bool [n]."""
        self.all_count = self.all_count and bool(counts.all())
        self.rest = np.concatenate([self.rest, counts])
        whole = len(self.rest) // 8 * 8
        self.file.write(np.packbits(self.rest[:whole], bitorder="little").tobytes())
        self.rest = self.rest[whole:]

    def finish(self) -> None:
        """Write the last, partly filled byte."""
        self.file.write(np.packbits(self.rest, bitorder="little").tobytes())


def grouped(documents: Iterable[Document]) -> Iterator[tuple[list[Segment], list[bool], int]]:
    """Gather segments into groups: the segments, which of them close a document, and bytes read so far."""
    segments: list[Segment] = []
    closing: list[bool] = []
    characters = done = 0
    for document in documents:
        for place, segment in enumerate(document.segments, start=1):
            segments.append(segment)
            closing.append(place == len(document.segments))
            characters += len(segment.text)
            done = min(done + len(segment.text), document.done)
            if characters >= GROUP_CHARACTERS:
                yield segments, closing, done
                segments, closing, characters = [], [], 0
        done = document.done
    if segments:
        yield segments, closing, done


def encoded(segments: list[Segment], tokenizer: BatchTokenizer, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """All tokens of the segments, ends included, as ``dtype`` [n], and how many each has, int64 [segments]."""
    end = np.array([tokenizer.end_of_text], dtype=dtype)
    parts: list[np.ndarray] = []
    lengths = np.empty(len(segments), dtype=np.int64)
    for place, (ids, segment) in enumerate(
        zip(tokenizer.encode_many([segment.text for segment in segments]), segments, strict=True)
    ):
        parts.append(ids.astype(dtype))
        if segment.ends:
            parts.append(end)
        lengths[place] = len(ids) + segment.ends
    return np.concatenate(parts), lengths


def write_shard(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: BatchTokenizer,
    *,
    total_bytes: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise ``documents`` into ``folder``; returns the facts that ``open_shard`` needs."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    offsets = [np.zeros(1, dtype=np.int64)]
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "mask.bin").open("wb") as bits:
        mask = MaskWriter(bits)
        written = 0
        for segments, closing, done in grouped(documents):
            ids, lengths = encoded(segments, tokenizer, dtype)
            tokens.write(ids.tobytes())
            mask.write(np.repeat([segment.counts for segment in segments], lengths))
            offsets.append(written + np.cumsum(lengths)[closing])
            written += len(ids)
            if progress is not None:
                progress(done, total_bytes, "bytes tokenised")
        mask.finish()
        if progress is not None:
            progress(total_bytes, total_bytes, "bytes tokenised")
    if mask.all_count:
        (folder / "mask.bin").unlink()
    starts = np.concatenate(offsets)
    np.save(folder / "documents.npy", starts)
    return {
        "dtype": dtype.str,
        "masked": not mask.all_count,
        "tokens": int(starts[-1]),
        "documents": len(starts) - 1,
    }
