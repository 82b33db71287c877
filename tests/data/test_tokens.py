"""What stands in a token shard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.data import tokens as tokens_module
from stretto.data.chat import Segment
from stretto.data.source import Document
from stretto.data.tokenizer import ByteTokenizer
from stretto.data.tokens import open_shard, write_shard

SEGMENTS = st.lists(st.tuples(st.text("ab", max_size=9), st.booleans(), st.booleans()), min_size=1, max_size=4)


def written(folder: Path, documents: Sequence[Sequence[Segment]], tokenizer: ByteTokenizer | None = None):
    """Write documents to a shard and open it."""
    made = [Document(list(segments), place) for place, segments in enumerate(documents, start=1)]
    facts = write_shard(folder, made, tokenizer or ByteTokenizer(), total_bytes=len(made))
    return open_shard(folder, facts), facts


@given(st.lists(SEGMENTS, min_size=1, max_size=6), st.integers(1, 30))
def test_tokens_offsets_and_mask(tmp_path_factory: pytest.TempPathFactory, documents: list, group: int) -> None:
    documents = [[Segment(*s) for s in d[:-1]] + [Segment(*d[-1][:2], True)] for d in documents]
    expected, counts, starts = [], [], [0]
    for document in documents:
        for segment in document:
            ids = [*segment.text.encode()] + [256] * segment.ends
            expected += ids
            counts += [segment.counts] * len(ids)
        starts.append(len(expected))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "GROUP_CHARACTERS", group)
        shard, facts = written(tmp_path_factory.mktemp("shard"), documents)
    assert shard.tokens.tolist() == expected
    assert shard.documents.tolist() == starts
    assert facts["tokens"] == len(expected) and facts["documents"] == len(documents)
    if all(counts):
        assert shard.mask is None
    else:
        assert shard.counts(np.arange(len(expected))).tolist() == counts


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 70_000
        end_of_text = 69_999

    shard, _ = written(tmp_path, [[Segment("a")]], Wide())
    assert shard.tokens.tolist() == [97, 69_999] and shard.tokens.dtype == np.uint32


def test_progress_rises_to_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "GROUP_CHARACTERS", 10)
    seen: list[tuple[int, int]] = []
    documents = [Document([Segment("x" * 7, ends=False), Segment("y" * 5)], 12 * n) for n in (1, 2, 3)]
    write_shard(
        tmp_path,
        documents,
        ByteTokenizer(),
        total_bytes=40,
        progress=lambda done, total, what: seen.append((done, total)),
    )
    assert len(seen) == 4 and seen == sorted(seen) and seen[-1] == (40, 40)
