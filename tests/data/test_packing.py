"""Every token is predicted once, and no label crosses a document."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.data import packing as packing_module
from stretto.data.packing import Rows, Stream, Whole, best_fit, fill, pack_stream, pack_whole
from stretto.data.tokens import TokenShard
from stretto.spec.contract import IGNORE

PAD = 9_999
LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=25)


def shard_of(lengths: list[int], mask: list[bool] | None = None) -> TokenShard:
    """A shard in which token i is i, so that a token says where it comes from."""
    total = sum(lengths)
    return TokenShard(
        tokens=np.arange(total, dtype=np.uint16),
        documents=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        mask=None if mask is None else np.packbits(mask, bitorder="little"),
    )


def packed(kind: str, start: np.ndarray, length: np.ndarray, sequence_length: int) -> Stream | Whole:
    if kind == "stream":
        return Stream(sequence_length, **pack_stream(start, length))
    return Whole(sequence_length, **pack_whole(start, length, sequence_length))


def all_rows(kind: str, shard: TokenShard, sequence_length: int, *, isolate: bool = True) -> Rows:
    packing = packed(kind, shard.documents[:-1], np.diff(shard.documents), sequence_length)
    pieces = packing.pieces(np.arange(packing.num_samples))
    return fill(shard, pieces, rows=packing.num_samples, pad=PAD, isolate=isolate)


@given(LENGTHS, st.integers(1, 17))
def test_stream_predicts_each_token_once(lengths: list[int], width: int) -> None:
    rows = all_rows("stream", shard_of(lengths), width, isolate=False)
    total = sum(lengths)
    complete = (total - 1) // width
    labels = rows.labels[rows.labels != IGNORE]
    assert labels.tolist() == list(range(1, (complete * width if complete else total - 1) + 1))
    assert rows.tokens[rows.labels != IGNORE].tolist() == (labels - 1).tolist()
    assert (rows.positions == np.arange(width)).all()


@given(LENGTHS, st.integers(1, 17))
def test_whole_predicts_each_token_but_the_first_of_a_document_once(lengths: list[int], width: int) -> None:
    shard = shard_of(lengths)
    rows = all_rows("whole", shard, width)
    labels = rows.labels[rows.labels != IGNORE]
    first = set(shard.documents.tolist())
    assert sorted(labels.tolist()) == [i for i in range(sum(lengths)) if i not in first]
    assert rows.tokens[rows.labels != IGNORE].tolist() == (labels - 1).tolist()


@given(LENGTHS, st.integers(1, 17), st.sampled_from(["stream", "whole"]))
def test_isolated_documents_are_apart(lengths: list[int], width: int, kind: str) -> None:
    shard = shard_of(lengths)
    rows = all_rows(kind, shard, width)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for tokens, labels, positions, documents, mixed in zip(
        rows.tokens, rows.labels, rows.positions, rows.documents, rows.mixed, strict=True
    ):
        real = tokens != PAD
        origin = document_of[tokens[real]]
        valid = labels != IGNORE
        assert (document_of[labels[valid]] == document_of[tokens[valid]]).all()
        assert [a == b for a, b in pairwise(documents[real])] == [a == b for a, b in pairwise(origin)]
        assert mixed == (len(set(origin)) > 1)
        assert not set(documents[~real]) & set(documents[real])
        for number in set(documents):
            assert positions[documents == number].tolist() == list(range((documents == number).sum()))


@given(LENGTHS, st.integers(3, 17))
def test_whole_never_cuts_a_document_that_fits(lengths: list[int], width: int) -> None:
    shard = shard_of(lengths)
    start, length = shard.documents[:-1], np.diff(shard.documents)
    arrays = pack_whole(start, length, width)
    pieces = set(zip(arrays["start"].tolist(), arrays["length"].tolist(), strict=True))
    for at, size in zip(start.tolist(), length.tolist(), strict=True):
        if size <= width + 1:
            assert (at, size) in pieces


@given(st.lists(st.integers(2, 20), min_size=1, max_size=60))
def test_best_fit_fills_rows(lengths: list[int]) -> None:
    row = best_fit(np.array(lengths), 20)
    used = np.bincount(row, weights=lengths)
    assert used.max() <= 20 and len(used) == row.max() + 1 and used.min() > 0
    # At most one row may be half empty, or two of them would have been one.
    assert (used <= 10).sum() <= 1


def test_windows_bound_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "WINDOW", 4)
    shard = shard_of([3] * 10)
    rows = all_rows("whole", shard, 5)
    assert len(rows.tokens) == 5
    windows = [set(row[row != PAD] // 12) for row in rows.tokens]  # twelve tokens are four documents
    assert all(len(window) == 1 for window in windows)
    assert sorted(rows.labels[rows.labels != IGNORE].tolist()) == [i for i in range(30) if i % 3]


def test_packing_is_close_to_full() -> None:
    lengths = np.random.default_rng(0).integers(2, 400, 20_000)
    arrays = pack_whole(np.cumsum(lengths) - lengths, lengths, 511)
    assert lengths.sum() / (512 * (len(arrays["rows"]) - 1)) > 0.97


@pytest.mark.parametrize("kind", ["stream", "whole"])
def test_masked_tokens_are_no_labels(kind: str) -> None:
    lengths = [7, 5, 9]
    mask = [i % 3 != 0 for i in range(21)]
    rows = all_rows(kind, shard_of(lengths, mask), 6)
    assert all(label % 3 for label in rows.labels[rows.labels != IGNORE])
    plain = all_rows(kind, shard_of(lengths), 6)
    assert np.array_equal(rows.labels, np.where(plain.labels % 3 == 0, IGNORE, plain.labels))
    assert (rows.labels != plain.labels).any()


def test_a_split_that_skips_documents_reads_only_its_own() -> None:
    shard = shard_of([4, 5, 6, 7])
    packing = packed("stream", np.array([0, 9]), np.array([4, 6]), 3)
    rows = fill(shard, packing.pieces(np.arange(3)), rows=3, pad=PAD, isolate=True)
    assert rows.tokens.tolist() == [[0, 1, 2], [3, 9, 10], [11, 12, 13]]
    assert rows.labels.tolist() == [[1, 2, 3], [IGNORE, 10, 11], [12, 13, 14]]


def test_a_corpus_shorter_than_a_row_is_padded() -> None:
    rows = all_rows("stream", shard_of([3, 2]), 8)
    assert rows.tokens.tolist() == [[0, 1, 2, 3, 4, PAD, PAD, PAD]]
    assert rows.labels.tolist() == [[1, 2, IGNORE, 4, IGNORE, IGNORE, IGNORE, IGNORE]]
    assert rows.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
